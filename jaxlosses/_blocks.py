"""How the product of a last layer, ``hidden @ kernel``, is cut into blocks.

A block is some of the tokens with all classes, or some of the classes with all tokens. Nothing here
knows a loss or a mesh: tokens and classes are those that one device has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from jax import Array, lax

from jaxlosses._typing import is_integer
from jaxlosses._typing import precision as precision_of

T = TypeVar("T")
BlockSize: TypeAlias = int | tuple[int, None] | None
Side = Literal["tokens", "classes"]
Platform = Literal["cpu", "tpu", "default"]
PLATFORMS: tuple[Platform, ...] = get_args(Platform)

# How many bytes the logits of one block take. On a CPU they stay in the cache. TPUs and GPUs
# ("default") need larger blocks to be busy, because they multiply fast.
_BLOCK_BYTES: dict[Platform, int] = {"cpu": 2**23, "tpu": 2**26, "default": 2**28}
# Sizes that are a multiple of these fit the matrix units of the hardware.
_MULTIPLES: dict[Platform, int] = {"cpu": 1, "tpu": 128, "default": 8}
# In a smaller block, reading hidden and kernel takes longer than multiplying them.
_FEWEST: dict[Side, int] = {"tokens": 256, "classes": 1024}


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """How an axis of tokens or of classes is cut into blocks.

    There are ``count`` blocks of ``length`` positions, and a shorter one of the ``rest``.

    Attributes:
        side: Whether tokens or classes are cut.
        axis: Which of the tokens' axes is cut, if tokens are cut.
        length: How many positions of that axis a block has.
        count: How many blocks have this length.
        rest: How many positions are left for a shorter last block.
    """

    side: Side
    axis: int
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


@dataclasses.dataclass(frozen=True)
class BlockSlice:
    """One block of a plan: ``length`` positions of the axis that is cut, from ``start`` on.

    The argument ``side`` of its methods says whether an array has tokens or classes. For an array
    with classes, ``axis`` says which axis is that of the classes; in an array with tokens, the
    tokens' axes come first. If that side is not the one that is cut, a block has the whole array.
    """

    plan: BlockPlan
    start: Any
    length: int

    def take(self, side: Side, x: Array, axis: int = -1) -> Array:
        """The block's part of an array."""
        if side != self.plan.side:
            return x
        return lax.dynamic_slice_in_dim(x, self.start, self.length, self._axis(side, x, axis))

    def put(self, side: Side, x: Array, part: Array, axis: int = -1) -> Array:
        """``x`` with the block's part replaced by ``part``."""
        part = part.astype(x.dtype)
        if side != self.plan.side:
            return part
        return lax.dynamic_update_slice_in_dim(x, part, self.start, self._axis(side, x, axis))

    def add(self, side: Side, x: Array, part: Array, axis: int = -1) -> Array:
        """``x``, a sum that starts at 0, with this block's ``part`` added.

        Where ``x`` has the side that is cut, no other block adds to that part, so it is put there.
        """
        is_cut = side == self.plan.side
        return self.put(side, x, part if is_cut else x + part.astype(x.dtype), axis)

    def _axis(self, side: Side, x: Array, axis: int) -> int:
        return self.plan.axis if side == "tokens" else axis % x.ndim


def check_block_size(block_size: BlockSize) -> BlockSize:
    """``block_size``, if it says how many classes or how many tokens a block has.

    Raises:
        ValueError: if it is not a positive integer, ``(tokens, None)`` or None.
    """
    of_tokens = isinstance(block_size, tuple) and block_size[1:] == (None,)
    number: Any = block_size[0] if isinstance(block_size, tuple) and of_tokens else block_size
    if (number is not None and (not is_integer(number) or number < 1)) or (
        number is None and of_tokens
    ):
        raise ValueError(
            f"block_size must be a positive number of classes, or (tokens, None) with a positive "
            f"number of tokens, got {block_size!r}"
        )
    return block_size


def plan_blocks(
    tokens: Sequence[int],
    features: int,
    part: int,
    shards: int,
    block_size: BlockSize,
    platform: Platform,
    itemsize: int,
    *,
    may_cut_tokens: bool = True,
) -> BlockPlan:
    """Blocks of the size that was asked for, or of as many logits as suit a platform.

    By default the longer one of both sides is cut, because the other side's gradient is added up
    block by block, which takes memory and is rewritten for every block. If the number of tokens is
    symbolic (in ``jax.export``), always the classes, whose number is fixed.

    Args:
        tokens: The sizes of the tokens' axes; none if there is one token.
        features: How many features a token has.
        part: How many classes a part of the kernel has.
        shards: How many such parts there are; a block takes as many classes from each part.
        block_size: What was asked for.
        platform: Which kind of machine it is for.
        itemsize: How many bytes a logit takes.
        may_cut_tokens: Whether tokens may be cut by default. Where it is not known how arrays are
            sharded they must not be: most often the tokens are sharded, and a block of them would
            be on one device.
    """
    classes, num_tokens = part * shards, math.prod(tokens)
    is_fixed = is_integer(num_tokens)
    logits = _BLOCK_BYTES[platform] // itemsize
    rows = columns = None
    if isinstance(block_size, tuple):
        rows = block_size[0]
    elif block_size is not None:
        columns = -(-block_size // shards)
    elif is_fixed and num_tokens > classes and may_cut_tokens:
        rows = _near(num_tokens, logits // classes, "tokens", features, _MULTIPLES[platform])
    else:
        wanted = logits // max(num_tokens, 1) if is_fixed else 0
        # Gathered parts are concatenated, so the size of each can be a smaller multiple.
        multiple = _MULTIPLES[platform] if shards == 1 else 16
        columns = _near(part, wanted, "classes", features, multiple, shards)
    if rows is None or not is_fixed or not num_tokens or not tokens:
        columns = min(columns or _FEWEST["classes"], part)
        return BlockPlan("classes", -1, columns, *divmod(part, columns))
    axis = max(range(len(tokens)), key=lambda i: tokens[i])
    length = min(max(rows * tokens[axis] // num_tokens, 1), tokens[axis])
    return BlockPlan("tokens", axis, length, *divmod(tokens[axis], length))


def _near(size: int, wanted: int, side: Side, features: int, multiple: int, shards: int = 1) -> int:
    """A length of blocks near the wanted one, a divisor of ``size`` if possible."""
    # Each block rewrites sums that are as long as the features. In a shorter block these would be
    # more numbers than its logits.
    wanted = max(wanted, _FEWEST[side], features // 2) // shards
    if wanted >= size:
        return size
    divisors = (n for n in range(wanted, wanted // 2, -1) if size % n == 0 and n % multiple == 0)
    return next(divisors, 2 ** (max(wanted, 1).bit_length() - 1))


def matmul(
    x: Array,
    y: Array,
    x_axes: Sequence[int],
    y_axes: Sequence[int],
    *,
    dtype: Any = None,
    precision: Any = None,
) -> Array:
    """The sum of products over some axes of ``x`` and of ``y``, in float32 at least.

    Both are cast to ``dtype``; without it, to float32 if their dtypes differ. ``precision`` is that
    of ``jax.lax.dot_general``.
    """
    wide = precision_of(x, y)
    common = dtype or (x.dtype if x.dtype == y.dtype else wide)
    axes, options = ((x_axes, y_axes), ((), ())), {"preferred_element_type": wide}
    x, y = x.astype(common), y.astype(common)
    return lax.dot_general(x, y, axes, precision=precision, **options)
