"""A mean kept as a total and a count, which is divided only when its value is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import TypeVar

import jax
import jax.export
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxlosses._typing import as_array, as_option, precision

T = TypeVar("T")


def exportable(cls: type[T]) -> type[T]:
    """Let ``jax.export`` save programs that take or return a pytree class.

    The class is restored as ``cls(*children)``. Its name is part of the saved program, so it is
    made without private modules and underscores.
    """
    return jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"{__package__}.{cls.__name__.lstrip('_')}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: None,
        from_children=lambda aux_data, children: cls(*children),
    )


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedMean:
    r"""A mean kept as its two numbers, so that means add up exactly.

    $$\text{value} = \text{total} / \text{count},\quad 0 \text{ where } \text{count} = 0$$

    The mean of a whole dataset is not the mean of the means of its batches, if these count
    different numbers of losses. It is the sum of totals divided by the sum of counts. The same
    holds for microbatches, devices and hosts. Every loss returns this class with
    ``reduction="parts"``, and with ``"average_parts"``, where the count is the sum of the weights.

    Add means with ``+``. To multiply a mean by a scalar or by an array of its shape, or to divide
    it, changes the total and keeps the count; another shape raises a ``ValueError``. A mean is a
    pytree, so it passes through ``jit``, ``scan``, ``vmap`` and ``grad``, and through
    ``jax.export`` and checkpoints. Sums have the precision of their dtype: past $2^{24}$, a float32
    loses small numbers that are added to it, so add up millions of batches in groups.

    Attributes:
        total: Sum of the weighted losses; any floating-point array, usually a scalar.
        count: How many losses counted (those whose weight is not zero), or another denominator, of
            the same shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> first = jl.compute_weighted_loss(jnp.array([1.0, 2.0, 3.0]), reduction="parts")
        >>> last = jl.compute_weighted_loss(jnp.array([6.0]), reduction="parts")
        >>> print((first + last).value, (first.value + last.value) / 2)
        3.0 4.0
        >>> print((0.1 * (first + last)).value)
        0.3
    """

    total: ArrayLike
    count: ArrayLike

    __array_ufunc__ = None  # So that a NumPy number times a mean calls __rmul__.

    @property
    def value(self) -> Array:
        """``total / count`` in float32 at least, and 0 where the count is 0.

        Raises:
            ValueError: if total or count is not a real array or number.
        """
        return divide(*_parts(self))

    def merge(self, other: WeightedMean) -> WeightedMean:
        """The mean over the losses of both; ``mean + other`` is the same.

        Raises:
            ValueError: if ``other`` is not a ``WeightedMean`` of the same shape, or if a total or
                count is not a real array or number.
        """
        if not isinstance(other, WeightedMean):
            raise ValueError(
                f"other must be a WeightedMean to be added to one, got {type(other).__name__}"
            )
        (total, count), (other_total, other_count) = _parts(self), _parts(other)
        if total.shape != other_total.shape:
            raise ValueError(
                f"other must have shape {total.shape} to be added to a WeightedMean of this shape, "
                f"got {other_total.shape}"
            )
        return WeightedMean(jnp.add(total, other_total), jnp.add(count, other_count))

    __add__ = merge

    def __radd__(self, other: object) -> WeightedMean:
        # The built-in sum() starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor: ArrayLike) -> WeightedMean:
        total, count = _parts(self)
        return WeightedMean(jnp.multiply(*_alike(total, "factor", factor)), count)

    __rmul__ = __mul__

    def __truediv__(self, divisor: ArrayLike) -> WeightedMean:
        total, count = _parts(self)
        return WeightedMean(jnp.divide(*_alike(total, "divisor", divisor)), count)

    def macro(self) -> WeightedMean:
        r"""The mean over the elements of a mean with axes: the macro average.

        $$\text{macro} = \frac{\sum_i \text{value}_i}{|\{i : \text{count}_i \ne 0\}|}$$

        An element whose count is 0 is absent. Under ``vmap`` a loss gives the mean of each
        sequence, and this gives the mean over the sequences, all of which count equally, however
        many tokens they have. The result is undivided too, so batches of sequences add up.

        Raises:
            ValueError: if total or count is not a real array or number.

        Example:
            >>> import functools
            >>> import jax, jax.numpy as jnp
            >>> import jaxlosses as jl
            >>> losses = jnp.array([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
            >>> present = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
            >>> loss = functools.partial(jl.compute_weighted_loss, reduction="parts")
            >>> sequences = jax.vmap(loss)(losses, present).macro()
            >>> print(sequences.value, sequences.count, loss(losses, present).value)  # 8/2 and 12/4
            4.0 2.0 3.0
        """
        total, count = _parts(self)
        value = divide(total, count)
        return WeightedMean(jnp.sum(value), jnp.sum(count != 0).astype(value.dtype))

    def psum(self, axis_name: Hashable) -> WeightedMean:
        """The mean over all members of a mapped axis (``shard_map``, ``vmap``), in one collective.

        Args:
            axis_name: The axis, or a tuple of axes, as for ``jax.lax.psum``.
        """
        return psum(self, axis_name)


def _parts(mean: WeightedMean) -> tuple[Array, Array]:
    """Total and count, checked.

    Not checked by the constructor, because JAX also builds pytrees of leaves that are not arrays.
    Sums of fewer than 32 bits would soon overflow or stop growing, so they are cast to float32.
    """
    parts = as_array("WeightedMean.total", mean.total), as_array("WeightedMean.count", mean.count)
    total, count = (x.astype(jnp.float32) if x.dtype.itemsize < 4 else x for x in parts)
    if total.shape != count.shape:
        raise ValueError(
            f"WeightedMean.count must have the total's shape {total.shape}, got {count.shape}"
        )
    return total, count


def _alike(total: Array, name: str, number: ArrayLike) -> tuple[Array, Array]:
    """A total and its factor or divisor, in the total's shape and in the same dtype."""
    other = as_array(name, number)
    if other.shape not in ((), total.shape):
        raise ValueError(
            f"{name} must be a scalar or have the mean's shape {total.shape}, got {other.shape}"
        )
    dtype = precision(total, weights=other)
    return total.astype(dtype), jnp.broadcast_to(other.astype(dtype), total.shape)


def divide(total: ArrayLike, count: ArrayLike) -> Array:
    """``total / count`` in the total's precision, 0 (and no derivative) where the count is 0."""
    total = widen(total)
    count = jnp.broadcast_to(jnp.asarray(count).astype(total.dtype), total.shape)
    zero = lax.full_like(total, 0)
    is_empty = lax.eq(count, zero)
    # Select the total too: else a total of NaN would make the derivative in the count NaN.
    return lax.div(lax.select(is_empty, zero, total), lax.select(is_empty, zero + 1, count))


def widen(x: ArrayLike) -> Array:
    """``x`` in a dtype in which sums are accurate: float64 as it is, all others as float32."""
    x = jnp.asarray(x)
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def psum(tree: T, axis_name: Hashable) -> T:
    """``jax.lax.psum`` of each leaf on its own; XLA makes one collective of them.

    JAX 0.8 cannot transpose one ``psum`` of leaves of which some (counts) have no derivative.
    """
    axis_name = as_option("axis_name", axis_name)
    return jax.tree.map(lambda leaf: jax.lax.psum(leaf, axis_name), tree)
