"""Everything that knows what a weight is: alignment, masking, the reduction and its derivatives.

A loss hands over its formula and its inputs; nothing here knows a loss by name. The forward pass
evaluates the formula on the raw inputs and selects the losses that count, which fuses into one
pass. The derivative rule selects the inputs as well, before the formula is differentiated, because
zero times an infinite slope is NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxlosses._mean import WeightedMean, divide
from jaxlosses._typing import AxisName, Reduction, Result

Formula = Callable[..., Array]

# Not ArrayLike, of which tracers are no instances in every JAX.
_ARRAYS = (Array, np.ndarray, np.generic, bool, int, float, complex)


def reduce_losses(
    formula: Formula,
    inputs: Sequence[Array],
    weights: ArrayLike,
    *,
    reduction: Reduction,
    axis_name: AxisName,
    foreign: bool = False,
) -> Result:
    """Weigh and reduce the losses ``formula(*inputs)``.

    Floating-point inputs reach the formula in the precision of the result; integers (class ids)
    as they are. The shape of the losses is a prefix of the shape of each input, which says what
    of an input an absent loss makes absent.

    Args:
        formula: Element losses, each from its own slice of the inputs.
        inputs: Arrays with the losses' shape, followed by the axes that one loss consumes.
        weights: Weights as the caller gave them.
        reduction: How to reduce, see the package's docstring.
        axis_name: Mapped axes over which total and count are summed as well.
        foreign: The formula was written elsewhere: it may close over traced arrays, have an
            infinite slope where its loss is finite, and return losses of any shape.

    Raises:
        ValueError: if the weights do not align, the reduction is none of ours, or the losses of a
            foreign formula do not have a leading part of the inputs' shape.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    dtype = _precision(*inputs, weights)

    def upcast(*arrays: Array) -> Array:
        return formula(*(a.astype(dtype) if _is_float(a) else a for a in arrays)).astype(dtype)

    shape = jax.eval_shape(upcast, *inputs).shape
    for array in inputs:
        if array.shape[: len(shape)] != shape:
            raise ValueError(
                f"the losses must have a leading part of the shape of predictions and labels, "
                f"got losses of shape {shape} for an input of shape {array.shape}"
            )
    weights = align(weights, shape)
    arguments = list(inputs)
    if foreign:
        upcast, closed_over = jax.closure_convert(upcast, *inputs)
        arguments += closed_over
    losses = _weigh(_Losses(upcast, len(inputs), foreign), weights, *arguments)
    if reduction == "none":
        return losses
    total = jnp.sum(losses)
    if reduction == "sum":
        return total if axis_name is None else jax.lax.psum(total, axis_name)
    if reduction == "average":
        copies = math.prod(shape) // max(weights.size, 1)
        count = jnp.sum(weights.astype(dtype)) * copies
    else:
        count = _count(weights, shape).astype(dtype)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return WeightedMean(total, count) if reduction == "parts" else divide(total, count)


def align(weights: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Weights with one axis for each axis of the losses, equal to it or 1, aligned from the left.

    Raises:
        ValueError: naming both shapes, if an axis is neither equal to the losses' axis nor 1.
    """
    weights = as_array("weights", weights)
    given = weights.shape
    kept = given[:-1] if len(given) == len(shape) + 1 and given[-1] == 1 else given
    if len(kept) > len(shape) or any(w not in (1, n) for w, n in zip(kept, shape, strict=False)):
        raise ValueError(
            f"weights must be a scalar or match the leading axes of the losses (each equal or 1); "
            f"got weights of shape {given} for losses of shape {shape}"
        )
    return weights.reshape(kept + (1,) * (len(shape) - len(kept)))


def as_array(name: str, value: Any) -> Array:
    """``value`` as a real array; ``ValueError`` naming the argument if it is none."""
    if not isinstance(value, _ARRAYS):
        raise ValueError(f"{name} must be an array or a number, got {type(value).__name__}")
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or not _is_number(array):
        raise ValueError(f"{name} must be real, got dtype {array.dtype}")
    return array


def as_floats(**arrays: ArrayLike) -> list[Array]:
    """Arrays of one shape, integers and booleans as float32.

    Raises:
        ValueError: naming both arguments, if their shapes differ.
    """
    checked = {name: as_array(name, value) for name, value in arrays.items()}
    (first, head), *rest = checked.items()
    for name, array in rest:
        if array.shape != head.shape:
            raise ValueError(
                f"{first} and {name} must have the same shape, "
                f"got {first} of shape {head.shape} and {name} of shape {array.shape}"
            )
    return [a if _is_float(a) else a.astype(jnp.float32) for a in checked.values()]


@dataclasses.dataclass(frozen=True)
class _Losses:
    """A formula of inputs, each loss from one place of them, and of arrays that it closed over."""

    formula: Formula
    num_inputs: int
    foreign: bool

    def __call__(self, *arguments: Array) -> Array:
        return self.formula(*arguments)

    def is_finite(self, *arguments: Array) -> Array:
        """Which losses are finite, and for a foreign formula have finite slopes."""
        constants = [jax.lax.stop_gradient(a) for a in arguments]
        if not self.foreign:
            return jnp.isfinite(self(*constants))
        floats = [i for i in range(self.num_inputs) if _is_float(constants[i])]
        losses, pullback = jax.vjp(_vary(self, constants, floats), *(constants[i] for i in floats))
        finite = jnp.isfinite(losses)
        for slope in pullback(jnp.ones_like(losses)):
            finite &= jnp.all(jnp.isfinite(slope), axis=tuple(range(losses.ndim, slope.ndim)))
        return finite


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weigh(losses_fn: _Losses, weights: Array, *arguments: Array) -> Array:
    losses = losses_fn(*arguments)
    return jnp.where(weights.astype(bool), losses, 0) * weights.astype(losses.dtype)


def _weigh_jvp(losses_fn: _Losses, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Differentiate at inputs that are safe, so that what is absent reaches no derivative.

    A loss is usable if it counts, or if it is finite: the derivative with respect to a weight of
    zero is the loss there, and schemes that learn weights differentiate it once more with respect
    to the inputs. Plain operations from here on make this hold at every order.
    """
    weights, *arguments = primals
    dweights, *dinputs = tangents
    usable = weights.astype(bool) | losses_fn.is_finite(*arguments)

    def select(position: int, array: Array, otherwise: float) -> Array:
        mask = _expand(usable, arguments[position])
        return jnp.where(mask, array, jnp.asarray(otherwise, array.dtype))

    inputs = range(losses_fn.num_inputs)
    safe = [select(i, a, _stand_in(i, a)) if i in inputs else a for i, a in enumerate(arguments)]
    moved = [i for i, d in enumerate(dinputs) if not isinstance(d, SymbolicZero)]
    moves = [select(i, dinputs[i], 0) if i in inputs else dinputs[i] for i in moved]
    losses, dlosses = jax.jvp(_vary(losses_fn, safe, moved), [safe[i] for i in moved], moves)
    losses, dlosses = (jnp.where(usable, x, 0) for x in (losses, dlosses))
    scale = weights.astype(losses.dtype)
    tangent = dlosses * scale
    if not isinstance(dweights, SymbolicZero):
        tangent += losses * dweights.astype(losses.dtype)
    return losses * scale, tangent


_weigh.defjvp(_weigh_jvp, symbolic_zeros=True)


def _vary(function: Formula, arguments: Sequence[Array], positions: Sequence[int]) -> Formula:
    """``function`` of the arguments at some positions, the others held."""

    def varied(*values: Array) -> Array:
        chosen = dict(zip(positions, values, strict=True))
        return function(*(chosen.get(i, a) for i, a in enumerate(arguments)))

    return varied


def _stand_in(position: int, array: Array) -> float | int:
    """What takes the place of an absent input: class 0, or 1/2, 1/4, ...

    These are probabilities, positive, and differ between the inputs, so that neither a logarithm,
    a square root nor the norm of a difference has an infinite slope there.
    """
    return 0.5 ** (position + 1) if _is_float(array) else 0


def _expand(mask: Array, array: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))


def _count(weights: Array, shape: tuple[int, ...]) -> Array:
    """The number of losses whose weight is not zero, in integers as far as int32 can hold it."""
    copies = math.prod(shape) // max(weights.size, 1)
    exact = math.prod(shape) < 2**31
    return jnp.sum(weights.astype(bool), dtype=jnp.int32 if exact else jnp.float32) * copies


def _precision(*arrays: ArrayLike) -> Any:
    """float64 where an argument asks for it, float32 elsewhere."""
    doubles = (jnp.asarray(a) for a in arrays if isinstance(a, _ARRAYS))
    if any(a.dtype == jnp.float64 and not a.weak_type for a in doubles):
        return jnp.float64
    return jnp.float32


def _is_float(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _is_number(array: Array) -> bool:
    return any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.number, jnp.bool_))


def check_axis(name: str, axis: int, ndim: int) -> int:
    """``axis`` counted from the front; ``ValueError`` if the array has no such axis."""
    if not -ndim <= operator.index(axis) < ndim:
        raise ValueError(f"{name} must be an axis of an array of rank {ndim}, got {axis}")
    return axis % ndim
