"""Small programs with the libraries that people use beside this one."""

import pickle
import re
import struct
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxlosses as jl
import jaxlosses.flax as jlf

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))
Y = jnp.where(jnp.arange(8) < 6, X @ jnp.arange(4.0), jnp.nan)  # Two labels are missing.
BATCH = X, Y, jnp.isfinite(Y)


def collector():
    means = {
        "xent": jl.WeightedMean(jnp.float32(6.0), jnp.float32(4.0)),
        "layers": jl.WeightedMean(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])),
    }
    losses = jl.LossCollector().add_metric("accuracy", jl.WeightedMean(3.0, 4.0))
    for name, mean in means.items():
        losses = losses.add_loss(name, mean)
    return losses.add_regularization_loss("l2", 0.25)


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def squared_error(predict):
    def loss_fn(params, batch):
        x, y, known = batch
        error = jl.mean_squared_error(predict(params, x), y, known, reduction="parts")
        return jl.LossCollector().add_loss("error", error)

    return loss_fn


def linear(params, x):
    return x @ params["kernel"]


def code_of_page(name, first_line):
    """The code block of a page that begins with a line."""
    page = Path(__file__).parents[2] / ".github" / "docs" / name
    if not page.exists():
        pytest.skip("the pages are not here, only the tests")
    (code,) = re.findall(rf"^```python\n({first_line}.+?)^```", page.read_text(), re.M | re.S)
    return code


# Checkpoints.


@pytest.mark.parametrize("value", [collector(), jl.WeightedMean(jnp.float32(6), jnp.float32(4))])
def test_orbax_restores_with_a_target(value, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"losses": value, "step": 3})
        checkpointer.wait_until_finished()
        target = jax.tree.map(jnp.zeros_like, {"losses": value, "step": 3})
        restored = checkpointer.restore(tmp_path / "state", target)
    same(restored["losses"], value)
    assert type(restored["losses"]) is type(value)


def test_orbax_restores_without_a_target_by_public_names(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", collector())
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state")
    assert sorted(restored) == ["losses", "metrics", "regularization_losses"]
    assert float(restored["losses"]["xent"]["total"]) == 6
    assert float(restored["metrics"]["accuracy"]["count"]) == 4
    means = {name: jl.WeightedMean(**parts) for name, parts in restored["losses"].items()}
    same(means, dict(collector().losses))


# Metrics and logs.


def parts(size, loss=None):
    losses = jnp.arange(size, dtype=jnp.float32) if loss is None else loss
    return jl.compute_weighted_loss(losses, losses != 2, reduction="parts")


def test_clu_averages_take_totals_and_counts():
    metrics = pytest.importorskip("clu.metrics")
    means = [parts(3), parts(8)]
    averages = [metrics.Average(total=mean.total, count=mean.count) for mean in means]
    np.testing.assert_allclose(averages[0].merge(averages[1]).compute(), sum(means).value)


def test_metrax_averages_take_totals_and_counts():
    metrax = pytest.importorskip("metrax")
    means = [parts(3), parts(8)]
    averages = [metrax.Average(total=mean.total, count=mean.count) for mean in means]
    np.testing.assert_allclose(averages[0].merge(averages[1]).compute(), sum(means).value)


def test_nnx_average_agrees_where_all_count_equally():
    average = nnx.metrics.Average("loss")
    for value in (1.0, 2.0, 6.0):
        average.update(loss=jnp.array(value))
    mean = sum(jl.WeightedMean(value, 1.0) for value in (1.0, 2.0, 6.0))
    np.testing.assert_allclose(average.compute(), mean.value)


def test_tensorboard_takes_scalars(tmp_path):
    tensorboard = pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for name, value in collector().to_dict().items():
            writer.add_scalar(name, float(value), 7)
    (path,) = tmp_path.glob("events*")
    data, read = path.read_bytes(), {}
    while data:  # A record is its length, a checksum, the event, and a checksum.
        (size,) = struct.unpack("<Q", data[:8])
        for value in Event.FromString(data[12 : 12 + size]).summary.value:
            read[value.tag] = value.simple_value
        data = data[16 + size :]
    want = {"total_loss": 3.25, "xent": 1.5, "layers/0": 1.0, "layers/1": 0.5, "l2": 0.25}
    assert read == {**want, "accuracy": 0.75}


# Training loops.


def test_optax_loop_learns_what_is_known():
    params = {"kernel": jnp.zeros(4)}
    optimizer = optax.adam(0.3)
    accumulate = jl.accumulate_value_and_grad(squared_error(linear), 2)

    @jax.jit
    def step(params, state):
        (total, _), grads = accumulate(params, BATCH)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, total

    state = optimizer.init(params)
    for _ in range(200):
        params, state, total = step(params, state)
    assert total < 1e-2
    np.testing.assert_allclose(params["kernel"], jnp.arange(4.0), atol=0.2)


def test_optax_value_in_a_line_search():
    optimizer = optax.lbfgs()
    params = {"kernel": jnp.zeros(4)}

    def total(params):
        return squared_error(linear)(params, BATCH).get_total_loss()

    @jax.jit
    def step(params, state):
        value, grads = optax.value_and_grad_from_state(total)(params, state=state)
        updates, state = optimizer.update(
            grads, state, params, value=value, grad=grads, value_fn=total
        )
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(10):
        params, state, _ = step(params, state)
    np.testing.assert_allclose(params["kernel"], jnp.arange(4.0), atol=1e-2)


class Sparse(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(8)(x))
        jlf.sow_loss(self, "sparsity", 0.01 * jnp.abs(x))
        return nn.Dense(1)(x)[..., 0]


def test_linen_train_state_steps():
    model = Sparse()
    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(0.01))

    @jax.jit
    def step(state, batch):
        def loss_fn(params, batch):
            x, y, known = batch
            out, losses = jlf.capture(state.apply_fn)({"params": params}, x)
            error = jl.mean_squared_error(out, y, known, reduction="parts")
            return losses.add_loss("error", error)

        (_, losses), grads = jl.accumulate_value_and_grad(loss_fn, 2)(state.params, batch)
        return state.apply_gradients(grads=grads), losses

    history = []
    for _ in range(20):
        state, losses = step(state, BATCH)
        history.append(float(losses.get_total_loss()))
    assert sorted(losses.losses) == ["error", "sparsity"]
    assert np.isfinite(history).all()
    assert history[-1] < history[0]


def test_nnx_optimizer_steps():
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            error = jl.mean_squared_error(model(X)[:, 0], Y, BATCH[2], reduction="parts")
            losses = jl.LossCollector().add_loss("error", error)
            losses = losses.regularize(
                nnx.state(model, nnx.Param), {"kernel": jl.l2_regularizer(1e-4)}
            )
            return losses.get_total_loss(), losses

        (total, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        return total

    history = [float(step(model, optimizer)) for _ in range(20)]
    assert np.isfinite(history).all()
    assert history[-1] < history[0]


# equinox.


def test_equinox_filters():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, "scalar", 8, 1, key=jax.random.key(0))

    def loss_fn(model, batch):
        x, y, known = batch
        error = jl.mean_squared_error(jax.vmap(model)(x), y, known, reduction="parts")
        losses = jl.LossCollector().add_loss("error", error)
        return losses.regularize(model, {"weight$": jl.l2_regularizer(0.1)})

    def total(model):
        losses = loss_fn(model, BATCH)
        return losses.get_total_loss(), losses

    step = eqx.filter_jit(eqx.filter_value_and_grad(total, has_aux=True))
    (value, losses), grads = step(model)
    assert list(losses.regularization_losses) == ["weight$"]
    squares = sum(jnp.sum(layer.weight**2) for layer in model.layers)
    np.testing.assert_allclose(losses.get_regularization_losses()["weight$"], 0.05 * squares, 1e-6)

    params, rest = eqx.partition(model, eqx.is_inexact_array)
    accumulate = jl.accumulate_value_and_grad(lambda p, b: loss_fn(eqx.combine(p, rest), b), 4)
    (accumulated, _), accumulated_grads = jax.jit(accumulate)(params, BATCH)
    np.testing.assert_allclose(accumulated, value, rtol=1e-5)
    both = jax.tree.leaves(accumulated_grads), jax.tree.leaves(eqx.filter(grads, eqx.is_array))
    for got, want in zip(*both, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_equinox_takes_the_step_of_the_page():
    eqx = pytest.importorskip("equinox")
    names = {}
    exec(code_of_page("named_losses.md", "import equinox"), names)
    model = eqx.nn.MLP(4, "scalar", 8, 1, key=jax.random.key(0))
    (total, losses), grads = names["gradients"](model, *BATCH)
    assert sorted(losses.to_dict()) == ["error", "total_loss", "weight$"]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((total, grads)))


def test_equinox_modules_hold_a_collector():
    eqx = pytest.importorskip("equinox")

    class State(eqx.Module):
        losses: jl.LossCollector
        step: int = eqx.field(static=True)

    state = eqx.filter_jit(lambda state: State(state.losses + state.losses, state.step))(
        State(collector(), 3)
    )
    same(state.losses, collector() + collector())


# Keras.


def test_keras_compiles_with_the_adapter_of_the_page(keras):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="dense")])
    exec(code_of_page("coming_from.md", "import keras"), {"model": model})
    x, y, weights = (np.asarray(a, np.float32) for a in BATCH)
    y, weights = y[:, None], weights * np.array([1, 2, 1, 1, 1, 1, 1, 1], np.float32)
    want = jl.absolute_difference(model.predict(x, verbose=0), y, weights[:, None])
    got = model.evaluate(x, y, sample_weight=weights, verbose=0, batch_size=8)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    model.fit(x, y, sample_weight=weights, epochs=2, verbose=0)
    assert all(np.isfinite(w).all() for w in model.get_weights())


# Pickles.


def test_values_and_functions_can_be_pickled():
    for value in (collector(), jl.WeightedMean(1.0, 2.0)):
        same(pickle.loads(pickle.dumps(value)), value)
    regularizer = pickle.loads(pickle.dumps(jl.l2_regularizer(0.5)))
    assert regularizer(jnp.ones(4)) == 1
    for loss in (jl.mean_squared_error, jl.sparse_softmax_cross_entropy, jl.segment_means):
        assert pickle.loads(pickle.dumps(loss)) is loss
    huber = pickle.loads(pickle.dumps(jl.weighted(optax.huber_loss)))
    assert huber(jnp.ones(2), jnp.zeros(2)) == 0.5


def test_cloudpickle_takes_closures():
    cloudpickle = pytest.importorskip("cloudpickle")
    scale = 2.0
    lifted = jl.weighted(lambda p, y: scale * jnp.abs(p - y))
    assert cloudpickle.loads(cloudpickle.dumps(lifted))(jnp.ones(2), jnp.zeros(2)) == 2
    params = {"kernel": jnp.ones(4)}
    accumulate = jl.accumulate_value_and_grad(lambda p, b: squared_error(linear)(p, b), 2)
    copy = cloudpickle.loads(cloudpickle.dumps(accumulate))
    np.testing.assert_array_equal(copy(params, BATCH)[0][0], accumulate(params, BATCH)[0][0])
