"""Annotations of the arguments of a loss, checks of arguments, and a typed ``jit``."""

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

Reduction: TypeAlias = Literal["mean", "average", "sum", "none", "parts", "average_parts"]
AxisName: TypeAlias = Hashable | tuple[Hashable, ...] | None
# An Array, or a WeightedMean if the reduction is "parts" or "average_parts". The typed jit cannot
# tell which, and with a union every caller would have to check.
Result: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """What an array argument contains.

    Attributes:
        domain: What each number is; ``tests/arguments.py`` draws valid ones by this name.
        inner: The axes that one loss consumes, after the axes that the losses keep.
        shared: Whether all losses use the same array, which then has none of the losses' axes.
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
    """``jax.jit`` with static options, and with the signature kept for type checkers.

    Options are the arguments that are not annotated as arrays.
    """
    hints = get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    names = list(signature.parameters)
    arrays = {name: spec for name in names if (spec := _array_spec(hints[name]))}
    options = [name for name in names if name not in arrays]
    jitted = jax.jit(function, static_argnames=options)
    prepare = dict.fromkeys(options, as_option)
    prepare |= {name: keep_wide for name, spec in arrays.items() if spec.domain != "class id"}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        pairs = zip(names, args, strict=False)
        positional = [prepare[n](n, v) if n in prepare else v for n, v in pairs]
        named: Any = {n: prepare[n](n, v) if n in prepare else v for n, v in kwargs.items()}
        try:
            return jitted(*positional, *args[len(names) :], **named)
        except (TypeError, ValueError):
            arguments = _bind(function.__name__, signature, args, kwargs)
            # It may come from JAX, which does not name the argument that it cannot take.
            for name, value in arguments.items():
                if name in arrays and value is not signature.parameters[name].default:
                    as_array(name, value)
            raise

    return checked


def _array_spec(hint: Any) -> ArraySpec | None:
    """What an argument contains by its annotation, if it is an array (or None)."""
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Annotated:
            return part.__metadata__[0]
    return None


def as_option(name: str, value: Any) -> Any:
    """``value`` as a Python value; ``ValueError`` naming the argument if it cannot be fixed."""
    if isinstance(value, Array) or not isinstance(value, Hashable):
        raise ValueError(
            f"{name} must be a Python value, fixed when the program is compiled "
            f"(a tuple, not a list), got {value!r} of type {type(value).__name__}"
        )
    if name.endswith("axis_name") and isinstance(value, tuple) and len({*value}) < len(value):
        # XLA would abort the process.
        raise ValueError(f"{name} must name each axis once, got {value!r}")
    # A NumPy scalar would change the dtype of what it is multiplied with.
    return value.item() if isinstance(value, np.generic) else value


def checked_call(call: Callable[P, R]) -> Callable[P, R]:
    """The method ``__call__``, whose errors for wrong calls name the object by its ``repr``."""
    signature = inspect.signature(call)
    without_self = signature.replace(parameters=list(signature.parameters.values())[1:])

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        self, *others = args
        _bind(repr(self), without_self, others, kwargs)
        return call(*args, **kwargs)

    return checked


def _bind(name: str, signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name; ``TypeError`` naming the function if it is a wrong call."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        takes = inspect.Signature(bare)
        raise TypeError(f"{name} was called wrongly: {error}; it takes {takes}") from None


_LARGEST = float(np.finfo(np.float32).max)
# Not ArrayLike: in some versions of JAX, tracers are not instances of it.
_ARRAYS = (Array, np.ndarray, np.generic, bool, int, float, complex)


def as_array(name: str, value: Any) -> Array:
    """``value`` as a real array; ``ValueError`` naming the argument if it is not one."""
    if not isinstance(value, _ARRAYS):
        raise ValueError(f"{name} must be an array or a number, got {type(value).__name__}")
    check_unmasked(name, value)
    dtype = getattr(value, "dtype", np.dtype(type(value)))
    if jnp.issubdtype(dtype, jnp.complexfloating) or not _is_number(dtype):
        raise ValueError(f"{name} must be real, got dtype {dtype}")
    if dtype.itemsize > 8:  # NumPy's longdouble.
        raise ValueError(f"{name} must have at most 64 bits, got dtype {dtype}")
    return jnp.asarray(keep_wide(name, value) if type(value) is int else value)


def keep_wide(name: str, value: Any) -> Any:
    """``value``, but as floats if it holds integers that JAX would truncate to 32 bits.

    Raises:
        ValueError: naming the argument, if it is a Python integer that is too large for a float.
    """
    if not isinstance(value, (np.ndarray, np.integer, int)):
        return value
    check_unmasked(name, value)
    narrow = jax.dtypes.canonicalize_dtype(np.int64)
    if not isinstance(value, int):
        is_cut = value.dtype.kind in "iu" and value.dtype.itemsize > narrow.itemsize
        return value.astype(np.float32) if is_cut else value
    if value.bit_length() < 8 * narrow.itemsize:
        return value
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name} must fit into a float, got an integer of {value.bit_length()} bits"
        ) from None


def check_unmasked(name: str, value: Any) -> None:
    """``ValueError`` if ``value`` is a masked array of NumPy."""
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(
            f"{name} must be an array without a mask, got a masked array of NumPy; give its data, "
            f"and weights that are 0 where it is masked"
        )


def as_floats(**arrays: ArrayLike) -> list[Array]:
    """Arrays of the same shape, with integers and booleans cast to the precision of the others.

    Raises:
        ValueError: naming both arguments, if their shapes differ.
    """
    checked = {name: as_array(name, keep_wide(name, value)) for name, value in arrays.items()}
    (first, head), *rest = checked.items()
    for name, array in rest:
        if array.shape != head.shape:
            raise ValueError(
                f"{first} and {name} must have the same shape, "
                f"got {first} of shape {head.shape} and {name} of shape {array.shape}"
            )
    return in_floats(*checked.values())


def in_floats(*arrays: Array) -> list[Array]:
    """The arrays, with integers and booleans cast to the precision of the others."""
    dtype = precision(*arrays)
    return [a if is_float(a) else a.astype(dtype) for a in arrays]


def is_float(array: Array) -> bool:
    """Whether it holds floating-point numbers; only these have derivatives."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def precision(*inputs: Array, weights: Array | None = None) -> Any:
    """The dtype to compute in: float64 if an argument has this dtype, else float32.

    As in JAX, a weakly typed float64 input counts only if all floating-point inputs are weakly
    typed. A weakly typed weight (inside of ``jit``, a Python number) does not count.
    """
    floats = [x for x in inputs if is_float(x)]
    asking = [x for x in floats if not x.weak_type] or floats
    if weights is not None and not weights.weak_type:
        asking = [*asking, weights]
    return jnp.float64 if any(x.dtype == jnp.float64 for x in asking) else jnp.float32


def in_precision(inputs: Sequence[Array], weights: Array) -> list[Array]:
    """Floating-point inputs in the dtype to compute in; integers (class ids) as they are."""
    dtype = precision(*inputs, weights=weights)
    return [x.astype(dtype) if is_float(x) else x for x in inputs]


def _is_number(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_))


def axis_names(names: AxisName) -> tuple[Any, ...]:
    """The names of mapped axes as a tuple, which is empty for None."""
    if names is None:
        return ()
    return names if isinstance(names, tuple) else (names,)


def check_axis(name: str, axis: int, ndim: int) -> int:
    """``axis`` counted from the front; ``ValueError`` if the array has no such axis."""
    if not -ndim <= check_integer(name, axis) < ndim:
        raise ValueError(f"{name} must be an axis of an array of rank {ndim}, got {axis}")
    return axis % ndim


def check_integer(name: str, value: Any) -> int:
    """``value`` as an int; ``ValueError`` if it is not an integer."""
    if not is_integer(value):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return int(value)


def is_integer(value: Any) -> bool:
    """Whether it is a Python or NumPy integer; a boolean is not one."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_number(name: str, value: Any, smallest: float = 0, largest: float = _LARGEST) -> float:
    """``value`` as a float; ``ValueError`` unless it is within the limits, which fit float32."""
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not smallest <= value <= largest:
        raise ValueError(
            f"{name} must be a number from {smallest:.3g} to {largest:.3g}, got {value!r}"
        )
    return float(value)
