"""Statistics of a last layer's logits, with derivatives in both modes and of every order.

``_linear_device.py`` is what each device computes; here are the rules by which JAX transforms it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jaxlosses._layout import MappedLayout
from jaxlosses._linear_device import linear_jvp, linear_sums, linear_transpose
from jaxlosses._linear_layer import KINDS, Layer, Residuals, Sums, split
from jaxlosses._masking import where
from jaxlosses._primitive import define_primitive, vary_alike, with_axis_in_front
from jaxlosses._typing import is_float, precision

_INPUTS = ("hidden", "kernel", "bias", "labels")
_DIFFERENTIABLE = _INPUTS[:3]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def logit_statistics(
    layer: Layer,
    hidden: Array,
    kernel: Array,
    bias: Array,
    labels: Array,
    present: Array,
) -> list[Array]:
    """The statistics of each token's logits, as :class:`Statistics` names them.

    Args:
        layer: The last layer.
        hidden: Numbers ``[..., features]``.
        kernel: Numbers ``[features, classes]``.
        bias: Numbers ``[classes]``.
        labels: Class ids, among the classes of all devices.
        present: Which tokens are never masked; matters to the derivative only.
    """
    found = _linear_sums_p.bind(hidden, kernel, bias, labels, layer=layer, batches=())
    sums = Sums(*layer.named(found))
    # JAX's vmap asks that values are mapped over every axis over which their derivatives are. The
    # derivatives use the mask, so the values are made to depend on it too.
    return [where(present, s, s) for s in sums.statistics()]


def _statistics_jvp(layer: Layer, primals: Any, tangents: Any) -> tuple[Any, Any]:
    hidden, kernel, bias, labels, present = primals
    statistics = logit_statistics(layer, *primals)
    max_logit, log_sum_exp_shifted, *_ = statistics
    input_tangents = {
        name: tangent
        for name, tangent in zip(_DIFFERENTIABLE, tangents[:3], strict=True)
        if not isinstance(tangent, SymbolicZero)
    }
    if not input_tangents:
        return statistics, [jnp.zeros_like(s) for s in statistics]
    usable = present
    if not layer.masks_all_absent:
        # An absent token is masked if its logits or their derivatives would not be finite.
        finite = jnp.isfinite(jnp.sum(jnp.square(hidden.astype(max_logit.dtype)), -1))
        usable |= finite & jnp.isfinite(max_logit) & jnp.isfinite(log_sum_exp_shifted)
    expected = layer.named(statistics).expected_logit_shifted
    residuals = Residuals(
        hidden,
        kernel,
        bias,
        labels,
        where(usable, max_logit, jnp.zeros_like(max_logit)),
        where(usable, log_sum_exp_shifted, jnp.full_like(max_logit, jnp.inf)),
        jnp.zeros_like(max_logit) if expected is None else expected,
    )
    arrays = [*residuals, *input_tangents.values()]
    # A MappedLayout itself sums the gradient of an array that does not vary.
    arrays = arrays if isinstance(layer.layout, MappedLayout) else vary_alike(*arrays)
    results = _linear_jvp_p.bind(*arrays, layer=layer, wrt=tuple(input_tangents), batches=())
    if layer.layout.outer_sums:
        # Not inside of the primitive: without check_vma, JAX has its own rule to transpose a psum.
        results = [lax.psum(r, layer.layout.outer_sums) for r in results]
    return statistics, [jnp.zeros_like(max_logit), *results]


logit_statistics.defjvp(_statistics_jvp, symbolic_zeros=True)


def _mapped(
    function: Callable[..., list[Array]], arrays: Sequence[Array], batches: Any
) -> list[Array]:
    """``function(*arrays)``, under each ``vmap`` that is not only over arrays of tokens.

    Args:
        function: What to map.
        arrays: The arrays that it takes.
        batches: For each such ``vmap``, its axis of each array.
    """
    for axes in reversed(batches):
        function = jax.vmap(function, axes)
    return function(*arrays)


def _mapped_sums(*arrays: Array, layer: Layer, batches: Any) -> list[Array]:
    return _mapped(functools.partial(linear_sums, layer), arrays, batches)


def _mapped_jvp(*arrays: Array, layer: Layer, wrt: tuple[str, ...], batches: Any) -> list[Array]:
    return _mapped(functools.partial(linear_jvp, layer, wrt), arrays, batches)


def _mapped_transpose(
    residuals: Residuals,
    cotangents: list[Array],
    *,
    layer: Layer,
    wrt: tuple[str, ...],
    batches: Any,
) -> list[Array]:
    """:func:`linear_transpose`, mapped over the same axes."""
    if not batches:
        return linear_transpose(layer, wrt, residuals, cotangents)
    axes, *rest = batches
    residual_axes, tangent_axes = split(axes)
    transpose = functools.partial(_mapped_transpose, layer=layer, wrt=wrt, batches=rest)
    gradients = jax.vmap(transpose, (residual_axes, 0))(residuals, cotangents)
    return [
        jnp.sum(g, 0) if axis is None else jnp.moveaxis(g, 0, axis)
        for g, axis in zip(gradients, tangent_axes, strict=True)
    ]


def _any_transpose(
    *arrays: Array, layer: Layer, wrt: tuple[str, ...], batches: Any, maps: Any
) -> list[Array]:
    """:func:`_mapped_transpose`, mapped over ``maps`` too, whose axes the gradients keep."""

    def transpose(*arrays: Array) -> list[Array]:
        return _mapped_transpose(*split(arrays), layer=layer, wrt=wrt, batches=batches)

    return _mapped(transpose, arrays, maps)


def _linear_transpose_batch(arrays: Any, axes: Any, *, maps: Any, **params: Any) -> Any:
    results = _linear_transpose_p.bind(*arrays, maps=(tuple(axes), *maps), **params)
    return results, (0,) * len(results)


def _batch(
    primitive: Primitive, names: Sequence[str], arrays: Any, axes: Any, layer: Layer, **params: Any
) -> Any:
    """Under ``vmap``: one more axis of tokens, if only arrays of tokens have it."""
    of_tokens = [KINDS[name] in ("hidden", "tokens") for name in names]
    triples = list(zip(arrays, axes, of_tokens, strict=True))
    batches = params.pop("batches")
    if batches or any(axis is not None and not tokens for _, axis, tokens in triples):
        batches = (tuple(axes), *batches)
    else:
        tokens = with_axis_in_front(*zip(*[(a, x) for a, x, t in triples if t], strict=True))
        layout = layer.layout.with_batch_axis(jax.typeof(tokens[0]).sharding.spec[0])
        layer, rest = dataclasses.replace(layer, layout=layout), iter(tokens)
        arrays = [next(rest) if t else a for a, _, t in triples]
    results = primitive.bind(*arrays, layer=layer, batches=batches, **params)
    return results, (0,) * len(results)


def _linear_sums_batch(arrays: Any, axes: Any, **params: Any) -> Any:
    return _batch(_linear_sums_p, _INPUTS, arrays, axes, **params)


def _linear_jvp_batch(arrays: Any, axes: Any, *, wrt: tuple[str, ...], **params: Any) -> Any:
    names = (*Residuals._fields, *wrt)
    return _batch(_linear_jvp_p, names, arrays, axes, wrt=wrt, **params)


def _sums_shapes(hidden: Any, kernel: Any, *_: Any, layer: Layer, batches: Any) -> Any:
    shape, dtype = hidden.shape[:-1], precision(hidden, kernel)
    return None if batches else [jax.ShapeDtypeStruct(shape, dtype)] * layer.num_statistics


def _jvp_shapes(*arrays: Any, layer: Layer, wrt: Any, batches: Any) -> Any:
    del wrt
    residuals, _ = split(arrays)
    return None if batches else [residuals.max_logit] * (layer.num_statistics - 1)


def _jvp(function: Callable[..., list[Array]], primals: Any, tangents: Any, **params: Any) -> Any:
    """For second derivatives: JAX differentiates the function that a primitive computes."""
    tangents = [
        ad.instantiate_zeros(t) if is_float(p) else np.zeros(p.shape, jax.dtypes.float0)
        for p, t in zip(primals, tangents, strict=True)
    ]
    return jax.jvp(functools.partial(function, **params), list(primals), tangents)


def _linear_jvp_transpose(cotangents: Any, *arrays: Any, layer: Layer, **params: Any) -> list[Any]:
    residuals, _ = split(arrays)
    if layer.needs_expected and isinstance(cotangents[-1], ad.Zero):
        # The gradient of the entropy is not needed.
        layer = dataclasses.replace(layer, needs_expected=False)
        cotangents = cotangents[:-1]
    cotangents = [ad.instantiate_zeros(c) for c in cotangents]
    # If the cotangent of a masked token is not zero, its gradient is NaN.
    is_asked = functools.reduce(jnp.logical_or, [c != 0 for c in cotangents])
    log_sum_exp = residuals.log_sum_exp_shifted
    log_sum_exp = jnp.where(residuals.is_masked & is_asked, jnp.nan, log_sum_exp)
    residuals = residuals._replace(log_sum_exp_shifted=log_sum_exp)
    arrays = (*residuals, *cotangents)
    gradients = _linear_transpose_p.bind(*arrays, layer=layer, maps=(), **params)
    return [None] * len(residuals) + gradients


def _transpose_shapes(*arrays: Any, layer: Layer, wrt: Any, batches: Any, maps: Any) -> Any:
    del layer
    residuals, _ = split(arrays)
    return None if batches or maps else [getattr(residuals, name) for name in wrt]


# A primitive, because JAX's own transpose of the loop would add a gradient as large as the kernel
# for every block. Neither ``jax.custom_vjp``, which has no forward mode, nor
# ``jax.custom_derivatives.linear_call``, which has no batching rule, can replace it.
_linear_jvp_p = define_primitive("linear_jvp", _mapped_jvp, _jvp_shapes)
batching.primitive_batchers[_linear_jvp_p] = _linear_jvp_batch
ad.primitive_jvps[_linear_jvp_p] = functools.partial(_jvp, _mapped_jvp)
ad.primitive_transposes[_linear_jvp_p] = _linear_jvp_transpose

# The others are primitives because checkify cannot look into a shard_map on an Explicit mesh; and a
# vmap then adds an axis of tokens to the blocks of the sums too.
_linear_sums_p = define_primitive("linear_sums", _mapped_sums, _sums_shapes)
batching.primitive_batchers[_linear_sums_p] = _linear_sums_batch
_linear_transpose_p = define_primitive("linear_transpose", _any_transpose, _transpose_shapes)
batching.primitive_batchers[_linear_transpose_p] = _linear_transpose_batch
ad.primitive_jvps[_linear_transpose_p] = functools.partial(_jvp, _any_transpose)
