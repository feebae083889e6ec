"""What a loss costs besides its arithmetic: tracing, lowering, and the call of a compiled step."""

import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import workloads
from benchmarks.peers import JaxPeer
from benchmarks.timing import interleave

PARTS = ("tracing", "lowering", "both")
GOAL = 1.5  # How many times longer than optax-naive ours may take to trace and to lower.


def trace(
    peers: list[JaxPeer], names: list[str], mode: str, rounds: int
) -> dict[str, dict[str, np.ndarray]]:
    """For each part and peer, the seconds of each round. Nothing is compiled.

    A peer cannot reuse what it traced before: JAX's caches are cleared, and every round has a new
    function and new shapes. One more round goes first and is not counted, because it loads modules.
    """
    seconds = {part: {peer.name: np.zeros(rounds + 1) for peer in peers} for part in PARTS}
    for i in range(rounds + 1):
        for peer in peers if i % 2 else peers[::-1]:
            function, arguments = _model(peer, names, mode, rows=32 + i)
            jax.clear_caches()
            gc.collect()
            gc.disable()
            start = time.perf_counter()
            traced = jax.jit(function).trace(*arguments)
            middle = time.perf_counter()
            traced.lower()
            end = time.perf_counter()
            gc.enable()
            for part, spent in zip(PARTS, (middle - start, end - middle, end - start), strict=True):
                seconds[part][peer.name][i] = spent
    return {part: {peer: s[1:] for peer, s in found.items()} for part, found in seconds.items()}


def _model(peer: JaxPeer, names: list[str], mode: str, rows: int) -> tuple[Callable, Any]:
    """The sum of weighted losses, each of another shape, and the shapes of its arguments.

    The only parameters are one scale for each loss, which multiplies the first input.
    """

    def total(scales: list[jax.Array], batch: list[list[jax.Array]]) -> Any:
        cases = zip(names, scales, batch, strict=True)
        return sum(peer.losses[name](scale * x, *rest) for name, scale, (x, *rest) in cases)

    batch = []
    for i, name in enumerate(names):
        arrays = workloads.make(name, (1, 128 * (i + 1)))
        batch.append([jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype) for a in arrays])
    scales = [jax.ShapeDtypeStruct((), jnp.float32)] * len(names)
    return total if mode == "forward" else jax.value_and_grad(total), (scales, batch)


def dispatch(
    peers: list[JaxPeer], num_arrays: int, rounds: int, turn: float
) -> dict[str, np.ndarray]:
    """For each peer, the seconds of one call in each round."""
    calls = {peer.name: _step(peer, num_arrays) for peer in peers}
    return interleave(calls, rounds, turn)


def _step(peer: JaxPeer, num_arrays: int) -> Callable[[], Any]:
    """A training step with small logits, and with more arrays that go in and come out."""
    loss = peer.losses[workloads.SPARSE]

    @jax.jit
    def step(state: list[jax.Array], logits: jax.Array, *rest: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(logits, *rest)
        return value, logits - 0.1 * gradient, [array + 1 for array in state]

    state = [jnp.zeros(4) for _ in range(num_arrays)]
    inputs = peer.arrays(workloads.make(workloads.SPARSE, (32, 10)))
    return lambda: jax.block_until_ready(step(state, *inputs))
