"""Reductions in the form that XLA fuses on a CPU. Nothing here knows a weight or a loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

_BLOCK = 4096  # How many numbers are added one by one. More would round away more digits.
_SHORT_ROW = 256


def reduce_together(x: Array, mask: Array, *, operation: str, num_kept_axes: int) -> list[Array]:
    """A reduction of ``x``, and a count or a pick by the mask, in one pass on one CPU.

    XLA fuses the computation of ``x`` into the reduction, and vectorises it, if integers are
    reduced together with ``x``. Without integers it takes three to ten times as long. So there are
    always two reductions, also where only one is asked for.

    They are done block by block, which keeps all cores busy, sums accurate and counts small. Blocks
    are cut from rows, the last axes, along which the mask is constant, or where these rows are
    short, from all numbers in order.
    """
    kept, size = x.shape[:num_kept_axes], math.prod(x.shape[num_kept_axes:])
    # The last axis along which the mask varies, or the last one that is kept.
    varied = max([num_kept_axes - 1, *(i for i, n in enumerate(mask.shape) if n > 1)])
    row = math.prod(x.shape[varied + 1 :])
    columns = row if row >= _SHORT_ROW else size
    is_sum = operation in ("sum", "sum and count")
    start, combine = (0, _add) if is_sum else (-jnp.inf, _max)
    mask = jnp.broadcast_to(mask, x.shape)
    if operation == "max and pick":
        # Exactly one entry of a row is non-zero, so the sum of the raw bits is that entry.
        bits = jnp.int32 if x.dtype.itemsize == 4 else jnp.int64
        integers = jnp.where(mask, jax.lax.bitcast_convert_type(x, bits), 0)
    else:
        integers = mask.astype(jnp.int32)
    pair = [a.reshape(*kept, size // columns, columns) for a in (x, integers)]
    # A maximum rounds nothing, so its blocks may be whole rows.
    reduced, count = _reduce_blocks(pair, start, combine, _width(columns) if is_sum else columns)
    while (num_blocks := reduced.shape[-1]) > 1:
        # Counts of blocks fit into int32; their sum may not.
        count = count if size < 2**31 else count.astype(x.dtype)
        pair = [a[..., None, :] for a in (reduced, count)]
        reduced, count = _reduce_blocks(pair, start, combine, _width(num_blocks))
    reduced, count = reduced[..., 0], count[..., 0]
    if operation == "max and pick":
        count = jax.lax.bitcast_convert_type(count, x.dtype)
    # XLA would remove a result that is not used, and the rest would no longer be fused.
    if operation != "sum and count":
        reduced, count = jax.lax.optimization_barrier((reduced, count))
    return [reduced] if operation in ("sum", "max") else [reduced, count.astype(x.dtype)]


def _reduce_blocks(pair: Sequence[Array], start: float, combine: Any, width: int) -> list[Array]:
    """Reduce ``[..., rows, columns]`` to a number for each block of a row, ``[..., blocks]``."""
    *kept, rows, columns = pair[0].shape
    starts = [jnp.asarray(value, a.dtype) for value, a in zip((start, 0), pair, strict=True)]
    # XLA fuses a pad with the computation of its input. Two slices it would not fuse.
    edges = [(0, 0, 0)] * (len(kept) + 1) + [(0, -columns % width, 0)]
    padded = [jax.lax.pad(a, value, edges) for a, value in zip(pair, starts, strict=True)]
    blocks = [a.reshape(*kept, rows * (-(-columns // width)), width) for a in padded]
    return jax.lax.reduce(blocks, starts, combine, (len(kept) + 1,))


def _width(columns: int) -> int:
    """The length of a block: near ``_BLOCK``, a divisor if possible, because padding is slow."""
    near = itertools.chain(range(_BLOCK, _BLOCK // 8, -1), range(_BLOCK + 1, 8 * _BLOCK))
    return next((n for n in near if columns % n == 0), min(columns, _BLOCK))


def _add(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
    return [a[0] + b[0], a[1] + b[1]]


def _max(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
    return [jax.lax.max(a[0], b[0]), a[1] + b[1]]
