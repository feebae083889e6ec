"""Losses of probabilities and logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxlosses._kernel import reduce_losses
from jaxlosses._labels import class_ids, is_label, nan_if_impossible, with_wide_labels
from jaxlosses._reduce import max_and_pick, max_of, size_of, sum_of
from jaxlosses._typing import (
    AxisName,
    ClassIds,
    ClassLogits,
    ClassProbabilities,
    Logits,
    Probabilities,
    Reduction,
    Result,
    Weights,
    as_floats,
    check_number,
    jit,
)


@jit
def log_loss(
    predictions: Probabilities,
    labels: Probabilities,
    weights: Weights = 1.0,
    *,
    epsilon: float = 1e-7,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Result:
    r"""Binary cross-entropy of probabilities, in nats.

    $$l = -y \log(p + \epsilon) - (1 - y) \log(1 - p + \epsilon)$$

    Nothing is clipped: a prediction beyond $[-\epsilon, 1 + \epsilon]$ gives NaN, as in TensorFlow.
    The limit of $y \log y$ at 0 is taken as its value, so that a perfect fit costs 0 without an
    epsilon too.

    Args:
        predictions: Probabilities ``[batch, d1, ..., dN]``.
        labels: Probabilities (0 and 1, or between) of the same shape.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        epsilon: Keeps the logarithms finite; not negative.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"`` or ``"parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the shapes differ, the weights do not align, or ``epsilon`` is negative.

    References:
        ``tf.contrib.losses.log_loss``, TensorFlow 1.15.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> print(jl.log_loss(jnp.array([0.5, 0.5]), jnp.array([0.0, 1.0])).round(4))
        0.6931
    """
    inputs = as_floats(predictions=predictions, labels=labels)
    epsilon = check_number("epsilon", epsilon)

    def formula(p: Array, y: Array) -> Array:
        # XLA would add 1 and epsilon first, whose sum has one digit of epsilon left.
        info = jnp.finfo(p.dtype)
        complement = jax.lax.reduce_precision(1 - p, info.nexp, info.nmant)
        return -_times_log(y, p + epsilon) - _times_log(1 - y, complement + epsilon)

    return reduce_losses(formula, inputs, weights, reduction=reduction, axis_name=axis_name)


@jit
def hinge_loss(
    logits: Logits,
    labels: Probabilities,
    weights: Weights = 1.0,
    *,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Result:
    r"""Hinge loss of a binary decision; its derivative at the kink is 0.

    $$l = \max(0,\ 1 - (2y - 1)\, x)$$

    Args:
        logits: Real numbers ``[batch, d1, ..., dN]``, positive for class 1.
        labels: 0 or 1, of the same shape.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"`` or ``"parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the shapes differ, or the weights do not align.

    References:
        ``tf.contrib.losses.hinge_loss``, TensorFlow 1.15 (which does not reduce it).

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> print(jl.hinge_loss(jnp.array([0.5, -2.0]), jnp.array([1, 0])))
        0.25
    """
    inputs = as_floats(logits=logits, labels=labels)

    def formula(x: Array, y: Array) -> Array:
        return jax.nn.relu(1 - times_logit(2 * y - 1, x))

    return reduce_losses(formula, inputs, weights, reduction=reduction, axis_name=axis_name)


@jit
def sigmoid_cross_entropy(
    logits: Logits,
    labels: Probabilities,
    weights: Weights = 1.0,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Result:
    r"""Binary cross-entropy of logits, in nats; each class is decided on its own.

    $$l = -y \log \sigma(x) - (1 - y) \log(1 - \sigma(x)), \quad y \leftarrow y (1 - s) + s / 2$$

    Args:
        logits: Real numbers ``[batch, d1, ..., dN]``.
        labels: Probabilities (0 and 1, or between) of the same shape.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        label_smoothing: The $s$ above, from 0 to 1.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"`` or ``"parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the shapes differ, the weights do not align, or ``label_smoothing`` is
            outside of [0, 1].

    References:
        ``tf.contrib.losses.sigmoid_cross_entropy``, TensorFlow 1.15.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> print(jl.sigmoid_cross_entropy(jnp.array([0.0, 90.0]), jnp.array([1, 1])).round(4))
        0.3466
    """
    inputs = as_floats(logits=logits, labels=labels)
    label_smoothing = check_number("label_smoothing", label_smoothing, largest=1)

    def formula(x: Array, y: Array) -> Array:
        return _binary_cross_entropy(x, y * (1 - label_smoothing) + label_smoothing / 2)

    return reduce_losses(formula, inputs, weights, reduction=reduction, axis_name=axis_name)


@jit
def softmax_cross_entropy(
    logits: ClassLogits,
    labels: ClassProbabilities,
    weights: Weights = 1.0,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Result:
    r"""Cross-entropy of class logits against class probabilities, in nats.

    $$l = -\sum_c y_c \log \text{softmax}(x)_c + z \left(\log \sum_c e^{x_c}\right)^2,
    \quad y_c \leftarrow y_c (1 - s) + s / C$$

    A logit of minus infinity where the label is 0 is a class ruled out, and costs nothing. With
    label smoothing no label is 0.

    A row of labels that are all 0 (the one-hot of -100, or of a place to ignore) has no class, and
    counts as a loss of 0. To make such places absent, weigh each by the sum of its labels.

    Args:
        logits: Real numbers ``[batch, d1, ..., dN, classes]``.
        labels: Probabilities of the same shape, whose sum over the classes is 1.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        label_smoothing: The $s$ above, from 0 to 1.
        z_loss: The $z$ above, not negative; keeps the logits from drifting.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"`` or ``"parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the shapes differ, there is no class, the weights do not align,
            ``label_smoothing`` is outside of [0, 1], or ``z_loss`` is negative.

    References:
        ``tf.contrib.losses.softmax_cross_entropy``, TensorFlow 1.15. The z-loss is from Chowdhery
        et al., "PaLM: scaling language modeling with pathways", 2022.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> logits, labels = jnp.zeros((2, 2)), jnp.array([[0.0, 1.0], [0.0, 0.0]])
        >>> print(jl.softmax_cross_entropy(logits, labels, weights=labels.sum(-1)).round(4))
        0.6931
    """
    inputs = as_floats(logits=logits, labels=labels)
    _check_classes(inputs[0])
    label_smoothing = check_number("label_smoothing", label_smoothing, largest=1)
    z_loss = check_number("z_loss", z_loss)

    def formula(x: Array, y: Array) -> Array:
        y = y * (1 - label_smoothing) + label_smoothing / size_of(x.shape[-1:], x.dtype)
        max_logit = max_of(x, x.ndim - 1)
        log_sum_exp_shifted = _log_sum_exp_shifted(x, max_logit)
        losses = _expected(y, log_sum_exp_shifted, x, max_logit)
        return losses + z_losses(max_logit, log_sum_exp_shifted, z_loss) if z_loss else losses

    options = {"reduction": reduction, "axis_name": axis_name}
    return reduce_losses(formula, inputs, weights, num_inner_axes=1, **options)


@with_wide_labels
@jit
def sparse_softmax_cross_entropy(
    logits: ClassLogits,
    labels: ClassIds,
    weights: Weights = 1.0,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Result:
    r"""Cross-entropy of class logits against one class each, in nats.

    $$l = \log \sum_c e^{x_c} - (1 - s)\, x_y - \frac{s}{C} \sum_c x_c
    + z \left(\log \sum_c e^{x_c}\right)^2$$

    A label outside of ``[0, classes)`` gives NaN in value and gradient where its weight is not
    zero, and ``checkify.checkify`` of whatever calls this reports the label. NumPy labels of 64
    bits are checked as they are; inside of your own ``jax.jit`` JAX has cut them to 32 bits before.

    Args:
        logits: Real numbers ``[batch, d1, ..., dN, classes]``.
        labels: Integers ``[batch, d1, ..., dN]``, or with a last axis of one more.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        label_smoothing: The $s$ above, from 0 to 1.
        z_loss: The $z$ above, not negative; keeps the logits from drifting.
        ignore_index: Labels of this value have weight zero.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"`` or ``"parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the labels are not integers of the logits' shape without the classes, there
            is no class, the weights do not align, ``label_smoothing`` is outside of [0, 1],
            ``z_loss`` is negative, or ``ignore_index`` is no value of the labels' dtype.

    References:
        ``tf.contrib.losses.sparse_softmax_cross_entropy``, TensorFlow 1.15.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> logits, labels = jnp.zeros((3, 2)), jnp.array([1, 0, -100])
        >>> print(jl.sparse_softmax_cross_entropy(logits, labels, ignore_index=-100).round(4))
        0.6931
    """
    (logits,) = as_floats(logits=logits)
    _check_classes(logits)
    label_smoothing = check_number("label_smoothing", label_smoothing, largest=1)
    z_loss = check_number("z_loss", z_loss)
    labels, weights = class_ids(labels, weights, logits.shape, ignore_index)

    def formula(x: Array, y: Array) -> Array:
        max_logit, label_logit = max_and_pick(x, is_label(y, x.shape))
        log_sum_exp_shifted = _log_sum_exp_shifted(x, max_logit)
        statistics = [max_logit, log_sum_exp_shifted, shifted(label_logit, max_logit)]
        if label_smoothing:
            total = sum_of(shifted(x, max_logit[..., None]), x.ndim - 1)
            statistics.append(total / size_of(x.shape[-1:], x.dtype))
        losses = class_losses(*statistics, label_smoothing=label_smoothing, z_loss=z_loss)
        return nan_if_impossible(losses, y, x.shape[-1])

    options = {"reduction": reduction, "axis_name": axis_name}
    return reduce_losses(formula, [logits, labels], weights, num_inner_axes=1, **options)


@jax.custom_jvp
def _binary_cross_entropy(x: Array, y: Array) -> Array:
    # softplus(x) = softplus(-x) + x: the tail on the label's own side keeps its digits.
    is_one = y > 0.5
    wrong = jnp.where(is_one, -x, x)  # The logit of the class that is less probable.
    probability = jnp.where(is_one, 1 - y, y)
    # Infinity less infinity would be NaN, and so would infinity times 0.
    product = probability * jnp.minimum(wrong, jnp.finfo(x.dtype).max)
    return jax.nn.softplus(wrong) - jnp.where(probability == 0, 0, product)


@_binary_cross_entropy.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, y), (x_tangent, y_tangent) = primals, tangents
    sign = 1 - 2 * (y > 0.5).astype(x.dtype)
    # Not nearest - y, which XLA would then keep in memory from the value to the gradient.
    derivative = sign * jax.nn.sigmoid(sign * x) - (y - (1 - sign) / 2)
    return _binary_cross_entropy(x, y), derivative * x_tangent - _finite(x) * y_tangent


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
def _times_log(y: Array, p: Array) -> Array:
    """``y * log(p)``, and 0 where both are 0; there its derivatives are taken as 0 too."""
    return jnp.where((y == 0) & (p == 0), 0, y * jnp.log(p))


@_times_log.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (y, p), (y_tangent, p_tangent) = primals, tangents
    of_y = jnp.where((y == 0) & (p == 0), 0, jnp.log(p))
    return _times_log(y, p), of_y * y_tangent + _ratio(y, p) * p_tangent


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
    """``x - max_logit``, and 0 where both are the same infinity; the maximum is a constant."""
    return _replace_new_nan(x - max_logit, x, 0)


@shifted.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return shifted(*primals), tangents[0]


def _replace_new_nan(result: Array, x: Array, replacement: ArrayLike) -> Array:
    """The result, and something else where it is NaN because infinity was taken from infinity.

    A NaN of ``x`` stays. To compare ``x`` with the other infinity instead would cost a softmax its
    one kernel on a GPU.
    """
    return jnp.where(jnp.isnan(result) & jnp.isinf(x), replacement, result)


@jax.custom_jvp
def _log_sum_exp_shifted(x: Array, max_logit: Array) -> Array:
    """The logarithm of the sum of exponentials of the logits, less the largest logit.

    The two are kept apart because a loss is a difference of logits: adding the largest one first
    would round the loss to that logit's last digit. The largest one has a derivative of zero; the
    derivative of the sum of both is right all the same.
    """
    return jnp.log(sum_of(jnp.exp(shifted(x, max_logit[..., None])), x.ndim - 1))


@_log_sum_exp_shifted.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, max_logit), (x_tangent, _) = primals, tangents
    log_sum_exp_shifted = _log_sum_exp_shifted(x, max_logit)
    # From the logits again: to keep what the value had would take as much memory as the logits.
    softmax = jnp.exp(_log_softmax(x, max_logit[..., None], log_sum_exp_shifted[..., None]))
    return log_sum_exp_shifted, jnp.sum(softmax * x_tangent, axis=-1)


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
def _expected(y: Array, log_sum_exp_shifted: Array, x: Array, max_logit: Array) -> Array:
    """The mean of log-sum-exp less the logit over the classes, each as probable as its label says.

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

    # A CPU has a pass for each sum. Elsewhere sums that do not wait for log_sum_exp share its pass.
    ways = {"cpu": in_one_pass, "default": with_exponentials}
    rows = log_sum_exp_shifted[..., None], x, max_logit[..., None]
    return jax.lax.platform_dependent(y, *rows, **ways)


@_expected.defjvp
def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    y, log_sum_exp_shifted, x, max_logit = primals
    y_tangent, log_sum_exp_tangent, x_tangent, _ = tangents
    surprise = _finite(log_sum_exp_shifted[..., None] - shifted(x, max_logit[..., None]))
    tangent = jnp.sum(y_tangent * surprise - y * x_tangent, -1)
    # JAX would sum the labels by a reduction of its own, which on a CPU is not fused.
    return _expected(*primals), tangent + sum_of(y, y.ndim - 1) * log_sum_exp_tangent


def class_losses(
    max_logit: Array,
    log_sum_exp_shifted: Array,
    label_logit_shifted: Array,
    mean_logit_shifted: Array | None = None,
    *,
    label_smoothing: float,
    z_loss: float,
) -> Array:
    """Cross-entropy with one class each, from statistics of the logits.

    What is shifted is relative to the largest logit. The mean is needed where labels are smoothed.
    """
    label_logit = label_logit_shifted
    if mean_logit_shifted is not None:
        label_logit = label_smoothing * mean_logit_shifted
        # Not at all if its factor is 0, because it may be infinite.
        if label_smoothing != 1:
            label_logit += (1 - label_smoothing) * label_logit_shifted
    losses = log_sum_exp_shifted - label_logit
    return losses + z_losses(max_logit, log_sum_exp_shifted, z_loss) if z_loss else losses


def z_losses(max_logit: Array, log_sum_exp_shifted: Array, z_loss: float) -> Array:
    """The square of log-sum-exp; where that is infinite, its derivative is taken as 0."""
    log_sum_exp = max_logit + log_sum_exp_shifted
    finite = _finite(log_sum_exp)
    # In this order a factor that is small keeps the square from overflowing.
    return jnp.where(jnp.isinf(log_sum_exp), jnp.inf, z_loss * finite * finite)


def _check_classes(logits: Array) -> None:
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have a last axis of classes, got shape {logits.shape}")
