"""Statistics of a last layer's logits, with derivatives in both modes and of every order.

What each device computes stands in ``_linear_device.py``; here is what JAX has to know of it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching

from jaxlosses._layout import MappedLayout
from jaxlosses._linear_device import (
    KINDS,
    Layer,
    Residuals,
    linear_jvp,
    linear_sums,
    linear_transpose,
    split,
)
from jaxlosses._masking import where
from jaxlosses._primitive import define_primitive, vary_alike, with_axis_in_front
from jaxlosses._typing import is_float

_DIFFERENTIABLE = ("hidden", "kernel", "bias")


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
    sums = linear_sums(layer, hidden, kernel, bias, labels)
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
    # Else the layout knows where to sum the gradient of an array that does not vary.
    arrays = arrays if isinstance(layer.layout, MappedLayout) else vary_alike(*arrays)
    results = _linear_jvp_p.bind(*arrays, layer=layer, wrt=tuple(input_tangents), batches=())
    if layer.layout.outer_sums:
        # Not inside of the primitive: JAX transposes this sum in its own way where it does not know
        # what varies over which axis.
        results = [lax.psum(r, layer.layout.outer_sums) for r in results]
    return statistics, [jnp.zeros_like(max_logit), *results]


logit_statistics.defjvp(_statistics_jvp, symbolic_zeros=True)


def _mapped_jvp(*arrays: Array, layer: Layer, wrt: tuple[str, ...], batches: Any) -> list[Array]:
    """:func:`linear_jvp`, mapped over axes that not all arrays of tokens have alone.

    Args:
        arrays: The residuals, and a tangent for each name in ``wrt``.
        layer: The last layer.
        wrt: Which of hidden, kernel and bias have a tangent.
        batches: The axis of each array under ``vmap``, once for each ``vmap`` that added more than
            an axis of tokens.
    """
    if not batches:
        return linear_jvp(layer, wrt, *arrays)
    axes, *rest = batches
    jvp = functools.partial(_mapped_jvp, layer=layer, wrt=wrt, batches=rest)
    return jax.vmap(jvp, axes)(*arrays)


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


def _linear_jvp_batch(
    arrays: Any, axes: Any, *, layer: Layer, wrt: tuple[str, ...], batches: Any
) -> Any:
    """Under ``vmap``: one more axis of tokens, if only arrays of tokens have it."""
    of_tokens = [KINDS[name] in ("hidden", "tokens") for name in (*Residuals._fields, *wrt)]
    triples = list(zip(arrays, axes, of_tokens, strict=True))
    if batches or any(axis is not None and not tokens for _, axis, tokens in triples):
        batches = (tuple(axes), *batches)
    else:
        tokens = with_axis_in_front(*zip(*[(a, x) for a, x, t in triples if t], strict=True))
        layout = layer.layout.with_batch_axis(jax.typeof(tokens[0]).sharding.spec[0])
        layer, rest = dataclasses.replace(layer, layout=layout), iter(tokens)
        arrays = [next(rest) if t else a for a, _, t in triples]
    results = _linear_jvp_p.bind(*arrays, layer=layer, wrt=wrt, batches=batches)
    return results, (0,) * len(results)


def _linear_jvp_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    """For second derivatives: JAX differentiates :func:`linear_jvp` as it is."""
    tangents = [
        ad.instantiate_zeros(t) if is_float(p) else np.zeros(p.shape, jax.dtypes.float0)
        for p, t in zip(primals, tangents, strict=True)
    ]
    return jax.jvp(functools.partial(_mapped_jvp, **params), list(primals), tangents)


def _linear_jvp_transpose(cotangents: Any, *arrays: Any, layer: Layer, **params: Any) -> list[Any]:
    residuals, _ = split(arrays)
    if layer.needs_expected and isinstance(cotangents[-1], ad.Zero):
        # Nobody asks for the gradient of the entropy.
        layer = dataclasses.replace(layer, needs_expected=False)
        cotangents = cotangents[:-1]
    cotangents = [ad.instantiate_zeros(c) for c in cotangents]
    # Of a masked token nobody may ask, or the trouble is real.
    is_asked = functools.reduce(jnp.logical_or, [c != 0 for c in cotangents])
    log_sum_exp = residuals.log_sum_exp_shifted
    log_sum_exp = jnp.where(residuals.is_masked & is_asked, jnp.nan, log_sum_exp)
    residuals = residuals._replace(log_sum_exp_shifted=log_sum_exp)
    gradients = _mapped_transpose(residuals, cotangents, layer=layer, **params)
    return [None] * len(residuals) + gradients


# A primitive, because JAX's own transpose of the loop would add a gradient as large as the kernel
# for every block. Neither ``jax.custom_vjp``, which has no forward mode, nor
# ``jax.custom_derivatives.linear_call``, which has no batching rule, can replace it.
_linear_jvp_p = define_primitive("linear_jvp", _mapped_jvp)
batching.primitive_batchers[_linear_jvp_p] = _linear_jvp_batch
ad.primitive_jvps[_linear_jvp_p] = _linear_jvp_jvp
ad.primitive_transposes[_linear_jvp_p] = _linear_jvp_transpose
