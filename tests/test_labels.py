"""Class ids: the label that is named, and what it costs who does not check."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlosses as jl
from jaxlosses import _labels

CLASSES = 3
KERNEL = np.ones((2, CLASSES), np.float32)


def linear(hidden, labels, weights=1.0, **options):
    return jl.linear_softmax_cross_entropy(hidden[..., :2], KERNEL, labels, weights, **options)


LOSSES = {"sparse": jl.sparse_softmax_cross_entropy, "linear": linear}
X = np.zeros((4, CLASSES), np.float32)
WRONG, RIGHT = np.array([0, 7, 2, 1], np.int32), np.array([0, 1, 2, 1], np.int32)
WEIGHTS = np.array([1, 0, 1, 1], np.float32)
NAMED = r"labels must be in \[0, 3\) where they count, got 7"


def error_of(function, **options):
    """Compiled, and without the function's result, which no test here looks at."""
    return jax.jit(lambda *arguments: checkify.checkify(function, **options)(*arguments)[0])


def in_shard_map(loss):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    mapped = functools.partial(loss, axis_name="data")
    return jax.shard_map(mapped, mesh=mesh, in_specs=(rows, rows), out_specs=PartitionSpec())


def accumulate(loss):
    def loss_fn(scale, batch):
        parts = loss(scale * batch[0], batch[1], reduction="parts")
        return jl.LossCollector().add_loss("loss", parts)

    return lambda x, y: jl.accumulate_value_and_grad(loss_fn, 2)(1.0, (x, y))


def scan(loss):
    def step(carry, row):
        return carry + loss(row[0][None], row[1][None]), None

    return lambda x, y: jax.lax.scan(step, 0.0, (x, y))[0]


def while_loop(loss):
    def body(state):
        i, total, x, y = state
        return i + 1, total + loss(x, y), x, y

    return lambda x, y: jax.lax.while_loop(lambda s: s[0] < 2, body, (0, 0.0, x, y))[1]


def cond(loss):
    return lambda x, y: jax.lax.cond(x[0, 0] == 0, loss, lambda x, y: jnp.sum(x), x, y)


WAYS = {
    "as it is": lambda loss: loss,
    "jit": jax.jit,
    "grad": jax.grad,
    "hessian": jax.hessian,
    "vmap": lambda loss: jax.vmap(lambda x, y: loss(x[None], y[None])),
    "vmap of the labels alone": lambda loss: (
        lambda x, y: jax.vmap(loss, (None, 0))(x[:1], y[:, None])
    ),
    "grad of vmap": lambda loss: jax.grad(
        lambda x, y: jnp.sum(jax.vmap(lambda x, y: loss(x[None], y[None]))(x, y))
    ),
    "scan": scan,
    "grad of scan": lambda loss: jax.grad(scan(loss)),
    "grad of map": lambda loss: jax.grad(
        lambda x, y: jnp.sum(jax.lax.map(lambda row: loss(*row), (x[:, None], y[:, None])))
    ),
    "while": while_loop,
    "cond": cond,
    "checkpoint": lambda loss: jax.grad(jax.checkpoint(loss)),
    "accumulate": accumulate,
    "shard_map": in_shard_map,
    "grad of shard_map": lambda loss: jax.grad(in_shard_map(loss)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_label_is_named(name, way):
    error = error_of(WAYS[way](LOSSES[name]))
    with pytest.raises(checkify.JaxRuntimeError, match=NAMED):
        error(X, WRONG).throw()
    error(X, RIGHT).throw()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize("name", LOSSES)
def test_the_label_is_named_on_a_mesh(name, kind):
    if jax.__version_info__ < (0, 9) and (name, kind) == ("linear", AxisType.Explicit):
        pytest.skip("the checkify of JAX 0.8 loses the mesh of auto_axes")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    error = error_of(jax.value_and_grad(LOSSES[name]))
    with jax.set_mesh(mesh):
        x, wrong, right = (jax.device_put(a, rows) for a in (X, WRONG, RIGHT))
        with pytest.raises(checkify.JaxRuntimeError, match=NAMED):
            error(x, wrong).throw()
        error(x, right).throw()


def test_without_its_rule_the_check_is_a_debug_check(monkeypatch):
    monkeypatch.setattr(_labels, "_HAS_CHECKIFY_RULES", False)
    checked = checkify.checkify(jax.jit(lambda *a: jl.sparse_softmax_cross_entropy(*a)))
    with pytest.raises(checkify.JaxRuntimeError, match=r"labels must be in \[0, 5\).*got 7"):
        checked(np.zeros((4, 5), np.float32), WRONG)[0].throw()


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_absent_is_not_reported(name):
    loss = LOSSES[name]
    error_of(loss)(X, WRONG, WEIGHTS).throw()
    error_of(functools.partial(loss, ignore_index=7))(X, WRONG).throw()
    error_of(loss, errors=checkify.nan_checks)(X, WRONG, WEIGHTS).throw()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_labels_of_64_bits_are_checked_before_jax_narrows_them(name, dtype):
    loss = functools.partial(LOSSES[name], X, reduction="none")
    wide = np.array([0, 2**32 + 1, 2, 1], dtype)
    for labels in (wide, wide[:, None]):
        chex.assert_trees_all_equal(np.isnan(loss(labels)), wide > 2)
    chex.assert_trees_all_close(loss(wide % 3), loss(np.array([0, 2, 2, 1], np.int32)))


@pytest.mark.parametrize("label", [2**31 - 1, -(2**31), 2**40, 2**32 + 1, 2**70, -(2**70)])
def test_a_label_of_python_is_checked_before_jax_refuses_it(label):
    assert np.isnan(jl.sparse_softmax_cross_entropy(X[0], label))
    limit = 2**31 - 1 if label > 0 else -(2**31)
    value = jl.sparse_softmax_cross_entropy(X[0], label, ignore_index=limit)
    assert np.isnan(value) == (label != limit)


@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index", "is_ignored"),
    [
        (np.int64, 2**32 - 1, -1, False),  # Its lower 32 bits are those of -1.
        (np.int64, -1, -1, True),
        (np.int64, 2**40, 2**31 - 1, False),
        (np.int64, 2**31 - 1, 2**31 - 1, True),
        (np.int64, -(2**40), -(2**31), False),
        (np.uint64, 2**40, 2**32 - 1, False),
        (np.uint64, 2**32 - 1, 2**32 - 1, True),
        (np.uint32, 2**32 - 1, 2**32 - 1, True),
        (np.uint8, 255, 255, True),
        (np.int8, -100, -100, True),
    ],
)
def test_only_the_label_that_is_ignored_is(dtype, label, ignore_index, is_ignored):
    labels = np.array([0, label], dtype)
    value = jl.sparse_softmax_cross_entropy(X[:2], labels, ignore_index=ignore_index)
    assert np.isnan(value) == (not is_ignored)


def test_x64_keeps_labels_wide():
    with jax.enable_x64(True):
        labels = np.array([0, 2**32 + 1])
        assert np.isnan(jl.sparse_softmax_cross_entropy(X[:2], labels))
        ignored = jl.sparse_softmax_cross_entropy(X[:2], labels, ignore_index=2**32 + 1)
        chex.assert_trees_all_close(ignored, np.log(np.float32(3)))


@pytest.mark.parametrize("name", LOSSES)
def test_debug_nans_finds_nothing_where_labels_are_ignored_or_absent(name):
    with jax.debug_nans(True):
        for options in ({"ignore_index": 7}, {"weights": WEIGHTS}):
            loss = functools.partial(LOSSES[name], labels=WRONG, **options)
            chex.assert_tree_all_finite(jax.value_and_grad(loss)(X))
        with pytest.raises(FloatingPointError):
            LOSSES[name](X, WRONG)
