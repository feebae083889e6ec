"""Losses of parameters, and how parameters are named."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxlosses._regression import absolute_difference, mean_squared_error
from jaxlosses._typing import check_number

Regularizer: TypeAlias = Callable[[ArrayLike], Array]


def l1_regularizer(scale: float) -> Regularizer:
    r"""A function that charges one parameter array for its absolute values.

    $$\text{scale} \cdot \sum_i |w_i|$$

    Args:
        scale: The factor, not negative.

    Returns:
        A function of one array of any shape that returns a scalar, float32 at least; its slope at
        0 is 0.

    Raises:
        ValueError: if ``scale`` is negative.

    References:
        ``tf.contrib.layers.l1_regularizer``, TensorFlow 1.15.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> print(jl.l1_regularizer(0.5)(jnp.array([[3.0, -4.0]])))
        3.5
    """
    _check_scale(scale)
    return lambda w: scale * absolute_difference(w, jnp.zeros_like(w), reduction="sum")


def l2_regularizer(scale: float) -> Regularizer:
    r"""A function that charges one parameter array for its squares.

    $$\frac{\text{scale}}{2} \sum_i w_i^2$$

    Args:
        scale: The factor, not negative; the slope of the loss is ``scale * w``.

    Returns:
        A function of one array of any shape that returns a scalar, float32 at least.

    Raises:
        ValueError: if ``scale`` is negative.

    References:
        ``tf.contrib.layers.l2_regularizer``, TensorFlow 1.15.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> print(jl.l2_regularizer(0.5)(jnp.array([[3.0, -4.0]])))
        6.25
    """
    _check_scale(scale)
    return lambda w: scale / 2 * mean_squared_error(w, jnp.zeros_like(w), reduction="sum")


def matching_parameters(params: Any, pattern: str) -> list[Array]:
    """The floating-point leaves of a pytree whose "/"-joined path the pattern is found in.

    Raises:
        ValueError: if the pattern is no regular expression, or matches none of them.
    """
    search = as_pattern("pattern", pattern).search
    named, seen = [], set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_variable):
        # An nnx module that two others share holds one parameter, whatever its paths.
        if _is_variable(leaf):
            if id(leaf) in seen:
                continue
            seen.add(id(leaf))
            leaf = leaf.get_value()
        if jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating):
            named.append((_path_of(path), leaf))
    matched = [leaf for path, leaf in named if search(path)]
    if not matched:
        raise ValueError(
            f"pattern {pattern!r} matches no parameter; there are {[path for path, _ in named]}"
        )
    return matched


def as_pattern(name: str, pattern: str) -> re.Pattern[str]:
    """A compiled regular expression; ``ValueError`` naming the argument if it is none."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{name} must be a regular expression, got {pattern!r}: {error}"
        ) from error


def _is_variable(x: Any) -> bool:
    return hasattr(x, "get_value")  # Of nnx, which only jaxlosses.flax may import.


def _path_of(path: tuple[Any, ...]) -> str:
    # Linen's boxes of metadata hold their array as an attribute "value".
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_scale(scale: float) -> None:
    # A scale may be traced (a schedule): then there is no value to check.
    if not isinstance(scale, Tracer):
        is_array = isinstance(scale, Array | np.ndarray) and scale.ndim == 0
        check_number("scale", float(scale) if is_array else scale)
