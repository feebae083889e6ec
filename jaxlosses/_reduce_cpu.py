"""The form in which a CPU reduces at the speed of memory. Nothing here knows a weight or a loss."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_BLOCK = 4096  # Numbers that are summed one after the other: 16 KiB, and 8 digits of accuracy.
_SHORT_ROW = 256


def reduce_together(x: Array, keep: Array, *, operation: str, num_kept_axes: int) -> list[Array]:
    """Reduction and count in one pass, for one CPU.

    XLA fuses what computes ``x`` into a reduction and vectorises it if an integer is reduced along;
    a reduction of ``x`` alone, or a count of floats, takes three to ten times as long. Blocks keep
    all cores busy, the sums accurate and the integers small. They are cut from rows of equal
    weight, or where these are short, from the whole.
    """
    kept, size = x.shape[:num_kept_axes], math.prod(x.shape[num_kept_axes:])
    varied = max([num_kept_axes - 1, *(i for i, n in enumerate(keep.shape) if n > 1)])
    row = math.prod(x.shape[varied + 1 :])
    columns = row if row >= _SHORT_ROW else size
    is_sum = operation in ("sum", "sum and count")
    start, join = (0, _add) if is_sum else (-jnp.inf, _max)
    if operation == "max and pick":
        # The sum of integers that are 0 but for one is that one, whatever number its bits are.
        bits = lax.bitcast_convert_type(x, jnp.int32 if x.dtype.itemsize == 4 else jnp.int64)
        integers = lax.select(keep, bits, lax.full_like(bits, 0))
    else:
        integers = jnp.broadcast_to(lax.convert_element_type(keep, jnp.int32), x.shape)
    # The largest loses no digits in a long row.
    width = _width(columns) if is_sum else columns
    number, count = _fold([x, integers], start, join, (*kept, size // columns, columns), width)
    while number.shape != kept:
        num_blocks = number.shape[-1]
        count = count if size < 2**31 else count.astype(x.dtype)
        shape = (*kept, 1, num_blocks)
        number, count = _fold([number, count], start, join, shape, _width(num_blocks))
    if operation == "max and pick":
        count = lax.bitcast_convert_type(count, x.dtype)
    # A second result that goes unused would be removed, and with it the fast form.
    if operation != "sum and count":
        number, count = lax.optimization_barrier((number, count))
    return [number] if operation in ("sum", "max") else [number, count.astype(x.dtype)]


def _fold(
    parts: Sequence[Array], start: float, join: Any, shape: Sequence[int], width: int
) -> list[Array]:
    """Reduce ``[..., rows, columns]`` to a number for each block of a row, ``[..., blocks]``.

    Of one block that is ``[...]``.
    """
    *kept, rows, columns = shape
    zeros = [np.asarray(value, a.dtype) for value, a in zip((start, 0), parts, strict=True)]
    if padding := -columns % width:
        # What computes a number that is padded is fused; of two slices, it would be kept in memory.
        edges = [(0, 0, 0)] * (len(kept) + 1) + [(0, padding, 0)]
        parts = [lax.reshape(a, shape) for a in parts]
        parts = [lax.pad(a, zero, edges) for a, zero in zip(parts, zeros, strict=True)]
    num_blocks = rows * (-(-columns // width))
    blocked = (*kept, num_blocks, width) if num_blocks > 1 else (*kept, width)
    parts = [a if a.shape == blocked else lax.reshape(a, blocked) for a in parts]
    return lax.reduce(parts, zeros, join, (len(blocked) - 1,))


@functools.cache
def _width(columns: int) -> int:
    """Of a block: about ``_BLOCK``, and a divisor where there is one, for padding can be slow."""
    near = itertools.chain(range(_BLOCK, _BLOCK // 8, -1), range(_BLOCK + 1, 8 * _BLOCK))
    return next((n for n in near if columns % n == 0), min(columns, _BLOCK))


def _add(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
    return [lax.add(a[0], b[0]), lax.add(a[1], b[1])]


def _max(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
    return [lax.max(a[0], b[0]), lax.add(a[1], b[1])]
