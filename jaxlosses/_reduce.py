"""Sums and maxima at the speed of memory. Nothing here knows a weight or a loss.

XLA reduces well what it fuses; a CPU needs the form of :func:`_reduce_together` to fuse it. Every
reduction is one primitive, so that a program gets the form of the machine that it is compiled for.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_BLOCK = 4096  # Numbers that are summed one after the other: 16 KiB, and 8 digits of accuracy.
_SHORT_ROW = 256
_SUMS = ("sum", "sum and count")  # Beside these, "max" and "max and pick".


@jax.custom_jvp
def sum_and_count(x: Array, keep: Array) -> tuple[Array, Array]:
    """The sum of ``x``, and exactly how many of its places ``keep`` sets, in the dtype of ``x``.

    ``keep`` has the axes of ``x``, or 1 in their place.
    """
    total, count = _reduce.bind(x, keep, operation="sum and count", num_kept_axes=0)
    return total, count


@sum_and_count.defjvp
def _(primals: Any, tangents: Any) -> Any:
    total, count = sum_and_count(*primals)
    return (total, count), (jnp.sum(tangents[0]), jnp.zeros_like(count))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def sum_of(x: Array, num_kept_axes: int = 0) -> Array:
    """The sum over all axes but some leading ones."""
    return _reduce_alone(x, "sum", num_kept_axes)


@sum_of.defjvp
def _(num_kept_axes: int, primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return sum_of(x, num_kept_axes), jnp.sum(dx, tuple(range(num_kept_axes, x.ndim)))


def max_of(x: Array, num_kept_axes: int = 0) -> Array:
    """The largest over all axes but some leading ones, as a constant: its derivative is 0."""
    return _reduce_alone(jax.lax.stop_gradient(x), "max", num_kept_axes)


@jax.custom_jvp
def max_and_pick(x: Array, mask: Array) -> tuple[Array, Array]:
    """The largest of each row, as by :func:`max_of`, and the number where the row's mask is set.

    The number is 0 where it is not set at all.
    """
    top, picked = _reduce.bind(x, mask, operation="max and pick", num_kept_axes=x.ndim - 1)
    return top, picked


@max_and_pick.defjvp
def _(primals: Any, tangents: Any) -> Any:
    top, picked = max_and_pick(*primals)
    dpicked = jnp.sum(jnp.where(primals[1], tangents[0], 0), -1)
    return (top, picked), (jnp.zeros_like(top), dpicked)


def _reduce_alone(x: Array, operation: str, num_kept_axes: int) -> Array:
    keep = jnp.ones((1,) * x.ndim, bool)
    (reduced,) = _reduce.bind(x, keep, operation=operation, num_kept_axes=num_kept_axes)
    return reduced


def _reduce_apart(
    x: Array,
    keep: Array,
    *,
    operation: str,
    num_kept_axes: int,
    count_dtype: Any = None,
) -> list[Array]:
    """Reduction and count as XLA partitions them best: over devices they are one collective."""
    axes = tuple(range(num_kept_axes, x.ndim))
    results = [(jnp.sum if operation in _SUMS else jnp.max)(x, axes)]
    if operation == "sum and count":
        copies = math.prod(x.shape) // max(keep.size, 1)
        results.append(jnp.sum(keep, dtype=count_dtype or x.dtype).astype(x.dtype) * copies)
    if operation == "max and pick":
        results.append(jnp.sum(jnp.where(keep, x, 0), axes))
    return results


def _reduce_together(x: Array, keep: Array, *, operation: str, num_kept_axes: int) -> list[Array]:
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
    start, join = (0, _add) if operation in _SUMS else (-jnp.inf, _max)
    keep = jnp.broadcast_to(keep, x.shape)
    if operation == "max and pick":
        # The sum of integers that are 0 but for one is that one, whatever number its bits are.
        bits = jnp.int32 if x.dtype.itemsize == 4 else jnp.int64
        integers = jnp.where(keep, jax.lax.bitcast_convert_type(x, bits), 0)
    else:
        integers = keep.astype(jnp.int32)
    parts = [a.reshape(*kept, size // columns, columns) for a in (x, integers)]
    # The largest loses no digits in a long row.
    number, count = _fold(parts, start, join, _width(columns) if operation in _SUMS else columns)
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


def _lower_on_cpu(ctx: Any, *arguments: Any, **params: Any) -> Any:
    """Together where the program runs on one device, or is one device's part in ``shard_map``.

    Elsewhere XLA partitions the program, and would gather all of ``x`` to cut it into blocks.
    """
    devices = ctx.module_context.axis_context
    if hasattr(devices, "manual_axes"):
        local = frozenset(devices.manual_axes) == frozenset(devices.mesh.axis_names)
    else:
        local = getattr(devices, "num_devices", 1) == 1
    if local:
        ctx = ctx.replace(avals_in=[ShapedArray(a.shape, a.dtype) for a in ctx.avals_in])
    # XLA counts on a CPU one by one, where a float32 stops at 2**24.
    apart = functools.partial(_reduce_apart, count_dtype=jnp.int32)
    reduce = _reduce_together if local and math.prod(ctx.avals_in[0].shape) else apart
    return mlir.lower_fun(reduce, multiple_results=True)(ctx, *arguments, **params)


def _reduce_batch(arguments: Any, axes: Any, **params: Any) -> Any:
    batched = jax.vmap(functools.partial(_reduce_apart, **params), axes)(*arguments)
    return batched, [0] * len(batched)


_reduce = Primitive("reduce_and_count")
_reduce.multiple_results = True
_reduce.def_impl(jax.jit(_reduce_apart, static_argnames=("operation", "num_kept_axes")))
_reduce.def_abstract_eval(
    lambda *avals, **params: (
        jax.make_jaxpr(functools.partial(_reduce_apart, **params))(*avals).out_avals
    )
)
batching.primitive_batchers[_reduce] = _reduce_batch
mlir.register_lowering(_reduce, mlir.lower_fun(_reduce_apart, multiple_results=True))
mlir.register_lowering(_reduce, _lower_on_cpu, platform="cpu")
