"""Losses of Flax modules, of linen and of nnx. No other file of the package imports Flax.

A module calls :func:`sow_loss` where it computes a loss, and the training step calls
:func:`capture` or :func:`collect`. A loss may be sown several times: in a module that is called
twice, for each layer of a ``scan``, for each example of a ``vmap``. Each time gives its own loss:
they are collected under one name, as the elements of an array, and the total loss is their sum.

Once this module is imported, ``flax.serialization`` saves and restores the package's pytrees.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, serialization, traverse_util
from flax.core.scope import union_filters
from flax.linen import module as linen_module
from jax.typing import ArrayLike

from jaxlosses._collector import KINDS, LossCollector, as_mean
from jaxlosses._mean import WeightedMean, exportable


class Loss(nnx.Variable):
    """The nnx variable in which :func:`sow_loss` stores a loss; for ``nnx.capture``.

    :func:`collect` has an example.
    """


class RegularizationLoss(nnx.Variable):
    """The nnx variable in which ``sow_loss(..., regularization=True)`` stores a loss."""


class LossMetric(nnx.Variable):
    """The nnx variable in which :func:`sow_metric` stores a metric."""


# For each kind that a collector has: how to add one, linen's collection, and nnx's variable. The
# collection is not called "metrics", because models may have one of this name.
_ADD = {
    "losses": LossCollector.add_loss,
    "regularization_losses": LossCollector.add_regularization_loss,
    "metrics": LossCollector.add_metric,
}
_COLLECTIONS = {
    "losses": "losses",
    "regularization_losses": "regularization_losses",
    "metrics": "loss_metrics",
}
_VARIABLES: dict[str, type[nnx.Variable]] = {
    "losses": Loss,
    "regularization_losses": RegularizationLoss,
    "metrics": LossMetric,
}

# Whether a function is being captured. Then an nnx module that sows must be one of those captured.
_is_capturing = contextvars.ContextVar("_is_capturing", default=False)


def sow_loss(
    module: nn.Module | nnx.Module,
    name: str,
    value: ArrayLike | WeightedMean,
    *,
    regularization: bool = False,
) -> None:
    """Store a loss in the state of a module, from within one of its methods.

    In linen the loss is put into the collection ``losses`` or ``regularization_losses``, if that
    is mutable and this is not ``init``. It replaces a loss of an earlier ``apply`` that is still in
    the variables. In nnx the loss is stored within :func:`capture` (or ``nnx.capture``). Otherwise
    the call does nothing.

    Args:
        module: The module, of linen or of nnx.
        name: The name of the loss within the module, without ``/``. It must not be the name of a
            submodule, or in nnx of an attribute.
        value: A scalar, an array of losses, all of which count, or a ``WeightedMean``.
        regularization: Whether it is a regularization loss, which depends on parameters only.

    Raises:
        ValueError: if ``module`` is not a Flax module, the name is empty, has a ``/`` or is taken,
            or the value is not a real array or number; within :func:`capture`, if ``module`` is not
            among the arguments; and in linen, in a lifted transformation of a submodule of a bound
            module (``bind``), if no method has called it.

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
    _sow(module, "regularization_losses" if regularization else "losses", name, value)


def sow_metric(module: nn.Module | nnx.Module, name: str, value: ArrayLike | WeightedMean) -> None:
    """Store a metric in the state of a module, as :func:`sow_loss` stores a loss.

    It is collected with the losses and is not part of the total loss. In linen its collection is
    ``loss_metrics``, in nnx its variable is :class:`LossMetric`.

    Args:
        module: The module, of linen or of nnx.
        name: The name of the metric within the module; as for a loss.
        value: A scalar, an array of numbers, all of which count, or a ``WeightedMean``.

    Raises:
        ValueError: as :func:`sow_loss`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxlosses.flax as jlf
        >>> class Router(nnx.Module):
        ...     def __call__(self, x):
        ...         jlf.sow_metric(self, "share_of_first", jnp.argmax(x, -1) == 0)
        ...         return x
        >>> y, losses = jlf.capture(Router())(jnp.array([[2.0, 1.0], [0.0, 3.0]]))
        >>> print(losses.get_metrics(), losses.get_total_loss())
        {'share_of_first': Array(0.5, dtype=float32)} 0.0
    """
    _sow(module, "metrics", name, value)


def _sow(module: Any, kind: str, name: str, value: ArrayLike | WeightedMean) -> None:
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"name must be a non-empty string without '/', got {name!r}")
    mean = as_mean(kind, name, value)
    if isinstance(module, nn.Module):
        collection = _COLLECTIONS[kind]
        if not module.is_initializing() and module.is_mutable_collection(collection):
            run = _current_run(module)
            if run is None:
                raise ValueError(
                    f"{name} cannot be sown in a lifted transformation of a part of a bound module "
                    f"that no method has called, because losses of earlier runs could not be "
                    f"distinguished from those of this one; call the transformation in a method"
                )
            add = functools.partial(_Sown.add, run=run)
            module.sow(collection, name, mean, reduce_fn=add, init_fn=_Sown)
    elif isinstance(module, nnx.Module):
        variable, captures = _VARIABLES[kind], getattr(module, "__captures__", None)
        others = (sown for sown in captures or () if type(sown) is not variable)
        # Flax would overwrite an attribute or loss of this name.
        if hasattr(module, name) or any(name in sown for sown in others):
            raise ValueError(
                f"name {name!r} is taken by another attribute or loss of {type(module).__name__}"
            )
        if captures is not None:  # Outside of a capture, Flax's sow would warn.
            module.sow(variable, name, mean, reduce_fn=_Sown.add, init_fn=_Sown)
        elif _is_capturing.get():
            raise ValueError(
                f"module {type(module).__name__} sows {name!r} within capture, but is not among "
                f"the arguments of the captured function, so that the loss would be lost; give the "
                f"module to the function as an argument, or in a list or another pytree"
            )
    else:
        raise ValueError(f"module must be a Flax module, got {type(module).__name__}")


def collect(state: Any, *, expected: Any = None) -> LossCollector:
    """The losses that modules have sown, named by module path: ``encoder/layer_0/load_balance``.

    Args:
        state: In linen, the mutated variables that ``apply`` returns. In nnx, the state that
            ``nnx.capture`` with :class:`Loss`, :class:`RegularizationLoss` and :class:`LossMetric`
            returns; if it returns several states, merge them.
        expected: Names of losses or metrics that must have been sown. Without them, there is no
            error if Flax drops a loss because a ``scan`` or ``vmap`` does not declare its
            collection.

    Raises:
        ValueError: if ``state`` is not such a state, or if an expected loss is missing.

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
    """The expected names as a tuple, which can be read more than once."""
    if isinstance(expected, str) or not isinstance(expected, Iterable | type(None)):
        raise ValueError(f"expected must be names, such as a list of strings, got {expected!r}")
    return tuple(expected or ())


def _collect(
    sown_losses: Iterable[tuple[str, str, Any]], expected: tuple[str, ...]
) -> LossCollector:
    """A collector of what :func:`_sown_in` found, if all expected names are among it."""
    collector, names = LossCollector(), set()
    for kind, name, sown in sown_losses:
        collector = _ADD[kind](collector, name, _mean_of(kind, name, sown))
        names.add(name)
    missing = sorted(set(expected) - names)
    if missing:
        raise ValueError(
            f"expected losses {missing} were not sown, only {sorted(names)}. In linen, are "
            f"{list(_COLLECTIONS.values())} in `mutable` of apply, and in `variable_axes` of every "
            f"nn.scan and nn.vmap? Was sow_loss called, and not only in init? In nnx, was the "
            f"module called within capture?"
        )
    return collector


def capture(
    fn: Callable[..., Any], *, expected: Any = None
) -> Callable[..., tuple[Any, LossCollector]]:
    """Run a function and collect the losses that its module sows.

    Args:
        fn: An nnx module, a method of one, or a function of nnx modules, which may be anywhere in
            its arguments: in pytrees, dataclasses and ``functools.partial``. Or the method
            ``apply`` of a linen module; then the collections of losses are made mutable and start
            empty.
        expected: As in :func:`collect`.

    Returns:
        A function of the same arguments that returns ``(fn(*args), LossCollector)``. With a single
        nnx module, names are paths in it. With several, they begin with the module's number in the
        order of the arguments (in a dictionary, of sorted keys): ``0/layer/loss``. A module that is
        given twice is one module. If ``fn`` raises an error, nothing is left on the modules.

    Raises:
        ValueError: if ``fn`` is not a function, if there is no module to collect from, if a module
            is already being captured, if an nnx module sows that is not among the arguments (the
            function closes over it, or creates it), or as :func:`collect`.

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
    if not callable(fn):
        raise ValueError(f"fn must be a function or a module that can be called, got {fn!r}")

    @functools.wraps(fn, updated=())  # Do not copy the attributes of a module.
    def captured(*args: Any, **kwargs: Any) -> tuple[Any, LossCollector]:
        function = fn
        while isinstance(function, functools.partial):
            args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
            function = function.func
        if isinstance(getattr(function, "__self__", None), nn.Module):
            result, *states = _apply(function, *args, **kwargs)
        else:
            modules = _modules_in(function, *args, *kwargs.values())
            result, *states = _capture(modules, function, *args, **kwargs)
        return result, _collect(itertools.chain(*map(_sown_in, states)), expected)

    return captured


def _modules_in(*trees: Any) -> tuple[nnx.Module, ...]:
    """All modules of nnx in pytrees, each once; Flax itself finds the modules within these."""
    modules, seen = [], set()

    def visit(*trees: Any) -> None:
        for tree in trees:
            try:
                leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Module))
            except ValueError:
                continue  # A dictionary whose keys cannot be sorted is not a pytree.
            for leaf in leaves:
                if id(leaf) not in seen:
                    seen.add(id(leaf))
                    enter(leaf)

    def enter(leaf: Any) -> None:
        if isinstance(leaf, nnx.Module):
            modules.append(leaf)
        elif isinstance(leaf, functools.partial):
            visit(leaf.func, *leaf.args, *leaf.keywords.values())
        elif inspect.ismethod(leaf):
            visit(leaf.__self__)
        elif dataclasses.is_dataclass(leaf):
            visit(*(getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)))

    visit(*trees)
    return tuple(modules)


def _apply(
    apply: Callable[..., Any], variables: Any, *args: Any, mutable: Any = False, **kwargs: Any
) -> tuple[Any, Any]:
    """What ``apply`` returns without capture, and the variables that hold the losses."""
    if apply.__name__ != "apply":
        raise ValueError(f"fn of a linen module must be its apply, got {apply.__name__}")
    all_mutable = union_filters(mutable, list(_COLLECTIONS.values()))
    variables = {k: v for k, v in variables.items() if k not in _COLLECTIONS.values()}
    result, state = apply(variables, *args, mutable=all_mutable, **kwargs)
    others = {k: v for k, v in state.items() if k not in _COLLECTIONS.values()}
    return (result if mutable is False else (result, others)), state


def _capture(modules: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """``nnx.capture``, with a check before it and a clean-up after it.

    A second capture within a first one would drop the losses of the first, so it is refused. An
    error in ``fn`` would leave attributes on the modules, so these are removed.
    """
    if not modules:
        raise ValueError(
            "fn must be an nnx module, a method of one, a function with nnx modules in its "
            "arguments (in pytrees or dataclasses, not closed over), or the apply of a linen "
            "module itself; no module was found"
        )
    for _, module in nnx.iter_modules(modules):
        if hasattr(module, "__captures__"):
            raise ValueError(
                f"module {type(module).__name__} is being captured already, or an earlier "
                f"nnx.capture failed and left its captures there; capture once, around everything"
            )
    outer = _is_capturing.set(True)
    try:
        run = nnx.capture(lambda _: fn(*args, **kwargs), *_VARIABLES.values())
        return run(modules[0] if len(modules) == 1 else modules)
    finally:
        _is_capturing.reset(outer)
        for _, module in nnx.iter_modules(modules):
            if hasattr(module, "__captures__"):
                del module.__captures__


@exportable
@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Sown:
    """What a module holds under one name: a mean for each time that the loss was sown.

    ``run`` distinguishes one call of ``apply`` from another. The variables may still hold the means
    of an earlier call; these are dropped. The structure of the pytree says only whether the run is
    the current one: if it held the run itself, JAX would trace a function again in every run. So a
    program of ``nn.jit`` that was traced in an earlier run returns means of the current one.
    """

    means: tuple[WeightedMean, ...] = ()
    run: Any = None

    def add(self, mean: WeightedMean, run: Any = None) -> _Sown:
        if not isinstance(self, _Sown):
            raise ValueError("name must not be one that the module also gives to its own sow")
        return _Sown((*self.means, mean) if self.run is run else (mean,), run)

    def tree_flatten(self) -> tuple[tuple[Any, ...], bool]:
        return (self.means,), self.run is not None and self.run is _current_run()

    @classmethod
    def tree_unflatten(cls, is_current: bool, children: Any) -> _Sown:
        return cls(children[0], _current_run() if is_current else None)

    def __reduce__(self) -> Any:
        return _Sown, (self.means,)  # A copy belongs to no run.


def _current_run(*modules: nn.Module) -> Any:
    """Something that is the same object throughout one ``apply`` (or ``bind``), and in no other.

    It is the dictionary of counters that Flax makes for each root scope. In lifted transformations
    Flax rebuilds scopes and clones modules, but a copy of a root scope keeps this dictionary. The
    copy of another scope has no parent, so its root is not found from it, but from the module whose
    method called the transformation.

    Args:
        modules: Modules to try first, before those whose methods are being run.
    """
    for module in (*modules, *reversed(linen_module._context.module_stack)):
        if module is not None and module.scope is not None and not module.scope.root.path:
            return module.scope.root.rng_counters
    return None


def _sown_in(state: Any) -> Iterator[tuple[str, str, Any]]:
    """The kind, the path and the value of each loss or metric that was sown."""
    if isinstance(state, nnx.State):
        for path, variable in nnx.to_flat_state(state):
            for kind, variable_type in _VARIABLES.items():
                if isinstance(variable, variable_type):
                    yield kind, "/".join(map(str, path)), variable.get_value()
    elif isinstance(state, Mapping):
        for kind, collection in _COLLECTIONS.items():
            flat = traverse_util.flatten_dict(state.get(collection, {}), sep="/")
            for path, sown in flat.items():
                yield kind, path, sown
    else:
        raise ValueError(
            f"state must be the variables that apply returns, or an nnx.State; "
            f"got {type(state).__name__}"
        )


def _mean_of(kind: str, name: str, sown: Any) -> WeightedMean:
    """What was sown under one name, as one mean; with an axis if it was sown several times."""
    means = sown.means if isinstance(sown, _Sown) else _sown_by_flax(kind, name, sown)
    if len(means) == 1:
        return means[0]
    return jax.tree.map(lambda *x: jnp.concatenate([jnp.ravel(y) for y in x]), *means)


def _sown_by_flax(kind: str, name: str, sown: Any) -> list[WeightedMean]:
    """Scalars that a module sowed by Flax's own method ``sow``."""
    values = sown if isinstance(sown, tuple) else (sown,)
    if any(jnp.shape(value) for value in values):
        raise ValueError(
            f"{name} was sown by Flax's own sow and must be a scalar, got shapes "
            f"{[jnp.shape(value) for value in values]}: only sow_loss can tell whether the "
            f"elements are losses to average or layers to sum"
        )
    return [as_mean(kind, name, value) for value in values]


def _children(fields: tuple[str, ...], tree: Any) -> dict[str, Any]:
    """The fields of one of the package's pytrees, with mappings as dictionaries for Flax."""
    values = {field: getattr(tree, field) for field in fields}
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _to_state(fields: tuple[str, ...], tree: Any) -> dict[str, Any]:
    """What Flax saves."""
    return {k: serialization.to_state_dict(v) for k, v in _children(fields, tree).items()}


def _from_state(fields: tuple[str, ...], target: Any, state: dict[str, Any]) -> Any:
    """``target`` with the leaves that Flax has saved, if the names are the same.

    Flax itself would drop what a dictionary of the target does not have.
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            f"the saved state of a {type(target).__name__} must be a dictionary, got {state!r} at "
            f"{serialization.current_path()}"
        )
    children = _children(fields, target)
    for expected, found in ((children, state), *((v, state.get(k)) for k, v in children.items())):
        if isinstance(expected, dict) and expected.keys() != set(found or ()):
            raise ValueError(
                f"target, a {type(target).__name__}, must have the names of the saved state, got "
                f"{sorted(expected)} where the state has {sorted(found or ())} at "
                f"{serialization.current_path()}"
            )
    restored = {k: serialization.from_state_dict(v, state[k], k) for k, v in children.items()}
    return type(target)(*restored.values())


for _class, _fields in (
    (WeightedMean, ("total", "count")),
    (LossCollector, KINDS),
    (_Sown, ("means",)),
):
    serialization.register_serialization_state(
        _class,
        functools.partial(_to_state, _fields),
        functools.partial(_from_state, _fields),
        override=True,  # This module may be reloaded.
    )
