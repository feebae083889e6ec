"""What the arguments of a loss hold, for readers and tests; a ``jit`` that type checkers see."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Annotated, Any, Literal, ParamSpec, TypeAlias, TypeVar

import jax
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
class Holds:
    """What an array argument holds.

    Attributes:
        domain: What each number is; ``tests/arguments.py`` draws valid ones by this name.
        inner: The axes that one loss consumes, after the axes that the losses keep.
    """

    domain: str
    inner: tuple[str, ...] = ()


Reals: TypeAlias = Annotated[ArrayLike, Holds("real")]
Logits: TypeAlias = Annotated[ArrayLike, Holds("logit")]
Probabilities: TypeAlias = Annotated[ArrayLike, Holds("probability")]
SampleReals: TypeAlias = Annotated[ArrayLike, Holds("real", inner=("elements",))]
UnitVectors: TypeAlias = Annotated[ArrayLike, Holds("unit vector", inner=("features",))]
ClassLogits: TypeAlias = Annotated[ArrayLike, Holds("logit", inner=("classes",))]
ClassProbabilities: TypeAlias = Annotated[ArrayLike, Holds("distribution", inner=("classes",))]
ClassIds: TypeAlias = Annotated[ArrayLike, Holds("class id")]
Weights: TypeAlias = Annotated[ArrayLike, Holds("weight")]


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """``jax.jit`` with keyword-only arguments static and the signature kept for type checkers."""
    parameters = inspect.signature(function).parameters.values()
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    jitted = jax.jit(function, static_argnames=options)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in options:
            if isinstance(kwargs.get(name), Array | np.ndarray):
                raise ValueError(
                    f"{name} must be a Python value, fixed when the program is compiled, "
                    f"got an array"
                )
        return jitted(*args, **kwargs)

    return checked
