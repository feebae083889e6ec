"""The form in which a CPU reduces at the speed of memory. Nothing here knows a weight or a loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

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
    keep = jnp.broadcast_to(keep, x.shape)
    if operation == "max and pick":
        # The sum of integers that are 0 but for one is that one, whatever number its bits are.
        bits = jnp.int32 if x.dtype.itemsize == 4 else jnp.int64
        integers = jnp.where(keep, jax.lax.bitcast_convert_type(x, bits), 0)
    else:
        integers = keep.astype(jnp.int32)
    parts = [a.reshape(*kept, size // columns, columns) for a in (x, integers)]
    # The largest loses no digits in a long row.
    number, count = _fold(parts, start, join, _width(columns) if is_sum else columns)
    while (num_blocks := number.shape[-1]) > 1:
        count = count if size < 2**31 else count.astype(x.dtype)
        parts = [a[..., None, :] for a in (number, count)]
        number, count = _fold(parts, start, join, _width(num_blocks))
    number, count = number[..., 0], count[..., 0]
    if operation == "max and pick":
        count = jax.lax.bitcast_convert_type(count, x.dtype)
    # A second result that goes unused would be removed, and with it the fast form.
    if operation != "sum and count":
        number, count = jax.lax.optimization_barrier((number, count))
    return [number] if operation in ("sum", "max") else [number, count.astype(x.dtype)]


def _fold(parts: Sequence[Array], start: float, join: Any, width: int) -> list[Array]:
    """Reduce ``[..., rows, columns]`` to a number for each block of a row, ``[..., blocks]``."""
    *kept, rows, columns = parts[0].shape
    zeros = [jnp.asarray(value, a.dtype) for value, a in zip((start, 0), parts, strict=True)]
    # What computes a number that is padded is fused; of two slices, it would be kept in memory.
    edges = [(0, 0, 0)] * (len(kept) + 1) + [(0, -columns % width, 0)]
    parts = [jax.lax.pad(a, zero, edges) for a, zero in zip(parts, zeros, strict=True)]
    blocks = [a.reshape(*kept, rows * (-(-columns // width)), width) for a in parts]
    return jax.lax.reduce(blocks, zeros, join, (len(kept) + 1,))


def _width(columns: int) -> int:
    """Of a block: about ``_BLOCK``, and a divisor where there is one, for padding can be slow."""
    near = itertools.chain(range(_BLOCK, _BLOCK // 8, -1), range(_BLOCK + 1, 8 * _BLOCK))
    return next((n for n in near if columns % n == 0), min(columns, _BLOCK))


def _add(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
    return [a[0] + b[0], a[1] + b[1]]


def _max(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
    return [jax.lax.max(a[0], b[0]), a[1] + b[1]]
