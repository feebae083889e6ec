"""What the arguments of a loss contain, for readers and tests; their checks; a typed ``jit``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

P = ParamSpec("P")
R = TypeVar("R")

Reduction: TypeAlias = Literal["mean", "average", "sum", "none", "parts"]
AxisName: TypeAlias = Hashable | tuple[Hashable, ...] | None
# An Array, or a WeightedMean where the reduction is "parts": no signature can say it through jit,
# and a union would burden every caller.
Result: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """What an array argument contains.

    Attributes:
        domain: What each number is; ``tests/arguments.py`` draws valid ones by this name.
        inner: The axes that one loss consumes, after the axes that the losses keep.
        shared: All losses have the same, so that it has none of the losses' axes.
    """

    domain: str
    inner: tuple[str, ...] = ()
    shared: bool = False


Reals: TypeAlias = Annotated[ArrayLike, ArraySpec("real")]
Logits: TypeAlias = Annotated[ArrayLike, ArraySpec("logit")]
Probabilities: TypeAlias = Annotated[ArrayLike, ArraySpec("probability")]
SampleReals: TypeAlias = Annotated[ArrayLike, ArraySpec("real", inner=("elements",))]
UnitVectors: TypeAlias = Annotated[ArrayLike, ArraySpec("unit vector", inner=("features",))]
ClassLogits: TypeAlias = Annotated[ArrayLike, ArraySpec("logit", inner=("classes",))]
ClassProbabilities: TypeAlias = Annotated[ArrayLike, ArraySpec("distribution", inner=("classes",))]
ClassIds: TypeAlias = Annotated[ArrayLike, ArraySpec("class id")]
Hidden: TypeAlias = Annotated[ArrayLike, ArraySpec("real", inner=("features",))]
Kernel: TypeAlias = Annotated[
    ArrayLike, ArraySpec("real", inner=("features", "classes"), shared=True)
]
Bias: TypeAlias = Annotated[ArrayLike, ArraySpec("real", inner=("classes",), shared=True)]
Weights: TypeAlias = Annotated[ArrayLike, ArraySpec("weight")]


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """``jax.jit`` with options static and the signature kept for type checkers.

    Options are what is keyword-only and not annotated as an array.
    """
    hints = get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    options = [
        p.name
        for p in signature.parameters.values()
        if p.kind is p.KEYWORD_ONLY
        and not any(get_origin(hint) is Annotated for hint in get_args(hints[p.name]))
    ]
    jitted = jax.jit(function, static_argnames=options)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in kwargs.items():
            if name in options and (isinstance(value, Array) or not isinstance(value, Hashable)):
                raise ValueError(
                    f"{name} must be a Python value, fixed when the program is compiled, "
                    f"got {value!r} of type {type(value).__name__}"
                )
        try:
            return jitted(*args, **kwargs)
        except TypeError:
            # JAX's, if it is of an argument that can be none of its own.
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                if name not in options and value is not signature.parameters[name].default:
                    as_array(name, value)
            raise

    return checked


def checked_call(call: Callable[P, R]) -> Callable[P, R]:
    """A method ``__call__`` that names its object, by its ``repr``, if it is called wrongly."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{args[0]!r} was called wrongly: {error}") from None
        return call(*args, **kwargs)

    return checked


_LARGEST = float(np.finfo(np.float32).max)
# Not ArrayLike, of which tracers are no instances in every JAX.
_ARRAYS = (Array, np.ndarray, np.generic, bool, int, float, complex)


def as_array(name: str, value: Any) -> Array:
    """``value`` as a real array; ``ValueError`` naming the argument if it is none."""
    if not isinstance(value, _ARRAYS):
        raise ValueError(f"{name} must be an array or a number, got {type(value).__name__}")
    dtype = getattr(value, "dtype", np.dtype(type(value)))
    if jnp.issubdtype(dtype, jnp.complexfloating) or not _is_number(dtype):
        raise ValueError(f"{name} must be real, got dtype {dtype}")
    return jnp.asarray(value)


def as_floats(**arrays: ArrayLike) -> list[Array]:
    """Arrays of one shape, integers and booleans as float32.

    Raises:
        ValueError: naming both arguments, if their shapes differ.
    """
    checked = {name: as_array(name, value) for name, value in arrays.items()}
    (first, head), *rest = checked.items()
    for name, array in rest:
        if array.shape != head.shape:
            raise ValueError(
                f"{first} and {name} must have the same shape, "
                f"got {first} of shape {head.shape} and {name} of shape {array.shape}"
            )
    return [a if is_float(a) else a.astype(jnp.float32) for a in checked.values()]


def is_float(array: Array) -> bool:
    """Whether it holds floating-point numbers, the ones that have derivatives."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def precision(*arrays: Array) -> Any:
    """The dtype to compute in: float64 where an argument asks for it, float32 elsewhere."""
    doubles = (a.dtype == jnp.float64 and not a.weak_type for a in arrays)
    return jnp.float64 if any(doubles) else jnp.float32


def in_precision(inputs: Sequence[Array], weights: Array) -> list[Array]:
    """Floating-point inputs in the dtype to compute in; integers (class ids) as they are."""
    dtype = precision(*inputs, weights)
    return [x.astype(dtype) if is_float(x) else x for x in inputs]


def _is_number(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_))


def check_axis(name: str, axis: int, ndim: int) -> int:
    """``axis`` counted from the front; ``ValueError`` if the array has no such axis."""
    if not -ndim <= check_integer(name, axis) < ndim:
        raise ValueError(f"{name} must be an axis of an array of rank {ndim}, got {axis}")
    return axis % ndim


def check_integer(name: str, value: Any) -> int:
    """``value``; ``ValueError`` if it is no integer."""
    if not is_integer(value):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return int(value)


def is_integer(value: Any) -> bool:
    """Whether it is a Python or NumPy integer; a truth value is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_number(name: str, value: Any, largest: float = _LARGEST) -> None:
    """``ValueError`` unless ``value`` is a number from 0 to the largest, by default float32's."""
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not 0 <= value <= largest:
        bound = "not be negative" if largest == _LARGEST else f"be from 0 to {largest}"
        raise ValueError(f"{name} must be a finite number and {bound}, got {value!r}")
