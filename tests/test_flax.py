"""Losses sown in linen and nnx, in all situations where Flax's own sow loses or doubles one."""

import collections
import copy
import dataclasses
import functools
import pickle
import warnings

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training import train_state as train_state_lib

import jaxlosses as jl
import jaxlosses.flax as jlf

X = jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0]])
COLLECTIONS = ["losses", "regularization_losses", "loss_metrics"]
VARIABLES = (jlf.Loss, jlf.RegularizationLoss, jlf.LossMetric)


class Block(nn.Module):
    """A layer that sows an array of losses, an undivided mean, a regularization and a metric."""

    width: int = 3

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], self.width))
        x = x @ kernel / 3
        jlf.sow_loss(self, "square", jnp.square(x))
        masked = jl.compute_weighted_loss(x, x > 0, reduction="parts")
        jlf.sow_loss(self, "masked", masked)
        jlf.sow_loss(self, "l2", jl.l2_regularizer(0.5)(kernel), regularization=True)
        jlf.sow_metric(self, "positive", x > 0)
        return x


class Encoder(nn.Module):
    """Two layers, called one after the other without a scan."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(name=f"layer_{i}")(x)
        return x


class Twice(nn.Module):
    """One layer that is called twice, plainly or within a lifted transformation."""

    lift: str = ""

    @nn.compact
    def __call__(self, x):
        block = {"": Block, "remat": nn.remat(Block), "jit": nn.jit(Block)}[self.lift](name="layer")
        return block(block(x))


class Scanned(nn.Module):
    axes: tuple = tuple(COLLECTIONS)
    remat: bool = False
    carry: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        lifted = nn.scan(
            lambda module, x, _: (module(x), None),
            variable_axes={"params": 0} | dict.fromkeys(self.axes, 0),
            variable_carry=COLLECTIONS if self.carry else False,
            split_rngs={"params": True},
            length=2,
        )
        return lifted(block(name="layers"), x, None)[0]


def applied(module, variables=None, **options):
    variables = module.init(jax.random.key(0), X) if variables is None else variables
    return module.apply(variables, X, mutable=COLLECTIONS, **options)


def test_linen_losses_have_module_paths_and_right_values():
    x, state = applied(Encoder())
    losses = jlf.collect(state)
    names = {f"layer_{i}/{name}" for i in range(2) for name in ("square", "masked")}
    assert set(losses.losses) == names
    assert set(losses.regularization_losses) == {"layer_0/l2", "layer_1/l2"}
    assert set(losses.metrics) == {"layer_0/positive", "layer_1/positive"}
    np.testing.assert_allclose(losses.get_metrics()["layer_1/positive"], (x > 0).mean())
    np.testing.assert_allclose(losses.get_losses()["layer_1/square"], jnp.square(x).mean())
    np.testing.assert_allclose(losses.get_losses()["layer_1/masked"], x[x > 0].mean())
    assert losses.losses["layer_1/square"].count == x.size
    np.testing.assert_allclose(losses.get_regularization_losses("layer_0")["layer_0/l2"], 9 / 4)


def test_linen_sows_nothing_at_init():
    assert set(Encoder().init(jax.random.key(0), X)) == {"params"}
    assert set(Scanned().init(jax.random.key(0), X)) == {"params"}


def test_linen_does_nothing_where_not_mutable():
    variables = Encoder().init(jax.random.key(0), X)
    plain = Encoder().apply(variables, X)
    _, state = Encoder().apply(variables, X, mutable=["batch_stats"])
    chex.assert_trees_all_equal(plain, applied(Encoder(), variables)[0])
    assert jlf.collect(state).get_losses() == {}
    with pytest.raises(ValueError, match=r"\['layer_0/square'\] were not sown.*`mutable`"):
        jlf.collect(state, expected=["layer_0/square"])


@pytest.mark.parametrize("remat", [False, True])
def test_linen_scan_sows_the_losses_of_its_layers(remat):
    _, state = applied(Scanned(remat=remat))
    losses, written_out = jlf.collect(state), jlf.collect(applied(Encoder())[1])
    for name in ("square", "masked"):
        layers = jnp.stack([written_out.get_losses()[f"layer_{i}/{name}"] for i in range(2)])
        chex.assert_trees_all_close(losses.get_losses()[f"layers/{name}"], layers)
    chex.assert_trees_all_close(losses.get_total_loss(), written_out.get_total_loss())


def test_linen_scan_without_variable_axes_is_noticed():
    _, state = applied(Scanned(axes=()))
    assert jlf.collect(state).get_losses() == {}  # Flax drops them without a word.
    with pytest.raises(ValueError, match=r"layers/square.*variable_axes.*nn.scan"):
        jlf.collect(state, expected=["layers/square"])


def test_linen_vmap_without_variable_axes_is_noticed():
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}
            return nn.vmap(Block, **options)(name="layer")(x)

    _, state = applied(Mapped())
    with pytest.raises(ValueError, match=r"layer/square.*variable_axes.*nn.vmap"):
        jlf.collect(state, expected=["layer/square"])


def test_linen_scan_cannot_carry_losses():
    with pytest.raises(TypeError, match="carry"):
        applied(Scanned(axes=(), carry=True), Scanned().init(jax.random.key(0), X))


def test_linen_cond_needs_the_loss_in_both_branches():
    class Cond(nn.Module):
        both: bool

        @nn.compact
        def __call__(self, x):
            def sown(module, x):
                jlf.sow_loss(module, "aux", jnp.sum(x))
                return x

            def silent(module, x):
                return x

            return nn.cond(True, sown, sown if self.both else silent, self, x)

    with pytest.raises(TypeError):
        applied(Cond(both=False), {})
    assert jlf.collect(applied(Cond(both=True), {})[1]).get_losses()["aux"] == X.sum()


def test_linen_vmap_sows_the_losses_of_a_loop():
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = nn.vmap(
                Block,
                variable_axes={"params": None} | dict.fromkeys(COLLECTIONS, 0),
                split_rngs={"params": False},
            )
            return lifted(name="layer")(x)

    _, state = applied(Mapped())
    variables = Block().init(jax.random.key(0), X[0])
    loop = [jlf.capture(Block().apply)(variables, x)[1].get_losses() for x in X]
    expected = {f"layer/{k}": jnp.stack([losses[k] for losses in loop]) for k in loop[0]}
    chex.assert_trees_all_close(jlf.collect(state).get_losses(), expected)


@pytest.mark.parametrize("lift", ["", "remat", "jit"])
def test_linen_module_called_twice_sows_twice(lift):
    _, state = applied(Twice(lift))
    losses = jlf.collect(state)
    written_out = jlf.collect(applied(Encoder())[1])
    assert losses.get_losses()["layer/square"].shape == (2,)
    chex.assert_trees_all_close(losses.get_total_loss(), written_out.get_total_loss())


@pytest.mark.parametrize(
    "module",
    [Encoder(), Twice(), Twice("remat"), Scanned(), Scanned(remat=True)],
    ids=["plain", "twice", "twice remat", "scan", "scan remat"],
)
def test_linen_state_of_the_last_step_is_never_counted_again(module):
    variables = module.init(jax.random.key(0), X)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=2)  # Once without the state, once with it.
    def step(variables):
        _, state = applied(module, variables)
        return state

    state = step(variables)
    expected = jlf.collect(state)
    for _ in range(3):
        state = step({**variables, **state})
        chex.assert_trees_all_equal(jlf.collect(state), expected)
    _, eager = applied(module, {**variables, **state})
    chex.assert_trees_all_close(jlf.collect(eager), expected)


def scan(function):
    lifted = nn.scan(
        lambda module, x, _: (function(module, x), None),
        variable_axes={"losses": 0},
        variable_broadcast="params",
        split_rngs={"params": True},
        length=1,
    )
    return lambda module, x: lifted(module, x, None)[0]


def vmap(function):
    lifted = nn.vmap(
        function, variable_axes={"losses": 0, "params": None}, split_rngs={"params": False}
    )
    return lambda module, x: lifted(module, x[None])[0]


LIFTS = {
    "none": lambda f: f,
    "remat": nn.remat,
    "jit": nn.jit,
    "scan": scan,
    "vmap": vmap,
    "scan of remat": lambda f: scan(nn.remat(f)),
    "jit of vmap of scan": lambda f: nn.jit(vmap(scan(f))),
    "cond": lambda f: lambda module, x: nn.cond(True, f, f, module, x),
    "switch": lambda f: lambda module, x: nn.switch(0, [f, f], module, x),
    "map_variables": lambda f: nn.map_variables(f, "params", mutable=True),
    "custom_vjp": lambda f: nn.custom_vjp(f, lambda m, x: (f(m, x), ()), lambda *a: a[-2:]),
    "vjp": lambda f: lambda module, x: nn.vjp(f, module, x, vjp_variables="params")[0],
    "jvp": lambda f: lambda module, x: nn.jvp(f, module, (x,), (x,), variable_tangents={})[0],
    "metadata": lambda f: nn.add_metadata_axis(f, variable_axes={"params": 0}),
}


class Sows(nn.Module):
    """A loss, sown as a number and as a mean, in a lifted transformation of this or of a child."""

    lift: str = "none"
    child: bool = False

    @nn.compact
    def __call__(self, x):
        def run(module, x):
            if self.child:
                return module(x)
            jlf.sow_loss(module, "aux", x)
            jlf.sow_loss(module, "aux", jl.WeightedMean(2 * x, 1))
            return 2 * x

        return LIFTS[self.lift](run)(Sows(name="child") if self.child else self, x)


class Nests(nn.Module):
    """Other modules, fed with their own states, in a lifted transformation of this module."""

    lift: str
    inner: str
    bind: bool

    @nn.compact
    def __call__(self, x):
        def losses_of(state, x):
            module = Sows(self.inner, child=self.inner == "scan")
            if not self.bind:
                return module.apply(state, x, mutable=COLLECTIONS)[1]
            bound = module.bind(state, mutable=COLLECTIONS)
            bound(x)
            return bound.variables

        def run(module, x):
            jlf.sow_loss(module, "own", jl.WeightedMean(x, 1))
            state = {}
            for _ in range(2):
                state = losses_of(state, x)
                total = jlf.collect(state).get_total_loss()
                jlf.sow_loss(module, "own", jl.WeightedMean(total, 1))
                # As a transformation of the outer module does with what passes through it.
                state = jax.tree.map(lambda leaf: leaf, state)
            return jlf.collect(losses_of(state, x)).get_total_loss()

        return LIFTS[self.lift](run)(self, x)


@pytest.mark.parametrize("child", [False, True])
@pytest.mark.parametrize("lift", LIFTS)
def test_linen_sows_the_same_in_every_lifted_transformation(lift, child):
    state, one = {}, jnp.float32(1)
    apply = functools.partial(Sows(lift, child).apply, mutable=COLLECTIONS)
    jitted = jax.jit(apply)
    for function in (apply, apply, jitted, jitted):
        for variables in ({}, state):
            _, state = function(variables, one)
            (found,) = jlf.collect(state).get_losses().values()
            np.testing.assert_array_equal(np.ravel(found), [1, 2])


@pytest.mark.parametrize("bind", [False, True])
@pytest.mark.parametrize("inner", ["none", "jit", "scan"])
@pytest.mark.parametrize("lift", LIFTS)
def test_linen_inner_runs_replace_their_own_losses(lift, inner, bind):
    one, state = jnp.float32(1), {}
    for _ in range(2):
        total, state = Nests(lift, inner, bind).apply(state, one, mutable=COLLECTIONS)
        assert total == 3
        own = jlf.collect(state).get_losses()["own"]
        np.testing.assert_array_equal(np.ravel(own), [1, 3, 3])


def test_linen_inner_runs_replace_their_own_losses_within_a_loop():
    """A ``while_loop`` cannot carry losses that are sown, but its body may run other modules."""

    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(module, carry):
                i, _ = carry
                _, state = Sows().apply({}, x, mutable=COLLECTIONS)
                _, state = Sows().apply(state, x, mutable=COLLECTIONS)
                return i + 1, jlf.collect(state).get_total_loss()

            return nn.while_loop(lambda module, carry: carry[0] < 2, body, self, (0, 0.0))

    assert Loop().apply({}, jnp.float32(1), mutable=COLLECTIONS)[0] == (2, 3)


def test_linen_methods_that_are_jitted_lose_no_loss_of_other_methods():
    """A program of ``nn.jit`` is traced in one run and used in the next."""

    class Methods(nn.Module):
        @nn.jit
        def jitted(self):
            jlf.sow_loss(self, "aux", 1.0)

        def __call__(self, *calls):
            for jitted in calls:
                if jitted:
                    self.jitted()
                else:
                    jlf.sow_loss(self, "aux", 10.0)

    module, state = Methods(), {}
    for calls in ([1, 0], [1, 0], [0, 1], [1], [0, 1], [1, 1], [0, 1, 1, 0], [1, 0, 1]):
        expected = [1.0 if jitted else 10.0 for jitted in calls]
        for variables in ({}, state):
            _, state = module.apply(variables, *calls, mutable=COLLECTIONS)
            np.testing.assert_array_equal(
                jnp.ravel(jlf.collect(state).get_losses()["aux"]), expected
            )


def test_linen_bound_modules_are_one_run_until_they_are_bound_again():
    one = jnp.float32(1)
    bound = Sows().bind({}, mutable=COLLECTIONS)
    bound(one)
    jlf.sow_loss(bound, "aux", 5.0)  # Outside of its methods.
    bound(one)
    np.testing.assert_array_equal(jlf.collect(bound.variables).get_losses()["aux"], [1, 2, 5, 1, 2])
    again = Sows().bind(bound.variables, mutable=COLLECTIONS)
    jlf.sow_loss(again, "aux", 7.0)
    assert jlf.collect(again.variables).get_total_loss() == 7


def test_linen_runs_that_cannot_be_told_apart_are_refused():
    one = jnp.float32(1)

    class Part(nn.Module):
        def setup(self):
            self.part = Sows()

    def call(module, x):
        return module(x)

    part = Part().bind({}, mutable=COLLECTIONS).part
    part(one)
    with pytest.raises(ValueError, match="aux cannot be sown in a lifted transformation of a part"):
        nn.remat(call)(part, one)
    assert nn.remat(call)(Part().bind({}).part, one) == 2  # Nothing is sown.


def test_linen_state_can_be_copied():
    one = jnp.float32(1)
    _, state = Sows().apply({}, one, mutable=COLLECTIONS)
    for same in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        chex.assert_trees_all_equal(jlf.collect(same), jlf.collect(state))
        _, again = Sows().apply(same, one, mutable=COLLECTIONS)
        chex.assert_trees_all_equal(jlf.collect(again), jlf.collect(state))


def test_linen_gradients_flow_through_capture():
    variables = Encoder().init(jax.random.key(0), X)

    def total(variables):
        return jlf.capture(Encoder().apply)(variables, X)[1].get_total_loss()

    jax.test_util.check_grads(total, (variables,), 1, modes=["rev"], rtol=1e-2)


def test_linen_capture_leaves_the_result_as_it_was():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            return nn.BatchNorm(not train, name="norm")(Encoder(name="encoder")(x))

    variables = Norm().init(jax.random.key(0), X)
    plain = Norm().apply(variables, X, train=False)
    result, losses = jlf.capture(Norm().apply, expected=["encoder/layer_1/masked"])(
        variables, X, train=False
    )
    chex.assert_trees_all_equal(result, plain)
    assert "encoder/layer_0/square" in losses.get_losses()
    plain, updated = Norm().apply(variables, X, mutable=["batch_stats"])
    (result, state), _ = jlf.capture(Norm().apply)(variables, X, mutable=["batch_stats"])
    chex.assert_trees_all_equal((result, state), (plain, updated))
    with pytest.raises(ValueError, match="must be its apply, got init"):
        jlf.capture(Norm().init)(jax.random.key(0), X)


def test_linen_scalars_of_the_own_sow_of_flax_are_collected():
    class OwnSow(nn.Module):
        value: float | jax.Array

        @nn.compact
        def __call__(self, x):
            self.sow("losses", "aux", self.value)
            self.sow("losses", "aux", 2 * self.value)

    assert jlf.collect(applied(OwnSow(jnp.float32(3)), {})[1]).get_total_loss() == 9
    with pytest.raises(ValueError, match=r"aux was sown by .*must be a scalar, got.*\(3,\)"):
        jlf.collect(applied(OwnSow(jnp.ones(3)), {})[1])


class Layer(nnx.Module):
    """The same layer as Block."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 3)))

    def __call__(self, x):
        x = x @ self.kernel[...] / 3
        jlf.sow_loss(self, "square", jnp.square(x))
        jlf.sow_loss(self, "masked", jl.compute_weighted_loss(x, x > 0, reduction="parts"))
        l2 = jl.l2_regularizer(0.5)(self.kernel[...])
        jlf.sow_loss(self, "l2", l2, regularization=True)
        jlf.sow_metric(self, "positive", x > 0)
        return x


class Layers(nnx.Module):
    def __init__(self, remat=False):
        self.layers = nnx.List([Layer(), Layer()])
        self.remat = remat

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.remat(Layer.__call__)(layer, x) if self.remat else layer(x)
        return x


class ScannedLayers(nnx.Module):
    def __init__(self, remat=False):
        self.layers = nnx.vmap(lambda _: Layer())(jnp.arange(2))
        self.remat = remat

    def __call__(self, x):
        call = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
        return nnx.scan(
            lambda x, layer: call(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )(x, self.layers)


def test_nnx_gives_the_losses_of_linen():
    y, losses = jlf.capture(Layers())(X)
    expected, state = applied(Encoder())
    chex.assert_trees_all_close(y, expected)
    linen = jlf.collect(state)
    assert {n.replace("layers/", "layer_") for n in losses.losses} == set(linen.losses)
    for kind in ("get_losses", "get_regularization_losses", "get_metrics"):
        found = {n.replace("layers/", "layer_"): v for n, v in getattr(losses, kind)().items()}
        assert len(found) >= 2
        chex.assert_trees_all_close(found, getattr(linen, kind)())
    chex.assert_trees_all_close(losses.get_total_loss(), linen.get_total_loss())


def test_nnx_does_nothing_and_warns_of_nothing_outside_of_capture():
    model = Layers()
    before = nnx.state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)
        nnx.jit(Layers.__call__)(model, X)
    chex.assert_trees_all_equal(nnx.state(model), before)
    assert jlf.collect(nnx.pop(model, VARIABLES)).get_total_loss() == 0


@pytest.mark.parametrize("model", [Layers(), ScannedLayers()], ids=["layers", "scan"])
def test_nnx_neither_grows_nor_retraces(model):
    chex.clear_trace_counter()

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, x):
        return jlf.capture(model)(x)[1]

    first = step(model, X)
    before = nnx.state(model)
    for _ in range(3):
        chex.assert_trees_all_equal(step(model, X), first)
    chex.assert_trees_all_equal(nnx.state(model), before)


@pytest.mark.parametrize("remat", [False, True])
def test_nnx_scan_and_remat_sow_the_losses_of_their_layers(remat):
    written_out = jlf.capture(Layers())(X)[1]
    losses = jlf.capture(ScannedLayers(remat))(X)[1]
    for name in ("square", "masked"):
        layers = jnp.stack([written_out.get_losses()[f"layers/{i}/{name}"] for i in range(2)])
        chex.assert_trees_all_close(losses.get_losses()[f"layers/{name}"], layers)
    chex.assert_trees_all_close(losses.get_total_loss(), written_out.get_total_loss())
    chex.assert_trees_all_close(jlf.capture(Layers(remat))(X)[1], written_out)


def test_nnx_vmap_sows_the_losses_of_a_loop():
    def mapped(layer, x):
        axes = nnx.StateAxes({VARIABLES: 0, ...: None})
        return nnx.vmap(Layer.__call__, in_axes=(axes, 0))(layer, x)

    # A capture within vmap returns a pytree, which vmap maps as any other.
    losses = nnx.vmap(lambda layer, x: jlf.capture(layer)(x)[1], in_axes=(None, 0))(Layer(), X)
    loop = [jlf.capture(Layer())(x)[1].get_losses() for x in X]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *loop)
    chex.assert_trees_all_close(losses.get_losses(), expected)
    chex.assert_trees_all_close(jlf.capture(mapped)(Layer(), X)[1].get_losses(), expected)


def test_nnx_capture_gives_the_same_inside_and_outside_of_jit_and_grad():
    def total(model, x):
        _, losses = jlf.capture(model)(x)
        return losses.get_total_loss(), losses

    model = Layers()
    grads, losses = nnx.grad(total, has_aux=True)(model, X)
    chex.assert_trees_all_equal(losses, jlf.capture(model)(X)[1])
    jitted, _ = nnx.jit(nnx.grad(total, has_aux=True))(model, X)
    chex.assert_trees_all_close(jitted, grads)
    graph, params = nnx.split(model)
    plain = jax.grad(lambda p: total(nnx.merge(graph, p), X)[0])(params)
    chex.assert_trees_all_close(jax.tree.leaves(grads), jax.tree.leaves(plain))
    # And with a jitted function inside of the capture.
    chex.assert_trees_all_close(jlf.capture(nnx.jit(Layers.__call__))(model, X)[1], losses)


def test_nnx_layer_called_twice_sows_twice():
    def twice(layer, x):
        return layer(layer(x))

    losses = jlf.capture(twice)(Layer(), X)[1]
    assert losses.get_losses()["square"].shape == (2,)
    chex.assert_trees_all_close(
        losses.get_total_loss(), jlf.capture(Layers())(X)[1].get_total_loss()
    )


def test_nnx_capture_takes_a_function_a_method_or_a_module():
    model = Layers()
    found = [
        jlf.capture(fn)(*args)[1]
        for fn, args in (
            (model, (X,)),
            (model.__call__, (X,)),
            (lambda m, x: m(x), (model, X)),
            (lambda m, x: nnx.capture(m, nnx.Intermediate) and m(x), (model, X)),
        )
    ]
    for losses in found[1:]:
        chex.assert_trees_all_equal(losses, found[0])
    several = jlf.capture(lambda x, m, other: other(m(x)))(X, model, Layer())[1]
    assert {"0/layers/0/square", "0/layers/1/square", "1/square"} < set(several.losses)
    for wrong in (None, 3, nnx.Module()):
        with pytest.raises(
            ValueError, match="fn must be a function or a module that can be called"
        ):
            jlf.capture(wrong)
    for fn, args in ((lambda x: model(x), (X,)), (jnp.sum, (X,)), (lambda: None, ())):
        with pytest.raises(ValueError, match="fn must be an nnx module"):
            jlf.capture(fn)(*args)


@dataclasses.dataclass
class Bundle:
    """No pytree."""

    a: object
    others: object
    unset: object = dataclasses.field(init=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TreeBundle:
    a: object
    others: object


class Holder(nnx.Pytree):
    """A pytree of nnx that is no module, as an optimizer that holds its model."""

    def __init__(self, a, others):
        self.a, (self.b,) = a, others


NamedBundle = collections.namedtuple("NamedBundle", ("a", "others"))
# Ways to give modules a and b to a function of pytrees: what to capture and its arguments.
WAYS = {
    "arguments": lambda f, a, b: (f, (a, b), {}),
    "keywords": lambda f, a, b: (f, (), {"z": a, "b": b}),
    "tuple": lambda f, a, b: (f, (a, (b,)), {}),
    "lists": lambda f, a, b: (f, ([[a], [None, [b]]],), {}),
    "dict": lambda f, a, b: (f, ({"y": b, "x": a},), {}),
    "keyword of a list": lambda f, a, b: (f, (a,), {"others": [X, b]}),
    "namedtuple": lambda f, a, b: (f, (NamedBundle(a, [b]),), {}),
    "dataclass": lambda f, a, b: (f, (Bundle(a, [b]),), {}),
    "registered dataclass": lambda f, a, b: (f, (TreeBundle(a, [b]),), {}),
    "nnx pytree": lambda f, a, b: (f, (Holder(a, [b]),), {}),
    "partial": lambda f, a, b: (functools.partial(f, a), (b,), {}),
    "partial of keywords": lambda f, a, b: (functools.partial(f, a, others={"b": b}), (), {}),
    "partial of a partial": lambda f, a, b: (
        functools.partial(jax.tree_util.Partial(f, a), others=[b]),
        (),
        {},
    ),
    "partial as an argument": lambda f, a, b: (f, (functools.partial(f, a), [b]), {}),
    "method as an argument": lambda f, a, b: (f, (a.__call__, b.__call__), {}),
    "twice": lambda f, a, b: (f, ([a, b], b, {"a": a}), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_nnx_capture_sees_modules_wherever_they_are_in_the_arguments(way):
    a, b = Layers(), Layer()

    def call(*args, **kwargs):
        return b(a(X))

    fn, args, kwargs = WAYS[way](call, a, b)
    y, losses = jlf.capture(fn, expected=["0/layers/1/square", "1/square"])(*args, **kwargs)
    expected_y, expected = jlf.capture(lambda a, b: b(a(X)))(a, b)
    chex.assert_trees_all_equal((y, losses), (expected_y, expected))
    assert set(losses.losses) == {
        f"{n}/{k}" for n in ("0/layers/0", "0/layers/1", "1") for k in ("square", "masked")
    }
    for module in (a, b):
        assert not any(hasattr(m, "__captures__") for _, m in nnx.iter_modules(module))


@pytest.mark.parametrize(
    "ways", [lambda a: (a, a), lambda a: ([a], {"a": a}), lambda a: (Bundle(a, a), a.__call__)]
)
def test_nnx_module_given_twice_is_one_module(ways):
    a = Layers()
    expected = jlf.capture(a)(X)[1]
    chex.assert_trees_all_equal(jlf.capture(lambda *_: a(X))(*ways(a))[1], expected)


def test_nnx_other_arguments_are_left_alone():
    model = Layers()
    expected = jlf.capture(model)(X)
    for other in (
        {1: X, "a": X},
        {"a": {1: 2, None: 3}},
        Bundle,
        jnp.sum,
        "a",
        nnx.Rngs(0),
        model.layers[0].kernel,
    ):
        found = jlf.capture(lambda model, x, other, **_: model(x))(model, X, other, option=other)
        chex.assert_trees_all_equal(found, expected)
    with pytest.raises(ValueError, match="Layer sows 'square' within capture"):
        jlf.capture(lambda model, others: others[1](model(X)))(model, {1: Layer(), "a": 2})


def test_nnx_dataclass_may_refer_to_itself():
    bundle = Bundle(Layers(), None)
    bundle.others = [bundle]
    losses = jlf.capture(lambda bundle: bundle.others[0].a(X))(bundle)[1]
    chex.assert_trees_all_equal(losses, jlf.capture(bundle.a)(X)[1])


GLOBAL = Layer()


def test_nnx_losses_that_capture_cannot_see_are_refused():
    """Not those of modules that sow nothing, whatever a function closes over."""
    model, other, silent = Layers(), Layer(), nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    class Plain:
        layer = other

    class Method:
        def method(self, model):
            return other(model(X))

    expected = jlf.capture(lambda model: silent(model(X)))(model)[1]
    chex.assert_trees_all_equal(expected, jlf.capture(model)(X)[1])
    for fn in (
        lambda model: other(model(X)),
        lambda model: GLOBAL(model(X)),
        lambda model, plain=Plain: plain.layer(model(X)),
        lambda model: Layer()(model(X)),
        lambda model: nnx.jit(lambda: other(X))(),
        lambda model: jax.tree.map(lambda _: other(X), [1]),
        Method().method,
    ):
        with pytest.raises(
            ValueError, match=r"module Layer sows 'square' within capture.*argument"
        ):
            jlf.capture(fn)(model)
        jlf.capture(model)(X)
    # Within a capture another one may run; outside of all, nothing happens.
    both = jlf.capture(lambda model: jlf.capture(other)(model(X))[1])(model)
    assert set(both[0].losses) == {"square", "masked"}
    assert set(both[1].losses) == set(expected.losses)
    other(X)


def test_linen_capture_takes_a_partial():
    variables = Encoder().init(jax.random.key(0), X)
    expected = jlf.capture(Encoder().apply)(variables, X)
    for fn, args in (
        (functools.partial(Encoder().apply), (variables, X)),
        (functools.partial(Encoder().apply, variables), (X,)),
        (functools.partial(Encoder().apply, mutable=False), (variables, X)),
    ):
        chex.assert_trees_all_equal(jlf.capture(fn)(*args), expected)


def test_nnx_capture_leaves_nothing_on_a_module_when_it_fails():
    model = Layers()
    before = nnx.state(model)

    def fails(model, x):
        model(x)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        jlf.capture(fails)(model, X)
    chex.assert_trees_all_equal(nnx.state(model), before)
    assert not any(hasattr(m, "__captures__") for _, m in nnx.iter_modules(model))
    jlf.capture(model)(X)


def test_nnx_capture_within_a_capture_is_refused():
    model = Layers()

    def nested(model, x):
        return jlf.capture(model.layers[0])(x)

    for capture in (jlf.capture(nested), nnx.capture(nested, nnx.Intermediate)):
        with pytest.raises(ValueError, match="Layer is being captured already"):
            capture(model, X)


def test_nnx_capture_of_flax_itself_can_be_collected():
    model = Layers()
    _, *states = nnx.capture(model, *VARIABLES)(X)
    chex.assert_trees_all_equal(jlf.collect(nnx.merge_state(*states)), jlf.capture(model)(X)[1])
    # nnx.pop also finds subclasses, nnx.capture does not. So neither is a subclass of the other.
    assert jlf.Loss.__mro__[1] is nnx.Variable
    assert jlf.RegularizationLoss.__mro__[1] is nnx.Variable


def test_a_missing_expected_loss_is_an_error():
    model = Layers()
    jlf.capture(model, expected=["layers/0/square", "layers/1/l2"])(X)
    with pytest.raises(ValueError, match=r"\['layer/0/square'\] were not sown.*layers/0/square"):
        jlf.capture(model, expected=["layer/0/square"])(X)
    for wrong in ("layers/0/square", 3):
        with pytest.raises(ValueError, match="expected must be names"):
            jlf.capture(model, expected=wrong)
    captured = jlf.capture(model, expected=(name for name in ["nowhere"]))
    for _ in range(2):
        with pytest.raises(ValueError, match="nowhere"):
            captured(X)


@pytest.mark.parametrize("state", [None, (X, {}), [1], X])
def test_what_is_not_a_state_is_refused(state):
    with pytest.raises(ValueError, match="state must be"):
        jlf.collect(state)


def test_bad_modules_names_and_values_are_refused():
    with pytest.raises(ValueError, match="module must be a Flax module, got int"):
        jlf.sow_loss(3, "aux", 1.0)

    class Bad(nnx.Module):
        def __init__(self, name, value):
            self.layer, self.name, self.value = Layer(), name, value

        def __call__(self):
            jlf.sow_loss(self, self.name, self.value)

    for name, value, message in (
        ("layer", 1.0, "'layer' is taken"),
        ("aux", "1", "aux must be"),
        ("", 1.0, "name must be"),
        ("a/b", 1.0, "name must be"),
        (3, 1.0, "name must be"),
        (None, 1.0, "name must be"),
    ):
        with pytest.raises(ValueError, match=message):
            jlf.capture(Bad(name, value))()

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(2, name="dense")(x)
            jlf.sow_loss(self, "dense", 1.0)

    with pytest.raises(ValueError, match='Duplicate use of scope name: "dense"'):
        applied(Linen(), {"params": {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}})

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("losses", "aux", 1.0)
            jlf.sow_loss(self, "aux", 1.0)

    with pytest.raises(ValueError, match="its own sow"):
        applied(Both(), {})


def test_one_name_for_a_loss_and_a_regularization_loss_is_refused():
    class Nnx(nnx.Module):
        def __call__(self):
            jlf.sow_loss(self, "aux", 1.0)
            jlf.sow_loss(self, "aux", 10.0, regularization=True)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            Nnx.__call__(self)

    for sows, arguments in ((Nnx(), ()), (Linen().apply, ({}, X))):
        with pytest.raises(ValueError, match="'aux' is taken"):
            jlf.capture(sows)(*arguments)


def test_linen_capture_does_not_collect_losses_of_an_earlier_apply():
    class Sometimes(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            if train:
                jlf.sow_loss(self, "aux", 100.0)

    _, state = Sometimes().apply({}, X, True, mutable=COLLECTIONS)
    assert jlf.capture(Sometimes().apply)(state, X, False)[1].losses == {}


STATES = {
    "mean": jl.WeightedMean(jnp.float32(3), jnp.float32(2)),
    "mean with axes": jl.WeightedMean(jnp.arange(3.0), jnp.ones(3)),
    "empty": jl.LossCollector(),
    "collector": jl.LossCollector()
    .add_loss("encoder/xent", jl.WeightedMean(jnp.arange(3.0), jnp.ones(3)))
    .add_loss("a", 2.0)
    .add_regularization_loss("kernel$", 0.5)
    .add_metric("accuracy", 0.5),
}


@pytest.mark.parametrize("name", STATES)
def test_flax_saves_and_restores_the_pytrees(name):
    class TrainState(train_state_lib.TrainState):
        losses: object

    train_state = functools.partial(
        TrainState.create, apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1)
    )
    value = STATES[name]
    zeros = jax.tree.map(jnp.zeros_like, value)
    for saved, target in (
        (value, zeros),
        ({"a": [value]}, {"a": [zeros]}),
        (train_state(losses=value), train_state(losses=zeros)),
    ):
        restored = serialization.from_bytes(target, serialization.to_bytes(saved))
        assert jax.tree.structure(restored) == jax.tree.structure(saved)
        chex.assert_trees_all_equal(restored, saved)
        state = serialization.to_state_dict(saved)
        chex.assert_trees_all_equal(serialization.from_state_dict(target, state), saved)
    assert not any(key.startswith("_") for key in serialization.to_state_dict(value))


def test_flax_restores_no_losses_of_other_names():
    losses = jl.LossCollector().add_loss("a", 1.0)
    state = serialization.to_state_dict(losses)
    for target in (jl.LossCollector(), losses.add_loss("b", 1.0), losses.losses["a"]):
        with pytest.raises(ValueError, match=r"must have the names of the saved state.*at losses"):
            serialization.from_state_dict(target, state, name="losses")
    with pytest.raises(ValueError, match="must have the names of the saved state"):
        serialization.from_state_dict(losses, {"losses": state["losses"]})


def test_variables_with_sown_losses_are_saved_and_exported():
    model = Twice()
    variables = model.init(jax.random.key(0), X)

    @jax.jit
    def run(variables, x):
        return model.apply(variables, x, mutable=COLLECTIONS)[1]

    sown = run(variables, X)
    expected = jlf.collect(sown)
    blank = jax.tree.map(jnp.zeros_like, sown)
    restored = serialization.from_bytes(blank, serialization.to_bytes(sown))
    exported = jax.export.export(run)(variables, X)
    reloaded = jax.export.deserialize(exported.serialize())
    for found in (restored, reloaded.call(variables, X)):
        chex.assert_trees_all_equal(jlf.collect(found), expected)
        # They are of an earlier run, which the next one replaces.
        again = run({**variables, **found}, X)
        chex.assert_trees_all_equal(jlf.collect(again), expected)
    with pytest.raises(ValueError, match="must be a dictionary, got 5"):
        serialization.from_state_dict(expected, 5)
