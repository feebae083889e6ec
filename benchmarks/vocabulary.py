"""The last layer of a language model: time and temporaries as its vocabulary grows.

A peer is a loss ``(hidden, kernel, labels) -> scalar`` in JAX, or torch's. ``value_and_grad`` is
with respect to hidden and kernel.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlosses as jl
from benchmarks.workloads import OURS

LOGITS, OPTAX, TORCH = (f"{name} through logits" for name in (OURS, "optax", "torch"))
TOKAMAX = "tokamax"
LIMIT = 7e9  # Bytes of temporaries.


def load() -> tuple[dict[str, Callable[..., Any]], list[str]]:
    """The peers that are installed, ours first, and a line for each that is left out."""
    makers = {OURS: _ours, LOGITS: _logits, OPTAX: _optax, TOKAMAX: _tokamax, TORCH: _torch}
    peers, left_out = {}, []
    for name, maker in makers.items():
        try:
            peer = maker()
        except ImportError as error:
            left_out.append(f"{name} is left out: {str(error).splitlines()[0]}")
        else:
            peers[name] = peer if name == TORCH else functools.partial(_jitted, peer)
    return peers, left_out


def make(tokens: int, features: int, classes: int) -> list[np.ndarray]:
    """Hidden, kernel and labels, with logits of variance one."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, features), np.float32)
    kernel = rng.standard_normal((features, classes), np.float32) / np.float32(features**0.5)
    return [hidden, kernel, rng.integers(0, classes, tokens, np.int32)]


def _jitted(loss: Callable, mode: str, inputs: list[np.ndarray]) -> tuple[Callable, float]:
    """A function to time, and the bytes of its temporaries."""
    function = loss if mode == "forward" else jax.value_and_grad(loss, (0, 1))
    compiled = jax.jit(function).lower(*inputs).compile()
    arrays = [jax.device_put(a) for a in inputs]
    size = compiled.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(compiled(*arrays)), size


def _ours() -> Callable:
    return jl.linear_softmax_cross_entropy


def _logits() -> Callable:
    return lambda h, k, y: jl.sparse_softmax_cross_entropy(h @ k, y)


def _optax() -> Callable:
    import optax

    loss = optax.softmax_cross_entropy_with_integer_labels
    return lambda h, k, y: jnp.mean(loss(h @ k, y))


def _tokamax() -> Callable:
    import tokamax
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # Or tokamax reads our command line.
    loss = functools.partial(tokamax.linear_softmax_cross_entropy_loss, reduction="mean")
    return lambda h, k, y: loss(h, y, k)


def _torch() -> Callable:
    import torch
    from torch.nn import functional as f

    def peer(mode: str, inputs: list[np.ndarray]) -> tuple[Callable, float]:
        hidden, kernel, labels = map(torch.from_numpy, inputs)
        hidden, kernel, labels = hidden.requires_grad_(), kernel.requires_grad_(), labels.long()

        def forward() -> Any:
            return f.cross_entropy(hidden @ kernel, labels)

        def value_and_grad() -> Any:
            value = forward()
            return value.detach(), torch.autograd.grad(value, (hidden, kernel))

        # An estimate: the logits, their log-softmax, and the gradient of the logits.
        copies = 2 if mode == "forward" else 3
        size = 4 * copies * hidden.shape[0] * kernel.shape[1]
        return torch.no_grad()(forward) if mode == "forward" else value_and_grad, size

    return peer
