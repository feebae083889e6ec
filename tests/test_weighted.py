"""The lift, WeightedMean, and what belongs to single losses."""

import copy
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec

import jaxlosses as jl

P, Y = np.array([0, 4, np.nan, 1], np.float32), np.array([0, 0, 1, np.inf], np.float32)
W = np.array([0, 2, 0, 0], np.float32)
STEEP = {
    "sqrt": lambda p, y: jnp.sqrt(p),
    "log": lambda p, y: jnp.log(p) - jnp.log1p(y),
    "norm": lambda p, y: jnp.sqrt(jnp.square(p - y)),
    "power": lambda p, y: jnp.power(jnp.abs(p - y), 0.3),
}


@pytest.mark.parametrize("name", STEEP)
def test_infinite_derivatives_at_absent_places(name):
    loss = jl.weighted(STEEP[name])
    of_all = (0, 1, 2)

    @jax.jit
    def program(p, y, w):
        tangent = jax.jvp(lambda p, y: loss(p, y, w), (p, y), (jnp.ones(4), jnp.ones(4)))[1]
        alone = jax.value_and_grad(loss, of_all)(p[1:2], y[1:2], w[1:2])
        return jax.value_and_grad(loss, of_all)(p, y, w), alone, tangent, jax.hessian(loss)(p, y, w)

    found, (expected, alone), tangent, hessian = jax.device_get(program(P, Y, W))
    value, gradients = found
    chex.assert_trees_all_close(value, expected)
    chex.assert_trees_all_close([gradient[1:2] for gradient in gradients], list(alone))
    chex.assert_tree_all_finite(gradients)
    assert not gradients[0][[0, 2, 3]].any()
    chex.assert_trees_all_close(tangent, gradients[0][1] + gradients[1][1], rtol=1e-6)
    chex.assert_tree_all_finite(hessian)


def test_nan_reaches_no_parameter_that_the_function_closes_over():
    def total(scale):
        return jl.weighted(lambda p, y: scale * jnp.sqrt(p) + y)(P, Y, W)

    @jax.jit
    def program(scales):
        one = [f(total)(scales[1]) for f in (jax.grad, jax.jacfwd)]
        return one, jax.vmap(jax.grad(total))(scales)

    assert jax.grad(total)(3.0) == 4.0  # Not in jit.
    one, mapped = program(np.array([0, 3], np.float32))
    assert one == [4.0, 4.0]
    np.testing.assert_array_equal(mapped, [4.0, 4.0])


def test_options_are_differentiable():
    huber = jl.weighted(optax.huber_loss)
    gradient = jax.jit(jax.grad(lambda d: huber(P, Y, W, reduction="sum", delta=d)))(1.0)
    assert gradient == 2 * (4 - 1)


def test_rows_and_class_ids():
    loss = jl.weighted(optax.losses.softmax_cross_entropy_with_integer_labels)
    logits = np.arange(12, dtype=np.float32).reshape(4, 3)
    logits[1] = np.nan
    labels, weights = np.array([0, 99, 2, -1], np.int32), np.array([1, 0, 2, 0], np.float32)

    @jax.jit
    def both(*arguments):
        losses = loss, jl.sparse_softmax_cross_entropy
        return [jax.value_and_grad(loss)(*arguments) for loss in losses]

    lifted, ours = both(logits, labels, weights)
    chex.assert_trees_all_close(lifted, ours)


def test_an_absent_infinity_in_a_hinge():
    """The loss is 0, its derivative is not a number."""
    x, y, w = (np.array(a, np.float32) for a in ([0.5, np.inf], [np.inf, 0], [0, 0]))
    gradient = jax.grad(functools.partial(jl.hinge_loss, reduction="sum"), (0, 1, 2))

    @jax.jit
    def program(*arguments):
        second = [outer(gradient, (0, 1, 2))(*arguments) for outer in (jax.jacfwd, jax.jacrev)]
        return gradient(*arguments), second

    chex.assert_tree_all_finite(program(x, y, w))


def test_means_add_up_exactly():
    losses = np.random.default_rng(0).random(10).astype(np.float32)
    parts = [jl.compute_weighted_loss(losses[a:b], reduction="parts") for a, b in ((0, 3), (3, 10))]
    chex.assert_trees_all_close(sum(parts).value, losses.mean(), rtol=1e-6)
    assert jl.WeightedMean(6.0, 3).value == 2
    assert jl.WeightedMean(0.0, 0).value == 0
    with pytest.raises(ValueError, match="WeightedMean"):
        parts[0].merge(1.0)
    with pytest.raises(ValueError, match="WeightedMean"):
        parts[0] + 1.0
    with pytest.raises(ValueError, match=r"shape \(\).*got \(3,\)"):
        parts[0] + jl.WeightedMean(np.ones(3), np.ones(3))

    def add(mean, chunk):
        return mean + jl.compute_weighted_loss(chunk, reduction="parts"), None

    @jax.jit
    def in_scan_and_vmap(losses, total):
        zero = jl.WeightedMean(jnp.zeros(()), jnp.zeros(()))
        mapped = jax.vmap(lambda m: m.psum("i"), axis_name="i")(jl.WeightedMean(*total))
        return jax.lax.scan(add, zero, losses)[0], mapped

    folded, mapped = in_scan_and_vmap(losses[:, None], np.float32([[0, 1, 2], [1, 1, 1]]))
    chex.assert_trees_all_close(folded.value, losses.mean(), rtol=1e-6)
    np.testing.assert_array_equal(mapped.value, np.ones(3))


WRONG = {
    "string": "a",
    "none": None,
    "complex": 1j,
    "complex array": jnp.complex64(1),
    "complex of numpy": np.complex64(1),
    "key": jax.random.key(0),
    "strings": np.array("a"),
    "object": np.array(None),
    "list": [1.0],
    "type": float,
    "shape": jax.ShapeDtypeStruct((), jnp.float32),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mean_of_what_is_no_number_is_refused_where_it_is_used(name):
    wrong, one = WRONG[name], jl.WeightedMean(1.0, 1.0)
    for mean, part in (
        (jl.WeightedMean(wrong, 1.0), "total"),
        (jl.WeightedMean(1.0, wrong), "count"),
    ):
        for use in (
            lambda mean=mean: mean.value,
            lambda mean=mean: mean + one,
            lambda mean=mean: one + mean,
            lambda mean=mean: one.merge(mean),
            lambda mean=mean: sum([mean, one]),
            lambda mean=mean: jax.jit(lambda x: (mean + jl.WeightedMean(x, x)).value)(1.0),
        ):
            with pytest.raises(ValueError, match=rf"^WeightedMean\.{part} must be"):
                use()


def test_a_mean_holds_any_leaves():
    """JAX and other libraries put shapes, shardings and flags into pytrees."""
    mean = jl.WeightedMean(np.ones(2, np.float32), np.ones(2, np.float32))
    shapes = jax.eval_shape(lambda: mean)
    assert shapes.total.shape == (2,)
    for leaf in (None, "a", object(), PartitionSpec("data"), jnp.sum, True):
        assert jax.tree.map(lambda _, leaf=leaf: leaf, mean) == jl.WeightedMean(leaf, leaf)
    mapped = jax.vmap(lambda m: m, in_axes=(jl.WeightedMean(0, 0),), out_axes=jl.WeightedMean(0, 0))
    chex.assert_trees_all_equal(mapped(mean), mean)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int32, jnp.bfloat16, np.float32])
def test_means_of_any_dtype_are_counted(dtype):
    one = jl.WeightedMean(np.ones((), dtype), np.ones((), dtype))
    two = one + one
    assert (two.total, two.count, two.value) == (2, 2, 1)


def test_a_mean_can_be_pickled():
    mean = jl.WeightedMean(jnp.arange(3.0), jnp.ones(3))
    for same in (pickle.loads(pickle.dumps(mean)), copy.deepcopy(mean), copy.copy(mean)):
        assert isinstance(same, jl.WeightedMean)
        chex.assert_trees_all_equal(same, mean)


def test_the_numbers_of_the_document():
    losses, weights = np.float32([4, 1, 2, 3]), np.float32([1, 0.5, 3, 9])
    assert jl.compute_weighted_loss(losses, weights) == (4 * 1 + 1 * 0.5 + 2 * 3 + 3 * 9) / 4


def test_a_label_is_named_by_debug_check():
    loss = checkify.checkify(jax.jit(lambda *a: jl.sparse_softmax_cross_entropy(*a)))
    logits, labels = np.zeros((2, 3), np.float32), np.array([0, 7], np.int32)
    error, _ = loss(logits, labels, np.ones(2, np.float32))
    with pytest.raises(checkify.JaxRuntimeError, match=r"labels must be in \[0, 3\).*got 7"):
        error.throw()
    error, _ = loss(logits, labels, np.array([1, 0], np.float32))
    error.throw()


def test_sparse_labels():
    logits = np.arange(12, dtype=np.float32).reshape(4, 3)
    expected = jl.sparse_softmax_cross_entropy(logits, np.array([0, 1, 2, 0], np.int32))
    for dtype in (np.int8, np.uint8, np.int16, np.uint32):
        labels = np.array([[0], [1], [2], [0]], dtype)
        chex.assert_trees_all_close(jl.sparse_softmax_cross_entropy(logits, labels), expected)
    zeros = np.zeros((1, 1000), np.float32)
    wide = jl.sparse_softmax_cross_entropy(zeros, np.array([100], np.int8))
    chex.assert_trees_all_close(wide, np.float32(np.log(1000)), rtol=1e-6)
    labels = np.array([0, -100, -100, -100], np.int32)
    ignored = jl.sparse_softmax_cross_entropy(logits, labels, ignore_index=-100, reduction="parts")
    assert ignored.count == 1
    with pytest.raises(ValueError, match=r"ignore_index.*uint8.*-100"):
        jl.sparse_softmax_cross_entropy(logits, np.zeros(4, np.uint8), ignore_index=-100)
    with pytest.raises(ValueError, match=r"labels must be integers.*float32"):
        jl.sparse_softmax_cross_entropy(logits, np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"labels.*\(3,\)"):
        jl.sparse_softmax_cross_entropy(logits, np.zeros(3, np.int32))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}])
def test_sparse_is_dense(options):
    logits = np.random.default_rng(0).normal(0, 3, (4, 5)).astype(np.float32)
    labels = np.array([0, 4, 2, 2], np.int32)

    @jax.jit
    def both(logits):
        dense = functools.partial(
            jl.softmax_cross_entropy, labels=np.eye(5, dtype=np.float32)[labels]
        )
        sparse = functools.partial(jl.sparse_softmax_cross_entropy, labels=labels)
        return [jax.value_and_grad(loss)(logits, **options) for loss in (dense, sparse)]

    dense, sparse = both(logits)
    chex.assert_trees_all_close(sparse, dense, rtol=1e-5, atol=1e-6)


def test_z_loss_is_the_squared_log_normalizer():
    logits, labels = np.float32([[1, 2, 3]]), np.int32([1])
    plain, more = (jl.sparse_softmax_cross_entropy(logits, labels, z_loss=z) for z in (0, 2))
    expected = 2 * np.log(np.exp([1.0, 2.0, 3.0]).sum()) ** 2
    np.testing.assert_allclose(more - plain, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (jl.sigmoid_cross_entropy, {"label_smoothing": 1.5}, "label_smoothing.*1.5"),
        (jl.softmax_cross_entropy, {"label_smoothing": -0.1}, "label_smoothing.*-0.1"),
        (jl.softmax_cross_entropy, {"z_loss": -1.0}, "z_loss.*-1"),
        (jl.log_loss, {"epsilon": -1e-7}, "epsilon.*-1e-07"),
        (jl.cosine_distance, {"axis": 2}, "axis.*rank 2.*2"),
        (jl.cosine_distance, {"axis": None}, "axis must be an integer, got None"),
        (jl.log_loss, {"epsilon": None}, "epsilon must be a number from 0"),
        (jl.log_loss, {"epsilon": float("inf")}, "epsilon must be a number from 0"),
        (jl.softmax_cross_entropy, {"label_smoothing": True}, "label_smoothing.*True"),
        (jl.softmax_cross_entropy, {"z_loss": jnp.float32(1)}, "z_loss must be a Python value"),
        (
            jl.softmax_cross_entropy,
            {"z_loss": 1e39},
            "z_loss must be a number from 0 to 3.4e\\+38.*1e\\+39",
        ),
        (jl.log_loss, {"reduction": ["mean"]}, r"reduction must be a Python value.*\['mean'\]"),
    ],
)
def test_options_are_checked(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), **options)


def test_cosine_distance_along_any_axis():
    p = y = np.full((2, 3, 4), 3**-0.5, np.float32)
    losses = jl.cosine_distance(p, y, axis=1, reduction="none")
    assert losses.shape == (2, 4)
    chex.assert_trees_all_close(losses, np.zeros((2, 4)), atol=1e-6)
