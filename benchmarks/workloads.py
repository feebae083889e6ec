"""The losses that are measured: their formulas, their inputs, and the goals."""

from collections.abc import Callable
from typing import Any

import numpy as np

PASSES = ("forward", "value_and_grad")
OURS, NAIVE, KERAS, C = "jaxlosses", "optax-naive", "Keras on JAX", "C loop"
EAGER, COMPILE, GRAPH, XLA = "torch eager", "torch.compile", "TensorFlow graph", "TensorFlow XLA"
SQUARED, PAIRWISE, COSINE = "mean_squared_error", "mean_pairwise_squared_error", "cosine_distance"
SOFTMAX, SPARSE = "softmax_cross_entropy", "sparse_softmax_cross_entropy"
BINARY = ("hinge_loss", "sigmoid_cross_entropy", "log_loss")
ROW_WEIGHTS = (PAIRWISE, COSINE, SOFTMAX, SPARSE)


def formulas(xp: Any) -> dict[str, Callable]:
    """Losses that are written alike in NumPy, JAX and torch."""
    return {
        "compute_weighted_loss": lambda losses: losses,
        "absolute_difference": lambda p, y: xp.abs(p - y),
        SQUARED: lambda p, y: (p - y) ** 2,
        "hinge_loss": lambda x, y: xp.clip(1 - (2 * y - 1) * x, 0, None),
        "log_loss": lambda p, y: -y * xp.log(p + 1e-7) - (1 - y) * xp.log(1 - p + 1e-7),
        PAIRWISE: lambda p, y: 2 * xp.mean((p - y - xp.mean(p - y, -1)[:, None]) ** 2, -1),
        COSINE: lambda p, y: 1 - xp.sum(p * y, -1),
    }


LOSSES = formulas(np) | {
    "sigmoid_cross_entropy": lambda x, y: np.logaddexp(0, x) - x * y,
    SOFTMAX: lambda x, y: np.logaddexp.reduce(x, -1) * y.sum(-1) - (x * y).sum(-1),
    SPARSE: lambda x, y: np.logaddexp.reduce(x, -1) - np.take_along_axis(x, y[:, None], -1)[:, 0],
}

# A peer should take at least so many times longer than ours, in each pass.
_FAST = ({NAIVE: 4, COMPILE: 1}, {NAIVE: 1.5, XLA: 1})
_LEVEL = ({NAIVE: 1, C: 1 / 1.3}, {NAIVE: 1})
GOALS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    **dict.fromkeys(("absolute_difference", SQUARED, "hinge_loss"), _FAST),
    "sigmoid_cross_entropy": ({NAIVE: 4.5, COMPILE: 1}, {NAIVE: 2.5}),
    "log_loss": ({NAIVE: 2.5, COMPILE: 1}, {NAIVE: 2}),
    PAIRWISE: ({NAIVE: 5}, {NAIVE: 1.2}),
    **dict.fromkeys((COSINE, SOFTMAX, SPARSE), _LEVEL),
}


def goals(name: str, mode: str, ratios: dict[str, float]) -> dict[str, str]:
    """For each peer the goal and whether it is met; a goal of 1 is met from 0.95 on."""
    found = {}
    for peer, least in GOALS.get(name, ({}, {}))[PASSES.index(mode)].items():
        met = ratios.get(peer, np.nan) >= least * (0.95 if least == 1 else 1)
        found[peer] = f"≥ {least:.2g} {'✓' if met else '✗' if peer in ratios else 'not measured'}"
    return found


def shape_of(name: str, scale: int = 1) -> tuple[int, int]:
    return 4096 // scale, (8192 if name in (SOFTMAX, SPARSE) else 4096) // scale


def make(name: str, shape: tuple[int, int]) -> list[np.ndarray]:
    """Inputs and weights; a tenth of the weights is zero."""
    rng = np.random.default_rng(0)
    first, labels = (rng.standard_normal(shape, np.float32) for _ in range(2))
    if name == "log_loss":
        first = rng.random(shape, np.float32)
    if name in BINARY:
        labels = (labels < 0).astype(np.float32)
    elif name == COSINE:
        first, labels = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (first, labels))
    elif name == SOFTMAX:
        labels = np.abs(labels) / np.abs(labels).sum(-1, keepdims=True)
    elif name == SPARSE:
        labels = rng.integers(0, shape[1], shape[0], np.int32)
    weights = rng.random(shape[:1] if name in ROW_WEIGHTS else shape, np.float32)
    inputs = [first] if name == "compute_weighted_loss" else [first, labels]
    return [*inputs, np.where(weights < 0.1, np.float32(0), weights)]


def weighted_mean(name: str, *inputs: np.ndarray, dtype: type = np.float64) -> float:
    """sum(w * l) / count(w != 0), 256 rows at a time."""
    total = count = 0.0
    for start in range(0, len(inputs[0]), 256):
        some = [a[start : start + 256] for a in inputs]
        *wide, weights = [a if a.dtype == np.int32 else a.astype(dtype) for a in some]
        total += float(np.sum(LOSSES[name](*wide) * weights))
        count += np.count_nonzero(weights)
    return total / count
