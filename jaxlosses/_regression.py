"""Losses of real-valued predictions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlosses._kernel import reduce_losses
from jaxlosses._masking import expand
from jaxlosses._reduce import size_of, sum_of
from jaxlosses._typing import (
    AxisName,
    Reals,
    Reduction,
    Result,
    SampleReals,
    UnitVectors,
    Weights,
    as_floats,
    check_axis,
    jit,
)


@jit
def compute_weighted_loss(
    losses: Reals,
    weights: Weights = 1.0,
    *,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Result:
    r"""Weigh and reduce losses that were computed elsewhere.

    $$\frac{\sum_i w_i\, l_i}{|\{i : w_i \ne 0\}|}$$

    The function that computed them is not masked: if its own derivative is not finite at an absent
    position, the gradient is NaN. :func:`weighted` masks the function too.

    Args:
        losses: Losses ``[batch, d1, ..., dN]``.
        weights: Weights, aligned with the losses from the left.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"``, ``"parts"``, or
            ``"average_parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the weights do not align with the losses.

    References:
        ``tf.contrib.losses.compute_weighted_loss``, TensorFlow 1.15.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> losses, weights = jnp.array([4.0, 1.0, 2.0, 3.0]), jnp.array([1.0, 0.5, 3.0, 9.0])
        >>> print(jl.compute_weighted_loss(losses, weights))  # (4*1 + 1*0.5 + 2*3 + 3*9) / 4
        9.375
    """
    inputs = as_floats(losses=losses)
    return reduce_losses(lambda l: l, inputs, weights, reduction=reduction, axis_name=axis_name)  # noqa: E741


@jit
def absolute_difference(
    predictions: Reals,
    labels: Reals,
    weights: Weights = 1.0,
    *,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Result:
    r"""Absolute difference, in the units of the predictions; its derivative at 0 is 0.

    $$l = |p - y|$$

    Args:
        predictions: Real numbers ``[batch, d1, ..., dN]``.
        labels: Real numbers of the same shape.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"``, ``"parts"``, or
            ``"average_parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the shapes differ, or the weights do not align.

    References:
        ``tf.contrib.losses.absolute_difference``, TensorFlow 1.15.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> print(jl.absolute_difference(jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0])))
        1.0
    """
    inputs = as_floats(predictions=predictions, labels=labels)

    def formula(p: Array, y: Array) -> Array:
        d = p - y
        return d * jnp.sign(d)  # Not abs, whose derivative at 0 is 1.

    return reduce_losses(formula, inputs, weights, reduction=reduction, axis_name=axis_name)


@jit
def mean_squared_error(
    predictions: Reals,
    labels: Reals,
    weights: Weights = 1.0,
    *,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Result:
    r"""Squared error, in the squared units of the predictions.

    $$l = (p - y)^2$$

    Args:
        predictions: Real numbers ``[batch, d1, ..., dN]``.
        labels: Real numbers of the same shape.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"``, ``"parts"``, or
            ``"average_parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the shapes differ, or the weights do not align.

    References:
        ``tf.contrib.losses.mean_squared_error``, TensorFlow 1.15.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> predictions, depths = jnp.array([1.5, 2.0]), jnp.array([1.0, jnp.nan])
        >>> print(jl.mean_squared_error(predictions, depths, jnp.isfinite(depths)))
        0.25
    """
    inputs = as_floats(predictions=predictions, labels=labels)

    def formula(p: Array, y: Array) -> Array:
        return jnp.square(p - y)

    return reduce_losses(formula, inputs, weights, reduction=reduction, axis_name=axis_name)


@jit
def mean_pairwise_squared_error(
    predictions: SampleReals,
    labels: SampleReals,
    weights: Weights = 1.0,
    *,
    reduction: Reduction = "sum",
    axis_name: AxisName = None,
) -> Result:
    r"""Squared error of the differences between pairs of elements of one sample.

    It is in the squared units of the predictions. A constant offset of a sample does not change it.
    The mean over all $n^2$ pairs is twice the variance of $d = p - y$:

    $$l = \frac{1}{n^2} \sum_{i,j} (d_i - d_j)^2 = \frac{2}{n} \sum_i (d_i - \bar d)^2$$

    The samples' losses are summed by default, as in TensorFlow.

    Args:
        predictions: Real numbers ``[batch, d1, ..., dN]``; a sample is all but the first axis.
        labels: Real numbers of the same shape.
        weights: Weights of the samples: a scalar, ``[batch]`` or ``[batch, 1]``.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"``, ``"parts"``, or
            ``"average_parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the shapes differ, there is no batch axis, or the weights do not align.

    References:
        ``tf.contrib.losses.mean_pairwise_squared_error``, TensorFlow 1.15. Eigen, Puhrsch and
        Fergus, "Depth map prediction from a single image using a multi-scale deep network", 2014.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> print(jl.mean_pairwise_squared_error(jnp.array([[7.0, 8.0]]), jnp.array([[0.0, 3.0]])))
        2.0
    """
    inputs = as_floats(predictions=predictions, labels=labels)
    if inputs[0].ndim == 0:
        raise ValueError("predictions must have a batch axis, got a scalar")

    def formula(p: Array, y: Array) -> Array:
        return 2 * _variance(p, y)

    options = {"reduction": reduction, "axis_name": axis_name}
    return reduce_losses(formula, inputs, weights, num_inner_axes=inputs[0].ndim - 1, **options)


@jit
def cosine_distance(
    predictions: UnitVectors,
    labels: UnitVectors,
    weights: Weights = 1.0,
    *,
    axis: int = -1,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Result:
    r"""Cosine distance of unit vectors, between 0 and 2.

    $$l = 1 - \sum_{\text{axis}} p\, y$$

    The vectors are not normalised here: do that first.

    Args:
        predictions: Unit vectors along ``axis``, of shape ``[batch, d1, ..., dN]``.
        labels: Unit vectors of the same shape.
        weights: Weights, aligned from the left with the shape without ``axis``.
        axis: The axis along which the vectors lie.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"``, ``"parts"``, or
            ``"average_parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if the shapes differ, ``axis`` is not one of their axes, or the weights do not
            align.

    References:
        ``tf.contrib.losses.cosine_distance``, TensorFlow 1.15.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> print(jl.cosine_distance(jnp.array([[0.0, 1.0]]), jnp.array([[0.6, 0.8]])).round(3))
        0.2
    """
    inputs = as_floats(predictions=predictions, labels=labels)
    axis = check_axis("axis", axis, inputs[0].ndim)
    inputs = [jnp.moveaxis(x, axis, -1) for x in inputs]

    def formula(p: Array, y: Array) -> Array:
        return 1 - sum_of(p * y, p.ndim - 1)

    options = {"reduction": reduction, "axis_name": axis_name}
    return reduce_losses(formula, inputs, weights, num_inner_axes=1, **options)


@jax.custom_jvp
def _variance(p: Array, y: Array) -> Array:
    """The variance of each sample's differences.

    Their mean is subtracted before they are squared, or squares would lose all digits where it is
    large.
    """
    mean, correction = _means(p, y)
    mean_square = sum_of(jnp.square((p - y) - expand(mean, p)), 1) / _sample_size(p)
    return jnp.maximum(mean_square - jnp.square(correction), 0)


@_variance.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (p, y), (p_tangent, y_tangent) = primals, tangents
    mean, correction = _means(p, y)
    centred = ((p - y) - expand(mean, p)) - expand(correction, p)
    # The terms of the derivative that come from the mean sum to 0.
    products = 2 * centred * (p_tangent - y_tangent)
    tangent = jnp.sum(products, tuple(range(1, products.ndim)))
    return _variance(p, y), tangent / _sample_size(p)


def _means(p: Array, y: Array) -> list[Array]:
    """The mean of each sample's differences, and the mean of the differences minus that mean.

    The first is rounded, maybe by more than the differences vary. The second is the error.
    """
    size = _sample_size(p)

    def in_one_kernel(p: Array, y: Array) -> list[Array]:
        mean = sum_of(p - y, 1) / size
        return [mean, sum_of((p - y) - expand(mean, p), 1) / size]

    def in_passes(p: Array, y: Array) -> list[Array]:
        # Not the sum of p - y, which XLA would then keep in memory from one pass to the next.
        mean = -sum_of(y - p, 1) / size
        return [mean, sum_of((p - y) - expand(mean, p), 1) / size]

    # A kernel on a GPU reads a sample once and keeps it, and a TPU keeps p - y for the gradient.
    ways = {"cuda": in_one_kernel, "tpu": in_one_kernel, "default": in_passes}
    return jax.lax.platform_dependent(p, y, **ways)


def _sample_size(samples: Array) -> Any:
    # Every sum over an empty sample is 0, so it may be divided by 1.
    return size_of([max(n, 1) for n in samples.shape[1:]], samples.dtype)
