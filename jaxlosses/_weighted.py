"""The lift for loss functions written elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import jaxpr_as_fun

from jaxlosses._kernel import align, reduce_weighted
from jaxlosses._masking import lifted_losses
from jaxlosses._typing import (
    AxisName,
    Reduction,
    Result,
    Weights,
    as_array,
    check_integer,
    in_precision,
    precision,
)


def weighted(loss_fn: Callable[..., Array], *, num_inputs: int = 2) -> Callable[..., Result]:
    r"""Give a loss function of examples the weights, reductions and rules of this package.

    $$\text{weighted}(f)(x, \ldots, w) = \frac{\sum_i w_i\, f(x, \ldots)_i}{|\{i : w_i \ne 0\}|}$$

    The function is differentiated as JAX differentiates it, in every mode and order. A loss may
    depend on other places, as in contrastive and ranking losses: its gradient is that of the
    weighted sum.

    Absent means absent for the function too. Where a place is absent and its loss, or the
    derivative of its loss, is not finite, its inputs are replaced: floating-point numbers by
    numbers between 1/4 and 3/4, integers by 0. So neither NaN nor an infinite derivative (of a
    square root at 0) reaches a gradient. An absent place that does no harm stays as it is, for
    other places may depend on it. Value and derivative are always of the same inputs.

    Out of reach are an absent place whose loss and derivative are finite and whose second
    derivative is not, where second derivatives are taken; and what is absent in arrays that the
    function closes over or takes as options: these are not masked.

    Args:
        loss_fn: ``loss_fn(*inputs, **options)`` returns an array of losses, one for each place of
            the leading axes of all inputs, unreduced. Floating-point inputs reach it as float32 at
            least. It may close over traced arrays.
        num_inputs: How many inputs it takes; at least 1. An input is an array or a pytree of
            arrays.

    Returns:
        A function of ``(*inputs, weights=1.0, *, reduction="mean", axis_name=None, **options)``;
        ``options`` go to ``loss_fn``. It is not jitted: that is for the caller.

    Raises:
        ValueError: if ``loss_fn`` is not a function or ``num_inputs`` not a positive integer. From
            the lifted function: if ``loss_fn`` does not return one real array, or one number for
            inputs with axes; if the losses' shape does not begin the shape of each input; or if
            the weights do not align with it.
        TypeError: from the lifted function, if it is called with another number of inputs.

    References:
        The derivative with respect to weights of zero is what Ren et al., "Learning to reweight
        examples for robust deep learning", 2018, need.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> def gaussian(mean, labels, variance):  # the negative log-likelihood, but a constant
        ...     return (jnp.log(variance) + jnp.square(labels - mean) / variance) / 2
        >>> mean, labels = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 4.0, jnp.nan])
        >>> variance, weights = jnp.array([1.0, 1.0, 0.0]), jnp.array([1, 1, 0])
        >>> print(jl.weighted(gaussian, num_inputs=3)(mean, labels, variance, weights))
        1.25
    """
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function, got {loss_fn!r}")
    if check_integer("num_inputs", num_inputs) < 1:
        raise ValueError(f"num_inputs must be positive, got {num_inputs}")
    return _Weighted(loss_fn, num_inputs)


_ONES = 1.0


@dataclasses.dataclass(frozen=True)
class _Weighted:
    """What :func:`weighted` returns: a class, so that it can be pickled."""

    loss_fn: Callable[..., Array]
    num_inputs: int

    def __call__(
        self,
        *arguments: Any,
        weights: Weights = _ONES,
        reduction: Reduction = "mean",
        axis_name: AxisName = None,
        **options: Any,
    ) -> Result:
        inputs = list(arguments)
        if len(inputs) == self.num_inputs + 1 and weights is _ONES:
            weights = inputs.pop()
        if len(inputs) != self.num_inputs:
            raise TypeError(
                f"{self} takes {self.num_inputs} inputs (num_inputs), and then weights; "
                f"got {len(inputs)} inputs"
            )
        # Weights that are known when the program is traced cost nothing if none of them is zero.
        none_absent = not isinstance(weights, Array) and bool(np.all(weights))
        weights = as_array("weights", weights)
        paths, structure = jax.tree_util.tree_flatten_with_path(inputs)
        for i, value in enumerate(inputs):
            if not jax.tree.leaves(value):
                raise ValueError(f"inputs[{i}] must be an array or a pytree of arrays, got {value}")
        arrays = [as_array(f"inputs{jax.tree_util.keystr(path)}", x) for path, x in paths]
        dtype = precision(*arrays, weights)

        def losses_of(*arrays: Array) -> Array:
            losses = self.loss_fn(*jax.tree.unflatten(structure, arrays), **options)
            self._check(losses, arrays)
            return losses.astype(dtype)

        arrays = in_precision(arrays, weights)
        # Traced once, and repeated from the trace, to see what is finite and for the losses.
        traced, result = jax.make_jaxpr(losses_of, return_shape=True)(*arrays)
        weights = align(weights, result.shape)

        def repeated(*arrays: Array) -> Array:
            return jaxpr_as_fun(traced)(*arrays)[0]

        if none_absent:
            losses = repeated(*arrays) * weights.astype(dtype)
        else:
            losses = lifted_losses(repeated, weights, *arrays)
        return reduce_weighted(losses, weights, reduction=reduction, axis_name=axis_name)

    def __repr__(self) -> str:
        return f"weighted({getattr(self.loss_fn, '__name__', self.loss_fn)})"

    def _check(self, losses: Any, arrays: Sequence[Array]) -> None:
        """``ValueError`` unless the function returned losses of examples."""
        if not isinstance(losses, Array) or jnp.issubdtype(losses.dtype, jnp.complexfloating):
            raise ValueError(f"the loss function must return one real array, got {losses}")
        for array in arrays:
            if array.shape[: losses.ndim] != losses.shape:
                raise ValueError(
                    f"the losses must have a leading part of the shape of all inputs, "
                    f"got losses of shape {losses.shape} for an input of shape {array.shape}"
                )
        if losses.ndim == 0 and any(array.ndim for array in arrays):
            raise ValueError(
                f"the loss function must return a loss for each example, got one number for "
                f"inputs of shapes {[array.shape for array in arrays]}, whose mean would be a mean "
                f"of means; lift it with weighted(jax.vmap(...)), or give its number to "
                f"compute_weighted_loss"
            )
