"""Each loss as one writes it in plain JAX, with optax where optax has it.

These programs are what the package's programs are compared with. A loss that has no entry here is
skipped.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import pytest
from arguments import Case
from jax import Array
from programs import is_sum


def _log_loss(p: Array, y: Array) -> Array:
    return -y * jnp.log(p + 1e-7) - (1 - y) * jnp.log(1 - p + 1e-7)


LOSSES: dict[str, Callable[..., Array]] = {
    "compute_weighted_loss": lambda losses: losses,
    "absolute_difference": lambda p, y: jnp.abs(p - y),
    "mean_squared_error": optax.squared_error,
    "mean_pairwise_squared_error": lambda p, y: 2 * jnp.var(p - y, axis=-1),
    "cosine_distance": lambda p, y: 1 - jnp.sum(p * y, axis=-1),
    "log_loss": _log_loss,
    "hinge_loss": lambda x, y: optax.hinge_loss(x, 2 * y - 1),
    "sigmoid_cross_entropy": optax.sigmoid_binary_cross_entropy,
    "softmax_cross_entropy": optax.softmax_cross_entropy,
    "sparse_softmax_cross_entropy": optax.softmax_cross_entropy_with_integer_labels,
}


def plain(name: str, case: Case) -> Callable[..., Array]:
    """The loss of inputs and, where they are given, weights, reduced as ours is by default."""
    if name not in LOSSES:
        pytest.skip(f"tests/plain.py does not say how one writes {name} in plain JAX")
    num_inputs = len(case.inputs)

    def loss(*arguments: Array) -> Array:
        inputs, weights = arguments[:num_inputs], arguments[num_inputs:]
        losses = LOSSES[name](*map(_upcast, inputs))
        if not weights:
            return jnp.sum(losses) if is_sum(case) else jnp.mean(losses)
        (w,) = weights
        w = w.reshape(w.shape + (1,) * (losses.ndim - w.ndim))
        total = jnp.sum(losses * w)
        if is_sum(case):
            return total
        # count_nonzero counts in integers, which need an all-reduce of their own.
        return total / (jnp.sum(w != 0, dtype=w.dtype) * (losses.size // w.size))

    return loss


def through_logits(hidden: Array, kernel: Array, labels: Array) -> Array:
    """The loss of a last layer, multiplied in the dtype of hidden as Flax does."""
    kernel = kernel.astype(hidden.dtype)
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def _upcast(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def differentiated(loss: Callable[..., Array], positions: tuple[int, ...]) -> Callable:
    """The loss with its gradients in these inputs, or where there are none, the loss itself."""
    return jax.value_and_grad(loss, positions) if positions else loss
