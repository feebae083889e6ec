"""Parts of the losses of logits and probabilities, with their limits at infinite logits.

An infinite logit means that a class is certain or ruled out. Plain formulas and their derivatives
would be NaN there: infinity minus infinity, or infinity times 0. Here each has its limit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxlosses._reduce import sum_of, sum_over_members
from jaxlosses._typing import AxisName


@jax.custom_jvp
def binary_cross_entropy(x: Array, y: Array) -> Array:
    """Element-wise binary cross-entropy of logits ``x`` and labels ``y``."""
    # softplus(x) = softplus(-x) + x: of these, take the one that is small where the label is right.
    is_one = y > 0.5
    wrong = jnp.where(is_one, -x, x)  # The logit of the class that is less probable.
    probability = jnp.where(is_one, 1 - y, y)
    # Infinity minus infinity would be NaN, and so would infinity times 0.
    product = probability * jnp.minimum(wrong, jnp.finfo(x.dtype).max)
    return jax.nn.softplus(wrong) - jnp.where(probability == 0, 0, product)


@binary_cross_entropy.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, y), (x_tangent, y_tangent) = primals, tangents
    sign = 1 - 2 * (y > 0.5).astype(x.dtype)
    # (1 - sign) / 2 is y rounded to 0 or 1. Subtract y - rounded: if rounded - y were added, XLA
    # would keep it in memory from the value to the gradient.
    derivative = sign * jax.nn.sigmoid(sign * x) - (y - (1 - sign) / 2)
    return binary_cross_entropy(x, y), derivative * x_tangent - _finite(x) * y_tangent


@jax.custom_jvp
def times_logit(y: Array, x: Array) -> Array:
    """``y * x``, and 0 where ``y`` is 0 and ``x`` is infinite.

    The derivative with respect to ``y`` is taken as 0 where ``x`` is infinite.
    """
    return jnp.where((y == 0) & jnp.isinf(x), 0, y * x)


@times_logit.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (y, x), (y_tangent, x_tangent) = primals, tangents
    return times_logit(y, x), y * x_tangent + _finite(x) * y_tangent


@jax.custom_jvp
def times_log(y: Array, p: Array) -> Array:
    """``y * log(p)``, and 0 where both are 0; there its derivatives are taken as 0 too."""
    return jnp.where((y == 0) & (p == 0), 0, y * jnp.log(p))


@times_log.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (y, p), (y_tangent, p_tangent) = primals, tangents
    of_y = jnp.where((y == 0) & (p == 0), 0, jnp.log(p))
    return times_log(y, p), of_y * y_tangent + _ratio(y, p) * p_tangent


@jax.custom_jvp
def _ratio(y: Array, p: Array) -> Array:
    """``y / p``, and 0 where both are 0. Its derivative needs no square of a small ``p``."""
    return jnp.where((y == 0) & (p == 0), 0, y / p)


@_ratio.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (y, p), (y_tangent, p_tangent) = primals, tangents
    ratio, inverse = _ratio(y, p), jnp.where((y == 0) & (p == 0), 0, 1 / p)
    return ratio, inverse * y_tangent - ratio * (inverse * p_tangent)


def _finite(x: Array) -> Array:
    """``x``, and 0 where it is infinite."""
    return jnp.where(jnp.isinf(x), 0, x)


@jax.custom_jvp
def shifted(x: Array, max_logit: Array) -> Array:
    """``x - max_logit``, and 0 where both are the same infinity; max_logit has no derivative."""
    return _replace_new_nan(x - max_logit, x, 0)


@shifted.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return shifted(*primals), tangents[0]


def _replace_new_nan(result: Array, x: Array, replacement: ArrayLike) -> Array:
    """The result, with NaN replaced where it comes from infinity minus infinity.

    A NaN of ``x`` stays. With a comparison of ``x`` and the other infinity instead, XLA would need
    more than one kernel for a softmax on a GPU.
    """
    return jnp.where(jnp.isnan(result) & jnp.isinf(x), replacement, result)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def shifted_log_sum_exp(x: Array, max_logit: Array, axis_name: AxisName = None) -> Array:
    """The log-sum-exp of the logits minus the largest logit.

    The largest logit is not added back here, because a loss is a difference of logits: it would be
    rounded to the last digit of the largest one. The derivative of the largest logit is taken as
    zero and that of this number is the softmax, so the derivative of log-sum-exp, the sum of both,
    is right. The sum of exponentials is over the members of mapped axes too, if there are any.
    """
    sum_exp = sum_of(jnp.exp(shifted(x, max_logit[..., None])), x.ndim - 1)
    return jnp.log(sum_over_members(sum_exp, axis_name))


@shifted_log_sum_exp.defjvp
def _(
    axis_name: AxisName, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, max_logit), (x_tangent, _) = primals, tangents
    log_sum_exp_shifted = shifted_log_sum_exp(x, max_logit, axis_name)
    # Computed again: to keep the exponentials of the value would take the memory of the logits.
    softmax = jnp.exp(_log_softmax(x, max_logit[..., None], log_sum_exp_shifted[..., None]))
    return log_sum_exp_shifted, sum_over_members(jnp.sum(softmax * x_tangent, axis=-1), axis_name)


@jax.custom_jvp
def _log_softmax(x: Array, max_logit: Array, log_sum_exp_shifted: Array) -> Array:
    # Not of shifted logits, which XLA on a CPU would keep in memory from the value.
    log_softmax = (x - max_logit) - log_sum_exp_shifted
    return _replace_new_nan(log_softmax, x, -log_sum_exp_shifted)


@_log_softmax.defjvp
def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    x_tangent, _, log_sum_exp_tangent = tangents
    return _log_softmax(*primals), x_tangent - log_sum_exp_tangent


@jax.custom_jvp
def expected_surprise(y: Array, log_sum_exp_shifted: Array, x: Array, max_logit: Array) -> Array:
    """The sum over classes of label times (log-sum-exp minus logit): the cross-entropy.

    A class that is ruled out by a logit of minus infinity costs nothing if its label is 0, and the
    derivative with respect to its label is 0.
    """

    def in_one_pass(y: Array, log_sum_exp: Array, x: Array, max_logit: Array) -> Array:
        # Not of shifted logits, which XLA would keep in memory from the pass before.
        surprise = log_sum_exp - (x - max_logit)
        return sum_of(times_logit(y, _replace_new_nan(surprise, x, log_sum_exp)), y.ndim - 1)

    def with_exponentials(y: Array, log_sum_exp: Array, x: Array, max_logit: Array) -> Array:
        expected_logit = sum_of(times_logit(y, shifted(x, max_logit)), y.ndim - 1)
        return log_sum_exp[..., 0] * sum_of(y, y.ndim - 1) - expected_logit

    # A CPU makes a pass for each sum. Elsewhere, sums that do not need log_sum_exp are computed in
    # the same pass as it.
    ways = {"cpu": in_one_pass, "default": with_exponentials}
    rows = log_sum_exp_shifted[..., None], x, max_logit[..., None]
    return jax.lax.platform_dependent(y, *rows, **ways)


@expected_surprise.defjvp
def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    y, log_sum_exp_shifted, x, max_logit = primals
    y_tangent, log_sum_exp_tangent, x_tangent, _ = tangents
    surprise = _finite(log_sum_exp_shifted[..., None] - shifted(x, max_logit[..., None]))
    tangent = jnp.sum(y_tangent * surprise - y * x_tangent, -1)
    # JAX would sum the labels by a reduction of its own, which on a CPU is not fused.
    return expected_surprise(*primals), tangent + sum_of(y, y.ndim - 1) * log_sum_exp_tangent


def class_losses(
    max_logit: Array,
    log_sum_exp_shifted: Array,
    label_logit_shifted: Array,
    mean_logit_shifted: Array | None = None,
    *,
    label_smoothing: float,
    z_loss: float,
) -> Array:
    """Cross-entropy with integer labels, from statistics of the logits.

    Shifted numbers are relative to the largest logit. The mean is needed for label smoothing.
    """
    label_logit = label_logit_shifted
    if mean_logit_shifted is not None:
        label_logit = label_smoothing * mean_logit_shifted
        # Not added if its factor is 0, because it may be infinite.
        if label_smoothing != 1:
            label_logit += (1 - label_smoothing) * label_logit_shifted
    losses = log_sum_exp_shifted - label_logit
    return losses + z_losses(max_logit, log_sum_exp_shifted, z_loss) if z_loss else losses


def z_losses(max_logit: Array, log_sum_exp_shifted: Array, z_loss: float) -> Array:
    """``z_loss`` times log-sum-exp squared; if that is infinite, its derivative is taken as 0."""
    log_sum_exp = max_logit + log_sum_exp_shifted
    finite = _finite(log_sum_exp)
    # In this order a small factor keeps the square from overflowing.
    return jnp.where(jnp.isinf(log_sum_exp), jnp.inf, z_loss * finite * finite)
