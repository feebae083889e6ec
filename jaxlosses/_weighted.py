"""The lift for loss functions written elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax import Array

from jaxlosses._kernel import reduce_losses
from jaxlosses._typing import AxisName, Reals, Reduction, Result, Weights, as_array


def weighted(loss_fn: Callable[..., Array]) -> Callable[..., Result]:
    r"""Give a per-example loss function weights, reductions and the rules of this package.

    $$\text{weighted}(f)(p, y, w) = \frac{\sum_i w_i\, f(p, y)_i}{|\{i : w_i \ne 0\}|}$$

    Absent means absent for the function too: neither NaN nor Inf at an absent place, nor a slope
    that is infinite there (a square root or norm at 0), reaches any derivative. Slopes are selected
    like losses; where that is not enough (second derivatives, and those with respect to what the
    function closes over) an absent example whose loss or slope is not finite is replaced by one
    that is harmless: 1/2 in the predictions, 1/4 in the labels, 0 in integers.

    Args:
        loss_fn: ``loss_fn(predictions, labels, **options)`` returns one loss for each place of the
            leading axes of both inputs, each from that place alone, unreduced. Floating-point
            inputs reach it as float32 at least. It may close over traced arrays.

    Returns:
        A function of ``(predictions, labels, weights=1.0, *, reduction="mean", axis_name=None,
        **options)``; ``options`` go to ``loss_fn``. It is not jitted: that is for the caller.

    Raises:
        ValueError: if ``loss_fn`` is no function, and from the lifted function, if it returns no
            real array, the losses' shape is no prefix of both inputs' shapes, or the weights do
            not align with it.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> def huber(predictions, labels, delta=1.0):
        ...     error = jnp.abs(predictions - labels)
        ...     small = jnp.minimum(error, delta)
        ...     return small * (error - small / 2)
        >>> predictions, labels = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 5.0, jnp.nan])
        >>> print(jl.weighted(huber)(predictions, labels, jnp.array([1, 1, 0]), delta=2.0))
        2.25
    """
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function, got {loss_fn!r}")

    @functools.wraps(loss_fn)
    def lifted(
        predictions: Reals,
        labels: Reals,
        weights: Weights = 1.0,
        *,
        reduction: Reduction = "mean",
        axis_name: AxisName = None,
        **options: Any,
    ) -> Result:
        inputs = [as_array("predictions", predictions), as_array("labels", labels)]
        return reduce_losses(
            functools.partial(loss_fn, **options),
            inputs,
            weights,
            reduction=reduction,
            axis_name=axis_name,
            foreign=True,
        )

    del lifted.__wrapped__  # Its signature is its own.
    return lifted
