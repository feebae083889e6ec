"""A collection of named losses, a value that functions take and return.

TensorFlow keeps losses in a global collection of the graph, but functions in JAX are pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.tree_util import GetAttrKey
from jax.typing import ArrayLike

from jaxlosses._kernel import reduce_losses
from jaxlosses._mean import WeightedMean, exportable, psum, widen
from jaxlosses._regularization import Regularizer, as_pattern, matching_parameters
from jaxlosses._typing import as_array, as_floats

TOTAL = "total_loss"  # The name of the sum for loggers; no loss can have it.

# The attributes of a collector, and the first keys of its pytree.
KINDS = ("losses", "regularization_losses", "metrics")

# Whether the losses are those of one of several microbatches. JAX traces a function again if this
# value changes, so a cached program cannot skip the check.
is_microbatch = jax.make_user_context(False)


@exportable
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LossCollector:
    """Losses and metrics by name, each kept as an undivided mean.

    It is immutable: every method returns a new collector. It is a pytree, whose leaves are totals
    and counts and whose structure is the names, so it passes through ``jit``, ``grad``, ``scan``,
    ``cond`` and ``vmap``, through ``jax.export`` and into checkpoints (of ``flax.serialization``
    once ``jaxlosses.flax`` is imported). The sum of collectors (of microbatches, batches or
    devices) has the exact mean of each loss over all of them. The empty collector is neutral:
    ``sum(collectors, LossCollector())`` works. The carry of a ``scan`` keeps its structure, so it
    starts from ``jax.tree.map(jnp.zeros_like, losses)``.

    The value of a loss is a scalar, an array of losses, all of which count, or a ``WeightedMean``,
    which has its own count. A scalar counts 1, so that the sum of collectors has the mean of the
    scalars. (If these are means of batches, this is a mean of means; add undivided means instead.)
    A ``WeightedMean`` may have axes (the layers of a ``scan``): each element is then its own loss,
    and the total loss is their sum. ``mean.macro()`` is the mean over the elements. A loss with a
    coefficient is ``add_loss(name, coefficient * mean)``.

    Metrics are kept and added up in the same way, and are not part of the total loss.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> logits, labels = jnp.zeros((3, 2)), jnp.array([0, 1, -1])
        >>> xent = jl.sparse_softmax_cross_entropy(logits, labels, labels >= 0, reduction="parts")
        >>> losses = jl.LossCollector().add_loss("xent", xent)
        >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
        >>> losses = losses.regularize(params, {"kernel$": jl.l2_regularizer(0.01)})
        >>> print(losses)
        loss             value  count
        xent            0.6931      2
        regularization
        kernel$           0.02      1
        total           0.7131
    """

    _losses: dict[str, WeightedMean] = dataclasses.field(default_factory=dict)
    _regularization_losses: dict[str, WeightedMean] = dataclasses.field(default_factory=dict)
    _metrics: dict[str, WeightedMean] = dataclasses.field(default_factory=dict)

    @property
    def losses(self) -> Mapping[str, WeightedMean]:
        """The undivided means by name, in alphabetical order."""
        return MappingProxyType(self._losses)

    @property
    def regularization_losses(self) -> Mapping[str, WeightedMean]:
        """The undivided means of the losses of parameters, by name."""
        return MappingProxyType(self._regularization_losses)

    @property
    def metrics(self) -> Mapping[str, WeightedMean]:
        """The undivided means of the metrics, by name."""
        return MappingProxyType(self._metrics)

    def add_loss(self, name: str, value: ArrayLike | WeightedMean) -> LossCollector:
        """This collector with one more loss.

        Args:
            name: Its name, in scopes separated by ``/``.
            value: A scalar, an array of losses, all of which count, or a ``WeightedMean``.

        Raises:
            ValueError: if the name is taken, empty or ``"total_loss"``; if the value is not a real
                array or number; or if it is a scalar in one of several microbatches of
                :func:`accumulate_value_and_grad`.

        References:
            ``tf.contrib.losses.add_loss``, TensorFlow 1.15.

        Example:
            >>> import jaxlosses as jl
            >>> print(jl.LossCollector().add_loss("aux", 2.0).get_total_loss())
            2.0
        """
        return self._with("losses", name, value)

    def add_regularization_loss(self, name: str, value: ArrayLike | WeightedMean) -> LossCollector:
        """This collector with one more regularization loss; as :meth:`add_loss`.

        A scalar is allowed in microbatches too, because it is the same in all of them.
        """
        return self._with("regularization_losses", name, value)

    def add_metric(self, name: str, value: ArrayLike | WeightedMean) -> LossCollector:
        """This collector with one more metric; as :meth:`add_loss`, but not in the total loss.

        Example:
            >>> import jax.numpy as jnp
            >>> import jaxlosses as jl
            >>> is_right, weights = jnp.array([True, True, False]), jnp.array([1, 0, 1])
            >>> accuracy = jl.compute_weighted_loss(is_right, weights, reduction="parts")
            >>> losses = jl.LossCollector().add_loss("aux", 2.0).add_metric("accuracy", accuracy)
            >>> print(losses.get_total_loss(), losses.get_metrics())
            2.0 {'accuracy': Array(0.5, dtype=float32)}
        """
        return self._with("metrics", name, value)

    def regularize(self, params: Any, regularizers: Mapping[str, Regularizer]) -> LossCollector:
        """This collector with one more regularization loss for each pattern, named by the pattern.

        Args:
            params: Any pytree of parameters (of linen, of nnx, of your own). Flax's wrappers of
                arrays (variables of nnx, boxes of linen) add nothing to the paths.
            regularizers: A mapping from patterns to functions. A pattern is a regular expression
                that is searched for in the path of every floating-point parameter, joined by "/"
                (``encoder/dense/kernel``). The loss is the sum of the function's values for the
                parameters found. A parameter that two patterns find counts in both losses.

        Raises:
            ValueError: if a pattern is not a regular expression, finds no parameter or is a name
                already taken, or if a regularizer does not return a real scalar.

        Example:
            >>> import jax.numpy as jnp
            >>> import jaxlosses as jl
            >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
            >>> losses = jl.LossCollector().regularize(params, {"dense/": jl.l1_regularizer(1.0)})
            >>> print(losses.get_total_loss())
            6.0
        """
        if not isinstance(regularizers, Mapping):
            raise ValueError(
                f"regularizers must be a mapping from patterns to functions, "
                f"got {type(regularizers).__name__}"
            )
        collector = self
        for pattern, regularizer in regularizers.items():
            if not callable(regularizer):
                raise ValueError(
                    f"the regularizer of {pattern!r} must be a function, got {regularizer!r}"
                )
            values = [
                as_array(f"what the regularizer of {pattern!r} returns", regularizer(leaf))
                for leaf in matching_parameters(params, pattern)
            ]
            for value in values:
                if value.shape:
                    raise ValueError(
                        f"the regularizer of {pattern!r} must return a scalar, "
                        f"got shape {value.shape}"
                    )
            collector = collector.add_regularization_loss(pattern, sum(values))
        return collector

    def get_losses(self, scope: str | None = None) -> dict[str, Array]:
        """The value of each loss by name, without the regularization losses.

        Args:
            scope: Keep the names that start with a match of this regular expression.

        Raises:
            ValueError: if ``scope`` is not a regular expression.

        References:
            ``tf.contrib.losses.get_losses``, TensorFlow 1.15.
        """
        return _values(self.losses, scope)

    def get_regularization_losses(self, scope: str | None = None) -> dict[str, Array]:
        """The value of each regularization loss by name; as :meth:`get_losses`."""
        return _values(self.regularization_losses, scope)

    def get_metrics(self, scope: str | None = None) -> dict[str, Array]:
        """The value of each metric by name; as :meth:`get_losses`."""
        return _values(self.metrics, scope)

    def get_total_loss(self, add_regularization_losses: bool = True) -> Array:
        """The sum of the values of all losses, float32 at least; 0 where there is none.

        Args:
            add_regularization_losses: Whether the regularization losses are part of the sum.

        References:
            ``tf.contrib.losses.get_total_loss``, TensorFlow 1.15.
        """
        values = list(self.get_losses().values())
        if add_regularization_losses:
            values += self.get_regularization_losses().values()
        dtype = max((v.dtype for v in values), key=lambda d: d.itemsize, default=jnp.float32)
        return sum((jnp.sum(v.astype(dtype)) for v in values), jnp.zeros((), dtype))

    def merge(self, other: LossCollector) -> LossCollector:
        """The mean of each loss over both collectors; ``losses + other`` is the same.

        To merge with an empty collector, which has no names, changes nothing.

        Raises:
            ValueError: if ``other`` is not a ``LossCollector`` of the same names and shapes, saying
                which differ.
        """
        if not isinstance(other, LossCollector):
            raise ValueError(f"other must be a LossCollector, got {type(other).__name__}")
        for empty, same in ((self, other), (other, self)):
            if not empty._all_means():
                return same
        merged = {}
        for kind in KINDS:
            mine, theirs = getattr(self, kind), getattr(other, kind)
            if mine.keys() != theirs.keys():
                raise ValueError(
                    f"other must have the same {kind} to be merged; "
                    f"only the first has {sorted(mine.keys() - theirs.keys())}, "
                    f"only the second has {sorted(theirs.keys() - mine.keys())}"
                )
            for name in mine:
                shapes = [jnp.shape(means[name].total) for means in (mine, theirs)]
                if shapes[0] != shapes[1]:
                    raise ValueError(
                        f"{name} must have the same shape in both collectors, got {shapes}"
                    )
            merged[f"_{kind}"] = {name: mean + theirs[name] for name, mean in mine.items()}
        return LossCollector(**merged)

    __add__ = merge

    def __radd__(self, other: object) -> LossCollector:
        # The built-in sum() starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def psum(self, axis_name: Hashable) -> LossCollector:
        """The means over all members of a mapped axis (or axes), in one collective."""
        return psum(self, axis_name)

    def to_dict(self) -> dict[str, Array]:
        """Every value by name, and their sum as ``"total_loss"``, for loggers: all are scalars.

        The elements of a loss with axes have the names ``name/0``, ``name/1``, ...

        Raises:
            ValueError: if the name of such an element is also the name of another loss.

        Example:
            >>> import jaxlosses as jl
            >>> {k: float(v) for k, v in jl.LossCollector().add_loss("aux", 2.0).to_dict().items()}
            {'total_loss': 2.0, 'aux': 2.0}
        """
        flat = {TOTAL: self.get_total_loss()}
        for name, value, _ in _rows(self._all_means(), "/{}"):
            if name in flat:
                raise ValueError(f"name {name!r} must not be the name of two values")
            flat[name] = value
        return flat

    def __str__(self) -> str:
        """A table of the values: name, value, and how many losses counted."""
        if not all(map(_is_concrete, self._all_means().values())):
            return repr(self)
        lines = [("loss", "value", "count"), *_lines(self.losses)]
        if self.regularization_losses:
            lines += [("regularization", "", ""), *_lines(self.regularization_losses)]
        lines += [("total", f"{float(self.get_total_loss()):.4g}", "")]
        if self.metrics:
            lines += [("metric", "", ""), *_lines(self.metrics)]
        name, value, count = (max(map(len, column)) for column in zip(*lines, strict=True))
        return "\n".join(f"{n:{name}}  {v:>{value}}  {c:>{count}}".rstrip() for n, v, c in lines)

    def __repr__(self) -> str:
        """The names with their values, or with dtype and shape while they are traced."""
        parts = [
            f"{kind}={{{', '.join(f'{n}: {_show(m)}' for n, m in getattr(self, kind).items())}}}"
            for kind in KINDS
            if getattr(self, kind)
        ]
        return f"LossCollector({', '.join(parts)})"

    def tree_flatten_with_keys(self) -> tuple[Iterable[tuple[Any, Any]], None]:
        """Public names as keys, because checkpoints are read by them."""
        return [(GetAttrKey(kind), getattr(self, f"_{kind}")) for kind in KINDS], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Iterable[Any]) -> LossCollector:
        """A collector, unchecked, because JAX may put leaves there that are not arrays."""
        return cls(*children)

    def _all_means(self) -> dict[str, WeightedMean]:
        return {**self._losses, **self._regularization_losses, **self._metrics}

    def _with(self, kind: str, name: str, value: ArrayLike | WeightedMean) -> LossCollector:
        """This collector with one more mean, after a check of its name and value."""
        if not isinstance(name, str) or name in ("", TOTAL):
            raise ValueError(f"name must be a non-empty string other than {TOTAL!r}, got {name!r}")
        if name in self._all_means():
            raise ValueError(
                f"name {name!r} is taken; every loss and metric needs a name of its own"
            )
        means = {**getattr(self, kind), name: as_mean(kind, name, value)}
        # Sorted, as jit returns dictionaries: the order is part of the structure of a pytree.
        return dataclasses.replace(self, **{f"_{kind}": dict(sorted(means.items()))})


def as_mean(kind: str, name: str, value: ArrayLike | WeightedMean) -> WeightedMean:
    """A loss as an undivided mean: each loss of an array counts 1, and so does a scalar.

    Raises:
        ValueError: naming the loss, if the value is not a real array or number; if the count of a
            ``WeightedMean`` does not have the shape of its total; or if it is a scalar in one of
            several microbatches, and not a regularization loss.
    """
    if not isinstance(value, WeightedMean):
        losses = as_floats(**{name: value})
        if not losses[0].shape and is_microbatch.value and kind != "regularization_losses":
            raise ValueError(
                f"{name} must be undivided where a batch has several microbatches, because the "
                f"mean of their means is not the mean of the batch, got a scalar; add an array of "
                f"losses, the result of a loss with reduction='parts' or 'average_parts', or "
                f"WeightedMean(value, 1) for the mean over the microbatches"
            )
        return reduce_losses(lambda x: x, losses, 1.0, reduction="parts", axis_name=None)
    parts = as_floats(**{f"{name}.total": value.total, f"{name}.count": value.count})
    return WeightedMean(*map(widen, parts))


def _values(means: Mapping[str, WeightedMean], scope: str | None) -> dict[str, Array]:
    """The values of the means whose names start with a match of ``scope``."""
    match = as_pattern("scope", scope or "").match
    return {name: mean.value for name, mean in means.items() if match(name)}


def _rows(means: Mapping[str, WeightedMean], index: str) -> Iterator[tuple[str, Array, Array]]:
    """Name, value and count of every element of every mean.

    ``index`` is the format of what is added to the name for each element of a mean with axes.
    """
    for name, mean in means.items():
        value, count = jnp.ravel(mean.value), jnp.ravel(mean.count)
        for i in range(value.size):
            yield name + index.format(i) * (mean.value.ndim > 0), value[i], count[i]


def _lines(means: Mapping[str, WeightedMean]) -> list[tuple[str, str, str]]:
    """Lines of the table, as texts."""
    rows = _rows(means, "[{}]")
    return [(name, f"{float(value):.4g}", _count_text(float(count))) for name, value, count in rows]


def _count_text(count: float) -> str:
    """A count as text; the sum of weights need not be an integer."""
    return f"{count:,.0f}" if count.is_integer() else f"{count:,.4g}"


def _is_concrete(mean: WeightedMean) -> bool:
    """Whether it holds real numbers: no tracers, nor other leaves from ``jax.tree.map``."""
    return all(
        isinstance(x, Array | np.ndarray)
        and not isinstance(x, Tracer)
        and any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
        for x in (mean.total, mean.count)
    )


def _show(mean: WeightedMean) -> str:
    """The value as text, or dtype and shape, or whatever else the pytree holds."""
    if _is_concrete(mean):
        shown = ", ".join(f"{float(value):.4g}" for value in jnp.ravel(mean.value))
        return f"[{shown}]" if mean.value.ndim else shown
    leaf: Any = mean.total
    is_shaped = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return f"{leaf.dtype}{list(leaf.shape)}" if is_shaped else repr(leaf)
