"""The lift for loss functions written elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlosses._kernel import align, reduce_weighted
from jaxlosses._masking import lifted_losses
from jaxlosses._primitive import vary_alike
from jaxlosses._typing import (
    AxisName,
    Reduction,
    Result,
    Weights,
    as_array,
    as_option,
    check_integer,
    in_precision,
    keep_wide,
    precision,
)


def weighted(loss_fn: Callable[..., Array], *, num_inputs: int = 2) -> Callable[..., Result]:
    r"""Lift a function of examples to a loss with the weights and reductions of this package.

    $$\text{weighted}(f)(x, \ldots, w) = \frac{\sum_i w_i\, f(x, \ldots)_i}{|\{i : w_i \ne 0\}|}$$

    The function is differentiated as JAX differentiates it, in every mode and order. A loss may
    depend on other examples, as in contrastive and ranking losses: its gradient is that of the
    weighted sum.

    An example whose weight is zero is absent. If its loss is not finite, or the derivative of the
    losses with respect to its inputs is not finite, all its inputs are replaced before the function
    sees them: floating-point numbers by numbers between 1/4 and 3/4, integers and booleans by 0. So
    neither NaN nor an infinite derivative (of a square root at 0) reaches the gradient of an input.
    Other absent examples keep their inputs, because other losses may depend on them. If they depend
    on an example that is replaced, they see the replacement, in value and derivative alike.

    These cases are not covered:

    - arrays that the function closes over or takes as options: they are not masked, and a gradient
      with respect to them may be NaN if the replaced inputs are not valid inputs of the function
      (a count of 0 under a logarithm);
    - an absent example whose loss and first derivatives are finite and whose second derivatives are
      not, if second derivatives are taken;
    - the loss of an absent example that is not differentiable at inputs of examples that count;
    - 64-bit class ids in NumPy arrays, which reach the function truncated to 32 bits;
    - ``jax.debug_nans`` and ``checkify``, which may report a NaN of an absent example.

    The function is traced, as by ``jax.jit``. Unless the weights are a Python or NumPy constant
    without zeros, it is evaluated and differentiated once more, to find what is not finite.

    Args:
        loss_fn: ``loss_fn(*inputs, **options)`` returns an array with one loss for each example:
            from inputs ``[batch, ...]`` losses ``[batch]``, or a loss for each position of more
            leading axes, which all inputs have in common. It does not reduce them. Floating-point
            inputs reach it as float32 at least. It may close over traced arrays.
        num_inputs: How many inputs it takes; at least 1. An input is an array of real numbers or a
            pytree of such arrays.

    Returns:
        A function of ``(*inputs, weights=1.0, *, reduction="mean", axis_name=None, **options)``;
        ``options`` go to ``loss_fn``. It is not jitted; the caller may do that.

    Raises:
        ValueError: if ``loss_fn`` is not a function or ``num_inputs`` not a positive integer. From
            the lifted function: if ``loss_fn`` does not return one array of real losses; if it
            returns one number although inputs have axes; if the losses' shape does not begin the
            shape of each input; or if the weights do not align with it.
        TypeError: from the lifted function, if it is called with another number of inputs.

    References:
        The derivative with respect to weights of zero is used by Ren et al., "Learning to reweight
        examples for robust deep learning", 2018.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> def gaussian(mean, labels, variance):  # negative log-likelihood, up to a constant
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


_ONES = 1.0  # The default weights. ``is`` tells them from a 1.0 that the caller gave.


@dataclasses.dataclass(frozen=True)
class _Weighted:
    """A lifted loss function: see ``jaxlosses.weighted``. It can be pickled if the function can."""

    loss_fn: Callable[..., Array]
    num_inputs: int

    def __call__(
        self,
        /,
        *inputs: Any,
        weights: Weights = _ONES,
        reduction: Reduction = "mean",
        axis_name: AxisName = None,
        **options: Any,
    ) -> Result:
        if len(inputs) == self.num_inputs + 1:
            if weights is not _ONES:
                raise TypeError(f"{self} got weights twice, by position and by name")
            *examples, weights = inputs
        else:
            examples = list(inputs)
        if len(examples) != self.num_inputs:
            raise TypeError(
                f"{self} takes {self.num_inputs} inputs by position (num_inputs), then weights; "
                f"all else by name; got {len(inputs)} by position and {sorted(options)} by name"
            )
        reduction, axis_name = as_option("reduction", reduction), as_option("axis_name", axis_name)
        # Weights that are known when the program is traced cost nothing if none of them is zero.
        given, weights = weights, as_array("weights", keep_wide("weights", weights))
        none_absent = not isinstance(given, Array) and bool(np.all(given))
        names, arrays, structure = _flatten(examples)
        dtype = precision(*arrays, weights=weights)

        def losses_of(*arrays: Array) -> Array:
            losses = self.loss_fn(*jax.tree.unflatten(structure, arrays), **options)
            _check_losses(losses, dict(zip(names, arrays, strict=True)))
            return losses.astype(dtype)

        weights, *arrays = vary_alike(weights, *in_precision(arrays, weights))
        weights = align(weights, jax.eval_shape(losses_of, *arrays).shape)
        if none_absent:
            raw = losses_of(*arrays)
            losses = raw * weights.astype(dtype)
        else:
            losses, raw = lifted_losses(losses_of, weights, *arrays)
        return reduce_weighted(losses, raw, weights, reduction=reduction, axis_name=axis_name)

    def __repr__(self) -> str:
        return f"weighted({getattr(self.loss_fn, '__name__', self.loss_fn)})"


def _flatten(inputs: Sequence[Any]) -> tuple[list[str], list[Array], Any]:
    """Names and values of all arrays in the inputs, and their structure."""
    for i, value in enumerate(inputs):
        if not jax.tree.leaves(value):
            raise ValueError(f"inputs[{i}] must be an array or a pytree of arrays, got {value}")
    paths, structure = jax.tree_util.tree_flatten_with_path(list(inputs))
    names = [f"inputs{jax.tree_util.keystr(path)}" for path, _ in paths]
    arrays = [as_array(name, value) for name, (_, value) in zip(names, paths, strict=True)]
    return names, arrays, structure


def _check_losses(losses: Any, inputs: dict[str, Array]) -> None:
    """``ValueError`` unless a function returned losses of examples."""
    kind = losses.dtype if isinstance(losses, Array) else type(losses).__name__
    if not isinstance(losses, Array) or jnp.issubdtype(kind, jnp.complexfloating):
        raise ValueError(f"loss_fn must return one real array, got {kind}")
    for name, array in inputs.items():
        if array.shape[: losses.ndim] != losses.shape:
            raise ValueError(
                f"loss_fn must return losses with the leading axes of all inputs, got losses of "
                f"shape {losses.shape} for {name} of shape {array.shape}; give an array without an "
                f"axis of examples as an option, by name"
            )
    if losses.ndim == 0 and any(array.ndim for array in inputs.values()):
        raise ValueError(
            f"loss_fn must return a loss for each example, got one number for inputs of shapes "
            f"{[array.shape for array in inputs.values()]}, whose mean would be a mean of means; "
            f"lift weighted(jax.vmap(loss_fn)), or give the number to compute_weighted_loss"
        )
