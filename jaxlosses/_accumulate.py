"""Exact means over microbatches and ragged batches."""

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

    of losses $k$ with totals $t$ and counts $c$ in microbatches $m$. Each loss has a denominator
    of its own, so no factor for the whole gradient is right; here each is divided by its count over
    the whole batch before it is differentiated. That takes two scans and one sum of gradients. The
    first scan asks ``loss_fn`` for counts alone. They depend on the data, not on the model, so that
    the compiler removes the model from it; where weights do depend on the model, as much of it as
    they need runs twice, and the result is exact all the same (counts have no derivative).

    Losses added as scalars have no count: they are means over the microbatches. For a
    regularization that is the regularization itself, once.

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
        aux)), grads)``, the microbatches' ``aux`` stacked. The total is the whole batch's
        ``losses.get_total_loss()``. Gradients have the dtypes of the parameters and are summed in
        float32 at least.

    Raises:
        ValueError: if ``num_microbatches`` is no positive integer, and from the returned function,
            if the leading axes of the batch differ (naming them) or are no multiple of it,
            ``loss_fn`` returns no ``LossCollector`` (with ``has_aux``, no pair), or a loss has an
            axis over the rows of the batch, so that microbatches have no mean in common.

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
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"loss_fn must return a pair, got {type(result).__name__}")
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
        whole = _sum(counts)
        if any(leaf.ndim for leaf in jax.tree.leaves(whole)):
            full = jax.eval_shape(lambda *a: split_aux(loss_fn(*a))[0], params, batch)
            # Collectors of other shapes are refused here as where they would be added up.
            jax.eval_shape(LossCollector.merge, whole, full)

        def share(params: Any, microbatch: Any) -> tuple[Array, tuple[LossCollector, Any]]:
            losses, aux = split_aux(loss_fn(params, microbatch))
            return _with_totals(whole, losses).get_total_loss(), (losses, aux)

        def add(sums: Any, microbatch: Any) -> tuple[Any, tuple[LossCollector, Any]]:
            grads, seen = jax.grad(share, has_aux=True)(params, microbatch)
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads), seen

        sums = jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)
        sums, (losses, aux) = jax.lax.scan(add, sums, microbatches)
        losses = _sum(losses)
        grads = jax.tree.map(lambda s, p: s.astype(jnp.result_type(p)), sums, params)
        return (losses.get_total_loss(), (losses, aux) if has_aux else losses), grads

    return value_and_grad


def pad_batch(batch: Any, size: int) -> tuple[Any, Any]:
    """A batch of a fixed size from a smaller one, and the weights that make the rest absent.

    So the last batch of a dataset has the shape of the others, and nothing is compiled twice.

    Args:
        batch: A pytree of arrays of numbers (NumPy's stay NumPy's) with one leading axis in common.
        size: The length of that axis to pad to, with zeros at the end.

    Returns:
        The padded batch, and weights ``[size]``: True for what was there, False for what was added.

    Raises:
        ValueError: if the leading axes differ, or are longer than ``size``.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> losses, present = jl.pad_batch(jnp.array([1.0, 3.0]), 4)
        >>> print(jl.compute_weighted_loss(losses, present))
        2.0
    """
    rows = _num_rows(batch)
    if rows > check_integer("size", size):
        raise ValueError(f"size must be at least the batch's {rows}, got {size}")

    def pad(leaf: Any) -> Any:
        widths = [(0, size - rows)] + [(0, 0)] * (leaf.ndim - 1)
        return (np if isinstance(leaf, np.ndarray) else jnp).pad(leaf, widths)

    return jax.tree.map(pad, batch), np.arange(size) < rows


def _num_rows(batch: Any) -> int:
    """The length of the leading axis; ``ValueError`` naming the leaves if it is not theirs all."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    sizes = {jax.tree_util.keystr(path) or "batch": jnp.shape(leaf)[:1] for path, leaf in leaves}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise ValueError(f"batch must have arrays with one leading axis in common, got {sizes}")
    return next(iter(sizes.values()))[0]


def _split(batch: Any, num_microbatches: int) -> Any:
    """The batch with its leading axis cut into ``[num_microbatches, rows]``."""
    rows = _num_rows(batch)
    if rows % num_microbatches:
        raise ValueError(
            f"batch must have a leading axis that num_microbatches={num_microbatches} divides, "
            f"got {rows}"
        )

    def cut(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        pairs = leaf.reshape(rows // num_microbatches, num_microbatches, *leaf.shape[1:])
        return jnp.swapaxes(pairs, 0, 1)

    return jax.tree.map(cut, batch)


def _with_totals(counts: LossCollector, totals: LossCollector) -> LossCollector:
    def pick(count: WeightedMean, total: WeightedMean) -> WeightedMean:
        return WeightedMean(total.total, count.count)

    return jax.tree.map(pick, counts, totals, is_leaf=lambda x: isinstance(x, WeightedMean))


def _sum(stacked: LossCollector) -> LossCollector:
    return jax.tree.map(lambda x: jnp.sum(x, 0), stacked)
