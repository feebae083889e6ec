"""Reductions in the form that XLA fuses on a CPU. Nothing here knows a weight or a loss."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_BLOCK = 4096  # How many numbers are added one by one. More would round away more digits.
_SHORT_ROW = 256


def reduce_together(x: Array, mask: Array, *, operation: str, num_kept_axes: int) -> list[Array]:
    """A reduction of ``x``, and a count or a pick by the mask, in one pass on one CPU.

    XLA fuses the computation of ``x`` into the reduction, and vectorises it, if integers are
    reduced together with ``x``. Without integers it takes three to ten times as long. So there are
    always two reductions, also where only one is needed.

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
    if operation == "max and pick":
        # Exactly one entry of a row is non-zero, so the sum of the raw bits is that entry.
        # XLA takes the bits of a constant when it compiles, in a wrong order if the constant is a
        # transposed product. The barrier hides from it that this factor is a constant.
        one = lax.optimization_barrier(np.ones((), x.dtype))
        bits = lax.bitcast_convert_type(x * one, jnp.int32 if x.dtype.itemsize == 4 else jnp.int64)
        integers = lax.select(mask, bits, lax.full_like(bits, 0))
    else:
        # In this order, or XLA would keep all the ones of an unused mask in memory.
        integers = lax.convert_element_type(jnp.broadcast_to(mask, x.shape), jnp.int32)
    # A maximum rounds nothing, so its blocks may be whole rows.
    width = _width(columns) if is_sum else columns
    shape = (*kept, size // columns, columns)
    reduced, count = _reduce_blocks([x, integers], start, combine, shape, width)
    while reduced.shape != kept:
        # Counts of blocks fit into int32; their sum may not.
        count = count if size < 2**31 else count.astype(x.dtype)
        num_blocks = reduced.shape[-1]
        shape, width = (*kept, 1, num_blocks), _width(num_blocks)
        reduced, count = _reduce_blocks([reduced, count], start, combine, shape, width)
    if operation == "max and pick":
        count = lax.bitcast_convert_type(count, x.dtype)
    # XLA would remove a result that is not used, and the rest would no longer be fused.
    if operation != "sum and count":
        reduced, count = lax.optimization_barrier((reduced, count))
    return [reduced] if operation in ("sum", "max") else [reduced, count.astype(x.dtype)]


def _reduce_blocks(
    pair: Sequence[Array], start: float, combine: Any, shape: Sequence[int], width: int
) -> list[Array]:
    """Reduce ``[..., rows, columns]`` to a number for each block of a row, ``[..., blocks]``.

    Where there is one block in all, the last axis is left out.
    """
    *kept, rows, columns = shape
    starts = [np.asarray(value, a.dtype) for value, a in zip((start, 0), pair, strict=True)]
    if padding := -columns % width:
        # XLA fuses a pad with the computation of its input. It would not fuse two slices.
        edges = [(0, 0, 0)] * (len(kept) + 1) + [(0, padding, 0)]
        pair = [lax.reshape(a, shape) for a in pair]
        pair = [lax.pad(a, value, edges) for a, value in zip(pair, starts, strict=True)]
    num_blocks = rows * (-(-columns // width))
    blocked = (*kept, num_blocks, width) if num_blocks > 1 else (*kept, width)
    pair = [a if a.shape == blocked else lax.reshape(a, blocked) for a in pair]
    return lax.reduce(pair, starts, combine, (len(blocked) - 1,))


@functools.cache
def _width(columns: int) -> int:
    """The length of a block: near ``_BLOCK``, a divisor if possible, because padding is slow."""
    near = itertools.chain(range(_BLOCK, _BLOCK // 8, -1), range(_BLOCK + 1, 8 * _BLOCK))
    return next((n for n in near if columns % n == 0), min(columns, _BLOCK))


def _add(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
    return [lax.add(a[0], b[0]), lax.add(a[1], b[1])]


def _max(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
    return [lax.max(a[0], b[0]), lax.add(a[1], b[1])]
