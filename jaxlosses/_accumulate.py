"""Exact means over microbatches, and batches padded to a fixed size.

The whole batch of a training step may not fit into memory. Here one microbatch is computed after
the other, and value and gradient are still those of the whole batch. A batch that is too short is
padded with rows of weight zero, which change no mean.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlosses._collector import KINDS, LossCollector, is_microbatch
from jaxlosses._mean import WeightedMean, divide, widen
from jaxlosses._typing import as_array, check_integer, checked_call, is_float


@overload
def accumulate_value_and_grad(
    loss_fn: Callable[..., Any], num_microbatches: int, *, has_aux: Literal[False] = False
) -> Callable[..., tuple[tuple[Array, LossCollector], Any]]: ...


@overload
def accumulate_value_and_grad(
    loss_fn: Callable[..., Any], num_microbatches: int, *, has_aux: Literal[True]
) -> Callable[..., tuple[tuple[Array, tuple[LossCollector, Any]], Any]]: ...


def accumulate_value_and_grad(
    loss_fn: Callable[..., Any], num_microbatches: int, *, has_aux: bool = False
) -> Callable[..., tuple[tuple[Array, Any], Any]]:
    r"""The value and gradient of a whole batch, from one microbatch at a time.

    $$\nabla \sum_k \frac{T_k}{C_k}
    = \sum_m \sum_k \frac{1}{C_k} \left(\nabla t_{km} - \frac{T_k}{C_k} \nabla c_{km}\right),
    \quad T_k = \sum_m t_{km},\ C_k = \sum_m c_{km}$$

    for losses $k$ with totals $t$ and counts $c$ in microbatches $m$. Each loss has its own count,
    so no single factor for the gradient of a microbatch would be right. There are two scans over
    the microbatches: the first adds up totals and counts, the second adds up gradients.

    If counts depend on the data and not on parameters, their gradients are zero, and the totals of
    the first scan are not needed. Inside of ``jax.jit`` the compiler then removes the model from
    the first scan. (It cannot remove a ``lax.cond``: the forward pass of a model within one runs
    twice.) If counts depend on parameters, as with ``"average_parts"`` and learned weights, value
    and gradient are still those of the whole batch, and the forward pass runs twice.

    A loss must be undivided, because the mean of the microbatches' means is not the mean of the
    batch. So a scalar is refused. A scalar that is not a mean over rows is added as
    ``WeightedMean(value, 1)``; the result is its mean over the microbatches. A regularization loss
    may be a scalar, because it depends on parameters only; it must be the same in all microbatches.

    State that a model changes in a forward pass, such as batch statistics, is returned as ``aux``.
    Every microbatch begins with the state that ``loss_fn`` closes over, and ``aux`` has the state
    after each of them. The mean of these states is what one step with the mean of the microbatches'
    statistics gives (for a variance, the mean of the variances within the microbatches). The
    page on microbatches shows this for linen and for nnx.

    Args:
        loss_fn: ``loss_fn(params, microbatch)`` returns a ``LossCollector``, or with ``has_aux`` a
            pair of it and any pytree of arrays. If a key is given it is called as
            ``loss_fn(params, microbatch, key)``. Add means with ``reduction="parts"`` or
            ``"average_parts"``.
        num_microbatches: How many microbatches a batch is cut into. Microbatch ``i`` holds the
            rows ``i``, ``i + num_microbatches``, ..., so that a batch whose rows are sharded over
            devices is cut without moving a row. (On an Explicit mesh a microbatch must have rows
            for every device.)
        has_aux: Whether ``loss_fn`` returns a pair.

    Returns:
        A function of ``(params, batch, *, key=None)``. ``params`` and ``batch`` are pytrees of
        arrays: floating-point parameters, and numbers or keys with one leading axis. ``key`` is a
        single ``jax.random.key``, which ``jax.random.split`` makes into one for each microbatch.
        The function returns ``((total, losses), grads)``, or with ``has_aux`` ``((total, (losses,
        aux)), grads)``, where ``aux`` is that of all microbatches, stacked. The total is
        ``losses.get_total_loss()`` of the whole batch. Gradients have the dtypes of the parameters
        and are summed in float32 at least. The function can be pickled if ``loss_fn`` can.

    Raises:
        ValueError: if ``loss_fn`` is not a function or ``num_microbatches`` not a positive integer.
            The returned function raises it if a parameter is not real and floating-point, if the
            batch holds anything but numbers and keys, if its leading axes differ in length or are
            not a multiple of ``num_microbatches``, if ``key`` is not a single key, if ``loss_fn``
            does not return a ``LossCollector`` (with ``has_aux``, a pair), if it adds a scalar as a
            loss or a metric although there are several microbatches, or if a loss has an axis over
            the rows of the batch, so that the microbatches cannot be added up.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> def loss_fn(w, batch):
        ...     x, y, mask = batch
        ...     error = jl.mean_squared_error(w * x, y, mask, reduction="parts")
        ...     return jl.LossCollector().add_loss("error", error)
        >>> batch = jnp.arange(1.0, 5.0), jnp.ones(4), jnp.array([1, 1, 1, 0])
        >>> (total, losses), grad = jl.accumulate_value_and_grad(loss_fn, 2)(1.0, batch)
        >>> print(total, grad.round(2))  # 5 / 3 and 16 / 3
        1.6666666 5.33
    """
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function, got {loss_fn!r}")
    if check_integer("num_microbatches", num_microbatches) < 1:
        raise ValueError(f"num_microbatches must be positive, got {num_microbatches}")
    return _ValueAndGrad(loss_fn, num_microbatches, has_aux)


@dataclasses.dataclass(eq=False)
class _ValueAndGrad:
    """See ``accumulate_value_and_grad``. It can be pickled if the loss function can."""

    loss_fn: Callable[..., Any]
    num_microbatches: int
    has_aux: bool

    def __post_init__(self) -> None:
        # For tools that read the name and the source, as of the result of jax.value_and_grad.
        functools.update_wrapper(self, self.loss_fn, updated=())

    @checked_call
    def __call__(
        self, params: Any, batch: Any, *, key: Any = None
    ) -> tuple[tuple[Array, Any], Any]:
        _check_params(params)
        # The arguments of loss_fn after the parameters, with an axis of microbatches in front.
        microbatches = (_split(batch, self.num_microbatches),)
        if key is not None:
            microbatches += (jax.random.split(_check_key(key), self.num_microbatches),)

        def add_up(_: None, microbatch: Any) -> tuple[None, LossCollector]:
            return None, self._losses_and_aux(params, *microbatch)[0]

        _, losses = jax.lax.scan(add_up, None, microbatches)
        whole = _sum(losses)
        if any(leaf.ndim for leaf in jax.tree.leaves(whole)):
            keys = () if key is None else (key,)
            full = jax.eval_shape(lambda *a: self._losses_and_aux(*a)[0], params, batch, *keys)
            _check_axes(whole, full)

        def part_of_total(params: Any, microbatch: Any) -> tuple[Array, tuple[LossCollector, Any]]:
            losses, aux = self._losses_and_aux(params, *microbatch)
            parts = jax.tree.map(_part_of_mean, losses, whole, is_leaf=_is_mean)
            return parts.get_total_loss(), (losses, aux)

        def add(sums: Any, microbatch: Any) -> tuple[Any, tuple[LossCollector, Any]]:
            grads, results = jax.grad(part_of_total, has_aux=True)(params, microbatch)
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads), results

        # Accumulate in float32; cast once at the end.
        sums = jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)
        sums, (losses, aux) = jax.lax.scan(add, sums, microbatches)
        losses = _sum(losses)
        grads = jax.tree.map(lambda s, p: s.astype(jnp.result_type(p)), sums, params)
        return (losses.get_total_loss(), (losses, aux) if self.has_aux else losses), grads

    def _losses_and_aux(self, params: Any, batch: Any, *key: Any) -> tuple[LossCollector, Any]:
        """What the loss function returns, checked."""
        with is_microbatch(is_microbatch.value or self.num_microbatches > 1):
            result = self.loss_fn(params, batch, *key)
        if self.has_aux and not (isinstance(result, tuple) and len(result) == 2):
            length = f" of length {len(result)}" if isinstance(result, tuple) else ""
            raise ValueError(
                f"loss_fn must return a pair (losses, aux), got {type(result).__name__}{length}"
            )
        losses, aux = result if self.has_aux else (result, ())
        for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
            if not isinstance(leaf, Array | np.ndarray | np.generic | int | float | complex):
                name = f"aux{jax.tree_util.keystr(path)}"
                raise ValueError(f"{name} must be an array or a number, got {type(leaf).__name__}")
        if not isinstance(losses, LossCollector):
            raise ValueError(f"loss_fn must return a LossCollector, got {type(losses).__name__}")
        return losses, aux

    def __repr__(self) -> str:
        name = getattr(self.loss_fn, "__name__", self.loss_fn)
        aux = ", has_aux=True" * bool(self.has_aux)
        return f"accumulate_value_and_grad({name}, {self.num_microbatches}{aux})"


def pad_batch(batch: Any, size: int) -> tuple[Any, Any]:
    """A smaller batch padded to a fixed size, and weights that are zero for the added rows.

    Then the last batch of a dataset has the shape of the others, and nothing is compiled again.

    Args:
        batch: A pytree of arrays of numbers whose leading axes have the same length. NumPy arrays
            stay NumPy arrays.
        size: The length to pad this axis to, with zeros at the end.

    Returns:
        The padded batch, and weights ``[size]``: True for rows of the batch, False for added rows.

    Raises:
        ValueError: if a leaf is not an array of numbers, or if the leading axes differ in length or
            are longer than ``size``.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> losses, present = jl.pad_batch(jnp.array([1.0, 3.0]), 4)
        >>> print(jl.compute_weighted_loss(losses, present))
        2.0
    """
    rows = _num_rows(batch)
    if rows > check_integer("size", size):
        raise ValueError(f"size must be at least the batch's {rows} rows, got {size}")

    def pad(path: Any, leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} must be an array of numbers to be padded, "
                f"got dtype {leaf.dtype}"
            )
        widths = [(0, size - rows)] + [(0, 0)] * (leaf.ndim - 1)
        return (np if isinstance(leaf, np.ndarray) else jnp).pad(leaf, widths)

    present = np.zeros(size, bool)
    present[:rows] = True
    return jax.tree_util.tree_map_with_path(pad, batch), present


def _check_params(params: Any) -> None:
    """``ValueError`` naming the leaf that has no gradient."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"params{jax.tree_util.keystr(path)}"
        array = as_array(name, leaf)
        if not is_float(array):
            raise ValueError(
                f"{name} must be floating-point to have a gradient, got dtype {array.dtype}; put "
                f"what needs no gradient into the batch, or let loss_fn close over it"
            )


def _num_rows(batch: Any) -> int:
    """The length of the leading axes; ``ValueError`` naming the leaves if they differ."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    named = {f"batch{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
    for name, leaf in named.items():
        # A JAX array holds numbers or keys; a NumPy array may hold strings or objects.
        dtype = leaf.dtype if isinstance(leaf, Array) else np.asarray(leaf).dtype
        kinds = (jnp.number, jnp.bool_, jax.dtypes.prng_key)
        if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            raise ValueError(f"{name} must be an array of numbers or keys, got dtype {dtype}")
    sizes = {name: jnp.shape(leaf)[:1] for name, leaf in named.items()}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise ValueError(f"batch must have leading axes of the same length, got {sizes}")
    return next(iter(sizes.values()))[0]


def _split(batch: Any, num_microbatches: int) -> Any:
    """The batch with its leading axis cut into ``[num_microbatches, rows]``."""
    rows = _num_rows(batch)
    if rows % num_microbatches:
        raise ValueError(
            f"batch must have a leading axis that is a multiple of "
            f"num_microbatches={num_microbatches}, got {rows} rows"
        )

    def cut(path: Any, leaf: Any) -> Array:
        whole, leaf = leaf, jnp.asarray(leaf)
        has_integers = isinstance(whole, np.ndarray) and whole.dtype.kind in "iu"
        if has_integers and np.any(whole.astype(leaf.dtype) != whole):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} must hold integers that fit into {leaf.dtype}, "
                f"to which JAX truncates them, got integers from {whole.min()} to {whole.max()}"
            )
        # In this order, every row stays on its device if rows are sharded.
        split = leaf.reshape(rows // num_microbatches, num_microbatches, *leaf.shape[1:])
        return jnp.swapaxes(split, 0, 1)

    return jax.tree_util.tree_map_with_path(cut, batch)


def _check_axes(whole: LossCollector, full: LossCollector) -> None:
    """``ValueError`` naming a loss with an axis over the rows, whose microbatches cannot be added.

    Its sum over the microbatches has another shape than the loss of the full batch.
    """
    for kind in KINDS:
        for name, mean in getattr(whole, kind).items():
            shape = jnp.shape(getattr(full, kind)[name].total)
            if jnp.shape(mean.total) != shape:
                raise ValueError(
                    f"{name} must not have an axis over the rows of the batch, got shape "
                    f"{jnp.shape(mean.total)} for a microbatch and {shape} for the batch; add "
                    f"mean.macro(), the mean over its elements"
                )


def _check_key(key: Any) -> Any:
    """``key``; ``ValueError`` unless it is a single key, typed or of uint32 numbers."""
    got = type(key).__name__
    if isinstance(key, Array):
        got = f"shape {key.shape} and dtype {key.dtype}"
        is_new = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if (is_new and key.ndim == 0) or (key.dtype == np.uint32 and key.ndim == 1):
            return key
    raise ValueError(f"key must be a single key, such as jax.random.key(0), got {got}")


def _part_of_mean(part: WeightedMean, whole: WeightedMean) -> WeightedMean:
    """What one microbatch adds to the gradient of a mean over all of them.

    The derivative of ``T / C`` is ``(dT - mean * dC) / C``, where ``dT`` and ``dC`` are sums over
    the microbatches. If the count does not depend on the parameters, JAX knows that ``dC`` is zero
    and ``mean`` is not needed.
    """
    mean = divide(whole.total, whole.count)
    total = part.total - mean * jnp.asarray(part.count, mean.dtype)
    return WeightedMean(divide(total, whole.count), jnp.ones_like(mean))


def _is_mean(x: Any) -> bool:
    return isinstance(x, WeightedMean)


def _sum(stacked: LossCollector) -> LossCollector:
    """The sum of collectors that a scan has stacked."""
    return jax.tree.map(lambda x: jnp.sum(x, 0), stacked)
