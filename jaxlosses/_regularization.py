"""Regularization losses, which depend on parameters only, and finding parameters by their paths."""

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
    r"""A function that returns the L1 loss of one array of parameters.

    $$\text{scale} \cdot \sum_i |w_i|$$

    Args:
        scale: The factor, not negative.

    Returns:
        A function of one array of any shape that returns a scalar, float32 at least. Its gradient
        at 0 is 0.

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
    r"""A function that returns the L2 loss of one array of parameters.

    $$\frac{\text{scale}}{2} \sum_i w_i^2$$

    Args:
        scale: The factor, not negative; the gradient of the loss is ``scale * w``.

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
    """The floating-point leaves of a pytree in whose path, joined by "/", the pattern is found.

    Raises:
        ValueError: if the pattern is not a regular expression, or is found in no path.
    """
    search = as_pattern("pattern", pattern).search
    named, seen = [], set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_variable):
        # A variable of nnx has several paths if modules share it, but is one parameter.
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
            f"pattern {pattern!r} matches no parameter; the parameters are "
            f"{[path for path, _ in named]}"
        )
    return matched


def as_pattern(name: str, pattern: str) -> re.Pattern[str]:
    """A compiled regular expression; ``ValueError`` naming the argument if it is not one."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{name} must be a regular expression, got {pattern!r}: {error}"
        ) from error


def _is_variable(x: Any) -> bool:
    """Whether it is a variable of nnx; only ``jaxlosses.flax`` may import its class."""
    return hasattr(x, "get_value")


def _path_of(path: tuple[Any, ...]) -> str:
    """A leaf's path, joined by "/"."""
    # Linen wraps an array with metadata in a box, whose attribute "value" is the array.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_scale(scale: float) -> None:
    """``ValueError`` if ``scale`` is not a number that can be a factor."""
    # A scale may be traced (it may follow a schedule), and then has no value to check.
    if not isinstance(scale, Tracer):
        is_array = isinstance(scale, Array | np.ndarray) and scale.ndim == 0
        check_number("scale", float(scale) if is_array else scale)
