"""Losses sown inside of Flax modules, linen's and nnx's; the only room that imports Flax.

A module says :func:`sow_loss` where it knows a loss, and whoever trains it says :func:`collect` or
:func:`capture`. Every time that a loss is sown counts as a loss of its own: in a module that is
called twice, in a layer of a ``scan``, in an example of a ``vmap``. The losses that one call of
``sow_loss`` left stand under one name, one element for each time, and a total sums them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from flax.core.scope import union_filters
from flax.linen import module as linen_module
from jax.typing import ArrayLike

from jaxlosses._collector import LossCollector, as_mean
from jaxlosses._mean import WeightedMean


class Loss(nnx.Variable):
    """The nnx variable that :func:`sow_loss` leaves."""


class RegularizationLoss(nnx.Variable):
    """The nnx variable that ``sow_loss(..., regularization=True)`` leaves."""


# Collections of linen and variables of nnx; False and True as in the argument regularization.
_COLLECTIONS = {False: "losses", True: "regularization_losses"}
_VARIABLES: dict[bool, type[nnx.Variable]] = {False: Loss, True: RegularizationLoss}


def sow_loss(
    module: nn.Module | nnx.Module,
    name: str,
    value: ArrayLike | WeightedMean,
    *,
    regularization: bool = False,
) -> None:
    """Leave a loss in the state of a module, from within one of its methods.

    linen: in the collection ``losses`` (or ``regularization_losses``), where it is mutable and not
    in ``init``; a loss of an earlier call that is still in the variables is replaced, not added to.
    nnx: within :func:`capture`. Elsewhere nothing happens.

    Args:
        module: The module, of linen or of nnx.
        name: The name of the loss within the module, without ``/``; no attribute or submodule has
            it.
        value: A scalar, an array of losses, all of which count, or a ``WeightedMean``.
        regularization: Whether it is a loss of the parameters.

    Raises:
        ValueError: if ``module`` is no Flax module, the name has a ``/`` or is taken by something
            else, or the value is no real array.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import jaxlosses.flax as jlf
        >>> class Layer(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         jlf.sow_loss(self, "activity", jnp.mean(jnp.square(x)))
        ...         return nn.Dense(2)(x)
        >>> variables = Layer().init(jax.random.key(0), jnp.ones((1, 3)))
        >>> y, losses = jlf.capture(Layer().apply)(variables, jnp.ones((1, 3)))
        >>> print(losses.get_losses())
        {'activity': Array(1., dtype=float32)}
    """
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"name must be a non-empty string without '/', got {name!r}")
    mean = as_mean(name, value)
    if isinstance(module, nn.Module):
        if not module.is_initializing():
            add = functools.partial(_Sown.add, run=_current_run())
            module.sow(_COLLECTIONS[regularization], name, mean, reduce_fn=add, init_fn=_Sown)
    elif isinstance(module, nnx.Module):
        variable, captures = _VARIABLES[regularization], getattr(module, "__captures__", None)
        others = (sown for sown in captures or () if type(sown) is not variable)
        # Flax would let one of the two overwrite the other.
        if hasattr(module, name) or any(name in sown for sown in others):
            raise ValueError(f"name {name!r} is taken by something else of {type(module).__name__}")
        if captures is not None:  # Outside of a capture, Flax would warn.
            module.sow(variable, name, mean, reduce_fn=_Sown.add, init_fn=_Sown)
    else:
        raise ValueError(f"module must be a Flax module, got {type(module).__name__}")


def collect(state: Any, *, expected: Any = None) -> LossCollector:
    """The losses that modules have sown, named by module path: ``encoder/layer_0/load_balance``.

    Args:
        state: linen: the mutated variables that ``apply`` returns. nnx: what ``nnx.capture`` with
            :class:`Loss` and :class:`RegularizationLoss` returns, merged if it is two states.
        expected: Names that must be there, so that no loss goes missing in silence.

    Raises:
        ValueError: if ``state`` is no state, or an expected name is missing, saying which and what
            to check.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxlosses.flax as jlf
        >>> class Layer(nnx.Module):
        ...     def __call__(self, x):
        ...         jlf.sow_loss(self, "activity", jnp.mean(jnp.square(x)))
        ...         return x
        >>> y, state = nnx.capture(Layer(), jlf.Loss)(jnp.ones(3))
        >>> print(jlf.collect(state, expected=["activity"]).get_losses())
        {'activity': Array(1., dtype=float32)}
    """
    return _collect(_sown_in(state), _check_expected(expected))


def _check_expected(expected: Any) -> tuple[str, ...]:
    if isinstance(expected, str) or not isinstance(expected, Iterable | type(None)):
        raise ValueError(f"expected must be names, got {expected!r}")
    return tuple(expected or ())


def _collect(
    sown_losses: Iterable[tuple[bool, str, Any]], expected: tuple[str, ...]
) -> LossCollector:
    collector = LossCollector()
    for regularization, name, sown in sown_losses:
        add = collector.add_regularization_loss if regularization else collector.add_loss
        collector = add(name, _mean_of(name, sown))
    names = {*collector.losses, *collector.regularization_losses}
    missing = sorted(set(expected) - names)
    if missing:
        raise ValueError(
            f"expected losses {missing} were not sown, only {sorted(names)}. In linen, are "
            f"'losses' and 'regularization_losses' in `mutable` of apply, and in `variable_axes` "
            f"of every nn.scan and nn.vmap? Did sow_loss run, outside of init? In nnx, was the "
            f"module called within capture?"
        )
    return collector


def capture(fn: Callable[..., Any], *, expected: Any = None) -> Callable[..., Any]:
    """Run a function and collect the losses that its module sows.

    Args:
        fn: An nnx module, a method of one, or a function of nnx modules, among other arguments
            (the names of several begin with their place); or the method ``apply`` of a linen
            module, whose collections of losses need no ``mutable`` and start empty.
        expected: As in :func:`collect`.

    Returns:
        A function of the same arguments that returns ``(fn(*args), LossCollector)``. When ``fn``
        raises, nothing stays behind on the modules.

    Raises:
        ValueError: if there is no module to collect from, if one is within a capture already, or
            as :func:`collect`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxlosses.flax as jlf
        >>> class Layer(nnx.Module):
        ...     def __call__(self, x):
        ...         jlf.sow_loss(self, "activity", jnp.mean(jnp.square(x)))
        ...         return 2 * x
        >>> y, losses = jlf.capture(Layer())(jnp.ones(3))
        >>> print(y, losses.get_total_loss())
        [2. 2. 2.] 1.0
    """
    expected = _check_expected(expected)
    owner = fn if isinstance(fn, nnx.Module) else getattr(fn, "__self__", None)

    @functools.wraps(fn, updated=())  # Not the attributes of a module.
    def captured(*args: Any, **kwargs: Any) -> tuple[Any, LossCollector]:
        if isinstance(owner, nn.Module):
            result, *states = _apply(fn, *args, **kwargs)
        else:
            arguments = (owner, *args, *kwargs.values())
            modules = tuple(a for a in arguments if isinstance(a, nnx.Module))
            result, *states = _capture(modules, fn, *args, **kwargs)
        return result, _collect(itertools.chain(*map(_sown_in, states)), expected)

    return captured


def _apply(
    apply: Callable[..., Any], variables: Any, *args: Any, mutable: Any = False, **kwargs: Any
) -> tuple[Any, Any]:
    """The result as without capture, and the variables that hold the losses."""
    if apply.__name__ != "apply":
        raise ValueError(f"fn of a linen module must be its apply, got {apply.__name__}")
    ours = union_filters(mutable, list(_COLLECTIONS.values()))
    variables = {k: v for k, v in variables.items() if k not in _COLLECTIONS.values()}
    result, state = apply(variables, *args, mutable=ours, **kwargs)
    others = {k: v for k, v in state.items() if k not in _COLLECTIONS.values()}
    return (result if mutable is False else (result, others)), state


def _capture(modules: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """``nnx.capture`` that leaves nothing on the modules and loses no outer capture."""
    if not modules:
        raise ValueError(
            "fn must be an nnx module, a method of one, a function of nnx modules, or the apply "
            "of a linen module"
        )
    for _, module in nnx.iter_modules(modules):
        if hasattr(module, "__captures__"):
            raise ValueError(
                f"module {type(module).__name__} is being captured already, or nnx.capture raised "
                f"and left its captures there; capture once, around everything"
            )
    try:
        run = nnx.capture(lambda _: fn(*args, **kwargs), Loss, RegularizationLoss)
        return run(modules[0] if len(modules) == 1 else modules)
    finally:
        for _, module in nnx.iter_modules(modules):
            if hasattr(module, "__captures__"):
                del module.__captures__


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Sown:
    """What one name of one module holds: a mean for each time that it was sown.

    ``run`` tells the calls of ``apply`` apart, so that means that come back in with the variables
    of an earlier one are dropped. All runs are equal to JAX, or each would be traced anew.
    """

    means: tuple[WeightedMean, ...] = ()
    run: Any = None

    def add(self, mean: WeightedMean, run: Any = None) -> _Sown:
        if not isinstance(self, _Sown):
            raise ValueError("name must not be used by the module's own sow as well")
        return _Sown((*self.means, mean) if self.run == run else (mean,), run)

    def tree_flatten(self) -> tuple[tuple[Any, ...], _AnyRun]:
        return (self.means,), _AnyRun(self.run)

    @classmethod
    def tree_unflatten(cls, run: _AnyRun, children: Any) -> _Sown:
        return cls(children[0], run.run)


@dataclasses.dataclass(frozen=True, eq=False)
class _AnyRun:
    run: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _AnyRun)

    def __hash__(self) -> int:
        return 0


def _current_run() -> Any:
    """What is one within a call of linen's ``apply``, lifted transformations included.

    Scopes are rebuilt inside of every lifted transformation and modules cloned, and nothing public
    leads from them to the outermost module, of which each call of ``apply`` makes a new one.
    """
    modules = linen_module._context.module_stack
    return next((m._id for m in modules if m is not None), None)


def _sown_in(state: Any) -> Iterator[tuple[bool, str, Any]]:
    """Whether it is a regularization, the path and what was sown, of all that was."""
    if isinstance(state, nnx.State):
        for path, variable in nnx.to_flat_state(state):
            for regularization, kind in _VARIABLES.items():
                if isinstance(variable, kind):
                    yield regularization, "/".join(map(str, path)), variable.get_value()
    elif isinstance(state, Mapping):
        for regularization, collection in _COLLECTIONS.items():
            flat = traverse_util.flatten_dict(state.get(collection, {}), sep="/")
            for path, sown in flat.items():
                yield regularization, path, sown
    else:
        raise ValueError(
            f"state must be the variables that apply returns, or an nnx.State; "
            f"got {type(state).__name__}"
        )


def _mean_of(name: str, sown: Any) -> WeightedMean:
    means = sown.means if isinstance(sown, _Sown) else _foreign(name, sown)
    if len(means) == 1:
        return means[0]
    return jax.tree.map(lambda *x: jnp.concatenate([jnp.ravel(y) for y in x]), *means)


def _foreign(name: str, sown: Any) -> list[WeightedMean]:
    """Scalars that a module left with its own ``sow``."""
    values = sown if isinstance(sown, tuple) else (sown,)
    if any(jnp.shape(value) for value in values):
        raise ValueError(
            f"{name} was sown by sow, and is no scalar: whether its axes are losses or layers "
            f"only sow_loss can tell"
        )
    return [as_mean(name, value) for value in values]
