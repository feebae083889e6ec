"""Exact means over microbatches, and batches padded to a fixed size.

A step of training may not have the memory for its whole batch. Here it takes one microbatch after
the other, and value and gradient are still those of the whole batch. A batch that is too short is
padded with rows of weight zero, which change no mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlosses._collector import LossCollector
from jaxlosses._mean import WeightedMean, widen
from jaxlosses._typing import check_integer


def accumulate_value_and_grad(
    loss_fn: Callable[..., Any], num_microbatches: int, *, has_aux: bool = False
) -> Callable[[Any, Any], tuple[tuple[Array, Any], Any]]:
    r"""The value and gradient of a whole batch, from one microbatch at a time.

    $$\nabla \sum_k \frac{\sum_m t_{km}}{\sum_m c_{km}}
    = \sum_m \nabla \sum_k \frac{t_{km}}{C_k}, \quad C_k = \sum_m c_{km}$$

    of losses $k$ with totals $t$ and counts $c$ in microbatches $m$. Each loss has a count of its
    own, so no single factor for the gradient of a microbatch would be right. Here each total is
    divided by its count over the whole batch, and then differentiated. That takes two scans over
    the microbatches. The first one adds up the counts. These depend on the data and not on the
    model, so the compiler removes the model from this scan. Where weights do depend on the model,
    the part of the model that they need runs twice; the result is still exact, because counts have
    no derivative. The second scan adds up the gradients.

    A loss added as a scalar counts 1 in each microbatch, so its value is the mean over the
    microbatches. For a regularization, which is the same in all of them, that is its value.

    Args:
        loss_fn: ``loss_fn(params, microbatch)`` returns a ``LossCollector``, or with ``has_aux`` a
            pair of it and any pytree of arrays. Add means with ``reduction="parts"``.
        num_microbatches: How many microbatches a batch is cut into. Microbatch ``i`` holds the
            rows ``i``, ``i + num_microbatches``, ..., so that a batch whose rows are sharded over
            devices is cut without moving a row. (On an Explicit mesh a microbatch must have rows
            for every device.)
        has_aux: Whether ``loss_fn`` returns a pair.

    Returns:
        A function of ``(params, batch)``, pytrees of arrays, those of the batch with one leading
        axis. It returns ``((total, losses), grads)``, or with ``has_aux`` ``((total, (losses,
        aux)), grads)``, where ``aux`` is that of all microbatches, stacked. The total is
        ``losses.get_total_loss()`` of the whole batch. Gradients have the dtypes of the parameters
        and are summed in float32 at least.

    Raises:
        ValueError: if ``num_microbatches`` is not a positive integer. The returned function raises
            it if the leading axes of the batch differ or are not a multiple of
            ``num_microbatches``, if ``loss_fn`` does not return a ``LossCollector`` (with
            ``has_aux``, a pair), or if a loss has an axis over the rows of the batch, so that the
            microbatches cannot be added up.

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
    if check_integer("num_microbatches", num_microbatches) < 1:
        raise ValueError(f"num_microbatches must be positive, got {num_microbatches}")

    def split_aux(result: Any) -> tuple[LossCollector, Any]:
        """The losses and the aux of what ``loss_fn`` returned."""
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(
                f"loss_fn must return a pair (losses, aux), got {type(result).__name__}"
            )
        losses, aux = result if has_aux else (result, ())
        if not isinstance(losses, LossCollector):
            raise ValueError(f"loss_fn must return a LossCollector, got {type(losses).__name__}")
        return losses, aux

    def value_and_grad(params: Any, batch: Any) -> tuple[tuple[Array, Any], Any]:
        microbatches = _split(batch, num_microbatches)

        def count(_: None, microbatch: Any) -> tuple[None, LossCollector]:
            losses, _ = split_aux(loss_fn(params, microbatch))
            return None, _with_totals(losses, jax.tree.map(jnp.zeros_like, losses))

        _, counts = jax.lax.scan(count, None, microbatches)
        batch_counts = _sum(counts)
        if any(leaf.ndim for leaf in jax.tree.leaves(batch_counts)):
            # A loss whose axis is the rows has other shapes for the whole batch. To merge them
            # raises an error that names the loss.
            full = jax.eval_shape(lambda *a: split_aux(loss_fn(*a))[0], params, batch)
            jax.eval_shape(LossCollector.merge, batch_counts, full)

        def part_of_total(params: Any, microbatch: Any) -> tuple[Array, tuple[LossCollector, Any]]:
            losses, aux = split_aux(loss_fn(params, microbatch))
            return _with_totals(batch_counts, losses).get_total_loss(), (losses, aux)

        def add(sums: Any, microbatch: Any) -> tuple[Any, tuple[LossCollector, Any]]:
            grads, results = jax.grad(part_of_total, has_aux=True)(params, microbatch)
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads), results

        # Accumulate in float32; cast once at the end.
        sums = jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)
        sums, (losses, aux) = jax.lax.scan(add, sums, microbatches)
        losses = _sum(losses)
        grads = jax.tree.map(lambda s, p: s.astype(jnp.result_type(p)), sums, params)
        return (losses.get_total_loss(), (losses, aux) if has_aux else losses), grads

    return value_and_grad


def pad_batch(batch: Any, size: int) -> tuple[Any, Any]:
    """A smaller batch padded to a fixed size, and weights that are zero for the added rows.

    So the last batch of a dataset has the shape of the others, and no program is compiled for it.

    Args:
        batch: A pytree of arrays of numbers whose leading axes have one length. NumPy arrays stay
            NumPy arrays.
        size: The length to pad this axis to, with zeros at the end.

    Returns:
        The padded batch, and weights ``[size]``: True for rows of the batch, False for added rows.

    Raises:
        ValueError: if the leading axes differ in length, or are longer than ``size``.

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

    def pad(leaf: Any) -> Any:
        widths = [(0, size - rows)] + [(0, 0)] * (leaf.ndim - 1)
        return (np if isinstance(leaf, np.ndarray) else jnp).pad(leaf, widths)

    return jax.tree.map(pad, batch), np.arange(size) < rows


def _num_rows(batch: Any) -> int:
    """The length of the leading axes; ``ValueError`` naming the leaves if they differ."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    sizes = {jax.tree_util.keystr(path) or "batch": jnp.shape(leaf)[:1] for path, leaf in leaves}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise ValueError(f"batch must have arrays with leading axes of one length, got {sizes}")
    return next(iter(sizes.values()))[0]


def _split(batch: Any, num_microbatches: int) -> Any:
    """The batch with its leading axis cut into ``[num_microbatches, rows]``."""
    rows = _num_rows(batch)
    if rows % num_microbatches:
        raise ValueError(
            f"batch must have a leading axis that is a multiple of "
            f"num_microbatches={num_microbatches}, got {rows} rows"
        )

    def cut(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        # This order leaves every row on its device where rows are sharded.
        split = leaf.reshape(rows // num_microbatches, num_microbatches, *leaf.shape[1:])
        return jnp.swapaxes(split, 0, 1)

    return jax.tree.map(cut, batch)


def _with_totals(counts: LossCollector, totals: LossCollector) -> LossCollector:
    """The counts of one collector with the totals of another."""

    def pick(count: WeightedMean, total: WeightedMean) -> WeightedMean:
        return WeightedMean(total.total, count.count)

    return jax.tree.map(pick, counts, totals, is_leaf=lambda x: isinstance(x, WeightedMean))


def _sum(stacked: LossCollector) -> LossCollector:
    """The sum of collectors that a scan has stacked."""
    return jax.tree.map(lambda x: jnp.sum(x, 0), stacked)
