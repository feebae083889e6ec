"""Microbatches and padded batches give what the whole batch gives."""

import collections
import copy
import dataclasses
import functools
import pickle
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlosses as jl
import jaxlosses.flax as jlf

ROWS = 24


def draw(rows=ROWS, seed=0):
    """Inputs, class ids, weights that are often zero, and targets whose first half is absent."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 5)).astype(np.float32)
    ids = rng.integers(0, 3, rows).astype(np.int32)
    mask = (rng.random(rows) * (rng.random(rows) > 0.5)).astype(np.float32)
    targets = rng.normal(size=(rows, 6)).astype(np.float32)
    targets[: rows // 2] = np.nan
    return {"x": x, "ids": ids, "mask": mask, "targets": targets}


PARAMS = {
    name: np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for name, shape in {"a": (5, 6), "b": (6, 3)}.items()
}


def loss_fn(params, batch):
    """Every kind of term: masked, per element, an array, a scalar, and regularization."""
    hidden = jnp.tanh(batch["x"] @ params["a"])
    targets = batch["targets"]
    xent = jl.sparse_softmax_cross_entropy(
        hidden @ params["b"], batch["ids"], batch["mask"], reduction="parts"
    )
    known = jnp.isfinite(targets)
    error = jl.mean_squared_error(hidden, targets, known, reduction="parts")
    losses = jl.LossCollector().add_loss("xent", xent).add_loss("error", error)
    losses = losses.add_loss("activity", 0.1 * jnp.square(hidden))
    losses = losses.add_loss("scalar", jl.WeightedMean(jnp.mean(hidden**3), 1))
    return losses.regularize(params, {"a": jl.l2_regularizer(0.1)})


@jax.jit
def whole(params, batch):
    def total(params):
        losses = loss_fn(params, batch)
        return losses.get_total_loss(), losses

    return jax.value_and_grad(total, has_aux=True)(params)


def assert_agree(found, expected):
    """Compare values and gradients, but no counts: some count once in each microbatch."""
    (total, losses), grads = jax.device_get(found)
    (whole_total, whole_losses), whole_grads = jax.device_get(expected)
    chex.assert_trees_all_close(grads, whole_grads, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(total, whole_total, rtol=1e-5)
    chex.assert_trees_all_close(losses.to_dict(), whole_losses.to_dict(), rtol=1e-5)


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 8, ROWS])
def test_microbatches_give_the_gradient_of_the_whole_batch(num_microbatches):
    batch = draw()
    step = jax.jit(
        chex.assert_max_traces(jl.accumulate_value_and_grad(loss_fn, num_microbatches), n=1)
    )
    chex.clear_trace_counter()
    assert_agree(step(PARAMS, batch), whole(PARAMS, batch))
    other = draw(seed=1)
    assert_agree(step(PARAMS, other), whole(PARAMS, other))


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_outside_of_jit_they_give_the_same(num_microbatches):
    batch = draw()
    found = jl.accumulate_value_and_grad(loss_fn, num_microbatches)(PARAMS, batch)
    assert_agree(found, whole(PARAMS, batch))


def test_where_nothing_counts_the_gradient_is_finite():
    batch = draw() | {"mask": np.zeros(ROWS, np.float32)}
    batch["targets"][:] = np.nan
    (total, losses), grads = jl.accumulate_value_and_grad(loss_fn, 4)(PARAMS, batch)
    chex.assert_tree_all_finite((total, grads))
    assert losses.get_losses()["xent"] == 0
    assert_agree(((total, losses), grads), whole(PARAMS, batch))


def num_products(program):
    """How many matrix products a compiled program has."""
    return len(re.findall(r" (?:dot|convolution)\(", program.as_text()))


def mean_of(params, batch, *, model, reduction="parts", weights=None):
    """A loss of class ids whose weights are data, unless others are given."""
    logits = model(params, batch["x"])
    mask = batch["mask"] if weights is None else weights(logits)
    return jl.sparse_softmax_cross_entropy(logits, batch["ids"], mask, reduction=reduction)


def deep(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def scanned(params, x):
    """Four layers of one scan."""
    layers = jnp.stack([params["a"] @ params["a"].T] * 4)
    x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, layers)
    return deep(params, x)


lifted = jl.weighted(optax.softmax_cross_entropy_with_integer_labels)
MEANS_OF_DATA = {
    "deep": functools.partial(mean_of, model=deep),
    "checkpointed": functools.partial(mean_of, model=jax.checkpoint(deep)),
    "scanned": functools.partial(mean_of, model=scanned),
    "jitted": jax.jit(functools.partial(mean_of, model=deep)),
    "averaged": functools.partial(mean_of, model=deep, reduction="average_parts"),
    "lifted": lambda p, b: lifted(deep(p, b["x"]), b["ids"], b["mask"], reduction="parts"),
    "average lifted": lambda p, b: lifted(
        deep(p, b["x"]), b["ids"], b["mask"], reduction="average_parts"
    ),
    "last layer": lambda p, b: jl.linear_softmax_cross_entropy(
        jnp.tanh(b["x"] @ p["a"]), p["b"], b["ids"], b["mask"], reduction="parts"
    ),
    "sequences": lambda p, b: jax.vmap(
        lambda x, ids, mask: mean_of(p, {"x": x, "ids": ids, "mask": mask}, model=deep)
    )(*(jnp.stack([b[k]] * 2, 1) for k in ("x", "ids", "mask"))).macro(),
    "segments": lambda p, b: jl.segment_means(
        mean_of(p, b, model=deep, reduction="none"), b["ids"], 3, b["mask"]
    ),
    "coefficient": lambda p, b: p["b"][0, 0] * mean_of(p, b, model=deep) / 2,
    "captured": lambda p, b: jlf.capture(Sows().apply)({"params": p}, b)[1].losses["xent"],
}


class Sows(nn.Module):
    def __call__(self, batch):
        params = self.variables["params"]
        jlf.sow_loss(self, "xent", mean_of(params, batch, model=deep))


def products_of_programs_that_agree(loss_fn):
    """How many products the programs of microbatches and of the whole batch have."""
    batch = draw()
    accumulate = jax.jit(jl.accumulate_value_and_grad(loss_fn, 4))
    program = accumulate.lower(PARAMS, batch).compile()
    whole = jax.jit(jax.value_and_grad(lambda *a: loss_fn(*a).get_total_loss()))
    whole_program = whole.lower(PARAMS, batch).compile()
    ((total, _), grads), expected = program(PARAMS, batch), whole_program(PARAMS, batch)
    chex.assert_trees_all_close((total, grads), expected, rtol=1e-5, atol=1e-6)
    return num_products(program), num_products(whole_program)


@pytest.mark.parametrize("name", MEANS_OF_DATA)
def test_the_scan_for_counts_has_no_model(name):
    """These counts depend on data, so the compiler removes the model from this scan."""

    def loss_fn(params, batch):
        return jl.LossCollector().add_loss("loss", MEANS_OF_DATA[name](params, batch))

    products, of_whole = products_of_programs_that_agree(loss_fn)
    assert products == of_whole > 0


def test_the_scan_for_counts_has_the_model_where_they_depend_on_it():
    def loss_fn(params, batch):
        def confidence(logits):
            return jax.nn.sigmoid(logits[:, 0])

        mean = mean_of(params, batch, model=deep, reduction="average_parts", weights=confidence)
        return jl.LossCollector().add_loss("confident", mean)

    products, of_whole = products_of_programs_that_agree(loss_fn)
    forward = jax.jit(loss_fn).lower(PARAMS, draw()).compile()
    assert products == of_whole + num_products(forward)


def test_scalars_that_modules_sow_are_refused():
    """Through capture too, and if Flax's own sow left them; regularization is not concerned."""

    class Router(nn.Module):
        way: str

        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, ())
            value = jnp.mean(w * x)
            if self.way == "flax":
                self.sow("losses", "balance", value)
            elif self.way == "metric":
                jlf.sow_metric(self, "balance", value)
            elif self.way == "meant":
                jlf.sow_loss(self, "balance", jl.WeightedMean(value, 1))
            else:
                regularization = self.way == "regularization"
                jlf.sow_loss(self, "balance", value, regularization=regularization)
            return x

    class Nnx(nnx.Module):
        def __call__(self, x):
            jlf.sow_loss(self, "balance", jnp.mean(x))

    def step(way):
        apply = Router(way).apply if way != "nnx" else lambda v, x: Nnx()(v["params"]["w"] * x)

        def loss_fn(params, x):
            if way == "nnx":
                return jlf.capture(lambda m: m(params["w"] * x))(Nnx())[1]
            return jlf.capture(apply)({"params": params}, x)[1]

        return jl.accumulate_value_and_grad(loss_fn, 2)({"w": jnp.float32(2)}, X)

    for way in ("scalar", "flax", "metric", "nnx"):
        with pytest.raises(ValueError, match=r"balance must be undivided .*got a scalar"):
            step(way)
    for way in ("meant", "regularization"):
        (total, _), _ = step(way)
        assert total == 7


def test_batch_statistics_and_dropout_of_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(6)(x))
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x))

    model, batch, key = Net(), draw(), jax.random.key(1)
    variables = jax.jit(model.init)({"params": key, "dropout": key}, batch["x"])

    def apply(params, batch, key):
        variables_now = {"params": params, "batch_stats": variables["batch_stats"]}
        return model.apply(variables_now, batch["x"], mutable="batch_stats", rngs={"dropout": key})

    check_state_and_keys(apply, variables["params"], variables["batch_stats"], batch)


def test_batch_statistics_and_dropout_of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(self.norm(self.first(x))))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def apply(params, batch, key):
        model = nnx.merge(graph, params, rest, copy=True)
        nnx.reseed(model, default=key)
        return model(batch["x"]), {"batch_stats": nnx.state(model, nnx.BatchStat)}

    check_state_and_keys(apply, params, nnx.filter_state(rest, nnx.BatchStat), draw())


def check_state_and_keys(apply, params, state, batch):
    """One step of the running averages from all microbatches, each with a mask of its own."""

    def loss_fn(params, batch, key):
        logits, new = apply(params, batch, key)
        xent = jl.sparse_softmax_cross_entropy(
            logits, batch["ids"], batch["mask"], reduction="parts"
        )
        return jl.LossCollector().add_loss("xent", xent), new["batch_stats"]

    key, n = jax.random.key(3), 4
    step = jax.jit(jl.accumulate_value_and_grad(loss_fn, n, has_aux=True))
    (total, (_, stacked)), grads = step(params, batch, key=key)

    def cut(leaf):
        return np.stack([leaf[i::n] for i in range(n)])

    def side_by_side(params):
        rows = jax.tree.map(cut, batch)
        losses, states = jax.vmap(loss_fn, (None, 0, 0))(params, rows, jax.random.split(key, n))
        return jax.tree.map(lambda x: x.sum(0), losses).get_total_loss(), states

    (expected, states), expected_grads = jax.jit(jax.value_and_grad(side_by_side, has_aux=True))(
        params
    )
    chex.assert_trees_all_close((total, grads), (expected, expected_grads), rtol=1e-5, atol=1e-6)
    mean, expected_mean = (jax.tree.map(lambda x: np.mean(x, 0), x) for x in (stacked, states))
    chex.assert_trees_all_close(mean, expected_mean, rtol=1e-5)
    assert jax.tree.structure(mean) == jax.tree.structure(state)
    assert not np.allclose(jax.tree.leaves(mean)[0], jax.tree.leaves(state)[0])
    others = step(params, batch, key=jax.random.key(4))
    assert others[0][0] != total
    for wrong in (3, KEYS, jnp.ones(2), "a", np.zeros(2, np.uint32)):
        with pytest.raises(ValueError, match="key must be a single key"):
            jl.accumulate_value_and_grad(loss_fn, n, has_aux=True)(params, batch, key=wrong)


def test_aux_is_stacked():
    def with_aux(params, batch):
        return loss_fn(params, batch), {"first": batch["x"][0, 0], "rows": batch["x"].shape[0]}

    batch = draw()
    accumulate = jl.accumulate_value_and_grad(with_aux, 4, has_aux=True)
    (total, (losses, aux)), grads = accumulate(PARAMS, batch)
    assert_agree(((total, losses), grads), whole(PARAMS, batch))
    np.testing.assert_array_equal(aux["first"], batch["x"][:4, 0])  # Microbatch i starts at row i.
    np.testing.assert_array_equal(aux["rows"], [6] * 4)


def test_a_checkpointed_loss_gives_the_same():
    batch = draw()
    assert_agree(
        jl.accumulate_value_and_grad(jax.checkpoint(loss_fn), 4)(PARAMS, batch),
        whole(PARAMS, batch),
    )


def test_gradients_of_an_nnx_state_are_an_nnx_state():
    graph, state = nnx.split(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))

    def nnx_loss(state, batch):
        logits = nnx.merge(graph, state)(batch["x"])
        xent = jl.sparse_softmax_cross_entropy(
            logits, batch["ids"], batch["mask"], reduction="parts"
        )
        return jl.LossCollector().add_loss("xent", xent)

    batch = draw()
    _, grads = jax.jit(jl.accumulate_value_and_grad(nnx_loss, 4))(state, batch)
    expected = jax.jit(jax.grad(lambda state: nnx_loss(state, batch).get_total_loss()))(state)
    assert jax.tree.structure(grads) == jax.tree.structure(state)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_low_precision_is_summed_in_float32():
    params = jnp.ones((), jnp.bfloat16)
    batch = jnp.ones((512, 1), jnp.bfloat16)

    def linear(w, batch):
        return jl.LossCollector().add_loss("mean", w * batch)

    # In bfloat16 the sum would stop at a half, where one more 1/512 is rounded away.
    _, grad = jl.accumulate_value_and_grad(linear, 512)(params, batch)
    assert grad == 1
    assert grad.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_sharded_batch_is_cut_without_moving_a_row(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    batch = draw()
    accumulate = jax.jit(jl.accumulate_value_and_grad(loss_fn, 3))
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
        compiled = accumulate.lower(params, placed).compile()
        assert_agree(compiled(params, placed), whole(PARAMS, batch))
        text = compiled.as_text()
        assert "all-gather" not in text
        assert "all-to-all" not in text


def test_members_of_an_axis_agree_with_the_whole():
    def local(params, batch):
        return jl.accumulate_value_and_grad(lambda *a: loss_fn(*a).psum("data"), 3)(params, batch)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(), PartitionSpec("data"))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    batch = draw()
    assert_agree(jax.jit(mapped)(PARAMS, batch), whole(PARAMS, batch))


@pytest.mark.parametrize(
    ("num_microbatches", "batch", "message"),
    [
        (5, draw(), "multiple of num_microbatches=5, got 24 rows"),
        (2, {"a": np.ones(4), "b": np.ones(2)}, r"'b'\]\": \(2,\)"),
        (2, {"a": np.ones(4), "b": np.ones(())}, "leading axes of the same length"),
        (2, {}, "leading axes of the same length"),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(num_microbatches, batch, message):
    with pytest.raises(ValueError, match=message):
        jl.accumulate_value_and_grad(loss_fn, num_microbatches)(PARAMS, batch)


def test_arguments_are_checked():
    for wrong in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match=f"num_microbatches.*{wrong}"):
            jl.accumulate_value_and_grad(loss_fn, wrong)
    for wrong in (None, 3, jl.LossCollector()):
        with pytest.raises(ValueError, match="loss_fn must be a function"):
            jl.accumulate_value_and_grad(wrong, 2)
    with pytest.raises(ValueError, match="loss_fn must return a LossCollector"):
        jl.accumulate_value_and_grad(lambda p, b: jnp.sum(b), 2)(PARAMS, jnp.ones(4))
    with pytest.raises(ValueError, match="loss_fn must return a pair"):
        jl.accumulate_value_and_grad(loss_fn, 2, has_aux=True)(PARAMS, draw())
    for aux, message in (((1, 2), "got tuple of length 3"), (({"a": "b"},), r"aux\['a'\].*str")):
        step = jl.accumulate_value_and_grad(
            lambda p, b, aux=aux: (jl.LossCollector(), *aux), 2, has_aux=True
        )
        with pytest.raises(ValueError, match=message):
            step(PARAMS, draw())
    accumulate = jl.accumulate_value_and_grad(loss_fn, 2)
    for arguments, options in (((), {}), ((1.0,), {}), ((1.0, X, 3), {}), ((1.0, X), {"aux": 1})):
        with pytest.raises(TypeError, match=r"^accumulate_value_and_grad\(loss_fn, 2\) was called"):
            accumulate(*arguments, **options)


X = jnp.arange(8.0)
KEYS = jax.random.split(jax.random.key(0), 8)


def noisy(w, batch):
    """Each row has a key of its own."""
    keys, x = batch["keys"], batch["x"]
    noise = jax.vmap(jax.random.normal)(keys)
    return jl.LossCollector().add_loss(
        "noisy", jl.mean_squared_error(w * x, noise, x > 2, reduction="parts")
    )


def test_a_batch_may_hold_keys():
    batch = {"keys": KEYS, "x": X}
    step = jl.accumulate_value_and_grad(noisy, 4)
    expected = jax.jit(jax.value_and_grad(lambda w: noisy(w, batch).get_total_loss()))(2.0)
    for found in (step(2.0, batch), jax.jit(step)(2.0, batch)):
        chex.assert_trees_all_close((found[0][0], found[1]), expected, rtol=1e-6)
    seen = jl.accumulate_value_and_grad(lambda w, keys: (jl.LossCollector(), keys), 4, has_aux=True)
    (_, (_, keys)), _ = seen(2.0, KEYS)
    assert (keys.swapaxes(0, 1).ravel() == KEYS).all()


@pytest.mark.parametrize(
    "leaf", [np.array(["a", "b"]), np.array([None, 1]), "ab", np.array(["2020", "2021"], "M8[Y]")]
)
def test_batches_of_other_things_are_refused(leaf):
    batch = {"x": np.ones(2), "text": [leaf]}
    for function in (jl.accumulate_value_and_grad(loss_fn, 2), jl.pad_batch):
        with pytest.raises(ValueError, match=r"batch\['text'\]\[0\] must be an array of numbers"):
            function({}, batch) if function is not jl.pad_batch else function(batch, 4)
    with pytest.raises(ValueError, match=r"batch\['keys'\].*to be padded, got dtype key"):
        jl.pad_batch({"keys": KEYS}, 16)


@dataclasses.dataclass
class Layer:
    weight: object
    state: object


jax.tree_util.register_dataclass(Layer)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.array(3), "floating-point to have a gradient, got dtype int32"),
        (3, "floating-point to have a gradient, got dtype int32"),
        (True, "floating-point to have a gradient, got dtype bool"),
        (KEYS, "real, got dtype key"),
        (jnp.ones(2, jnp.complex64), "real, got dtype complex64"),
        (1j, "real, got dtype complex128"),
        ("a", "an array or a number, got str"),
        (jnp.sum, "an array or a number"),
    ],
)
def test_parameters_without_a_gradient_are_refused_by_name(leaf, message):
    params = {"layers": [Layer(jnp.ones(2), leaf)]}
    step = jl.accumulate_value_and_grad(loss_fn, 2)
    with pytest.raises(ValueError, match=rf"params\['layers'\]\[0\]\.state must be {message}"):
        step(params, X)


Pair = collections.namedtuple("Pair", ("x", "y"))
CONTAINERS = {
    "array": lambda x: x,
    "tuple": lambda x: (x, None, x),
    "list": lambda x: [x, [x]],
    "dict": lambda x: {"b": x, "a": {}, "c": {"value": x}},
    "namedtuple": lambda x: Pair(x, (x,)),
    "dataclass": lambda x: Layer(x, {"a": x, "none": None}),
    "variable": lambda x: nnx.Param(x),
    "state": lambda x: nnx.State({"a": nnx.Param(x)}),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_parameters_and_batches_are_any_pytrees(container):
    params = CONTAINERS[container](np.float32(2))
    batch = CONTAINERS[container](np.arange(8, dtype=np.float32).reshape(4, 2))

    def mean(params, batch):
        ws, xs = jax.tree.leaves(params), jax.tree.leaves(batch)
        losses = jl.LossCollector().add_loss("all", sum(w * x for w in ws for x in xs))
        return losses.regularize(params, {"^|.": jl.l2_regularizer(1.0)})

    (value, _), grads = jax.jit(jl.accumulate_value_and_grad(mean, 2))(params, batch)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    # The mean is that of w * x for every pair of leaves, and x is 3.5 in the mean.
    num_leaves = len(jax.tree.leaves(params))
    np.testing.assert_allclose(value, num_leaves**2 * 2 * 3.5 + num_leaves * 2**2 / 2, rtol=1e-6)
    for gradient in jax.tree.leaves(grads):
        np.testing.assert_allclose(gradient, num_leaves * 3.5 + 2, rtol=1e-6)
    padded, present = jl.pad_batch(batch, 6)
    assert jax.tree.structure(padded) == jax.tree.structure(batch)
    for leaf in jax.tree.leaves(padded):
        np.testing.assert_array_equal(leaf[present], jax.tree.leaves(batch)[0])
        assert not leaf[4:].any()


def test_an_accumulation_can_be_pickled():
    step = jl.accumulate_value_and_grad(loss_fn, 4)
    batch = draw()
    expected = step(PARAMS, batch)
    for same in (pickle.loads(pickle.dumps(step)), copy.deepcopy(step)):
        chex.assert_trees_all_equal(same(PARAMS, batch), expected)
        assert repr(same) == repr(step) == "accumulate_value_and_grad(loss_fn, 4)"
    aux = jl.accumulate_value_and_grad(loss_fn, 4, has_aux=True)
    assert repr(aux) == "accumulate_value_and_grad(loss_fn, 4, has_aux=True)"


def test_a_loss_may_have_an_axis_of_layers_but_not_of_rows():
    """Each layer has a mean over the whole batch. A row is in one microbatch only."""

    def layers(w, batch):
        means = jax.vmap(
            lambda scale: jl.compute_weighted_loss(scale * w * batch, reduction="parts")
        )
        return jl.LossCollector().add_loss("layers", means(jnp.arange(3.0)))

    (total, losses), grad = jl.accumulate_value_and_grad(layers, 4)(2.0, jnp.arange(8.0))
    np.testing.assert_allclose(losses.get_losses()["layers"], 7 * jnp.arange(3.0))
    assert (total, grad) == (21, 10.5)

    def examples(w, batch):
        return jax.vmap(lambda x: jl.LossCollector().add_loss("row", jl.WeightedMean(w * x, 1)))(
            batch
        )

    with pytest.raises(
        ValueError, match=r"row must not have an axis over the rows.*\(2,\).*\(8,\)"
    ):
        jl.accumulate_value_and_grad(examples, 4)(2.0, jnp.arange(8.0))


def test_the_gradient_is_right_where_a_mean_of_means_is_wrong():
    """``optax.MultiSteps`` takes such a mean; here microbatches count different numbers of rows."""
    batch, k = draw(), 4

    def mean(params, batch):
        logits = jnp.tanh(batch["x"] @ params["a"]) @ params["b"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["ids"])
        present = (batch["mask"] > 0).astype(jnp.float32)
        return jnp.sum(losses * present) / jnp.sum(present)

    def parts(params, batch):
        logits = jnp.tanh(batch["x"] @ params["a"]) @ params["b"]
        present = batch["mask"] > 0
        xent = jl.sparse_softmax_cross_entropy(logits, batch["ids"], present, reduction="parts")
        return jl.LossCollector().add_loss("xent", xent)

    full = jax.jit(jax.grad(mean))(PARAMS, batch)
    multi_steps = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=k)

    @jax.jit
    def step(params, state, microbatch):
        updates, state = multi_steps.update(jax.grad(mean)(PARAMS, microbatch), state)
        return optax.apply_updates(params, updates), state

    state, params = jax.jit(multi_steps.init)(PARAMS), PARAMS
    for i in range(k):
        microbatch = jax.tree.map(lambda leaf, i=i: leaf[i::k], batch)
        with jax.numpy_dtype_promotion("standard"):
            params, state = step(params, state, microbatch)
    of_optax = jax.tree.map(lambda old, new: old - np.asarray(new), PARAMS, params)
    _, exact = jax.jit(jl.accumulate_value_and_grad(parts, k))(PARAMS, batch)
    chex.assert_trees_all_close(exact, full, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(of_optax, full, rtol=0.1)


def test_padded_batches_add_up_to_the_mean_of_a_dataset():
    data, size = draw(rows=22), 8

    @jax.jit
    @chex.assert_max_traces(n=1)
    def evaluate(batch, present):
        logits = jnp.tanh(batch["x"] @ PARAMS["a"]) @ PARAMS["b"]
        weights = jnp.where(present, batch["mask"], 0)
        xent = jl.sparse_softmax_cross_entropy(logits, batch["ids"], weights, reduction="parts")
        return jl.LossCollector().add_loss("xent", xent)

    chex.clear_trace_counter()
    batches = [
        jl.pad_batch(jax.tree.map(lambda leaf, i=i: leaf[i : i + size], data), size)
        for i in range(0, 22, size)
    ]
    pooled = sum(evaluate(*batch) for batch in batches)
    expected = jax.jit(lambda: loss_fn(PARAMS, data).losses["xent"])()
    chex.assert_trees_all_close(pooled.losses["xent"], expected, rtol=1e-6)

    def add(total, batch):
        return total + evaluate(*batch), None

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    start = jax.tree.map(np.zeros_like, jax.device_get(pooled))
    chex.clear_trace_counter()
    scanned, _ = jax.lax.scan(add, start, stacked)
    chex.assert_trees_all_close(scanned, pooled, rtol=1e-6)


def test_pad_batch_adds_rows_that_are_not_present():
    batch, present = jl.pad_batch({"a": np.ones((2, 3)), "b": jnp.ones(2)}, 4)
    assert isinstance(batch["a"], np.ndarray)
    assert isinstance(batch["b"], jax.Array)
    np.testing.assert_array_equal(batch["a"], [[1] * 3] * 2 + [[0] * 3] * 2)
    np.testing.assert_array_equal(present, [True, True, False, False])
    same, present = jl.pad_batch(np.ones(4), 4)
    assert present.all()
    np.testing.assert_array_equal(same, np.ones(4))
    with pytest.raises(ValueError, match="size must be at least the batch's 4 rows, got 3"):
        jl.pad_batch(np.ones(4), 3)
    with pytest.raises(ValueError, match="size must be an integer"):
        jl.pad_batch(np.ones(4), 8.0)
    with pytest.raises(ValueError, match="leading axes of the same length"):
        jl.pad_batch([np.ones(4), np.ones(3)], 5)


def test_integers_that_jax_would_cut_are_refused():
    """2**32 would become class 0."""
    batch = {"logits": np.zeros((4, 3), np.float32), "labels": np.array([0, 1, 2, 2**32])}

    def loss_fn(scale, batch):
        logits = scale * batch["logits"]
        xent = jl.sparse_softmax_cross_entropy(logits, batch["labels"], reduction="parts")
        return jl.LossCollector().add_loss("xent", xent)

    step = jl.accumulate_value_and_grad(loss_fn, 2)
    with pytest.raises(ValueError, match=r"labels.*4294967296"):
        jax.jit(lambda w: step(w, batch))(jnp.float32(1))
    batch["labels"] %= 3
    expected = step(jnp.float32(1), batch)
    assert jnp.isfinite(expected[0][0])
    # JAX makes tracers of the batch that the function closes over.
    found = jax.jit(lambda w: step(w, batch))(jnp.float32(1))
    chex.assert_trees_all_close(found, expected)
    _, (total, _) = jax.jit(checkify.checkify(lambda w: step(w, batch)[0]))(jnp.float32(1))
    chex.assert_trees_all_close(total, expected[0][0])
    batch["labels"] += 3
    error, _ = checkify.checkify(lambda w: step(w, batch)[0])(jnp.float32(1))
    assert "labels must be in [0, 3) where they count, got 5" in error.get()
