"""Sums and maxima in one pass over memory. Nothing here knows a weight or a loss.

A reduction is fast where XLA fuses the computation of its input into it, so that the input is never
written to memory. On a CPU, XLA does so only for the form in ``_reduce_cpu.py``. Reductions are a
primitive, because a primitive can have one form for CPUs and another one for other platforms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

from jaxlosses._primitive import define_primitive, with_axis_in_front
from jaxlosses._reduce_cpu import reduce_together
from jaxlosses._typing import AxisName

_SUMS = ("sum", "sum and count")  # The other operations are "max" and "max and pick".


def sum_and_count(x: Array, mask: Array) -> tuple[Array, Array]:
    """The sum of all of ``x``, and the exact number of its elements where ``mask`` is True.

    Each axis of the mask has the length of that of ``x``, or 1. The count has the dtype of ``x``.
    """
    total, count = _reduce_p.bind(x, mask, operation="sum and count", num_kept_axes=0)
    return total, count


def sum_of(x: Array, num_kept_axes: int = 0) -> Array:
    """The sum over all axes except the first ``num_kept_axes``."""
    return _reduce_one(x, "sum", num_kept_axes)


def max_of(x: Array, num_kept_axes: int = 0) -> Array:
    """The maximum over all axes except the first ``num_kept_axes``; its derivative counts as 0."""
    return _reduce_one(x, "max", num_kept_axes)


def max_and_pick(x: Array, mask: Array) -> tuple[Array, Array]:
    """The maximum of each row, as by :func:`max_of`, and the number where the mask is True.

    A row is the last axis. Its mask is True at one position at most; if at none, the number is 0.
    """
    maximum, picked = _reduce_p.bind(x, mask, operation="max and pick", num_kept_axes=x.ndim - 1)
    return maximum, picked


def max_over_members(x: Array, axis_name: AxisName) -> Array:
    """The maximum over the members of mapped axes, if there are any; its derivative counts as 0."""
    return x if axis_name is None else lax.pmax(lax.stop_gradient(x), axis_name)


def sum_over_members(x: Array, axis_name: AxisName) -> Array:
    """The sum over the members of mapped axes, if there are any."""
    return x if axis_name is None else lax.psum(x, axis_name)


def max_sum_exp_and_pick(x: Array, mask: Array) -> tuple[Array, Array, Array]:
    """The maximum of each row, the sum of exponentials relative to it, and the number picked.

    This is one reduction, for which a GPU reads ``x`` once. It is not differentiated.
    """

    def scaled(total: Array, maximum: Array, of_both: Array) -> Array:
        # Infinity minus infinity would be NaN.
        shift = lax.select(lax.eq(maximum, of_both), lax.full_like(total, 0), maximum - of_both)
        return total * lax.exp(shift)

    def join(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
        maximum = lax.max(a[0], b[0])
        total = lax.add(scaled(a[1], a[0], maximum), scaled(b[1], b[0], maximum))
        return [maximum, total, lax.add(a[2], b[2])]

    starts = [np.asarray(value, x.dtype) for value in (-np.inf, 0, 0)]
    picked = lax.select(mask, x, lax.full_like(x, 0))
    ones = lax.full_like(x, 1)
    maximum, total, picked = lax.reduce([x, ones, picked], starts, join, (x.ndim - 1,))
    return maximum, total, picked


def num_copies(shape: Sequence[Any], like: Sequence[Any], dtype: Any) -> Any:
    """How often each element of an array is repeated if it is broadcast to ``like``, as a float."""
    return size_of([n for n, m in zip(like, shape, strict=True) if n != m], dtype)


def size_of(sizes: Iterable[Any], dtype: Any) -> Any:
    """The product of sizes as a float, because an integer of 32 bits may be too small for it.

    Sizes may be symbolic, as ``jax.export`` allows.
    """
    sizes = list(sizes)
    known = np.asarray(math.prod(n for n in sizes if isinstance(n, int)), dtype)
    return math.prod([jnp.asarray(n, dtype) for n in sizes if not isinstance(n, int)], start=known)


def _reduce_one(x: Array, operation: str, num_kept_axes: int) -> Array:
    """A reduction that has one result and does not use the mask."""
    mask = np.ones((1,) * x.ndim, bool)
    (reduced,) = _reduce_p.bind(x, mask, operation=operation, num_kept_axes=num_kept_axes)
    return reduced


def _reduce_separately(
    x: Array,
    mask: Array,
    *,
    operation: str,
    num_kept_axes: int,
    count: Callable[[Array, Any, Any], Array] = jnp.sum,
) -> list[Array]:
    """Each result by its own reduction. XLA fuses these, also over devices, except on CPUs."""
    axes = tuple(range(num_kept_axes, x.ndim))
    results = [jnp.sum(x, axes) if operation in _SUMS else jnp.max(x, axes)]
    if operation == "sum and count":
        copies = num_copies(mask.shape[num_kept_axes:], x.shape[num_kept_axes:], x.dtype)
        results.append(count(mask, axes, x.dtype) * copies)
    if operation == "max and pick":
        results.append(jnp.sum(jnp.where(mask, x, 0), axes))
    return results


def _count_in_int64(mask: Array, axes: Any, dtype: Any) -> Array:
    """The number of elements that are True, on a CPU, which adds them one by one.

    In this way a float32 cannot grow past 2**24, and an int32 not past 2**31. All devices of a
    program together may have more elements.
    """
    with jax.enable_x64(True):
        count = lax.reduce_sum(lax.convert_element_type(mask, jnp.int64), axes)
        return lax.convert_element_type(count, dtype)


def _reduce_shapes(x: Array, mask: Array, *, operation: str, num_kept_axes: int) -> list[Any]:
    result = jax.ShapeDtypeStruct(x.shape[:num_kept_axes], x.dtype)
    return [result] if operation in ("sum", "max") else [result, result]


def _reduce_jvp(primals: Any, tangents: Any, *, operation: str, num_kept_axes: int) -> Any:
    """Sums and the picked number are linear; the maximum and the count are constants."""
    results = _reduce_p.bind(*primals, operation=operation, num_kept_axes=num_kept_axes)
    result_tangents: list[Any] = [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results]
    (x, mask), (x_tangent, _) = primals, tangents
    if not isinstance(x_tangent, ad.Zero):
        axes = tuple(range(num_kept_axes, x.ndim))
        if operation in _SUMS:
            result_tangents[0] = lax.reduce_sum(x_tangent, axes)
        if operation == "max and pick":
            result_tangents[1] = lax.reduce_sum(jnp.where(mask, x_tangent, 0), axes)
    return results, result_tangents


def _lower_on_cpu(ctx: Any, *arguments: Any, **params: Any) -> Any:
    """The CPU's form if the program is for one device, or is one device's part in ``shard_map``.

    A program that XLA partitions would gather all of ``x`` on every device for this form.
    """
    devices = ctx.module_context.axis_context
    if hasattr(devices, "manual_axes"):
        local = frozenset(devices.manual_axes) == frozenset(devices.mesh.axis_names)
    else:
        local = getattr(devices, "num_devices", 1) == 1
    if local:
        ctx = ctx.replace(avals_in=[ShapedArray(a.shape, a.dtype) for a in ctx.avals_in])
    shape = ctx.avals_in[0].shape
    if local and all(isinstance(n, int) for n in shape) and math.prod(shape):
        return mlir.lower_fun(reduce_together, multiple_results=True)(ctx, *arguments, **params)
    reduce = functools.partial(_reduce_separately, count=_count_in_int64)
    return mlir.lower_fun(reduce, multiple_results=True)(ctx, *arguments, **params)


def _reduce_batch(arguments: Any, axes: Any, *, operation: str, num_kept_axes: int) -> Any:
    """Under ``vmap`` there is one more axis that is kept."""
    arguments = with_axis_in_front(arguments, axes)
    results = _reduce_p.bind(*arguments, operation=operation, num_kept_axes=num_kept_axes + 1)
    return results, [0] * len(results)


_reduce_p = define_primitive("reduce_and_count", _reduce_separately, _reduce_shapes)
ad.primitive_jvps[_reduce_p] = _reduce_jvp
batching.primitive_batchers[_reduce_p] = _reduce_batch
mlir.register_lowering(_reduce_p, _lower_on_cpu, platform="cpu")
