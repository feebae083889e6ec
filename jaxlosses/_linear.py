"""The loss of a language model's last layer, without all of its logits in memory."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxlosses._blocks import BlockSize, plan_blocks
from jaxlosses._kernel import reduce_losses
from jaxlosses._labels import class_ids, nan_if_impossible, with_wide_labels
from jaxlosses._linear_statistics import Layer, logit_statistics
from jaxlosses._logits import class_losses
from jaxlosses._primitive import vary_alike
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
) -> Result:
    r"""``sparse_softmax_cross_entropy(hidden @ kernel + bias)`` from blocks of logits, in nats.

    $$l = \log \sum_c e^{x_c} - (1 - s)\, x_y - \frac{s}{C} \sum_c x_c
    + z \left(\log \sum_c e^{x_c}\right)^2, \quad x = a \tanh\frac{h K + b}{a}$$

    The logits are computed block by block, in float32 at least, and once more for the derivative,
    so that a gradient takes four matrix products instead of three. Temporary memory holds one block
    and, in float32, the gradient with respect to ``hidden``. It does not grow with the number of
    classes.

    A block is some of the classes or, where these are sharded, some of the tokens (then the float32
    gradient in memory is that of ``kernel``). How an array is sharded is known on an Explicit mesh,
    but not on an Auto mesh: if the classes are sharded there, pass ``block_size=(256, None)``, or
    every device gathers the whole kernel. If the number of tokens is symbolic (in ``jax.export``),
    a block is some of the classes, whose number must be fixed.

    Args:
        hidden: Real numbers ``[batch, d1, ..., dN, features]``.
        kernel: Real numbers ``[features, classes]``.
        labels: Integers ``[batch, d1, ..., dN]`` or ``[batch, d1, ..., dN, 1]``.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        bias: Real numbers ``[classes]``, the $b$ above; minus infinity rules a class out, unless
            there is a soft cap, which makes it $-a$.
        label_smoothing: The $s$ above, from 0 to 1.
        z_loss: The $z$ above, not negative; keeps the logits from drifting.
        logit_soft_cap: The $a$ above, from 1e-30 to 1e30; logits stay between $-a$ and $a$.
        ignore_index: Labels of this value have weight zero.
        block_size: How many classes a block has, or ``(tokens, None)``: about how many tokens.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"`` or ``"parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if ``kernel`` is not ``[features, classes]``, or there is no class; if ``bias``
            is not ``[classes]``; if the labels are not integers of the shape of ``hidden`` without
            the features; if the weights do not align; or if an option is out of its range.

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
    hidden, kernel = as_array("hidden", hidden), as_array("kernel", kernel)
    if kernel.ndim != 2 or hidden.shape[-1:] != kernel.shape[:1] or kernel.shape[1] == 0:
        raise ValueError(
            f"kernel must be [features, classes], with as many features as the last axis of hidden "
            f"has and at least one class, got kernel of shape {kernel.shape} and hidden of shape "
            f"{hidden.shape}"
        )
    classes = kernel.shape[1]
    bias = as_array("bias", jnp.zeros(classes, kernel.dtype) if bias is None else bias)
    hidden, kernel, bias = in_floats(hidden, kernel, bias)
    if bias.shape != (classes,):
        raise ValueError(f"bias must have shape ({classes},), got {bias.shape}")
    label_smoothing = check_number("label_smoothing", label_smoothing, largest=1)
    z_loss = check_number("z_loss", z_loss)
    if logit_soft_cap is not None:
        # Outside of these limits, logits divided by the cap would underflow or overflow.
        logit_soft_cap = check_number("logit_soft_cap", logit_soft_cap, 1e-30, 1e30)
    shape = (*hidden.shape[:-1], classes)
    labels, weights = class_ids(labels, weights, shape, ignore_index)
    if precision(hidden, kernel, bias, weights=weights) == jnp.float64:
        # All of it is cast, because one of them may be all that asks for it.
        hidden, kernel, bias = (x.astype(jnp.float64) for x in (hidden, kernel, bias))
    plan = plan_blocks(hidden, kernel, block_size)
    layer = Layer(plan, classes, logit_soft_cap, bool(label_smoothing))
    present = jnp.broadcast_to(weights.astype(bool), labels.shape)
    statistics = logit_statistics(layer, *vary_alike(hidden, kernel, bias, labels, present))

    def formula(*inputs: Array) -> Array:
        *statistics, y = inputs
        losses = class_losses(*statistics, label_smoothing=label_smoothing, z_loss=z_loss)
        return nan_if_impossible(losses, y, classes)

    # The statistics are inputs of the formula, so that derivatives at absent places are masked.
    inputs = [*statistics, labels]
    return reduce_losses(formula, inputs, weights, reduction=reduction, axis_name=axis_name)
