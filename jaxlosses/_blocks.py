"""How the product of a last layer, ``hidden @ kernel``, is cut into blocks.

A block is some of the tokens with all classes, or some of the classes with all tokens. Nothing here
knows a loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from jaxlosses._typing import is_integer, precision

T = TypeVar("T")
BlockSize: TypeAlias = int | tuple[int, None] | None
Side = Literal["tokens", "classes"]

_BLOCK_BYTES = 2**23  # The logits of one block, so that they stay in a CPU's cache.
# In a smaller block, reading hidden and kernel takes longer than multiplying them.
_FEWEST_TOKENS, _FEWEST_CLASSES = 256, 1024


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """How an axis of tokens or of classes is cut into blocks.

    The axis is split into ``segments`` of equal size, and a block takes ``length`` places of every
    segment: there are ``count`` such blocks, and a shorter one of the ``rest``. An axis that is
    sharded over as many devices as there are segments, or a divisor of that, stays so in a block.
    """

    side: Side
    axis: int
    segments: int
    length: int
    count: int
    rest: int

    def loop(self, step: Callable[[BlockSlice, T], T], carry: T) -> T:
        """Repeat ``carry = step(block, carry)`` for every block."""

        def body(i: Any, carry: T) -> T:
            return step(BlockSlice(self, i * self.length, self.length), carry)

        carry = lax.fori_loop(0, self.count, body, carry)
        if not self.rest:
            return carry
        return step(BlockSlice(self, self.count * self.length, self.rest), carry)

    def with_batch_axis(self) -> BlockPlan:
        """The plan for arrays of tokens that have one more axis in front."""
        return dataclasses.replace(self, axis=self.axis + 1) if self.side == "tokens" else self


@dataclasses.dataclass(frozen=True)
class BlockSlice:
    """One block of a plan: ``length`` places of each segment, from ``start`` on.

    Its methods say of an array which side it has: ``"tokens"``, where the tokens' axes come first,
    or ``"classes"``, where the classes are the last axis. An array without the side that is cut is
    whole in every block.
    """

    plan: BlockPlan
    start: Any
    length: int

    def take(self, side: Side, x: Array) -> Array:
        """The block's part of an array."""
        if side != self.plan.side:
            return x
        axis, split = self._split(x)
        part = lax.dynamic_slice_in_dim(split, self.start, self.length, axis + 1)
        length = self.plan.segments * self.length
        return part.reshape(*x.shape[:axis], length, *x.shape[axis + 1 :])

    def put(self, side: Side, x: Array, part: Array) -> Array:
        """``x`` with the block's part replaced by ``part``."""
        part = part.astype(x.dtype)
        if side != self.plan.side:
            return part
        axis, split = self._split(x)
        part = part.reshape(*split.shape[: axis + 1], self.length, *split.shape[axis + 2 :])
        return lax.dynamic_update_slice_in_dim(split, part, self.start, axis + 1).reshape(x.shape)

    def add(self, side: Side, x: Array, part: Array) -> Array:
        """``x``, a sum that starts at 0, with this block's ``part`` added.

        Where ``x`` has the side that is cut, no other block adds to that part, so it is put there.
        """
        return self.put(side, x, part if side == self.plan.side else x + part.astype(x.dtype))

    def indices(self, side: Side, size: int) -> Array:
        """The block's indices along an axis of some size, which has one segment if it is cut."""
        if side != self.plan.side:
            return jnp.arange(size)
        return self.start + jnp.arange(self.length)

    def _split(self, x: Array) -> tuple[int, Array]:
        """The axis that is cut, and ``x`` with two in its place: segments, and places in them."""
        axis, segments = self.plan.axis % x.ndim, self.plan.segments
        size = x.shape[axis] // segments
        return axis, x.reshape(*x.shape[:axis], segments, size, *x.shape[axis + 1 :])


def plan_blocks(hidden: Array, kernel: Array, block_size: BlockSize) -> BlockPlan:
    """Blocks of the size that was asked for, or of ``_BLOCK_BYTES`` of logits on each device.

    The classes are cut, or the tokens where that was asked for or the classes are sharded. If the
    number of tokens is symbolic (in ``jax.export``), always the classes, whose number is fixed.

    Raises:
        ValueError: if ``block_size`` is not a positive integer, ``(tokens, None)`` or None, or if
            the number of classes is symbolic.
    """
    rows = columns = None
    if isinstance(block_size, tuple) and len(block_size) == 2 and block_size[1] is None:
        rows = _check_size(block_size, block_size[0])
    elif block_size is not None:
        columns = _check_size(block_size, block_size)
    sizes, classes = hidden.shape[:-1] or (1,), kernel.shape[1]
    shards = [_num_shards(hidden, i) for i in range(hidden.ndim - 1)] or [1]
    tokens, class_shards = math.prod(sizes), _num_shards(kernel, 1)
    if not is_integer(classes):
        raise ValueError(
            f"kernel must have a fixed number of classes, only the number of tokens may be "
            f"symbolic; got shape {kernel.shape}"
        )
    if not is_integer(tokens):
        rows, columns = None, columns or _FEWEST_CLASSES
    elif block_size is None:
        bytes_of_all = _BLOCK_BYTES * math.prod(shards) * class_shards
        logits = bytes_of_all // jnp.dtype(precision(hidden, kernel)).itemsize
        if class_shards > 1:
            rows = max(logits // classes, _FEWEST_TOKENS)
        else:
            columns = max(logits // max(tokens, 1), _FEWEST_CLASSES)
    if rows is None or not tokens or hidden.ndim == 1:
        columns = min(columns or classes, classes)
        return BlockPlan("classes", -1, 1, columns, *divmod(classes, columns))
    # Cut the longest axis of tokens, of those that are not sharded if there is one.
    axis = max(range(len(sizes)), key=lambda i: (shards[i] == 1, sizes[i]))
    length = min(max(rows * sizes[axis] // tokens, 1), sizes[axis])
    segments = math.gcd(sizes[axis], length)
    length //= segments
    return BlockPlan("tokens", axis, segments, length, *divmod(sizes[axis] // segments, length))


def _check_size(block_size: BlockSize, number: Any) -> int:
    """``number``, a part of ``block_size``, if it is a positive integer."""
    if not is_integer(number) or number < 1:
        raise ValueError(
            f"block_size must be a positive number of classes, or (tokens, None) with a positive "
            f"number of tokens, got {block_size!r}"
        )
    return int(number)


def _num_shards(x: Array, axis: int) -> int:
    """Over how many devices an axis is sharded, 1 if JAX does not know it (on an Auto mesh)."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    return math.prod(sharding.mesh.shape[n] for n in (names if type(names) is tuple else [names]))


def matmul(x: Array, y: Array, x_axes: Sequence[int], y_axes: Sequence[int]) -> Array:
    """The sum of products over some axes of ``x`` and of ``y``, in float32 at least."""
    wide = precision(x, y)
    common = x.dtype if x.dtype == y.dtype else wide
    axes = ((x_axes, y_axes), ((), ()))
    return lax.dot_general(x.astype(common), y.astype(common), axes, preferred_element_type=wide)


def auto_sharded(
    function: Callable[..., list[Array]], arrays: Sequence[Array], specs: Sequence[PartitionSpec]
) -> list[Array]:
    """``function(*arrays)``, whose results are sharded as the specs say, on any mesh.

    On an Explicit mesh JAX would ask how the result of every product is sharded; here XLA decides
    it, as on an Auto mesh. It encloses no more than loops over blocks, for JAX cannot differentiate
    a ``shard_map`` in which something is kept for the derivative from inside of ``auto_axes``.
    """
    mesh = jax.typeof(arrays[0]).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    # Not the other axes of the mesh: those that are manual in shard_map stay so.
    explicit = tuple(name for name, kind in kinds if kind is AxisType.Explicit)
    if not explicit:
        return function(*arrays)
    automatic: Any = jax.sharding.auto_axes(axes=explicit, out_sharding=list(specs))
    return automatic(function)(*arrays)


def spec_of(x: Array, num_axes: int | None = None) -> PartitionSpec:
    """How the first axes of an array, or all of them, are sharded."""
    return PartitionSpec(*jax.typeof(x).sharding.spec[:num_axes])
