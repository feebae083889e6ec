"""Losses of probabilities and logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlosses._kernel import reduce_losses
from jaxlosses._labels import (
    check_shards,
    class_ids,
    is_label,
    nan_if_impossible,
    num_shards,
    shard_index,
    with_wide_labels,
)
from jaxlosses._logits import (
    binary_cross_entropy,
    class_losses,
    expected_surprise,
    shifted,
    shifted_log_sum_exp,
    times_log,
    times_logit,
    z_losses,
)
from jaxlosses._reduce import (
    max_and_pick,
    max_of,
    max_over_members,
    size_of,
    sum_of,
    sum_over_members,
)
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
    axis_names,
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
    $0 \log 0$ is taken as 0, so that a perfect prediction has loss 0 also if epsilon is 0.

    Args:
        predictions: Probabilities ``[batch, d1, ..., dN]``.
        labels: Probabilities (0 and 1, or between) of the same shape.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        epsilon: Keeps the logarithms finite; not negative.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"``, ``"parts"``, or
            ``"average_parts"``.
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
        # XLA would compute (1 + epsilon) - p, and 1 + epsilon has one correct digit of epsilon.
        info = jnp.finfo(p.dtype)
        complement = jax.lax.reduce_precision(1 - p, info.nexp, info.nmant)
        return -times_log(y, p + epsilon) - times_log(1 - y, complement + epsilon)

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
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"``, ``"parts"``, or
            ``"average_parts"``.
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
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"``, ``"parts"``, or
            ``"average_parts"``.
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
        return binary_cross_entropy(x, y * (1 - label_smoothing) + label_smoothing / 2)

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
    class_axis_name: AxisName = None,
) -> Result:
    r"""Cross-entropy of class logits against class probabilities, in nats.

    $$l = -\sum_c y_c \log \text{softmax}(x)_c + z \left(\log \sum_c e^{x_c}\right)^2,
    \quad y_c \leftarrow y_c (1 - s) + s / C$$

    A logit of minus infinity rules a class out: it adds 0 to the loss if the label is 0, and
    infinity if not. With label smoothing no label is 0.

    A row of labels that are all 0 (such as the one-hot encoding of -100) still counts. To make such
    positions absent, pass ``weights=labels.sum(-1)``.

    Args:
        logits: Real numbers ``[batch, d1, ..., dN, classes]``.
        labels: Probabilities of the same shape, whose sum over the classes is 1.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        label_smoothing: The $s$ above, from 0 to 1.
        z_loss: The $z$ above, not negative; keeps the logits from drifting.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"``, ``"parts"``, or
            ``"average_parts"``.
        axis_name: Mapped axes to reduce over as well.
        class_axis_name: Mapped axes (of ``shard_map``) over whose members the classes are sharded,
            in this order. Logits and labels then have only a member's own classes.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the shapes differ, there is no class, the weights do not align,
            ``label_smoothing`` is outside of [0, 1], ``z_loss`` is negative, or ``class_axis_name``
            and ``axis_name`` share an axis.

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
    _check_classes(inputs[0], axis_name, class_axis_name)
    label_smoothing = check_number("label_smoothing", label_smoothing, largest=1)
    z_loss = check_number("z_loss", z_loss)

    def formula(x: Array, y: Array) -> Array:
        classes = size_of((*x.shape[-1:], num_shards(class_axis_name)), x.dtype)
        y = y * (1 - label_smoothing) + label_smoothing / classes
        max_logit = max_over_members(max_of(x, x.ndim - 1), class_axis_name)
        log_sum_exp_shifted = shifted_log_sum_exp(x, max_logit, class_axis_name)
        losses = sum_over_members(
            expected_surprise(y, log_sum_exp_shifted, x, max_logit), class_axis_name
        )
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
    class_axis_name: AxisName = None,
) -> Result:
    r"""Cross-entropy of class logits against integer labels, in nats.

    $$l = \log \sum_c e^{x_c} - (1 - s)\, x_y - \frac{s}{C} \sum_c x_c
    + z \left(\log \sum_c e^{x_c}\right)^2$$

    A label outside of ``[0, classes)`` gives NaN in value and gradient where its weight is not
    zero, and ``checkify.checkify`` around the call reports the label. 64-bit NumPy labels are
    checked before JAX truncates them to 32 bits, but inside of your own ``jax.jit`` it already has.

    Args:
        logits: Real numbers ``[batch, d1, ..., dN, classes]``.
        labels: Integers ``[batch, d1, ..., dN]`` or ``[batch, d1, ..., dN, 1]``.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        label_smoothing: The $s$ above, from 0 to 1.
        z_loss: The $z$ above, not negative; keeps the logits from drifting.
        ignore_index: Labels of this value have weight zero.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"``, ``"parts"``, or
            ``"average_parts"``.
        axis_name: Mapped axes to reduce over as well.
        class_axis_name: Mapped axes (of ``shard_map``) over whose members the classes are sharded,
            in this order. Logits then have only a member's own classes; labels are ids among the
            classes of all members.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the labels are not integers of the logits' shape without the classes, there
            is no class, the weights do not align, ``label_smoothing`` is outside of [0, 1],
            ``z_loss`` is negative, ``ignore_index`` does not fit the labels' dtype, or
            ``class_axis_name`` and ``axis_name`` share an axis.

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
    _check_classes(logits, axis_name, class_axis_name)
    label_smoothing = check_number("label_smoothing", label_smoothing, largest=1)
    z_loss = check_number("z_loss", z_loss)
    *shape, shard = logits.shape
    classes = shard * num_shards(class_axis_name)
    labels, weights = class_ids(labels, weights, (*shape, classes), ignore_index)

    def formula(x: Array, y: Array) -> Array:
        mask = is_label(y, x.shape, shard_index(class_axis_name) * shard)
        max_logit, label_logit = max_and_pick(x, mask)
        max_logit = max_over_members(max_logit, class_axis_name)
        label_logit = sum_over_members(label_logit, class_axis_name)
        log_sum_exp_shifted = shifted_log_sum_exp(x, max_logit, class_axis_name)
        statistics = [max_logit, log_sum_exp_shifted, shifted(label_logit, max_logit)]
        if label_smoothing:
            total = sum_over_members(
                sum_of(shifted(x, max_logit[..., None]), x.ndim - 1), class_axis_name
            )
            statistics.append(total / size_of([classes], x.dtype))
        losses = class_losses(*statistics, label_smoothing=label_smoothing, z_loss=z_loss)
        return nan_if_impossible(losses, y, classes)

    options = {"reduction": reduction, "axis_name": axis_name}
    return reduce_losses(formula, [logits, labels], weights, num_inner_axes=1, **options)


def _check_classes(logits: Array, axis_name: AxisName, class_axis_name: AxisName) -> None:
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have a last axis of classes, got shape {logits.shape}")
    if set(axis_names(axis_name)) & set(axis_names(class_axis_name)):
        raise ValueError(
            f"class_axis_name must be other axes than axis_name, because members that share the "
            f"classes of a loss would each add the whole loss; got class_axis_name="
            f"{class_axis_name!r} and axis_name={axis_name!r}"
        )
    check_shards("logits", logits, class_axis_name)
