"""Means of the segments of packed sequences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from jaxlosses._kernel import align
from jaxlosses._labels import as_integers, narrow_integers
from jaxlosses._layout import axes_of_type
from jaxlosses._mean import WeightedMean
from jaxlosses._regression import compute_weighted_loss
from jaxlosses._typing import (
    ClassIds,
    Reals,
    Weights,
    as_array,
    check_integer,
    is_integer,
    keep_wide,
)

_BLOCK = 4096  # How many losses are added up one after the other.


def segment_means(
    losses: Reals, segment_ids: ClassIds, num_segments: int, weights: Weights = 1.0
) -> WeightedMean:
    r"""The undivided mean of each segment, where several sequences are packed into one array.

    $$\text{mean}_s = \frac{\sum_{i:\, s_i = s} w_i\, l_i}{|\{i : s_i = s,\ w_i \ne 0\}|}$$

    Ids may be in any order. ``segment_means(...).macro()`` is the mean over the segments, all of
    which count equally, however long they are. (Without ``.macro()`` a ``LossCollector`` takes each
    segment as a loss of its own and sums them.) The rows of the array share the ids. If each row
    numbers its own segments from 0, use
    ``jax.vmap(lambda l, s: segment_means(l, s, num_segments))(losses, segment_ids)``, which gives
    means ``[batch, num_segments]``. Where a segment is cut between batches, microbatches or
    devices, add up the means of the pieces (``+``, ``.psum(axis_name)``) before ``.macro()``.

    Absent losses may hold NaN. The inputs of the function that computed them are not masked here:
    if these may hold NaN, give the weights, 0 for padding, to that function
    (``reduction="none"``), and only their mask (``weights != 0``) to this one.

    Args:
        losses: Real numbers ``[batch, d1, ..., dN]``.
        segment_ids: Integers of the same shape. A loss whose id is negative, or ``num_segments`` or
            more, is absent: padding.
        num_segments: How many segments there are; a Python integer.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.

    Returns:
        A ``WeightedMean`` ``[num_segments]``, float32 at least. A segment in which nothing counts
        has count and value 0.

    Raises:
        ValueError: if the segment ids are not integers of the losses' shape, ``num_segments`` is
            not an integer from 1 to $2^{31} - 1$, or the weights do not align.

    References:
        ``jax.ops.segment_sum``.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> losses, ids = jnp.array([1.0, 2.0, 3.0, 6.0, jnp.nan]), jnp.array([0, 0, 0, 1, -1])
        >>> means = jl.segment_means(losses, ids, 2)
        >>> print(means.value, means.count, means.macro().value)
        [2. 6.] [3. 1.] 4.0
    """
    losses = as_array("losses", losses)
    ids = as_integers("segment_ids", narrow_integers("segment_ids", segment_ids))
    if ids.shape != losses.shape:
        raise ValueError(f"segment_ids must have the losses' shape {losses.shape}, got {ids.shape}")
    if not 1 <= check_integer("num_segments", num_segments) < 2**31:
        raise ValueError(f"num_segments must be from 1 to 2**31 - 1, got {num_segments}")
    weights = align(as_array("weights", keep_wide("weights", weights)), losses.shape)
    in_segment = (ids >= 0) & (ids < num_segments)
    weights = jnp.where(in_segment, weights, jnp.zeros_like(weights))
    losses = compute_weighted_loss(losses, weights, reduction="none")

    def sums(*arrays: Array) -> list[Array]:
        losses, present, ids = map(jnp.ravel, arrays)
        # A float32 to which many numbers are added one by one loses digits, and in the end stops
        # growing. So each block has its own sums, together no larger than the losses.
        length = max(_BLOCK, num_segments)
        count = -(-losses.size // length) if is_integer(losses.size) else 1
        if count > 1:
            ids += num_segments * (lax.iota(ids.dtype, losses.size) // length)
        of_blocks = (jax.ops.segment_sum(x, ids, count * num_segments) for x in (losses, present))
        return [jnp.sum(x.reshape(count, num_segments), 0) for x in of_blocks]

    # A loss of no segment adds 0 to the first one. The count is exact because it is an integer.
    arrays = [losses, weights.astype(bool).astype(jnp.int32), jnp.where(in_segment, ids, 0)]
    explicit = axes_of_type(jax.typeof(losses).sharding.mesh, AxisType.Explicit)
    # On an Explicit mesh JAX cannot tell how a sum by ids is sharded, so XLA decides it, as on an
    # Auto mesh.
    if explicit:
        automatic: Any = jax.sharding.auto_axes(axes=explicit, out_sharding=[PartitionSpec()] * 2)
        total, count = automatic(sums)(*arrays)
    else:
        total, count = sums(*arrays)
    return WeightedMean(total, count.astype(total.dtype))
