"""Everything that knows what a weight is: alignment, masking, the reduction and its derivatives.

A loss hands over its formula and its inputs; nothing here knows a loss by name. The formula is
evaluated on the raw inputs, and the losses that count are selected, weighed and summed in one pass
over memory. Its derivative is a product with slopes that are selected and weighed in the same way,
because zero times an infinite slope is NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.typing import ArrayLike

from jaxlosses._mean import WeightedMean, divide, psum
from jaxlosses._typing import AxisName, Reduction, Result, as_array, is_float

Formula = Callable[..., Array]

_BLOCK = 4096  # Numbers that are summed one after the other: 16 KiB, and 8 digits of accuracy.
_SHORT_ROW = 256
_SUMS = ("sum", "sum and count")  # Beside these, "max" and "max and pick".


def reduce_losses(
    formula: Formula,
    inputs: Sequence[Array],
    weights: ArrayLike,
    *,
    reduction: Reduction,
    axis_name: AxisName,
    foreign: bool = False,
) -> Result:
    """Weigh and reduce the losses ``formula(*inputs)``.

    Floating-point inputs reach the formula in the precision of the result; integers (class ids)
    as they are. The shape of the losses is a prefix of the shape of each input, which says what
    of an input an absent loss makes absent.

    Args:
        formula: Element losses, each from its own place of the inputs.
        inputs: Arrays with the losses' shape, followed by the axes that one loss consumes.
        weights: Weights as the caller gave them.
        reduction: How to reduce, see the package's docstring.
        axis_name: Mapped axes over which total and count are summed as well.
        foreign: The formula was written elsewhere: it may close over traced arrays.

    Raises:
        ValueError: if the weights do not align, the reduction is none of ours, or the losses of a
            foreign formula do not have a leading part of the inputs' shape.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    weights = as_array("weights", weights)
    dtype = _precision(*inputs, weights)
    losses_fn = _Losses(formula, len(inputs), dtype)
    result = jax.eval_shape(formula, *losses_fn.widen(inputs))
    if not hasattr(result, "dtype") or jnp.issubdtype(result.dtype, jnp.complexfloating):
        raise ValueError(f"the loss function must return one real array, got {result}")
    shape = result.shape
    for array in inputs:
        if array.shape[: len(shape)] != shape:
            raise ValueError(
                f"the losses must have a leading part of the shape of predictions and labels, "
                f"got losses of shape {shape} for an input of shape {array.shape}"
            )
    weights = align(weights, shape)
    arguments = list(inputs)
    if foreign:
        converted, closed_over = jax.closure_convert(losses_fn, *losses_fn.widen(inputs))
        losses_fn = dataclasses.replace(losses_fn, formula=converted)
        arguments += closed_over
    losses = _weigh(losses_fn, weights, *arguments)
    if reduction == "none":
        return losses
    if reduction == "sum":
        total = sum_of(losses)
        return total if axis_name is None else psum(total, axis_name)
    if reduction == "average":
        copies = math.prod(shape) // max(weights.size, 1)
        total, count = sum_of(losses), sum_of(weights.astype(dtype)) * copies
    else:
        total, count = sum_and_count(losses, weights.astype(bool))
    if axis_name is not None:
        total, count = psum((total, count), axis_name)
    return WeightedMean(total, count) if reduction == "parts" else divide(total, count)


def align(weights: Array, shape: tuple[int, ...]) -> Array:
    """Weights with one axis for each axis of the losses, equal to it or 1, aligned from the left.

    Raises:
        ValueError: naming both shapes, if an axis is neither equal to the losses' axis nor 1.
    """
    given = weights.shape
    kept = given[:-1] if len(given) == len(shape) + 1 and given[-1] == 1 else given
    if len(kept) > len(shape) or any(w not in (1, n) for w, n in zip(kept, shape, strict=False)):
        raise ValueError(
            f"weights must be a scalar or match the leading axes of the losses (each equal or 1); "
            f"got weights of shape {given} for losses of shape {shape}"
        )
    return weights.reshape(kept + (1,) * (len(shape) - len(kept)))


@dataclasses.dataclass(frozen=True)
class _Losses:
    """A formula of inputs, each loss from one place of them, and of arrays that it closed over."""

    formula: Formula
    num_inputs: int
    dtype: Any

    def __call__(self, *arguments: Array) -> Array:
        return self.formula(*self.widen(arguments)).astype(self.dtype)

    def widen(self, arguments: Sequence[Array]) -> list[Array]:
        inputs, closed_over = arguments[: self.num_inputs], arguments[self.num_inputs :]
        return [*(a.astype(self.dtype) if is_float(a) else a for a in inputs), *closed_over]

    def slopes(self, positions: Sequence[int], *arguments: Array) -> list[Array]:
        """The derivative of each loss with respect to its own places of some inputs."""
        wide = self.widen(arguments)
        losses, pullback = jax.vjp(_vary(self, wide, positions), *_pick(wide, positions))
        return list(pullback(jnp.ones_like(losses)))

    def is_finite(self, *arguments: Array) -> Array:
        """Which losses are finite and have finite slopes."""
        constants = [jax.lax.stop_gradient(a) for a in arguments]
        finite = jnp.isfinite(self(*constants))
        for slope in self.slopes(_floats(constants[: self.num_inputs]), *constants):
            finite &= jnp.all(jnp.isfinite(slope), tuple(range(finite.ndim, slope.ndim)))
        return finite

    def safe_jvp(
        self, values_fn: Callable[..., Any], weights: Array, arguments: Any, tangents: Any
    ) -> tuple[list[Array], list[Array]]:
        """Values of the places of losses and their tangents, in operations that JAX knows.

        These hold at every order. Zero times an infinite slope is NaN, so the inputs are replaced
        where a loss neither counts nor is finite, before anything is differentiated.
        """
        usable = weights.astype(bool) | self.is_finite(*arguments)
        arguments, tangents = list(arguments), list(tangents)
        for i in range(self.num_inputs):
            arguments[i] = _where(usable, arguments[i], _stand_in(i, arguments[i]))
            if not isinstance(tangents[i], SymbolicZero):
                tangents[i] = _where(usable, tangents[i], 0)
        moved = _moved(tangents)
        varied = _vary(values_fn, arguments, moved)
        values, dvalues = jax.jvp(varied, _pick(arguments, moved), _pick(tangents, moved))
        return [_where(usable, v, 0) for v in values], [_where(usable, d, 0) for d in dvalues]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weigh(losses_fn: _Losses, weights: Array, *arguments: Array) -> Array:
    return _where(weights.astype(bool), losses_fn(*arguments), 0) * weights.astype(losses_fn.dtype)


def _weigh_jvp(losses_fn: _Losses, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The derivative with respect to inputs is a product with slopes that are themselves weighed.

    So what is absent reaches no derivative, and the inputs need no selection. Whether a loss of
    weight zero is finite matters to the derivative with respect to its weight alone, and nobody
    else pays for knowing it.
    """
    weights, *arguments = primals
    dweights, *moves = tangents
    losses = _weigh(losses_fn, *primals)
    moved = _moved(moves)
    if any(i >= losses_fn.num_inputs for i in moved):
        _, (tangent,) = losses_fn.safe_jvp(lambda *a: [losses_fn(*a)], weights, arguments, moves)
        tangent = tangent * weights.astype(tangent.dtype)
    else:
        tangent = jnp.zeros_like(losses)
        slopes = _weigh_slopes(losses_fn, tuple(moved), *primals) if moved else ()
        for slope, i in zip(slopes, moved, strict=True):
            # What is absent and not finite most likely has a tangent that is not finite either.
            usable = _expand(weights.astype(bool), slope) | jnp.isfinite(arguments[i])
            move = jnp.where(usable, moves[i], 0).astype(slope.dtype)
            tangent += jnp.sum(slope * move, tuple(range(losses.ndim, slope.ndim)))
    if not isinstance(dweights, SymbolicZero):
        tangent += _unweighed(losses_fn, *primals) * dweights.astype(tangent.dtype)
    return losses, tangent


_weigh.defjvp(_weigh_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _unweighed(losses_fn: _Losses, weights: Array, *arguments: Array) -> Array:
    """The derivative with respect to the weights: the losses, as far as they are usable."""
    losses = losses_fn(*arguments)
    return jnp.where(weights.astype(bool) | jnp.isfinite(losses), losses, 0)


def _unweighed_jvp(losses_fn: _Losses, primals: Any, tangents: Any) -> tuple[Array, Array]:
    weights, *arguments = primals
    _, (tangent,) = losses_fn.safe_jvp(lambda *a: [losses_fn(*a)], weights, arguments, tangents[1:])
    return _unweighed(losses_fn, *primals), tangent


_unweighed.defjvp(_unweighed_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _weigh_slopes(
    losses_fn: _Losses, positions: tuple[int, ...], weights: Array, *arguments: Array
) -> list[Array]:
    slopes = losses_fn.slopes(positions, *arguments)
    keep, scale = weights.astype(bool), weights.astype(losses_fn.dtype)
    return [_where(keep, slope, 0) * _expand(scale, slope) for slope in slopes]


def _weigh_slopes_jvp(
    losses_fn: _Losses, positions: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[list[Array], list[Array]]:
    weights, *arguments = primals
    dweights, *moves = tangents
    slopes_fn = functools.partial(losses_fn.slopes, positions)
    slopes, dslopes = losses_fn.safe_jvp(slopes_fn, weights, arguments, moves)
    scale = weights.astype(losses_fn.dtype)
    dweighed = [_expand(scale, d) * d for d in dslopes]
    if not isinstance(dweights, SymbolicZero):
        dscale = dweights.astype(losses_fn.dtype)
        dweighed = [d + _expand(dscale, s) * s for d, s in zip(dweighed, slopes, strict=True)]
    return [_expand(scale, s) * s for s in slopes], dweighed


_weigh_slopes.defjvp(_weigh_slopes_jvp, symbolic_zeros=True)


def _moved(tangents: Sequence[Any]) -> list[int]:
    return [i for i, d in enumerate(tangents) if not isinstance(d, SymbolicZero)]


def _floats(arrays: Sequence[Array]) -> list[int]:
    return [i for i, array in enumerate(arrays) if is_float(array)]


def _pick(values: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    return [values[i] for i in positions]


def _vary(
    function: Callable[..., Any], arguments: Sequence[Array], positions: Sequence[int]
) -> Callable[..., Any]:
    """``function`` of the arguments at some positions, the others held."""

    def varied(*values: Array) -> Any:
        chosen = dict(zip(positions, values, strict=True))
        return function(*(chosen.get(i, a) for i, a in enumerate(arguments)))

    return varied


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


def _stand_in(position: int, array: Array) -> float | int:
    """What takes the place of an absent input: class 0, or 1/2, 1/4, ...

    These are probabilities, positive, and differ between the inputs, so that neither a logarithm,
    a square root nor the norm of a difference has an infinite slope there.
    """
    return 0.5 ** (position + 1) if is_float(array) else 0


def _where(mask: Array, array: Array, otherwise: float) -> Array:
    return jnp.where(_expand(mask, array), array, jnp.asarray(otherwise, array.dtype))


def _expand(array: Array, like: Array) -> Array:
    """``array`` with the axes that ``like`` has behind its own."""
    return array.reshape(array.shape + (1,) * (like.ndim - array.ndim))


def _precision(*arrays: Array) -> Any:
    """float64 where an argument asks for it, float32 elsewhere."""
    doubles = (a.dtype == jnp.float64 and not a.weak_type for a in arrays)
    return jnp.float64 if any(doubles) else jnp.float32
