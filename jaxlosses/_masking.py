"""Losses at positions that may be absent, and their derivatives.

A position is absent if its weight is zero. Its inputs may hold NaN, infinity or an impossible
label, and these must reach neither the value nor a derivative. To multiply by the weight is not
enough, because zero times infinity is NaN. There are two ways to do it.

:func:`masked_losses` is for the losses of this package. Each loss depends only on its own position
of the inputs, so a NaN at an absent position stays there. It is masked twice, and JAX
differentiates the formula between the two masks, in every order:

- :func:`_weigh`, after the formula, selects the losses by their weights and then multiplies. Its
  derivative with respect to a weight is the loss, also where the weight is zero. JAX's derivative
  of the selection is 0 there, and no weight could be learned from zero.
- :func:`_guard`, before the formula, is the identity, but at an absent position it masks
  derivatives that are not finite. Without it, the cotangent of zero from the weight would be
  multiplied by an infinite derivative (of a logarithm at 0). To replace the inputs instead would
  need to know which are finite, and every gradient would read all inputs once more. Finite
  derivatives pass, or no gradient could be differentiated with respect to a weight of zero.

:func:`lifted_losses` is for functions written elsewhere. A loss may depend on other positions
(every other row is a negative example), where a mask before the function is not enough. There the
inputs of an absent position are replaced by harmless numbers if its loss or derivative is not
finite, for value and derivative alike, and JAX differentiates the function as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad

from jaxlosses._primitive import define_primitive, vary_alike
from jaxlosses._typing import is_float

LossFunction = Callable[..., Array]


def masked_losses(formula: LossFunction, weights: Array, *inputs: Array) -> tuple[Array, Array]:
    """``weights * formula(*inputs)``, and 0 where a weight is zero, whatever the inputs are there.

    Args:
        formula: The losses, each from its own position of the inputs.
        weights: Weights with as many axes as the losses, each equal to theirs or 1.
        inputs: Arrays that begin with the losses' axes, in the precision of the result.

    Returns:
        The weighted losses, and the losses before they were weighted.
    """
    absent = _is_absent(weights)
    losses = formula(*(_guard(absent, x) if is_float(x) else x for x in inputs))
    return _weigh(losses, weights), losses


@jax.custom_jvp
def _weigh(losses: Array, weights: Array) -> Array:
    """``losses * weights``, and 0 where a weight is zero, whatever the loss is there."""
    scale = _broadcast(weights.astype(losses.dtype), losses)
    return lax.mul(_select(weights.astype(bool), losses), scale)


def _weigh_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    losses, weights = primals
    losses_tangent, weights_tangent = tangents
    absent, dtype = _is_absent(weights), losses.dtype
    terms = []
    if not isinstance(losses_tangent, SymbolicZero):
        scale = _guard(absent, _broadcast(weights.astype(dtype), losses))
        terms.append(_mask(absent, lax.mul(scale, losses_tangent)))
    if not isinstance(weights_tangent, SymbolicZero):
        finite = _select(weights.astype(bool) | jnp.isfinite(losses), losses)
        terms.append(_guard(absent, finite) * weights_tangent.astype(dtype))
    return _weigh(losses, weights), sum(terms[1:], terms[0])


_weigh.defjvp(_weigh_jvp, symbolic_zeros=True)


def _guard(absent: Array, x: Array) -> Array:
    """``x``, with a derivative that is masked where it is not finite and a position is absent."""
    return _guard_p.bind(*vary_alike(*_alike(absent, x)))[0]


def _mask(absent: Array, tangent: Array) -> Array:
    """``tangent``, and 0 where a position is absent and the tangent is not finite.

    JAX treats it as linear, and it is its own transpose: a cotangent is masked in the same way.
    """
    return _mask_p.bind(*vary_alike(*_alike(absent, tangent)))[0]


def _zero_unless_finite(absent: Array, x: Array) -> list[Array]:
    # lax traces faster than jax.numpy, and every gradient of every loss traces this. Not
    # lax.is_finite, with which XLA needs more than one kernel for a softmax on a GPU.
    is_finite = lax.lt(lax.abs(x), lax.full_like(x, np.inf))
    return [lax.select(absent, lax.select(is_finite, x, lax.full_like(x, 0)), x)]


def _masked_jvp(primitive: Primitive, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The derivative of either primitive: the tangent is masked."""
    return primitive.bind(*primals), _mask_p.bind(primals[0], tangents[1])


def _mask_transpose(cotangents: Any, absent: Any, x: Any) -> list[Any]:
    (cotangent,) = cotangents
    is_zero = isinstance(cotangent, ad.Zero)
    return [None, None] if is_zero else [None, *_mask_p.bind(absent, cotangent)]


def _like_second(first: Any, second: Any) -> list[Any]:
    return [second]


_guard_p = define_primitive("guard", _like_second, _like_second, elementwise=True)
_mask_p = define_primitive("mask", _zero_unless_finite, _like_second, elementwise=True)
ad.primitive_jvps[_guard_p] = functools.partial(_masked_jvp, _guard_p)
ad.primitive_jvps[_mask_p] = functools.partial(_masked_jvp, _mask_p)
ad.primitive_transposes[_mask_p] = _mask_transpose


def lifted_losses(function: LossFunction, weights: Array, *inputs: Array) -> tuple[Array, Array]:
    """``weights * function(*inputs)``, with some inputs replaced by harmless numbers.

    The inputs of a position are replaced if it is absent and its loss, or the derivative of its
    loss, is not finite. Arguments and results are those of :func:`masked_losses`, but a loss may
    depend on other positions.
    """
    present = weights.astype(bool)
    raw, is_differentiable = _losses_and_check(function, inputs)
    usable = present | is_differentiable
    replaced = [where(usable, x, _placeholder(i, x)) for i, x in enumerate(inputs)]
    losses = _select(usable, function(*replaced))
    scale = weights.astype(losses.dtype)
    # The derivative with respect to a weight is the loss, also where the inputs are replaced.
    of_weight = _select(~usable & jnp.isfinite(raw), lax.stop_gradient(raw))
    return losses * scale + of_weight * (scale - lax.stop_gradient(scale)), raw


def _losses_and_check(function: LossFunction, inputs: Sequence[Array]) -> tuple[Array, Array]:
    """The losses, and which of them are finite and have finite derivatives."""
    inputs = [lax.stop_gradient(x) for x in inputs]
    points = [x for x in inputs if is_float(x)]

    def function_of(*floats: Array) -> Array:
        rest = iter(floats)
        return function(*(next(rest) if is_float(x) else x for x in inputs))

    def in_reverse_mode() -> tuple[Array, Sequence[Array]]:
        losses, pullback = jax.vjp(function_of, *points)
        return losses, pullback(jnp.ones_like(losses))

    def in_forward_mode() -> tuple[Array, Sequence[Array]]:
        # Not ones, which would cancel in a difference of two inputs.
        tangents = [_placeholder(i, x) for i, x in enumerate(points)]
        losses, tangent = jax.jvp(function_of, points, tangents)
        return losses, [tangent]

    # A dynamic loop has a derivative in forward mode only, a callback in neither mode.
    for derive in (in_reverse_mode, in_forward_mode):
        with contextlib.suppress(NotImplementedError, TypeError, ValueError):
            losses, derivatives = derive()
            break
    else:
        losses, derivatives = function_of(*points), []
    finite = jnp.isfinite(losses)
    for derivative in derivatives:
        finite &= jnp.all(jnp.isfinite(derivative), tuple(range(finite.ndim, derivative.ndim)))
    return losses, finite


def _placeholder(index: int, x: Array) -> Array:
    """Harmless numbers in place of input ``index``: class 0, or numbers between 1/4 and 3/4.

    These are positive, valid as probabilities, and differ between inputs, positions and features,
    so that neither a logarithm, a distance nor a standard deviation has an infinite derivative.
    """
    if not is_float(x):
        return jnp.zeros_like(x)
    # Multiples of a large odd number, modulo 2**32, are spread evenly and do not repeat soon.
    spread = jnp.full(x.shape, np.uint32(index * 0x632BE5AB % 2**32))
    for axis in range(x.ndim):
        step = np.uint32(0x9E3779B1 * (2 * axis + 1) % 2**32)
        spread += step * lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return 0.25 + spread.astype(x.dtype) * 2.0**-33 + jnp.zeros_like(x)


def _is_absent(weights: Array) -> Array:
    return lax.eq(weights, lax.full_like(weights, 0))


def _select(mask: Array, x: Array) -> Array:
    """``x``, and 0 where the mask is False."""
    return where(mask, x, lax.full_like(x, 0))


def where(mask: Array, x: Array, y: Array) -> Array:
    """``x`` where the mask is True, and ``y`` elsewhere. The mask has the leading axes of ``x``."""
    mask, x = _alike(mask, x)
    return lax.select(mask, x, _broadcast(y, x))


def _alike(mask: Array, x: Array) -> tuple[Array, Array]:
    """Both in the shape of ``x`` and sharded alike, even if one of them is replicated."""
    mask = _broadcast(expand(mask, x), x)
    return mask, _broadcast(x, mask)


def _broadcast(x: Array, like: Array) -> Array:
    """``x`` in the shape of ``like``, and sharded like it."""
    if x.shape == like.shape and jax.typeof(x).sharding == jax.typeof(like).sharding:
        return x
    if jax.typeof(like).sharding.mesh.empty:
        return lax.broadcast_in_dim(x, like.shape, range(x.ndim))
    zeros = lax.full_like(like, 0, x.dtype)
    return x | zeros if x.dtype == bool else x + zeros


def expand(x: Array, like: Array) -> Array:
    """``x`` with axes of length 1 added at the end, up to the rank of ``like``."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
