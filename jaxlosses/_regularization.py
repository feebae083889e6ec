"""Regularization losses, which depend on parameters only, and finding parameters by their paths."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxlosses._regression import absolute_difference, mean_squared_error
from jaxlosses._typing import as_array, check_number, checked_call

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
        ValueError: if ``scale`` is negative. From the returned function: if ``w`` is not a real
            array or number.

    References:
        ``tf.contrib.layers.l1_regularizer``, TensorFlow 1.15.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> print(jl.l1_regularizer(0.5)(jnp.array([[3.0, -4.0]])))
        3.5
    """
    _check_scale(scale)
    return _Regularizer("l1_regularizer", scale, scale, absolute_difference)


def l2_regularizer(scale: float) -> Regularizer:
    r"""A function that returns the L2 loss of one array of parameters.

    $$\frac{\text{scale}}{2} \sum_i w_i^2$$

    Args:
        scale: The factor, not negative; the gradient of the loss is ``scale * w``.

    Returns:
        A function of one array of any shape that returns a scalar, float32 at least.

    Raises:
        ValueError: if ``scale`` is negative. From the returned function: if ``w`` is not a real
            array or number.

    References:
        ``tf.contrib.layers.l2_regularizer``, TensorFlow 1.15.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> print(jl.l2_regularizer(0.5)(jnp.array([[3.0, -4.0]])))
        6.25
    """
    _check_scale(scale)
    return _Regularizer("l2_regularizer", scale, scale / 2, mean_squared_error)


# A class, so that it can be pickled. Two are equal only if they are the same object, because a
# traced scale can be neither compared nor hashed.
@dataclasses.dataclass(frozen=True, eq=False)
class _Regularizer:
    """See ``jaxlosses.l1_regularizer`` and ``jaxlosses.l2_regularizer``."""

    name: str
    scale: Any
    factor: Any
    loss: Callable[..., Array]

    @checked_call
    def __call__(self, w: ArrayLike) -> Array:
        w = as_array("w", w)
        loss = self.loss(w, jnp.zeros_like(w), reduction="sum")
        # In the precision of the parameters, whatever that of the factor is.
        return loss * jnp.asarray(self.factor, loss.dtype)

    def __repr__(self) -> str:
        return f"{self.name}({self.scale})"


def matching_parameters(params: Any, pattern: str) -> list[Array]:
    """The floating-point leaves of a pytree in whose path, joined by "/", the pattern is found.

    Raises:
        ValueError: if the pattern is not a regular expression, or is found in no path.
    """
    search = as_pattern("pattern", pattern).search
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in _leaves_with_path(params, (), set())
        if jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating)
    ]
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


def _leaves_with_path(
    tree: Any, prefix: tuple[Any, ...], seen: set[int]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Leaves and their paths, as if Flax did not wrap arrays in variables (nnx) and boxes (linen).

    A wrapper has its own key for its content, which is not part of a parameter's name. Only the
    keys of wrappers are left out: a layer of attention may be called ``value`` too.
    """
    variable = _flax_class("flax.nnx", "Variable")
    box = _flax_class("flax.core.meta", "AxisMetadata")
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, (variable, box))
    ):
        path = (*prefix, *path)
        if isinstance(leaf, variable):
            # It has several paths if modules share it, but is one parameter.
            if id(leaf) not in seen:
                seen.add(id(leaf))
                yield from _leaves_with_path(leaf.get_value(), path, seen)
        elif isinstance(leaf, box):
            # Its method unbox would also move the array to a mesh.
            for content in jax.tree.leaves(leaf, is_leaf=lambda x, box=leaf: x is not box):
                if content is not leaf:  # It is, if the box is no pytree.
                    yield from _leaves_with_path(content, path, seen)
        else:
            yield path, leaf


def _flax_class(module: str, name: str) -> Any:
    """A class of Flax, for ``isinstance``, without an import of Flax.

    If it is not loaded, there are no instances, and this is the empty tuple.
    """
    return getattr(sys.modules.get(module), name, ())


def _check_scale(scale: float) -> None:
    """``ValueError`` if ``scale`` is not a number that can be a factor."""
    # A scale may be traced (it may follow a schedule), and then has no value to check.
    if isinstance(scale, Tracer):
        return
    if isinstance(scale, Array | np.ndarray) and scale.ndim == 0:
        as_array("scale", scale)
        scale = scale.item()
    check_number("scale", scale)
