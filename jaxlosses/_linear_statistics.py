"""Statistics of a last layer's logits, and their derivative, from one block of logits at a time.

A loss needs only a few statistics of a token's logits: the largest one, the logarithm of the sum of
exponentials, the logit of the label, and where labels are smoothed, the mean. The statistics and
both modes of their derivative are loops over the blocks of ``_blocks.py``::

    for each block:
        logits = hidden @ kernel + bias, for the tokens and the classes of the block
        logit_statistics:  statistics  = those of the blocks before, joined with these logits
        linear_jvp:        tangents of the statistics += tangents from these logits
        linear_transpose:  gradients of hidden, kernel, bias += gradients through these logits
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching

from jaxlosses._blocks import BlockPlan, BlockSlice, Side, auto_sharded, matmul, spec_of
from jaxlosses._logits import shifted, times_logit
from jaxlosses._masking import where
from jaxlosses._primitive import define_primitive, with_axis_in_front
from jaxlosses._reduce import max_and_pick, sum_of
from jaxlosses._typing import is_float, precision


class _Residuals(NamedTuple):
    """The arrays that the derivative of the statistics is computed from, beside the tangents."""

    hidden: Array
    kernel: Array
    bias: Array
    labels: Array
    max_logit: Array
    log_sum_exp_shifted: Array


# The arrays that begin with the axes of the tokens.
_TOKEN_ARRAYS = ("hidden", "labels", "max_logit", "log_sum_exp_shifted")
_SIDES: dict[str, Side] = {"hidden": "tokens", "kernel": "classes", "bias": "classes"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """What of the last layer is fixed when the program is compiled."""

    plan: BlockPlan
    classes: int
    soft_cap: float | None
    label_smoothing: bool

    @property
    def num_statistics(self) -> int:
        """How many statistics a token has; the mean logit is one where labels are smoothed."""
        return 4 if self.label_smoothing else 3

    def logits(self, block: BlockSlice, hidden: Array, kernel: Array, bias: Array) -> Array:
        """The logits of a block, before the soft cap."""
        x = matmul(
            block.take("tokens", hidden), block.take("classes", kernel), [hidden.ndim - 1], [0]
        )
        bias = block.take("classes", bias).astype(x.dtype)
        return x + jnp.expand_dims(bias, range(x.ndim - 1))

    def capped(self, x: Array) -> Array:
        """Logits after the soft cap."""
        return x if self.soft_cap is None else self.soft_cap * jnp.tanh(x / self.soft_cap)

    def is_label(self, block: BlockSlice, x: Array, labels: Array) -> Array:
        """Which logits of a block are that of their token's label."""
        ids = block.indices("classes", self.classes).astype(labels.dtype)
        return jnp.expand_dims(ids, range(x.ndim - 1)) == block.take("tokens", labels)[..., None]

    def surrogates(self, block: BlockSlice, residuals: _Residuals, x: Array) -> list[Array]:
        """Sums over the logits of a block that have the derivatives of the statistics.

        For log-sum-exp it is the sum of ``exp(logit - log-sum-exp)``, with log-sum-exp held
        constant. The derivative of either with respect to a logit is the softmax.
        """
        max_logit = block.take("tokens", residuals.max_logit)[..., None]
        log_sum_exp_shifted = block.take("tokens", residuals.log_sum_exp_shifted)[..., None]
        # Infinity marks a masked token. Not even a NaN in the kernel may reach its derivative.
        x = self.capped(jnp.where(jnp.isposinf(log_sum_exp_shifted), 0, x))
        softmax = jnp.exp(shifted(x, max_logit) - log_sum_exp_shifted)
        terms = [softmax, jnp.where(self.is_label(block, x, residuals.labels), x, 0)]
        terms += [x / self.classes] if self.label_smoothing else []
        return [jnp.sum(term, -1) for term in terms]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def logit_statistics(
    layer: Layer, hidden: Array, kernel: Array, bias: Array, labels: Array, present: Array
) -> list[Array]:
    """The statistics of each token's logits, as :func:`class_losses` takes them.

    The largest logit, and relative to it: log-sum-exp, the logit of the label, and where labels are
    smoothed, the mean logit. Which tokens are ``present`` matters to the derivative only.
    """

    def loop(hidden: Array, kernel: Array, bias: Array, labels: Array) -> list[Array]:
        zeros = jnp.sum(jnp.zeros_like(hidden, precision(hidden, kernel, bias)), -1)
        carry = [zeros - jnp.inf, *[zeros] * (layer.num_statistics - 1)]
        step = functools.partial(_join, layer, hidden, kernel, bias, labels)
        max_logit, sum_exp, label_logit, *mean = layer.plan.loop(step, carry)
        return [max_logit, jnp.log(sum_exp), shifted(label_logit, max_logit), *mean]

    specs = [spec_of(hidden, -1)] * layer.num_statistics
    statistics = auto_sharded(loop, [hidden, kernel, bias, labels], specs)
    # JAX's vmap asks that values are mapped over every axis over which their derivatives are. The
    # derivatives use the mask, so the values are made to depend on it too.
    return [where(present, s, s) for s in statistics]


def _join(
    layer: Layer,
    hidden: Array,
    kernel: Array,
    bias: Array,
    labels: Array,
    block: BlockSlice,
    carry: list[Array],
) -> list[Array]:
    """The statistics of the blocks so far, joined with those of one more block."""
    max_before, sum_exp, label_logit, *mean = (block.take("tokens", c) for c in carry)
    x = layer.capped(layer.logits(block, hidden, kernel, bias))
    block_max, picked = max_and_pick(x, layer.is_label(block, x, labels))
    max_logit = jnp.maximum(max_before, block_max)
    # What there is so far is relative to the maximum of the blocks before.
    correction, x = shifted(max_before, max_logit), shifted(x, max_logit[..., None])
    sum_exp = sum_exp * jnp.exp(correction) + sum_of(jnp.exp(x), x.ndim - 1)
    if mean:
        fraction = jnp.asarray(block.indices("classes", 1)[0], x.dtype) / layer.classes
        mean = [mean[0] + times_logit(fraction, correction) + sum_of(x, x.ndim - 1) / layer.classes]
    parts = [max_logit, sum_exp, label_logit + picked, *mean]
    return [block.put("tokens", c, p) for c, p in zip(carry, parts, strict=True)]


def _statistics_jvp(layer: Layer, primals: Any, tangents: Any) -> tuple[Any, Any]:
    hidden, kernel, bias, labels, present = primals
    statistics = logit_statistics(layer, *primals)
    max_logit, log_sum_exp_shifted, *_ = statistics
    input_tangents = {
        name: tangent
        for name, tangent in zip(_SIDES, tangents[:3], strict=True)
        if not isinstance(tangent, SymbolicZero)
    }
    if not input_tangents:
        return statistics, [jnp.zeros_like(s) for s in statistics]
    # An absent token is masked if its logits or their derivatives would not be finite.
    finite = jnp.isfinite(jnp.sum(jnp.square(hidden.astype(max_logit.dtype)), -1))
    usable = present | (finite & jnp.isfinite(max_logit) & jnp.isfinite(log_sum_exp_shifted))

    def mask(x: Array) -> Array:
        return where(usable, x, jnp.zeros_like(x))

    if "hidden" in input_tangents:
        input_tangents["hidden"] = mask(input_tangents["hidden"])
    residuals = _Residuals(
        mask(hidden),
        kernel,
        bias,
        labels,
        where(usable, max_logit, jnp.zeros_like(max_logit)),
        where(usable, log_sum_exp_shifted, jnp.full_like(max_logit, jnp.inf)),
    )
    results = _linear_jvp_p.bind(
        *residuals, *input_tangents.values(), layer=layer, wrt=tuple(input_tangents), batches=()
    )
    return statistics, [jnp.zeros_like(max_logit), *results]


logit_statistics.defjvp(_statistics_jvp, symbolic_zeros=True)


def linear_jvp(*arrays: Array, layer: Layer, wrt: tuple[str, ...], batches: Any) -> list[Array]:
    """The tangents of the statistics but the largest logit, whose derivative is taken as 0.

    Args:
        arrays: The residuals, and a tangent for each name in ``wrt``.
        layer: The last layer.
        wrt: Which of hidden, kernel and bias have a tangent.
        batches: The axis of each array under ``vmap``, once for each ``vmap`` that added more than
            an axis of tokens.
    """
    if batches:
        axes, *rest = batches
        jvp = functools.partial(linear_jvp, layer=layer, wrt=wrt, batches=rest)
        return jax.vmap(jvp, axes)(*arrays)
    loop = functools.partial(_jvp_loop, layer, wrt)
    residuals, _ = _by_name(arrays, wrt)
    specs = [spec_of(residuals.max_logit)] * (layer.num_statistics - 1)
    return auto_sharded(loop, arrays, specs)


def _jvp_loop(layer: Layer, wrt: tuple[str, ...], *arrays: Array) -> list[Array]:
    residuals, tangents = _by_name(arrays, wrt)
    points = {name: getattr(residuals, name) for name in wrt}

    def step(block: BlockSlice, carry: list[Array]) -> list[Array]:
        def surrogates(points: dict[str, Array]) -> list[Array]:
            hidden, kernel, bias, *_ = residuals._replace(**points)
            return layer.surrogates(block, residuals, layer.logits(block, hidden, kernel, bias))

        _, parts = jax.jvp(surrogates, (points,), (tangents,))
        return [block.add("tokens", c, p) for c, p in zip(carry, parts, strict=True)]

    zeros = jnp.zeros_like(residuals.max_logit)
    return layer.plan.loop(step, [zeros] * (layer.num_statistics - 1))


def linear_transpose(
    residuals: _Residuals,
    cotangents: list[Array],
    *,
    layer: Layer,
    wrt: tuple[str, ...],
    batches: Any,
) -> list[Array]:
    """The transpose of :func:`linear_jvp`: the cotangents of its tangents, from its results'."""
    if batches:
        axes, *rest = batches
        residual_axes, tangent_axes = _by_name(axes, wrt)
        transpose = functools.partial(linear_transpose, layer=layer, wrt=wrt, batches=rest)
        gradients = jax.vmap(transpose, (residual_axes, 0))(residuals, cotangents)
        return [
            jnp.sum(g, 0) if axis is None else jnp.moveaxis(g, 0, axis)
            for g, axis in zip(gradients, tangent_axes.values(), strict=True)
        ]
    loop = functools.partial(_transpose_loop, layer, wrt)
    specs = [spec_of(getattr(residuals, name)) for name in wrt]
    return auto_sharded(loop, [*residuals, *cotangents], specs)


def _transpose_loop(layer: Layer, wrt: tuple[str, ...], *arrays: Array) -> list[Array]:
    residuals, cotangents = _split(arrays)
    hidden, kernel, bias, *_ = residuals
    cut_side = layer.plan.side
    # A CPU multiplies rows by columns faster than columns by columns. Transposed once, before the
    # loop, and not in every block.
    hidden_transposed = jnp.moveaxis(hidden, -1, 0)

    def step(block: BlockSlice, carry: list[Array]) -> list[Array]:
        x = layer.logits(block, hidden, kernel, bias)
        _, pullback = jax.vjp(functools.partial(layer.surrogates, block, residuals), x)
        (cotangent,) = pullback([block.take("tokens", c) for c in cotangents])
        tokens = list(range(cotangent.ndim - 1))
        h, k = block.take("tokens", hidden), block.take("classes", kernel)

        def products(cotangent: Array) -> dict[str, Array]:
            of_hidden = matmul(cotangent, k, [cotangent.ndim - 1], [1])
            if cut_side == "classes":
                of_kernel = matmul(hidden_transposed, cotangent, [t + 1 for t in tokens], tokens)
            else:
                of_kernel = matmul(h, cotangent, tokens, tokens)
            return {"hidden": of_hidden, "kernel": of_kernel}

        def bfloat16_products(cotangent: Array) -> dict[str, Array]:
            return products(cotangent.astype(jnp.bfloat16))

        # Not on a CPU, which gains nothing by it, and where XLA lacks this product for some shapes.
        # Not in float16 either: a probability divided by a count would underflow.
        if h.dtype == k.dtype == jnp.bfloat16:
            parts = lax.platform_dependent(cotangent, cpu=products, default=bfloat16_products)
        else:
            parts = products(cotangent)
        parts["bias"] = jnp.sum(cotangent, tokens)
        return [block.add(_SIDES[n], c, parts[n]) for n, c in zip(wrt, carry, strict=True)]

    inputs = {name: getattr(residuals, name) for name in wrt}
    # Accumulate in float32; cast once at the end. On the side that is cut nothing accumulates: each
    # block has its own part.
    wide = residuals.max_logit.dtype
    carry = [
        jnp.zeros_like(x, x.dtype if _SIDES[name] == cut_side else wide)
        for name, x in inputs.items()
    ]
    gradients = layer.plan.loop(step, carry)
    return [g.astype(x.dtype) for g, x in zip(gradients, inputs.values(), strict=True)]


def _by_name(arrays: Any, wrt: tuple[str, ...]) -> tuple[_Residuals, dict[str, Any]]:
    """The primitive's arrays, or their axes under ``vmap``, as residuals and tangents."""
    residuals, tangents = _split(arrays)
    return residuals, dict(zip(wrt, tangents, strict=True))


def _split(arrays: Any) -> tuple[_Residuals, Any]:
    """The residuals, which come first, and the rest."""
    count = len(_Residuals._fields)
    return _Residuals(*arrays[:count]), arrays[count:]


def _linear_jvp_batch(
    arrays: Any, axes: Any, *, layer: Layer, wrt: tuple[str, ...], batches: Any
) -> Any:
    """Under ``vmap``: one more axis of tokens, if only arrays of tokens have it."""
    of_tokens = [name in _TOKEN_ARRAYS for name in (*_Residuals._fields, *wrt)]
    triples = list(zip(arrays, axes, of_tokens, strict=True))
    if batches or any(axis is not None and not tokens for _, axis, tokens in triples):
        batches = (tuple(axes), *batches)
    else:
        tokens = iter(with_axis_in_front(*zip(*[(a, x) for a, x, t in triples if t], strict=True)))
        arrays = [next(tokens) if t else a for a, _, t in triples]
        layer = dataclasses.replace(layer, plan=layer.plan.with_batch_axis())
    results = _linear_jvp_p.bind(*arrays, layer=layer, wrt=wrt, batches=batches)
    return results, (0,) * len(results)


def _linear_jvp_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    """For second derivatives: JAX differentiates :func:`linear_jvp` as it is."""
    tangents = [
        ad.instantiate_zeros(t) if is_float(p) else np.zeros(p.shape, jax.dtypes.float0)
        for p, t in zip(primals, tangents, strict=True)
    ]
    return jax.jvp(functools.partial(linear_jvp, **params), list(primals), tangents)


def _linear_jvp_transpose(cotangents: Any, *arrays: Any, wrt: Any, **params: Any) -> list[Any]:
    residuals, _ = _by_name(arrays, wrt)
    cotangents = [ad.instantiate_zeros(c) for c in cotangents]
    return [None] * len(residuals) + linear_transpose(residuals, cotangents, wrt=wrt, **params)


# JAX's own transpose of the loop would add a gradient as large as the kernel for every block, so
# the transpose is written by hand. That takes a primitive, because ``jax.custom_vjp`` gives no
# forward mode and ``jax.custom_derivatives.linear_call`` has no batching rule.
_linear_jvp_p = define_primitive("linear_jvp", linear_jvp)
batching.primitive_batchers[_linear_jvp_p] = _linear_jvp_batch
ad.primitive_jvps[_linear_jvp_p] = _linear_jvp_jvp
ad.primitive_transposes[_linear_jvp_p] = _linear_jvp_transpose
