"""What a language model's last layer predicts, without all of its logits in memory."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxlosses._blocks import BlockSize, check_block_size
from jaxlosses._kernel import reduce_losses
from jaxlosses._labels import (
    as_class_ids,
    check_shards,
    class_ids,
    is_class,
    nan_if_impossible,
    num_shards,
    with_wide_labels,
)
from jaxlosses._layout import InSpecs, plan_layout
from jaxlosses._linear_derivative import logit_statistics
from jaxlosses._linear_layer import Layer, Statistics
from jaxlosses._logits import class_losses
from jaxlosses._typing import (
    AxisName,
    Bias,
    ClassIds,
    Hidden,
    Kernel,
    Reduction,
    Result,
    Weights,
    as_array,
    check_number,
    in_floats,
    is_integer,
    jit,
    precision,
)


@with_wide_labels
@jit
def linear_softmax_cross_entropy(
    hidden: Hidden,
    kernel: Kernel,
    labels: ClassIds,
    weights: Weights = 1.0,
    *,
    bias: Bias | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_soft_cap: float | None = None,
    ignore_index: int | None = None,
    block_size: BlockSize = None,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
    in_specs: InSpecs = None,
) -> Result:
    r"""``sparse_softmax_cross_entropy(hidden @ kernel + bias)`` from blocks of logits, in nats.

    $$l = \log \sum_c e^{x_c} - (1 - s)\, x_y - \frac{s}{C} \sum_c x_c
    + z \left(\log \sum_c e^{x_c}\right)^2, \quad x = a \tanh\frac{h K + b}{a}$$

    **On an Auto mesh, pass** ``in_specs``. JAX does not show there how arrays are sharded, and
    without ``in_specs`` every device may gather the whole kernel for every block (hundreds of
    gigabytes in a step of a large model). They are written as for ``shard_map``, and the call is
    inside of ``jax.set_mesh(mesh)``::

        in_specs=(PartitionSpec("data", None, None), PartitionSpec(None, "model"))

    An Explicit mesh shows how arrays are sharded. Inside of your own ``shard_map``, ``axis_name``
    names the axes that shard tokens, and ``class_axis_name`` those that shard classes; labels are
    ids among the classes of all devices. An axis in both shards tokens and classes (FSDP). Each
    device then holds only its own tokens, its own classes and one block of the other devices'
    classes, which it gathers.

    The logits are computed block by block, in float32 at least, and once more for the derivative,
    so that a gradient takes four matrix products instead of three. Temporary memory on each device
    holds one block and, in float32, the gradient with respect to ``hidden`` or to ``kernel``,
    whichever is smaller. A block is some of the classes, or if a device has more tokens than
    classes, some of the tokens. By default its logits take about 8 MB on a CPU, 64 MB on a TPU and
    256 MB on a GPU. If it is not known how arrays are sharded, or if the number of tokens is
    symbolic (in ``jax.export``), a block is some of the classes, whose number must be fixed.

    **Precision.** Factors have the dtype of ``hidden`` and ``kernel``, and products are summed in
    float32 at least; ``jax.default_matmul_precision`` applies. If one is bfloat16 and the other
    float32 (Flax's ``param_dtype``), TPUs and GPUs multiply in bfloat16, as Flax does, unless
    ``jax.default_matmul_precision`` asks for more. CPUs then multiply in float32.

    **Padded vocabularies.** Remove classes that only pad the kernel to a round number by slicing
    it, ``kernel[:, :num_classes]``. A bias of minus infinity rules a class out too, but not with a
    soft cap, which makes the logit $-a$, so that the class keeps a share of the probability.

    Args:
        hidden: Real numbers ``[batch, d1, ..., dN, features]``.
        kernel: Real numbers ``[features, classes]``.
        labels: Integers ``[batch, d1, ..., dN]`` or ``[batch, d1, ..., dN, 1]``.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        bias: Real numbers ``[classes]``, the $b$ above.
        label_smoothing: The $s$ above, from 0 to 1.
        z_loss: The $z$ above, not negative; keeps the logits from drifting.
        logit_soft_cap: The $a$ above, from 1e-30 to 1e30; logits stay between $-a$ and $a$.
        ignore_index: Labels of this value have weight zero.
        block_size: How many classes a block has, or ``(tokens, None)``: about how many tokens. If
            it is known how the arrays are sharded, this is the number on each device.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"``, ``"parts"``, or
            ``"average_parts"``.
        axis_name: Mapped axes to reduce over as well.
        class_axis_name: Axes of a ``shard_map`` around the call over whose members the classes of
            ``kernel`` and ``bias`` are sharded, in this order. Members have the same tokens; or
            their own tokens if the axis is in ``axis_name`` too, or if ``hidden`` or ``labels``
            are known to vary over it. (``shard_map`` knows this unless ``check_vma`` is off.)
        in_specs: How ``hidden`` and ``kernel`` are sharded: two ``PartitionSpec``. The bias is
            sharded as the kernel's classes are.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if ``kernel`` is not ``[features, classes]``, or there is no class; if ``bias``
            is not ``[classes]``; if the labels are not integers of the shape of ``hidden`` without
            the features; if the weights do not align; if ``in_specs`` do not fit the
            arrays or the mesh; or if an option is out of its range.

    References:
        ``tf.contrib.losses.sparse_softmax_cross_entropy``, TensorFlow 1.15. Wijmans et al., "Cut
        your losses in large-vocabulary language models", 2024. The soft cap is from Gemma Team,
        "Gemma 2", 2024, the z-loss from Chowdhery et al., "PaLM: scaling language modeling with
        pathways", 2022.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> hidden, kernel = jnp.ones((3, 4)), jnp.zeros((4, 2))
        >>> labels = jnp.array([1, 0, -100])
        >>> loss = jl.linear_softmax_cross_entropy(hidden, kernel, labels, ignore_index=-100)
        >>> print(loss.round(4))
        0.6931
    """
    layer, inputs = _last_layer(
        hidden,
        kernel,
        labels,
        weights,
        bias=bias,
        logit_soft_cap=logit_soft_cap,
        ignore_index=ignore_index,
        block_size=block_size,
        axis_name=axis_name,
        class_axis_name=class_axis_name,
        in_specs=in_specs,
    )
    label_smoothing = check_number("label_smoothing", label_smoothing, largest=1)
    z_loss = check_number("z_loss", z_loss)
    layer = dataclasses.replace(layer, needs_mean=bool(label_smoothing))
    labels, weights = inputs.labels, inputs.weights
    present = jnp.broadcast_to(weights.astype(bool), labels.shape)
    statistics = inputs.statistics(layer, present)

    def formula(*inputs: Array) -> Array:
        *statistics, y = inputs
        losses = class_losses(*statistics, label_smoothing=label_smoothing, z_loss=z_loss)
        return nan_if_impossible(losses, y, layer.classes)

    # The statistics are inputs of the formula, so that derivatives at absent positions are masked.
    used = [s for s in statistics if s is not None]
    return reduce_losses(
        formula, [*used, labels], weights, reduction=reduction, axis_name=axis_name
    )


class LogProbs(NamedTuple):
    r"""What a last layer predicts at each position: the result of :func:`linear_log_probs`.

    It is a named tuple, and so a pytree. All arrays have the shape of the labels,
    ``[batch, d1, ..., dN]``. They are float32 at least, and ``is_top`` is boolean.

    Attributes:
        label: The log-probability of the label, in nats.
        entropy: The entropy of the prediction, in nats.
        log_partition: The logarithm of the sum of exponentials, whose square is a z-loss.
        is_top: Whether no class has a larger logit than the label (another one may be equal); its
            mean is the accuracy.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> hidden, kernel, labels = jnp.ones((2, 1)), jnp.array([[1.0, 2.0]]), jnp.array([1, 0])
        >>> log_probs = jl.linear_log_probs(hidden, kernel, labels)
        >>> print(log_probs.is_top, log_probs.is_top.mean())  # and the accuracy
        [ True False] 0.5
    """

    label: Array
    entropy: Array
    log_partition: Array
    is_top: Array


jax.export.register_namedtuple_serialization(LogProbs, serialized_name=f"{__package__}.LogProbs")


@with_wide_labels
@jit
def linear_log_probs(
    hidden: Hidden,
    kernel: Kernel,
    labels: ClassIds,
    *,
    bias: Bias | None = None,
    temperature: float = 1.0,
    logit_soft_cap: float | None = None,
    block_size: BlockSize = None,
    class_axis_name: AxisName = None,
    in_specs: InSpecs = None,
) -> LogProbs:
    r"""A last layer's log-probability of each label, and entropy, from blocks of logits, in nats.

    $$\log p_y = \frac{x_y}{\tau} - \log Z, \quad
    H = -\sum_c p_c \log p_c, \quad
    \log Z = \log \sum_c e^{x_c / \tau}, \quad x = a \tanh\frac{h K + b}{a}$$

    DPO, PPO, GRPO, distillation on chosen tokens, accuracy and perplexity are computed from these.
    It needs as little memory as :func:`linear_softmax_cross_entropy`, whose docstring explains
    blocks and meshes. Inside of ``jax.jit``, results that are not used are not computed.

    There are no weights here, and no label is ignored. Give the weights to the loss that you
    compute from the results: ``compute_weighted_loss(-log_probs.label, weights)``. An absent token
    may hold NaN and an impossible label. Its results then have no meaning, and it has no gradient
    if they are masked, by that loss or by ``jnp.where`` (not by a product: zero times NaN is NaN).
    A label outside of ``[0, classes)`` has the log-probability NaN; ``checkify`` does not report
    it.

    Args:
        hidden: Real numbers ``[batch, d1, ..., dN, features]``.
        kernel: Real numbers ``[features, classes]``.
        labels: Integers ``[batch, d1, ..., dN]`` or ``[batch, d1, ..., dN, 1]``.
        bias: Real numbers ``[classes]``, the $b$ above.
        temperature: The $\tau$ above, from 1e-30 to 1e30.
        logit_soft_cap: The $a$ above, from 1e-30 to 1e30.
        block_size: How many classes a block has, or ``(tokens, None)``: about how many tokens.
        class_axis_name: As in :func:`linear_softmax_cross_entropy`. With ``check_vma`` off, all its
            members must have the same tokens.
        in_specs: How ``hidden`` and ``kernel`` are sharded: two ``PartitionSpec``.

    Returns:
        ``LogProbs(label, entropy, log_partition, is_top)``, arrays of the labels' shape, float32 at
        least, and ``is_top`` boolean. All except ``is_top`` are differentiable.

    Raises:
        ValueError: if ``kernel`` is not ``[features, classes]``, or there is no class; if ``bias``
            is not ``[classes]``; if the labels are not integers of the shape of ``hidden`` without
            the features; if ``in_specs`` do not fit the arrays or the mesh; or if an option is out
            of its range.

    References:
        Rafailov et al., "Direct preference optimization", 2023; Shao et al., "DeepSeekMath", 2024
        (GRPO). The blocks are as in Wijmans et al., "Cut your losses in large-vocabulary language
        models", 2024.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> hidden, kernel = jnp.ones((3, 4)), jnp.zeros((4, 2))
        >>> log_probs = jl.linear_log_probs(hidden, kernel, jnp.array([1, 0, 1]))
        >>> print(log_probs.label.round(4), log_probs.entropy.round(4), log_probs.is_top)
        [-0.6931 -0.6931 -0.6931] [0.6931 0.6931 0.6931] [ True  True  True]
    """
    layer, inputs = _last_layer(
        hidden,
        kernel,
        labels,
        1.0,
        checks_labels=False,
        bias=bias,
        logit_soft_cap=logit_soft_cap,
        ignore_index=None,
        block_size=block_size,
        axis_name=None,
        class_axis_name=class_axis_name,
        in_specs=in_specs,
    )
    temperature = check_number("temperature", temperature, 1e-30, 1e30)
    options = {"temperature": temperature, "needs_expected": True, "masks_all_absent": True}
    layer = dataclasses.replace(layer, **options)
    # Other tokens are masked. If their results are used in a gradient, it is NaN.
    finite = jnp.isfinite(jnp.sum(jnp.square(inputs.hidden.astype(inputs.dtype)), -1))
    possible = is_class(inputs.labels, layer.classes)
    statistics = inputs.statistics(layer, finite & possible)
    max_logit, log_sum_exp, label_logit, _, expected_logit = statistics
    assert expected_logit is not None
    return LogProbs(
        jnp.where(possible, label_logit - log_sum_exp, jnp.nan),
        log_sum_exp - expected_logit,
        max_logit + log_sum_exp,
        (label_logit >= 0) & possible,
    )


class _Inputs(NamedTuple):
    """The checked arrays of a last layer."""

    hidden: Array
    kernel: Array
    bias: Array
    labels: Array
    weights: Array

    @property
    def dtype(self) -> Any:
        """The dtype in which the statistics are computed."""
        return precision(self.hidden, self.kernel, self.bias)

    def statistics(self, layer: Layer, present: Array) -> Statistics:
        """The statistics of the logits; tokens that are ``present`` are never masked."""
        layout = layer.layout
        found = logit_statistics(
            layer,
            layout.place("hidden", self.hidden),
            layout.place("kernel", self.kernel),
            layout.place("bias", self.bias),
            layout.place("tokens", self.labels),
            layout.place("tokens", present),
        )
        return layer.named([layout.place_back(s, self.hidden) for s in found])


def _last_layer(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    checks_labels: bool = True,
    bias: ArrayLike | None,
    logit_soft_cap: float | None,
    ignore_index: int | None,
    block_size: BlockSize,
    axis_name: AxisName,
    class_axis_name: AxisName,
    in_specs: InSpecs,
) -> tuple[Layer, _Inputs]:
    """The layer and its arrays, checked; of the labels also the values, if ``checks_labels``."""
    hidden, kernel = as_array("hidden", hidden), as_array("kernel", kernel)
    if kernel.ndim != 2 or hidden.shape[-1:] != kernel.shape[:1] or kernel.shape[1] == 0:
        raise ValueError(
            f"kernel must be [features, classes], with as many features as the last axis of hidden "
            f"has and at least one class, got kernel of shape {kernel.shape} and hidden of shape "
            f"{hidden.shape}"
        )
    if not is_integer(kernel.shape[1]):
        raise ValueError(
            f"kernel must have a fixed number of classes, only the number of tokens may be "
            f"symbolic; got shape {kernel.shape}"
        )
    has_bias = bias is not None
    bias = as_array("bias", jnp.zeros(kernel.shape[1:], kernel.dtype) if bias is None else bias)
    hidden, kernel, bias = in_floats(hidden, kernel, bias)
    if bias.shape != kernel.shape[1:]:
        raise ValueError(f"bias must have shape {kernel.shape[1:]}, got {bias.shape}")
    if logit_soft_cap is not None:
        # Outside of these limits, logits divided by the cap would underflow or overflow.
        logit_soft_cap = check_number("logit_soft_cap", logit_soft_cap, 1e-30, 1e30)
    classes = kernel.shape[1]
    if in_specs is None:
        check_shards("kernel", kernel, class_axis_name)
        classes *= num_shards(class_axis_name)
    shape = (*hidden.shape[:-1], classes)
    if checks_labels:
        labels, weights = class_ids(labels, weights, shape, ignore_index)
    else:
        labels, weights = as_class_ids(labels, shape), jnp.ones((), jnp.float32)
    if precision(hidden, kernel, bias, weights=weights) == jnp.float64:
        # Cast all of them: one float64 array, or the weights, may be the reason.
        hidden, kernel, bias = (x.astype(jnp.float64) for x in (hidden, kernel, bias))
    layout = plan_layout(hidden, kernel, labels, in_specs, axis_name, class_axis_name)
    block_size = check_block_size(block_size)
    config: Any = jax.config
    asked = config.jax_default_matmul_precision
    options = {"has_bias": has_bias, "matmul_precision": asked}
    layer = Layer(layout, classes, block_size, logit_soft_cap, **options)
    return layer, _Inputs(hidden, kernel, bias, labels, weights)
