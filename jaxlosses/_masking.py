"""Losses at places that may be absent, and their derivatives.

A place is absent where its weight is zero. Its inputs may hold NaN, infinity or an impossible
label, and these must reach neither the value nor a derivative. To multiply by the weight is not
enough, because zero times infinity is NaN. There are two ways to do it.

:func:`masked_losses` is for the losses of this package. Each loss depends on its own place of the
inputs alone. It selects the losses by their weights, and its derivative is written here:

- With respect to the inputs it is a product of the weighed derivative of each loss and the tangent,
  by :func:`_masked_product`. At an absent place either of the two may not be finite (a logarithm
  at 0), and a plain product would be NaN. JAX's derivative of a selection of the inputs would be
  right as well, but it needs to know which inputs are finite, so that every gradient would read
  all inputs once more.
- With respect to the weights it is the loss, also where the weight is zero. JAX's derivative of
  the selection is 0 there, and no weight could be learned from zero.
- Second and higher derivatives are those of :func:`lifted_losses`.

:func:`lifted_losses` is for functions written elsewhere. A loss may depend on other places (every
other row is a negative example), so that no derivative of a single loss can be selected. There the
inputs of an absent place are replaced by harmless numbers where they would do harm, for value and
derivative alike, and JAX differentiates the function as it is.
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
from jax.interpreters import ad

from jaxlosses._primitive import define_primitive, vary_alike
from jaxlosses._typing import is_float

LossFunction = Callable[..., Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def masked_losses(formula: LossFunction, weights: Array, *inputs: Array) -> Array:
    """``weights * formula(*inputs)``, and 0 where a weight is zero, whatever the inputs are there.

    Args:
        formula: The losses, each from its own place of the inputs. It closes over no traced array.
        weights: Weights with as many axes as the losses, each equal to theirs or 1.
        inputs: Arrays that begin with the losses' axes, in the precision of the result.
    """
    return _weigh(formula(*inputs), weights)


def _masked_losses_jvp(formula: LossFunction, primals: Any, tangents: Any) -> tuple[Array, Array]:
    absent = lax.eq(primals[0], lax.full_like(primals[0], 0))
    weights_tangent, *input_tangents = tangents
    positions = tuple(i for i, t in enumerate(input_tangents) if _has_tangent(t))
    of_weights = _has_tangent(weights_tangent)
    losses, *derivatives = _losses_and_derivatives(formula, positions, of_weights, *primals)
    terms = []
    for derivative, i in zip(derivatives, positions, strict=False):
        product = _masked_product(absent, derivative, input_tangents[i])
        inner_axes = tuple(range(losses.ndim, product.ndim))
        terms.append(lax.reduce_sum(product, inner_axes) if inner_axes else product)
    if of_weights:
        terms.append(derivatives[-1] * weights_tangent.astype(losses.dtype))
    return losses, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(losses)


masked_losses.defjvp(_masked_losses_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _losses_and_derivatives(
    formula: LossFunction,
    positions: tuple[int, ...],
    of_weights: bool,
    weights: Array,
    *inputs: Array,
) -> list[Array]:
    """Masked losses, and their derivatives with respect to some inputs, and to the weights.

    Where a place is absent, the derivative with respect to an input is 0 or not finite.
    """
    formula_of, *points = _as_function_of(positions, formula, inputs)
    losses, pullback = jax.vjp(formula_of, *points)
    derivatives = pullback(_broadcast(weights.astype(losses.dtype), losses))
    finite = weights.astype(bool) | jnp.isfinite(losses)
    return [_weigh(losses, weights), *derivatives, *[_select(finite, losses)] * of_weights]


def _losses_and_derivatives_jvp(
    formula: LossFunction,
    positions: tuple[int, ...],
    of_weights: bool,
    primals: Any,
    tangents: Any,
) -> tuple[Any, Any]:
    def lifted(weights: Array, *inputs: Array) -> list[Array]:
        usable = functools.partial(_usable_losses, formula, weights.astype(bool))
        losses, pullback = jax.vjp(*_as_function_of(positions, usable, inputs))
        scale = _broadcast(weights.astype(losses.dtype), losses)
        return [losses * scale, *pullback(scale), *[losses] * of_weights]

    return _jvp(lifted, primals, tangents)


_losses_and_derivatives.defjvp(_losses_and_derivatives_jvp, symbolic_zeros=True)


def lifted_losses(function: LossFunction, weights: Array, *inputs: Array) -> Array:
    """``weights * function(*inputs)``, with harmless inputs where absent ones would do harm.

    A place is replaced where it is absent and its loss, or the derivative of its loss, is not
    finite. Arguments are those of :func:`masked_losses`, but a loss may depend on other places, and
    the function may close over traced arrays.
    """
    losses = _usable_losses(function, weights.astype(bool), *inputs)
    return losses * weights.astype(losses.dtype)


def _usable_losses(function: LossFunction, present: Array, *inputs: Array) -> Array:
    usable = present | _is_differentiable(function, inputs)
    replaced = [jnp.where(_expand(usable, x), x, _placeholder(i, x)) for i, x in enumerate(inputs)]
    return jnp.where(usable, function(*replaced), 0)


def _is_differentiable(function: LossFunction, inputs: Sequence[Array]) -> Array:
    """Which losses are finite and have finite derivatives."""
    inputs = [lax.stop_gradient(x) for x in inputs]
    positions = [i for i, x in enumerate(inputs) if is_float(x)]
    function_of, *points = _as_function_of(positions, function, inputs)

    def in_reverse_mode() -> tuple[Array, Sequence[Array]]:
        losses, pullback = jax.vjp(function_of, *points)
        return losses, pullback(jnp.ones_like(losses))

    def in_forward_mode() -> tuple[Array, Sequence[Array]]:
        # Not ones, which would cancel in a difference of two inputs.
        tangents = [_placeholder(i, inputs[i]) for i in positions]
        losses, tangent = jax.jvp(function_of, points, tangents)
        return losses, [tangent]

    # A dynamic loop has a derivative in forward mode only, a callback has none in either.
    for derive in (in_reverse_mode, in_forward_mode):
        with contextlib.suppress(NotImplementedError, TypeError, ValueError):
            losses, derivatives = derive()
            break
    else:
        losses, derivatives = function_of(*points), []
    finite = jnp.isfinite(losses)
    for derivative in derivatives:
        finite &= jnp.all(jnp.isfinite(derivative), tuple(range(finite.ndim, derivative.ndim)))
    return finite


def _placeholder(index: int, x: Array) -> Array:
    """Harmless numbers in place of input ``index``: class 0, or numbers between 1/4 and 3/4.

    These are probabilities and positive, and they differ between inputs, places and features, so
    that neither a logarithm, a distance nor a standard deviation has an infinite derivative.
    """
    if not is_float(x):
        return jnp.zeros_like(x)
    # Multiples of a large odd number, modulo 2**32, are spread evenly and do not repeat soon.
    spread = jnp.full(x.shape, np.uint32(index * 0x632BE5AB % 2**32))
    for axis in range(x.ndim):
        step = np.uint32(0x9E3779B1 * (2 * axis + 1) % 2**32)
        spread += step * lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return 0.25 + spread.astype(x.dtype) * 2.0**-33 + jnp.zeros_like(x)


def _has_tangent(tangent: Any) -> bool:
    return not isinstance(tangent, SymbolicZero)


def _jvp(function: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """``jax.jvp`` with respect to the arguments that have a tangent."""
    positions = [i for i, t in enumerate(tangents) if _has_tangent(t)]
    function_of, *points = _as_function_of(positions, function, primals)
    return jax.jvp(function_of, points, [tangents[i] for i in positions])


def _as_function_of(
    positions: Sequence[int], function: Callable[..., Any], arguments: Sequence[Array]
) -> list[Any]:
    """``function`` of the arguments at some positions, the others held, and these arguments."""

    def function_of(*some: Array) -> Any:
        chosen = dict(zip(positions, some, strict=True))
        return function(*(chosen.get(i, a) for i, a in enumerate(arguments)))

    return [function_of, *(arguments[i] for i in positions)]


def _weigh(x: Array, weights: Array) -> Array:
    """``x`` times the weights, and 0 where a weight is 0, whatever ``x`` is there."""
    scale = _broadcast(weights.astype(x.dtype), x)
    return lax.mul(_select(weights.astype(bool), x), scale)


def _select(mask: Array, x: Array) -> Array:
    """``x``, and 0 where the mask is not set."""
    return lax.select(_broadcast(mask, x), x, lax.full_like(x, 0))


def _broadcast(x: Array, like: Array) -> Array:
    """``x`` in the shape of ``like``, and sharded like it."""
    if x.shape == like.shape and jax.typeof(x).sharding == jax.typeof(like).sharding:
        return x
    if jax.typeof(like).sharding.mesh.empty:
        return lax.broadcast_in_dim(x, like.shape, range(x.ndim))
    zeros = lax.full_like(like, 0, x.dtype)
    return x | zeros if x.dtype == bool else x + zeros


def _expand(x: Array, like: Array) -> Array:
    """``x`` with an axis of one for each axis that ``like`` has behind its own."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def _masked_product(absent: Array, derivative: Array, tangent: Array) -> Array:
    """``derivative * tangent``, and 0 where a place is absent and that is not finite."""
    tangent = tangent.astype(derivative.dtype)
    absent = _broadcast(_expand(absent, derivative), derivative)
    (product,) = _masked_product_p.bind(*vary_alike(absent, derivative, tangent))
    return product


def _multiply(absent: Array, x: Array, y: Array) -> list[Array]:
    # In operations of lax, as this is traced for every gradient of every loss.
    product = lax.mul(x, y)
    # Not lax.is_finite, for which XLA gives up the one kernel of a softmax on a GPU.
    is_finite = lax.lt(lax.abs(product), lax.full_like(product, np.inf))
    finite_product = lax.select(is_finite, product, lax.full_like(product, 0))
    return [lax.select(absent, finite_product, product)]


def _multiply_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    absent, x, y = primals
    _, x_tangent, y_tangent = tangents
    product = _masked_product_p.bind(absent, x, y)
    terms = []
    if not isinstance(x_tangent, ad.Zero):
        terms += _masked_product_p.bind(absent, x_tangent, y)
    if not isinstance(y_tangent, ad.Zero):
        terms += _masked_product_p.bind(absent, x, y_tangent)
    return product, [sum(terms[1:], terms[0])]


def _multiply_transpose(cotangents: Any, absent: Any, x: Any, y: Any) -> list[Any]:
    (cotangent,) = cotangents
    if isinstance(cotangent, ad.Zero):
        return [None, None, None]
    if ad.is_undefined_primal(x):
        return [None, *_masked_product_p.bind(absent, cotangent, y), None]
    return [None, None, *_masked_product_p.bind(absent, x, cotangent)]


_masked_product_p = define_primitive(
    "masked_product", _multiply, lambda absent, x, y: [x], elementwise=True
)
ad.primitive_jvps[_masked_product_p] = _multiply_jvp
ad.primitive_transposes[_masked_product_p] = _multiply_transpose
