"""What a weight means: how weights align with losses, and how weighted losses are reduced.

A loss hands over its formula and its inputs; nothing here knows a loss by name. The formula is
evaluated on the inputs as they are. The losses that count are selected, weighed and summed in one
pass over memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxlosses._masking import LossFunction, masked_losses, where
from jaxlosses._mean import WeightedMean, divide, psum
from jaxlosses._reduce import num_copies, sum_and_count, sum_of
from jaxlosses._typing import AxisName, Reduction, Result, as_array, in_precision


def reduce_losses(
    formula: LossFunction,
    inputs: Sequence[Array],
    weights: ArrayLike,
    *,
    num_inner_axes: int = 0,
    reduction: Reduction,
    axis_name: AxisName,
) -> Result:
    """Weigh and reduce the losses ``formula(*inputs)``.

    Args:
        formula: The losses, each from its own position of the inputs.
        inputs: Arrays that begin with the losses' axes. Floating-point inputs reach the formula in
            the precision of the result, integers (class ids) as they are.
        weights: Weights as the caller gave them.
        num_inner_axes: How many axes of the first input one loss consumes.
        reduction: How to reduce, see the package's docstring.
        axis_name: Mapped axes over which total and count are summed as well.

    Raises:
        ValueError: if the weights do not align, or the reduction is not a known one.
    """
    weights = as_array("weights", weights)
    inputs = in_precision(inputs, weights)
    first = inputs[0].shape
    weights = align(weights, first[: len(first) - num_inner_axes])
    losses, raw = masked_losses(formula, weights, *inputs)
    return reduce_weighted(losses, raw, weights, reduction=reduction, axis_name=axis_name)


def align(weights: Array, shape: tuple[int, ...]) -> Array:
    """Weights with one axis for each axis of the losses, equal to it or 1, aligned from the left.

    Raises:
        ValueError: naming both shapes, if an axis is neither equal to the losses' axis nor 1.
    """
    given = weights.shape
    kept = given[:-1] if len(given) == len(shape) + 1 and given[-1] == 1 else given
    if len(kept) > len(shape) or any(w not in (1, n) for w, n in zip(kept, shape, strict=False)):
        raise ValueError(
            f"weights must be a scalar or match the leading axes of the losses (each equal or 1); "
            f"got weights of shape {given} for losses of shape {shape}"
        )
    return weights.reshape(kept + (1,) * (len(shape) - len(kept)))


def reduce_weighted(
    losses: Array, raw: Array, weights: Array, *, reduction: Reduction, axis_name: AxisName
) -> Result:
    """Reduce losses that are already multiplied by aligned weights, and 0 where a weight is 0.

    The ``raw`` losses are those before they were multiplied.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    if reduction == "none":
        return losses
    if reduction == "sum":
        total = sum_of(losses)
        return total if axis_name is None else psum(total, axis_name)
    if reduction in ("average", "average_parts"):
        total, count = sum_of(losses), _sum_of_weights(weights, lax.stop_gradient(raw))
    else:
        total, count = sum_and_count(losses, weights.astype(bool))
    if axis_name is not None:
        total, count = psum((total, count), axis_name)
    is_divided = reduction in ("mean", "average")
    return divide(total, count) if is_divided else WeightedMean(total, count)


@jax.custom_jvp
def _sum_of_weights(weights: Array, losses: Array) -> Array:
    """The sum of the weights after they are broadcast to the shape of the losses.

    The derivative with respect to a weight of zero is 0 where the loss is not finite, as it is for
    the sum of the weighted losses.
    """
    copies = num_copies(weights.shape, losses.shape, losses.dtype)
    return sum_of(weights.astype(losses.dtype)) * copies


def _sum_of_weights_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    weights, losses = primals
    total, tangent = _sum_of_weights(weights, losses), tangents[0]
    if isinstance(tangent, SymbolicZero):
        return total, jnp.zeros_like(total)
    zeros = jnp.zeros_like(losses)
    learned = where(weights.astype(bool) | jnp.isfinite(losses), zeros + 1, zeros)
    return total, jnp.sum(learned * tangent.astype(losses.dtype))


_sum_of_weights.defjvp(_sum_of_weights_jvp, symbolic_zeros=True)
