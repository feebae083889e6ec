"""How the product of a last layer is cut into blocks. Nothing here knows a loss."""

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

_BYTES = 2**23  # Of logits in a block: a CPU's cache holds them.
_FEWEST_TOKENS, _FEWEST_CLASSES = 256, 1024  # So that a product is worth its operands' way.


@dataclasses.dataclass(frozen=True)
class Blocks:
    """``count`` blocks of ``segments * length`` tokens or classes, and one of what is left.

    A block has a part of each of the segments that lie along the axis. So an axis that is sharded
    over as many devices as there are segments, or over a divisor, stays so in every block.
    """

    side: Side
    axis: int
    segments: int
    length: int
    count: int
    rest: int

    def fold(self, step: Callable[[Block, T], T], carry: T) -> T:
        """``carry = step(block, carry)`` from block to block."""

        def follow(i: Any, carry: T) -> T:
            return step(Block(self, i * self.length, self.length), carry)

        carry = lax.fori_loop(0, self.count, follow, carry)
        return step(Block(self, self.count * self.length, self.rest), carry) if self.rest else carry

    def with_batch_axis(self) -> Blocks:
        """For arrays of tokens that have one more axis in front."""
        return dataclasses.replace(self, axis=self.axis + 1) if self.side == "tokens" else self


@dataclasses.dataclass(frozen=True)
class Block:
    """``length`` of each segment, from ``start`` on."""

    blocks: Blocks
    start: Any
    length: int

    def take(self, side: Side, x: Array) -> Array:
        """What the block has of an array with tokens, or with classes as its last axis."""
        if side != self.blocks.side:
            return x
        axis, split = self._split(x)
        part = lax.dynamic_slice_in_dim(split, self.start, self.length, axis + 1)
        length = self.blocks.segments * self.length
        return part.reshape(*x.shape[:axis], length, *x.shape[axis + 1 :])

    def put(self, side: Side, x: Array, part: Array) -> Array:
        """``x`` with the block's part of it replaced."""
        part = part.astype(x.dtype)
        if side != self.blocks.side:
            return part
        axis, split = self._split(x)
        part = part.reshape(*split.shape[: axis + 1], self.length, *split.shape[axis + 2 :])
        return lax.dynamic_update_slice_in_dim(split, part, self.start, axis + 1).reshape(x.shape)

    def add(self, side: Side, x: Array, part: Array) -> Array:
        """The sum over the blocks so far, to which one adds what no other one does, or all do."""
        return self.put(side, x, part if side == self.blocks.side else x + part.astype(x.dtype))

    def places(self, side: Side, size: int) -> Array:
        """Where on an uncut axis the block is, which has one segment."""
        return (
            self.start + jnp.arange(self.length) if side == self.blocks.side else jnp.arange(size)
        )

    def _split(self, x: Array) -> tuple[int, Array]:
        axis, segments = self.blocks.axis % x.ndim, self.blocks.segments
        stretch = x.shape[axis] // segments
        return axis, x.reshape(*x.shape[:axis], segments, stretch, *x.shape[axis + 1 :])


def choose_blocks(hidden: Array, kernel: Array, block_size: BlockSize) -> Blocks:
    """Blocks of ``_BYTES`` of logits on a device, as far as it is known what a device has.

    The classes are cut, or where these are sharded, the tokens.
    """
    rows = columns = None
    if isinstance(block_size, tuple) and len(block_size) == 2 and block_size[1] is None:
        rows = _check_size(block_size, block_size[0])
    elif block_size is not None:
        columns = _check_size(block_size, block_size)
    sizes, classes = hidden.shape[:-1] or (1,), kernel.shape[1]
    shards = [_shards(hidden, i) for i in range(hidden.ndim - 1)] or [1]
    tokens, class_shards = math.prod(sizes), _shards(kernel, 1)
    if block_size is None:
        logits = (
            _BYTES
            // jnp.dtype(precision(hidden, kernel)).itemsize
            * math.prod(shards)
            * class_shards
        )
        if class_shards > 1:
            rows = max(logits // classes, _FEWEST_TOKENS)
        else:
            columns = max(logits // max(tokens, 1), _FEWEST_CLASSES)
    if rows is None or not tokens or hidden.ndim == 1:
        columns = min(columns or classes, classes)
        return Blocks("classes", -1, 1, columns, *divmod(classes, columns))
    # Of the axes of tokens, the longest that a device has for itself.
    axis = max(range(len(sizes)), key=lambda i: (shards[i] == 1, sizes[i]))
    length = min(max(rows * sizes[axis] // tokens, 1), sizes[axis])
    segments = math.gcd(sizes[axis], length)
    length //= segments
    return Blocks("tokens", axis, segments, length, *divmod(sizes[axis] // segments, length))


def _check_size(block_size: BlockSize, number: Any) -> int:
    if not is_integer(number) or number < 1:
        raise ValueError(
            f"block_size must be a positive number of classes, or (tokens, None), got {block_size}"
        )
    return int(number)


def _shards(x: Array, axis: int) -> int:
    """Over how many devices an axis is sharded, as far as it shows."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    return math.prod(sharding.mesh.shape[n] for n in (names if type(names) is tuple else [names]))


def matmul(x: Array, y: Array, x_axes: Sequence[int], y_axes: Sequence[int]) -> Array:
    """The products' sum over some axes, in float32 at least."""
    wide = precision(x, y)
    common = x.dtype if x.dtype == y.dtype else wide
    axes = ((x_axes, y_axes), ((), ()))
    return lax.dot_general(x.astype(common), y.astype(common), axes, preferred_element_type=wide)


def per_token(function: Callable[..., list[Array]], hidden: Array, *arrays: Array) -> list[Array]:
    """``function(hidden, *arrays)``, arrays of one number for each token, on any mesh.

    An Explicit mesh would ask of every product how it is sharded; XLA finds that by itself. In
    ``shard_map`` all arrays vary over the axes over which any does, as they would in a sum.
    """
    arrays, sharding = (hidden, *arrays), jax.typeof(hidden).sharding
    if AxisType.Manual in sharding.mesh.axis_types:
        zero = sum(jnp.sum(jnp.zeros_like(a), dtype=int) for a in arrays)
        arrays = tuple(a + jnp.asarray(zero, a.dtype) for a in arrays)
    if AxisType.Explicit in sharding.mesh.axis_types:
        spec = PartitionSpec(*sharding.spec[:-1])
        return jax.sharding.auto_axes(out_sharding=spec)(function)(*arrays)
    return function(*arrays)
