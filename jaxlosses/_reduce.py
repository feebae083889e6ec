"""Sums and maxima at the speed of memory. Nothing here knows a weight or a loss.

XLA reduces well what it fuses; a CPU needs the form of ``_reduce_cpu.py`` to fuse it. Every
reduction is one primitive, so that a program gets the form of the machine that it is compiled for.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.interpreters import batching, mlir

from jaxlosses._primitive import define_primitive
from jaxlosses._reduce_cpu import reduce_together

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
    maximum, picked = _reduce.bind(x, mask, operation="max and pick", num_kept_axes=x.ndim - 1)
    return maximum, picked


@max_and_pick.defjvp
def _(primals: Any, tangents: Any) -> Any:
    maximum, picked = max_and_pick(*primals)
    dpicked = jnp.sum(jnp.where(primals[1], tangents[0], 0), -1)
    return (maximum, picked), (jnp.zeros_like(maximum), dpicked)


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
    reduce = reduce_together if local and math.prod(ctx.avals_in[0].shape) else apart
    return mlir.lower_fun(reduce, multiple_results=True)(ctx, *arguments, **params)


def _reduce_batch(arguments: Any, axes: Any, **params: Any) -> Any:
    batched = jax.vmap(functools.partial(_reduce_apart, **params), axes)(*arguments)
    return batched, [0] * len(batched)


_reduce = define_primitive("reduce_and_count", _reduce_apart)
batching.primitive_batchers[_reduce] = _reduce_batch
mlir.register_lowering(_reduce, _lower_on_cpu, platform="cpu")
