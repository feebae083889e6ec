"""The peers: other libraries that each loss is measured beside, and our own.

A peer's library is imported when the peer is created. ``arrays`` turns NumPy inputs into the
library's arrays; ``function`` gives, for a loss and a pass, a function of these arrays that returns
when its result is ready, or None where the peer does not have the loss. ``notes`` say, for each
loss, how the peer's differs from ours.
"""

import functools
import os
from collections.abc import Callable
from subprocess import SubprocessError
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlosses as jl
from benchmarks import workloads as wl
from benchmarks.loops import CLoop, NumPyLoop


class JaxPeer:
    """Losses ``(*inputs, weights) -> scalar``, jitted."""

    def __init__(self, name: str, losses: dict[str, Callable], **notes: str):
        self.name, self.losses, self.notes = name, losses, notes

    def arrays(self, inputs: list[np.ndarray]) -> list[Any]:
        return [jax.device_put(a) for a in inputs]

    def jitted(self, name: str, mode: str) -> Any:
        loss = self.losses[name]
        return jax.jit(loss if mode == "forward" else jax.value_and_grad(loss))

    def function(self, name: str, mode: str) -> Callable | None:
        jitted = self.jitted(name, mode) if name in self.losses else None
        return jitted and (lambda *arrays: jax.block_until_ready(jitted(*arrays)))


def jaxlosses(name: str) -> JaxPeer:
    pairwise = functools.partial(jl.mean_pairwise_squared_error, reduction="mean")
    losses = {name: getattr(jl, name) for name in wl.LOSSES} | {wl.PAIRWISE: pairwise}
    return JaxPeer(name, losses)


def optax_naive(name: str) -> JaxPeer:
    """The plain way with optax: the losses, times the weights, divided by ``count_nonzero``."""
    import optax

    losses = {
        wl.SQUARED: optax.squared_error,
        "hinge_loss": lambda x, y: optax.hinge_loss(x, 2 * y - 1),
        "sigmoid_cross_entropy": optax.sigmoid_binary_cross_entropy,
        wl.SOFTMAX: optax.softmax_cross_entropy,
        wl.SPARSE: optax.softmax_cross_entropy_with_integer_labels,
    }
    own = {name: loss for name, loss in wl.formulas(jnp).items() if name not in losses}
    notes = dict.fromkeys(own, "formula in jax.numpy") | {
        wl.COSINE: "formula in jax.numpy, as optax's own normalises"
    }
    return JaxPeer(name, _weigh(own | losses), **notes)


def keras(name: str) -> JaxPeer:
    """Keras's losses, weighed and summed by Keras, divided by our count."""
    os.environ["KERAS_BACKEND"] = "jax"
    from keras import losses as kl

    def mean(kind, index=(..., None), **options):
        # Keras averages over the last axis before it weighs, so an axis of one is added.
        loss = getattr(kl, kind)(reduction="sum", **options)
        return lambda p, y, w: loss(y[index], p[index], w) / jnp.count_nonzero(w)

    cosine = kl.CosineSimilarity(reduction=None)
    losses = {
        "absolute_difference": mean("MeanAbsoluteError"),
        wl.SQUARED: mean("MeanSquaredError"),
        "hinge_loss": mean("Hinge"),
        "sigmoid_cross_entropy": mean("BinaryCrossentropy", from_logits=True),
        "log_loss": mean("BinaryCrossentropy"),
        wl.SOFTMAX: mean("CategoricalCrossentropy", ..., from_logits=True),
        wl.SPARSE: mean("SparseCategoricalCrossentropy", ..., from_logits=True),
    } | _weigh({wl.COSINE: lambda p, y: 1 + cosine(y, p)})
    notes = {"hinge_loss": "checks whether labels are 0 and 1", "log_loss": "clips at 1e-7"}
    return JaxPeer(name, losses, cosine_distance="normalises first", **notes)


def _weigh(losses: dict[str, Callable]) -> dict[str, Callable]:
    def weighted(loss, *arguments):
        *inputs, weights = arguments
        return jnp.sum(loss(*inputs) * weights) / jnp.count_nonzero(weights)

    return {name: functools.partial(weighted, loss) for name, loss in losses.items()}


class TensorFlowPeer:
    """``tf.compat.v1.losses``, formerly ``tf.contrib.losses``, in a graph or compiled by XLA."""

    def __init__(self, name: str):
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        self.name, self.tf = name, tf
        self.notes = {wl.PAIRWISE: "divides by n - 1 instead of n; subtracts two squares"}

    def arrays(self, inputs: list[np.ndarray]) -> list[Any]:
        return [self.tf.constant(a) for a in inputs]

    def function(self, name: str, mode: str) -> Callable:
        tf = self.tf
        options = {"loss_collection": None} | ({"axis": -1} if name == wl.COSINE else {})
        loss = functools.partial(getattr(tf.compat.v1.losses, name), **options)

        def forward(*arguments):
            *inputs, weights = arguments
            count = tf.math.count_nonzero(weights, dtype="float32") if name == wl.PAIRWISE else 1
            weights = weights[:, None] if name in (wl.PAIRWISE, wl.COSINE) else weights
            return loss(*inputs[::-1], weights=weights) / count

        def value_and_grad(*arguments):
            with tf.GradientTape() as tape:
                tape.watch(arguments[0])
                value = forward(*arguments)
            return value, tape.gradient(value, arguments[0])

        chosen = forward if mode == "forward" else value_and_grad
        return tf.function(chosen, jit_compile=self.name == wl.XLA, autograph=False)


class TorchPeer:
    """Losses of ``torch.nn.functional``, times the weights, divided by ``count_nonzero``."""

    def __init__(self, name: str):
        import torch
        from torch.nn import functional as f

        losses = {
            "absolute_difference": f.l1_loss,
            wl.SQUARED: f.mse_loss,
            "sigmoid_cross_entropy": f.binary_cross_entropy_with_logits,
            wl.SOFTMAX: f.cross_entropy,
            wl.SPARSE: lambda x, y, reduction: f.cross_entropy(x, y.long(), reduction=reduction),
        }
        losses = {name: functools.partial(f, reduction="none") for name, f in losses.items()}
        own = {name: loss for name, loss in wl.formulas(torch).items() if name not in losses}
        self.name, self.torch, self.losses = name, torch, own | losses
        self.notes = dict.fromkeys(own, "formula in torch")

    def arrays(self, inputs: list[np.ndarray]) -> list[Any]:
        first, *rest = map(self.torch.from_numpy, inputs)
        return [first.requires_grad_(), *rest]

    def function(self, name: str, mode: str) -> Callable:
        torch, loss = self.torch, self.losses[name]

        def forward(*arguments):
            *inputs, weights = arguments
            return (loss(*inputs) * weights).sum() / torch.count_nonzero(weights)

        if self.name == wl.COMPILE:
            torch.compiler.reset()  # Or it stops compiling after eight times.
            forward = torch.compile(forward, dynamic=False)

        def value_and_grad(*arguments):
            value = forward(*arguments)
            return value.detach(), torch.autograd.grad(value, arguments[0])[0]

        return torch.no_grad()(forward) if mode == "forward" else value_and_grad


def load() -> tuple[list[Any], list[str]]:
    """The peers that are installed, ours first, and a line for each that is left out."""
    makers = {wl.OURS: jaxlosses, wl.NAIVE: optax_naive, wl.KERAS: keras}
    makers |= dict.fromkeys((wl.GRAPH, wl.XLA), TensorFlowPeer)
    makers |= dict.fromkeys((wl.EAGER, wl.COMPILE), TorchPeer)
    peers, left_out = [], []
    for name, maker in (makers | {wl.C: CLoop}).items():
        try:
            peers.append(maker(name))
        except (ImportError, OSError, SubprocessError) as error:
            left_out.append(f"{name} is left out: {str(error).splitlines()[0]}")
    return peers if peers[-1].name == wl.C else [*peers, NumPyLoop("NumPy")], left_out
