"""Everything that knows what a weight is: alignment, masking, reductions and their derivatives.

A loss hands over its formula and its inputs; nothing here knows a loss by name. The formula is
evaluated on the raw inputs, and the losses that count are selected, weighed and summed in one pass
over memory. Its derivative is a product with slopes that are selected and weighed in the same way,
because zero times an infinite slope is NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxlosses._mean import WeightedMean, divide, psum
from jaxlosses._reduce import sum_and_count, sum_of
from jaxlosses._typing import AxisName, Reduction, Result, as_array, is_float, precision

Formula = Callable[..., Array]


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
        formula: Element losses, each from its own place of the inputs.
        inputs: Arrays with the losses' shape, followed by the axes that one loss consumes.
        weights: Weights as the caller gave them.
        reduction: How to reduce, see the package's docstring.
        axis_name: Mapped axes over which total and count are summed as well.
        foreign: The formula was written elsewhere: it may close over traced arrays.

    Raises:
        ValueError: if the weights do not align, the reduction is none of ours, or the losses of a
            foreign formula do not have a leading part of the inputs' shape.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    weights = as_array("weights", weights)
    dtype = precision(*inputs, weights)
    losses_fn = _Losses(formula, len(inputs), dtype)
    result = jax.eval_shape(formula, *losses_fn.widen(inputs))
    if not hasattr(result, "dtype") or jnp.issubdtype(result.dtype, jnp.complexfloating):
        raise ValueError(f"the loss function must return one real array, got {result}")
    shape = result.shape
    for array in inputs:
        if array.shape[: len(shape)] != shape:
            raise ValueError(
                f"the losses must have a leading part of the shape of predictions and labels, "
                f"got losses of shape {shape} for an input of shape {array.shape}"
            )
    weights = align(weights, shape)
    arguments = list(inputs)
    if foreign:
        converted, closed_over = jax.closure_convert(losses_fn, *losses_fn.widen(inputs))
        losses_fn = dataclasses.replace(losses_fn, formula=converted)
        arguments += closed_over
    losses = _weigh(losses_fn, weights, *arguments)
    if reduction == "none":
        return losses
    if reduction == "sum":
        total = sum_of(losses)
        return total if axis_name is None else psum(total, axis_name)
    if reduction == "average":
        copies = math.prod(shape) // max(weights.size, 1)
        total, count = sum_of(losses), sum_of(weights.astype(dtype)) * copies
    else:
        total, count = sum_and_count(losses, weights.astype(bool))
    if axis_name is not None:
        total, count = psum((total, count), axis_name)
    return WeightedMean(total, count) if reduction == "parts" else divide(total, count)


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


@dataclasses.dataclass(frozen=True)
class _Losses:
    """A formula of inputs, each loss from one place of them, and of arrays that it closed over."""

    formula: Formula
    num_inputs: int
    dtype: Any

    def __call__(self, *arguments: Array) -> Array:
        return self.formula(*self.widen(arguments)).astype(self.dtype)

    def widen(self, arguments: Sequence[Array]) -> list[Array]:
        inputs, closed_over = arguments[: self.num_inputs], arguments[self.num_inputs :]
        return [*(a.astype(self.dtype) if is_float(a) else a for a in inputs), *closed_over]

    def slopes(self, positions: Sequence[int], *arguments: Array) -> list[Array]:
        """The derivative of each loss with respect to its own places of some inputs."""
        wide = self.widen(arguments)
        losses, pullback = jax.vjp(_vary(self, wide, positions), *_pick(wide, positions))
        return list(pullback(jnp.ones_like(losses)))

    def is_finite(self, *arguments: Array) -> Array:
        """Which losses are finite and have finite slopes."""
        constants = [jax.lax.stop_gradient(a) for a in arguments]
        finite = jnp.isfinite(self(*constants))
        for slope in self.slopes(_floats(constants[: self.num_inputs]), *constants):
            finite &= jnp.all(jnp.isfinite(slope), tuple(range(finite.ndim, slope.ndim)))
        return finite

    def safe_jvp(
        self, values_fn: Callable[..., Any], weights: Array, arguments: Any, tangents: Any
    ) -> tuple[list[Array], list[Array]]:
        """Values of the places of losses and their tangents, in operations that JAX knows.

        These hold at every order. Zero times an infinite slope is NaN, so the inputs are replaced
        where a loss neither counts nor is finite, before anything is differentiated.
        """
        usable = weights.astype(bool) | self.is_finite(*arguments)
        arguments, tangents = list(arguments), list(tangents)
        for i in range(self.num_inputs):
            arguments[i] = _where(usable, arguments[i], _stand_in(i, arguments[i]))
            if not isinstance(tangents[i], SymbolicZero):
                tangents[i] = _where(usable, tangents[i], 0)
        moved = _moved(tangents)
        varied = _vary(values_fn, arguments, moved)
        values, dvalues = jax.jvp(varied, _pick(arguments, moved), _pick(tangents, moved))
        return [_where(usable, v, 0) for v in values], [_where(usable, d, 0) for d in dvalues]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weigh(losses_fn: _Losses, weights: Array, *arguments: Array) -> Array:
    return _where(weights.astype(bool), losses_fn(*arguments), 0) * weights.astype(losses_fn.dtype)


def _weigh_jvp(losses_fn: _Losses, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The derivative with respect to inputs is a product with slopes that are themselves weighed.

    So what is absent reaches no derivative, and the inputs need no selection. Whether a loss of
    weight zero is finite matters to the derivative with respect to its weight alone, and nobody
    else pays for knowing it.
    """
    weights, *arguments = primals
    dweights, *moves = tangents
    losses = _weigh(losses_fn, *primals)
    moved = _moved(moves)
    if any(i >= losses_fn.num_inputs for i in moved):
        _, (tangent,) = losses_fn.safe_jvp(lambda *a: [losses_fn(*a)], weights, arguments, moves)
        tangent = tangent * weights.astype(tangent.dtype)
    else:
        tangent = jnp.zeros_like(losses)
        slopes = _weigh_slopes(losses_fn, tuple(moved), *primals) if moved else ()
        for slope, i in zip(slopes, moved, strict=True):
            # What is absent and not finite most likely has a tangent that is not finite either.
            usable = _expand(weights.astype(bool), slope) | jnp.isfinite(arguments[i])
            move = jnp.where(usable, moves[i], 0).astype(slope.dtype)
            tangent += jnp.sum(slope * move, tuple(range(losses.ndim, slope.ndim)))
    if not isinstance(dweights, SymbolicZero):
        tangent += _unweighed(losses_fn, *primals) * dweights.astype(tangent.dtype)
    return losses, tangent


_weigh.defjvp(_weigh_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _unweighed(losses_fn: _Losses, weights: Array, *arguments: Array) -> Array:
    """The derivative with respect to the weights: the losses, as far as they are usable."""
    losses = losses_fn(*arguments)
    return jnp.where(weights.astype(bool) | jnp.isfinite(losses), losses, 0)


def _unweighed_jvp(losses_fn: _Losses, primals: Any, tangents: Any) -> tuple[Array, Array]:
    weights, *arguments = primals
    _, (tangent,) = losses_fn.safe_jvp(lambda *a: [losses_fn(*a)], weights, arguments, tangents[1:])
    return _unweighed(losses_fn, *primals), tangent


_unweighed.defjvp(_unweighed_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _weigh_slopes(
    losses_fn: _Losses, positions: tuple[int, ...], weights: Array, *arguments: Array
) -> list[Array]:
    slopes = losses_fn.slopes(positions, *arguments)
    keep, scale = weights.astype(bool), weights.astype(losses_fn.dtype)
    return [_where(keep, slope, 0) * _expand(scale, slope) for slope in slopes]


def _weigh_slopes_jvp(
    losses_fn: _Losses, positions: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[list[Array], list[Array]]:
    weights, *arguments = primals
    dweights, *moves = tangents
    slopes_fn = functools.partial(losses_fn.slopes, positions)
    slopes, dslopes = losses_fn.safe_jvp(slopes_fn, weights, arguments, moves)
    scale = weights.astype(losses_fn.dtype)
    dweighed = [_expand(scale, d) * d for d in dslopes]
    if not isinstance(dweights, SymbolicZero):
        dscale = dweights.astype(losses_fn.dtype)
        dweighed = [d + _expand(dscale, s) * s for d, s in zip(dweighed, slopes, strict=True)]
    return [_expand(scale, s) * s for s in slopes], dweighed


_weigh_slopes.defjvp(_weigh_slopes_jvp, symbolic_zeros=True)


def _moved(tangents: Sequence[Any]) -> list[int]:
    return [i for i, d in enumerate(tangents) if not isinstance(d, SymbolicZero)]


def _floats(arrays: Sequence[Array]) -> list[int]:
    return [i for i, array in enumerate(arrays) if is_float(array)]


def _pick(values: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    return [values[i] for i in positions]


def _vary(
    function: Callable[..., Any], arguments: Sequence[Array], positions: Sequence[int]
) -> Callable[..., Any]:
    """``function`` of the arguments at some positions, the others held."""

    def varied(*values: Array) -> Any:
        chosen = dict(zip(positions, values, strict=True))
        return function(*(chosen.get(i, a) for i, a in enumerate(arguments)))

    return varied


def _stand_in(position: int, array: Array) -> float | int:
    """What takes the place of an absent input: class 0, or 1/2, 1/4, ...

    These are probabilities, positive, and differ between the inputs, so that neither a logarithm,
    a square root nor the norm of a difference has an infinite slope there.
    """
    return 0.5 ** (position + 1) if is_float(array) else 0


def _where(mask: Array, array: Array, otherwise: float) -> Array:
    return jnp.where(_expand(mask, array), array, jnp.asarray(otherwise, array.dtype))


def _expand(array: Array, like: Array) -> Array:
    """``array`` with the axes that ``like`` has behind its own."""
    return array.reshape(array.shape + (1,) * (like.ndim - array.ndim))
