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
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

from jaxlosses._primitive import define_primitive
from jaxlosses._reduce_cpu import reduce_together

_SUMS = ("sum", "sum and count")  # Beside these, "max" and "max and pick".


def sum_and_count(x: Array, keep: Array) -> tuple[Array, Array]:
    """The sum of ``x``, and exactly how many of its places ``keep`` sets, in the dtype of ``x``.

    ``keep`` has the axes of ``x``, or 1 in their place.
    """
    total, count = _reduce.bind(x, keep, operation="sum and count", num_kept_axes=0)
    return total, count


def sum_of(x: Array, num_kept_axes: int = 0) -> Array:
    """The sum over all axes but some leading ones."""
    return _reduce_alone(x, "sum", num_kept_axes)


def max_of(x: Array, num_kept_axes: int = 0) -> Array:
    """The largest over all axes but some leading ones, as a constant: its derivative is 0."""
    return _reduce_alone(x, "max", num_kept_axes)


def max_and_pick(x: Array, mask: Array) -> tuple[Array, Array]:
    """The largest of each row, as by :func:`max_of`, and the number where the row's mask is set.

    The number is 0 where it is not set at all.
    """
    maximum, picked = _reduce.bind(x, mask, operation="max and pick", num_kept_axes=x.ndim - 1)
    return maximum, picked


def _reduce_alone(x: Array, operation: str, num_kept_axes: int) -> Array:
    keep = np.ones((1,) * x.ndim, bool)
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
        results.append(jnp.sum(keep, dtype=count_dtype or x.dtype).astype(x.dtype) * float(copies))
    if operation == "max and pick":
        results.append(jnp.sum(jnp.where(keep, x, 0), axes))
    return results


def _reduce_shapes(x: Array, keep: Array, *, operation: str, num_kept_axes: int) -> list[Any]:
    result = jax.ShapeDtypeStruct(x.shape[:num_kept_axes], x.dtype)
    return [result] if operation in ("sum", "max") else [result, result]


def _reduce_jvp(primals: Any, tangents: Any, *, operation: str, num_kept_axes: int) -> Any:
    """Sums and the picked number are linear; the maximum and the count are constants."""
    results = _reduce.bind(*primals, operation=operation, num_kept_axes=num_kept_axes)
    result_tangents = [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results]
    (x, keep), (x_tangent, _) = primals, tangents
    if not isinstance(x_tangent, ad.Zero):
        axes = tuple(range(num_kept_axes, x.ndim))
        if operation in _SUMS:
            result_tangents[0] = lax.reduce_sum(x_tangent, axes)
        if operation == "max and pick":
            result_tangents[1] = lax.reduce_sum(jnp.where(keep, x_tangent, 0), axes)
    return results, result_tangents


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


_reduce = define_primitive("reduce_and_count", _reduce_apart, _reduce_shapes)
ad.primitive_jvps[_reduce] = _reduce_jvp
batching.primitive_batchers[_reduce] = _reduce_batch
mlir.register_lowering(_reduce, _lower_on_cpu, platform="cpu")
