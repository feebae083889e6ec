"""Class ids: their check, labels that are ignored, and the NaN of an impossible one."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify
from jax.typing import ArrayLike

from jaxlosses._kernel import align
from jaxlosses._primitive import define_primitive, varying_axes
from jaxlosses._typing import (
    AxisName,
    as_array,
    axis_names,
    check_integer,
    check_unmasked,
    is_integer,
)

P = ParamSpec("P")
R = TypeVar("R")

_MESSAGE = "labels must be in [0, {classes}) where they count, got {label}"


def with_wide_labels(loss: Callable[P, R]) -> Callable[P, R]:
    """The loss, which checks 64-bit NumPy labels too, although JAX truncates them to 32 bits.

    JAX keeps the lower 32 bits, so that 2**32 + 1 would be class 1. Here a label that does not fit
    is clipped to the nearest number that does, which is not a class.
    """
    position = list(inspect.signature(loss).parameters).index("labels")

    @functools.wraps(loss)
    def with_narrow_labels(*args: Any, **kwargs: Any) -> Any:
        if "labels" in kwargs:
            kwargs["labels"] = _narrow_labels(kwargs["labels"], kwargs)
        elif len(args) > position:
            labels = _narrow_labels(args[position], kwargs)
            args = (*args[:position], labels, *args[position + 1 :])
        return loss(*args, **kwargs)

    return cast(Callable[P, R], with_narrow_labels)


def _narrow_labels(labels: Any, options: dict[str, Any]) -> Any:
    """Labels in the dtype that JAX gives them; a clipped one is never equal to ignore_index."""
    narrow, ignored = narrow_integers("labels", labels), options.get("ignore_index")
    if narrow is labels or not is_integer(ignored):
        return narrow
    limit = np.asarray(np.iinfo(narrow.dtype).max - 1, narrow.dtype)
    return np.where((narrow == ignored) & (narrow != labels), limit, narrow)


def narrow_integers(name: str, ids: Any) -> Any:
    """NumPy and Python integers, clipped to the dtype that JAX gives them.

    Anything else is returned as it is.
    """
    if type(ids) is int:
        narrow = jax.dtypes.canonicalize_dtype(int)
    elif isinstance(ids, np.ndarray | np.integer):
        check_unmasked(name, ids)
        narrow = jax.dtypes.canonicalize_dtype(ids.dtype)
        if narrow == ids.dtype or not np.issubdtype(narrow, np.integer):
            return ids
    else:
        return ids
    limits = np.iinfo(narrow)
    return np.asarray(np.clip(ids, limits.min, limits.max), narrow)


def as_integers(name: str, value: ArrayLike) -> Array:
    """An array of integers, of 32 bits at least; ``ValueError`` naming the argument otherwise."""
    integers = as_array(name, value)
    if not jnp.issubdtype(integers.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got dtype {integers.dtype}")
    # Narrow ones could not be compared with the number of classes.
    return integers if integers.dtype.itemsize >= 4 else integers.astype(jnp.int32)


def as_class_ids(labels: ArrayLike, logits_shape: tuple[int, ...]) -> Array:
    """Labels of the logits' shape without the classes; ``ValueError`` if they are not."""
    labels = as_integers("labels", labels)
    *shape, _ = logits_shape
    if list(labels.shape) not in (shape, [*shape, 1]):
        raise ValueError(
            f"labels must have the shape of the logits without the classes, {logits_shape[:-1]}, "
            f"got labels of shape {labels.shape} for logits of shape {logits_shape}"
        )
    return labels.reshape(logits_shape[:-1])


def class_ids(
    labels: ArrayLike, weights: ArrayLike, logits_shape: tuple[int, ...], ignore_index: int | None
) -> tuple[Array, Array]:
    """Labels of the logits' shape without the classes, and their weights.

    A label that is ignored, or impossible and absent, becomes class 0 with a constant weight of
    zero. Every impossible label that is left then counts.
    """
    given = as_array("labels", labels).dtype
    labels = as_class_ids(labels, logits_shape)
    limits, classes = jnp.iinfo(given), logits_shape[-1]
    if ignore_index is not None and not (
        limits.min <= check_integer("ignore_index", ignore_index) <= limits.max
    ):
        raise ValueError(f"ignore_index must be a value of {given}, got {ignore_index}")
    weights = align(as_array("weights", weights), labels.shape)
    absent = ~is_class(labels, classes) & ~weights.astype(bool)
    if ignore_index is not None:
        absent |= labels == jnp.asarray(ignore_index, labels.dtype)
    weights = jnp.where(absent, jnp.zeros_like(weights), weights)
    return _check(jnp.where(absent, 0, labels), weights.astype(bool), classes), weights


def is_label(labels: Array, shape: tuple[int, ...], first: Any = 0) -> Array:
    """Which of the classes, counted from ``first``, is the label: a mask of this shape.

    It is made by comparison: an index could wrap or be clamped.
    """
    ids = jax.lax.broadcasted_iota(labels.dtype, shape, len(shape) - 1)
    return ids + jnp.asarray(first, labels.dtype) == labels[..., None]


def check_shards(name: str, x: Array, class_axis_name: AxisName) -> None:
    """``ValueError`` unless members of mapped axes have classes of their own in ``x``.

    Where ``shard_map`` does not keep track of it, only the axes are checked.
    """
    for axis in axis_names(class_axis_name):
        try:
            varying = varying_axes(jax.lax.axis_index(axis))
        except (NameError, KeyError):
            raise ValueError(
                f"class_axis_name must name axes of a shard_map around the call, "
                f"got {class_axis_name!r}, and there is no {axis!r}"
            ) from None
        if axis in varying and axis not in varying_axes(x):
            raise ValueError(
                f"{name} must have its classes sharded over class_axis_name={class_axis_name!r}, "
                f"but all members of {axis!r} have the same classes"
            )


def num_shards(class_axis_name: AxisName) -> int:
    """Over how many members of mapped axes the classes are sharded; 1 without an axis."""
    return math.prod(jax.lax.axis_size(name) for name in axis_names(class_axis_name))


def shard_index(class_axis_name: AxisName) -> Any:
    """Which shard of the classes this member of mapped axes has, the first axis outermost."""
    index = 0
    for name in axis_names(class_axis_name):
        index = index * jax.lax.axis_size(name) + jax.lax.axis_index(name)
    return index


def nan_if_impossible(losses: Array, labels: Array, classes: int) -> Array:
    """The losses, and NaN where a label is not a class.

    A factor of NaN, unlike a selected NaN, reaches the gradient.
    """
    factor = jnp.where(is_class(labels, classes), 1, jnp.nan)
    return losses * factor.astype(losses.dtype)


def is_class(labels: Array, classes: int) -> Array:
    """Which labels are a class."""
    return (labels >= 0) & (labels < classes)


def _check(labels: Array, present: Array, classes: int) -> Array:
    """The labels, which under ``checkify`` are checked where they are present.

    ``checkify.debug_check`` would do it too, but it leaves an effect in the program: JAX then calls
    it more slowly, cannot export it, and drops the check in the gradient of a scan.
    """
    if not _HAS_CHECKIFY_RULES:
        wrong, label = _wrong_labels(labels, present, classes)
        checkify.debug_check(~wrong, _MESSAGE, classes=jnp.asarray(classes), label=label)
        return labels
    (labels,) = _check_p.bind(labels, present, classes=classes)
    return labels


def _wrong_labels(labels: Array, present: Array, classes: int) -> tuple[Array, Array]:
    """Whether one is wrong where it is present, and the largest of these."""
    wrong = present & ~is_class(labels, classes)
    largest = jnp.max(labels, initial=jnp.iinfo(labels.dtype).min, where=wrong)
    return jnp.any(wrong), largest


def _check_rule(*arguments: Any, classes: int) -> Any:
    """What ``checkify`` makes of the primitive: an error, and the labels."""
    *context, error, enabled_errors, labels, present = arguments  # JAX 0.8 gives no context.
    if rules.FailedCheckError in enabled_errors:
        wrong, label = _wrong_labels(labels, present, classes)
        values = {"classes": jnp.asarray(classes), "label": label}
        failure = rules.FailedCheckError(rules.get_traceback(), _MESSAGE, **values)
        error = rules.assert_func(*context, error, wrong, failure)
    return error, _check_p.bind(labels, present, classes=classes)


def _labels_alone(labels: Array, present: Array, *, classes: int) -> list[Array]:
    """What the primitive computes: the labels, unchanged."""
    return [labels]


_check_p = define_primitive("check_labels", _labels_alone, _labels_alone, elementwise=True)
try:
    # The table of checkify's rules for primitives is private to JAX.
    rules: Any = importlib.import_module("jax._src.checkify")
    rules.error_checks[_check_p] = _check_rule
    _HAS_CHECKIFY_RULES = True
except (ImportError, AttributeError):
    _HAS_CHECKIFY_RULES = False
