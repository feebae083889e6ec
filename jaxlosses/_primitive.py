"""JAX primitives of our own: operations whose derivative, batching or lowering JAX cannot know."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType


def define_primitive(
    name: str,
    function: Callable[..., list[Array]],
    shapes: Callable[..., list[Any] | None] | None = None,
    *,
    elementwise: bool = False,
) -> Primitive:
    """A primitive that computes ``function(*arrays, **params)``, a list of arrays.

    Args:
        name: Its name in a jaxpr.
        function: What it computes, in operations of JAX; keyword-only arguments are its params.
        shapes: ``shapes(*arrays, **params)`` returns something with the shape and the dtype of each
            result, or None if it cannot tell. It saves tracing the function if there is no mesh.
            (On a mesh, the function is traced to find how the results are sharded.)
        elementwise: Whether all arrays have the same shape and no axis is special, so that under
            ``vmap`` it is the same primitive with one more axis. Others need a batching rule.
    """
    params = inspect.signature(function).parameters.values()
    static = [p.name for p in params if p.kind is p.KEYWORD_ONLY]

    def abstract(*avals: Any, **params: Any) -> Any:
        no_mesh = all(a.sharding.mesh.empty for a in avals)
        results = shapes(*avals, **params) if shapes and no_mesh else None
        if results is not None:
            return [ShapedArray(r.shape, r.dtype) for r in results]
        return jax.make_jaxpr(functools.partial(function, **params))(*avals).out_avals

    def batch(arrays: Any, axes: Any, **params: Any) -> Any:
        results = primitive.bind(*with_axis_in_front(arrays, axes), **params)
        return results, [0] * len(results)

    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(jax.jit(function, static_argnames=static))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True))
    if elementwise:
        batching.primitive_batchers[primitive] = batch
    return primitive


def with_axis_in_front(arrays: Sequence[Array], axes: Sequence[int | None]) -> list[Array]:
    """The arrays with the axis of a ``vmap`` in front; those that lack it are broadcast.

    On an Explicit mesh JAX asks that this axis is sharded alike in all arrays.
    """
    pairs = list(zip(arrays, axes, strict=True))
    array, mapped = next((array, axis) for array, axis in pairs if axis is not None)
    size, mesh_axis = array.shape[mapped], jax.typeof(array).sharding.spec[mapped]
    return [batching.bdim_at_front(*pair, size, mesh_axis) for pair in pairs]


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays; in ``shard_map``, each made to vary over all axes over which any of them varies.

    JAX does this for the arguments of its own operations. It decides where their cotangents are
    summed over devices.
    """
    if not any(AxisType.Manual in jax.typeof(a).sharding.mesh.axis_types for a in arrays):
        return arrays
    zero = sum(jnp.sum(jnp.zeros_like(a), dtype=int) for a in arrays)
    return tuple(
        a | (zero != 0) if a.dtype == bool else a + jnp.asarray(zero, a.dtype) for a in arrays
    )


def varying_axes(x: Array) -> frozenset[Any]:
    """The axes of ``shard_map`` over which an array varies; none where JAX does not keep track."""
    kind: Any = jax.typeof(x)
    # The name differs between versions of JAX.
    found = getattr(getattr(kind, "mat", None), "varying", None) or getattr(kind, "vma", None)
    return frozenset(found or ())
