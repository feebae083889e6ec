"""Losses compared with float64 where float32 could lose digits."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlosses as jl

RNG = np.random.default_rng(0)
INF = np.inf
pytestmark = pytest.mark.usefixtures("full_optimization")


def logsumexp(x):
    max_logit = x.max(-1, keepdims=True)
    return (max_logit + np.log(np.exp(x - max_logit).sum(-1, keepdims=True)))[..., 0]


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_cross_entropy_of_large_logits_keeps_its_digits(offset):
    logits = (RNG.normal(0, 2, (16, 7)) + offset).astype(np.float32)
    labels = RNG.integers(0, 7, 16)
    exact = logits.astype(np.float64)
    expected = logsumexp(exact) - exact[np.arange(16), labels]
    sparse = jl.sparse_softmax_cross_entropy(logits, labels.astype(np.int32), reduction="none")
    dense = jl.softmax_cross_entropy(logits, np.eye(7, dtype=np.float32)[labels], reduction="none")
    np.testing.assert_allclose(sparse, expected, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(dense, expected, rtol=2e-6, atol=1e-7)


def test_sigmoid_cross_entropy_of_a_certain_prediction_keeps_its_digits():
    logits = np.array([-80, 80, -30, 30], np.float32)
    labels = np.array([0, 1, 0, 1], np.float32)
    expected = np.exp(np.array([-80.0, -80.0, -30.0, -30.0]))
    losses = jl.sigmoid_cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    total = functools.partial(jl.sigmoid_cross_entropy, reduction="sum")
    gradient = jax.jit(jax.grad(total))(logits, labels)
    np.testing.assert_allclose(gradient, expected * [1, -1, 1, -1], rtol=1e-5)


def test_sigmoid_cross_entropy_has_two_derivatives_at_zero():
    def loss(x):
        return jl.sigmoid_cross_entropy(x, np.float32(1))

    first, second = jax.jit(jax.value_and_grad(jax.grad(loss)))(0.0)
    assert float(first) == -0.5
    assert float(second) == 0.25


def test_the_derivative_is_zero_where_a_loss_has_a_kink():
    for loss in (jl.absolute_difference, jl.hinge_loss):
        assert float(jax.jit(jax.grad(loss))(1.0, 1.0)) == 0


@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [("data",), ("data", "model"), (None, "model")], ids=str)
def test_pairwise_error_with_a_large_offset_keeps_its_digits(spec, kind):
    """The mean of a float32 sample near 1e6 has a last digit of 1/16."""
    differences = (1e6 + RNG.normal(size=(4, 100_000))).astype(np.float32)
    exact = differences.astype(np.float64)
    expected = 2 * exact.var(axis=1).sum()
    slopes = 4 / 100_000 * (exact - exact.mean(1, keepdims=True))
    labels = np.zeros_like(differences)
    kinds = (kind or AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)
    with jax.set_mesh(mesh) if kind else contextlib.nullcontext():
        placed = (differences, labels)
        if kind:
            sharding = NamedSharding(mesh, PartitionSpec(*spec))
            placed = (jax.device_put(x, sharding) for x in placed)
        value, gradient = jax.jit(jax.value_and_grad(jl.mean_pairwise_squared_error))(*placed)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=0, atol=1e-6 * np.abs(slopes).max())


def test_pairwise_error_of_a_constant_difference_is_zero():
    predictions = np.full((2, 100_000), 1e6 + 1 / 16, np.float32)
    loss = jax.jit(jax.value_and_grad(jl.mean_pairwise_squared_error))
    losses, gradient = loss(predictions, np.zeros_like(predictions))
    assert float(losses) == 0
    assert not np.any(gradient)


def test_log_loss_of_a_certain_prediction_is_that_of_epsilon():
    predictions, labels = np.array([0, 1, 0, 1], np.float32), np.array([0, 0, 1, 1], np.int32)
    losses = jl.log_loss(predictions, labels, reduction="none")
    # In float32, 0 + 1e-7 is exact, and 1 + 1e-7 is rounded to the next number after 1.
    near_zero, near_one = -np.log(1e-7), -np.log(np.float64(np.float32(1) + np.float32(1e-7)))
    np.testing.assert_allclose(losses, [near_one, near_zero, near_zero, near_one], rtol=1e-5)


def test_log_loss_without_epsilon_is_zero_at_a_perfect_fit():
    sides = np.array([0, 1], np.float32)
    loss = jax.jit(jax.value_and_grad(functools.partial(jl.log_loss, epsilon=0.0), (0, 1)))
    value, gradients = loss(sides, sides)
    assert float(value) == 0
    np.testing.assert_allclose(gradients[0], [0.5, -0.5])
    assert np.isfinite(gradients[1]).all()
    assert float(jl.log_loss(sides, 1 - sides, epsilon=0.0)) == INF


def test_second_derivatives_of_a_log_loss_need_no_square_of_epsilon():
    def loss(p, y):
        return jl.log_loss(p[None], y[None], epsilon=1e-20)

    hessian = jax.jit(jax.hessian(loss))
    for side in np.array([0, 1], np.float32):
        np.testing.assert_allclose(hessian(side, side), 1, rtol=1e-6)


def test_a_z_loss_of_large_logits_overflows_only_if_it_is_too_large_itself():
    logits = np.array([[1.9e19, 0, 0], [3e38, 0, 0]], np.float32)
    for loss, labels in (
        (jl.sparse_softmax_cross_entropy, np.array([0], np.int32)),
        (jl.softmax_cross_entropy, np.array([[1, 0, 0]], np.float32)),
    ):
        differentiated = jax.jit(jax.value_and_grad(loss), static_argnames="z_loss")
        for i, z_loss in ((0, 1e-4), (0, 1e-30), (1, 1e-4)):
            value, gradient = differentiated(logits[i : i + 1], labels, z_loss=z_loss)
            size = np.float64(logits[i, 0])
            exact = z_loss * size**2
            np.testing.assert_allclose(value, exact if exact < 3e38 else INF, rtol=1e-6)
            np.testing.assert_allclose(gradient, [[2 * z_loss * size, 0, 0]], rtol=1e-6, atol=1e-7)


def test_infinite_logits_and_soft_labels():
    """The limits of the formulas, at every option."""
    logits = np.array([-INF, -INF, -INF, INF, INF, INF], np.float32)
    labels = np.array([0, 0.9, 1, 0, 0.1, 1], np.float32)
    losses = jl.sigmoid_cross_entropy(logits, labels, reduction="none")
    np.testing.assert_array_equal(losses, [0, INF, INF, INF, INF, 0])
    smoothed = jl.sigmoid_cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    np.testing.assert_array_equal(smoothed, [INF] * 6)
    labels = np.array([0, 0.5, 1, 0, 0.5, 1], np.float32)
    hinge = jl.hinge_loss(logits, labels, reduction="none")
    np.testing.assert_array_equal(hinge, [0, 1, INF, INF, 1, 0])
    overflowed = np.array([INF, -INF], np.float16)  # What 1e6 and -1e6 are in this dtype.
    assert float(jl.sigmoid_cross_entropy(overflowed, np.array([1, 0], np.int32))) == 0


ROWS = np.array(
    [[INF, 0, 0], [INF, INF, 0], [INF, -INF, 0], [-INF, 0, 1], [-INF, -INF, 2], [-INF] * 3]
)


def last_layer(logits, labels, **options):
    """The loss of logits that are the bias alone."""
    return jl.linear_softmax_cross_entropy(
        jnp.zeros((1, 2)), jnp.zeros((2, 3)), labels, bias=logits[0], **options
    )


@functools.cache
def differentiated(**options):
    """Losses of class ids, of the same in a last layer, and of distributions; and in their labels.

    They are compiled once for all rows.
    """
    ids, last, dense = (
        jax.value_and_grad(functools.partial(loss, **options))
        for loss in (jl.sparse_softmax_cross_entropy, last_layer, jl.softmax_cross_entropy)
    )
    of_labels = jax.grad(functools.partial(jl.softmax_cross_entropy, **options), 1)

    @jax.jit
    def of_all(row, label, one_hot):
        of_logits = [ids(row, label), last(row, label), dense(row, one_hot)]
        return of_logits, of_labels(row, one_hot)

    return of_all


@pytest.mark.parametrize("z_loss", [0, 1e-3])
@pytest.mark.parametrize("label_smoothing", [0, 0.1, 1])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_infinite_logits_of_classes(row, label_smoothing, z_loss):
    # Among infinite logits that are the largest, each is as probable as the other.
    x = np.where(row == row.max(), 0, -INF) if np.isinf(row.max()) else row
    softmax = np.exp(x) / np.exp(x).sum()
    log_sum_exp = row.max() if np.isinf(row.max()) else np.log(np.exp(x).sum())
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    for label, one_hot in enumerate(np.eye(3)):
        y = one_hot * (1 - label_smoothing) + label_smoothing / 3
        surprises = y[y > 0] * (np.log(np.exp(x).sum()) - x[y > 0])
        expected = surprises.sum() + (z_loss * log_sum_exp**2 if z_loss else 0)
        gradient = softmax - y
        if np.isfinite(log_sum_exp):
            gradient += 2 * z_loss * log_sum_exp * softmax
        of_logits, of_labels = differentiated(**options)(
            row[None], np.array([label], np.int32), one_hot[None]
        )
        for value, found in of_logits:
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            np.testing.assert_allclose(found[0], gradient, atol=1e-6)
        assert not np.isnan(of_labels).any()


def test_a_ruled_out_class_costs_nothing():
    logits, labels = np.array([[[1, -INF, 2]], [[1, 0, 0]]], np.float32)
    expected = np.log1p(np.exp(1.0))
    sparse = jax.jit(jax.value_and_grad(jl.sparse_softmax_cross_entropy))
    dense = jax.jit(jax.value_and_grad(jl.softmax_cross_entropy, (0, 1)))
    loss, (of_logits, of_labels) = dense(logits, labels)
    for value, gradient in (sparse(logits, np.array([0], np.int32)), (loss, of_logits)):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        probability = 1 / (1 + np.exp(1.0))
        np.testing.assert_allclose(gradient, [[probability - 1, 0, 1 - probability]], rtol=1e-6)
    np.testing.assert_allclose(of_labels, [[expected, 0, expected - 1]], rtol=1e-6)


@pytest.mark.parametrize("size", [2**24 + 3, 40_000_000])
def test_mean_and_count_of_many_elements_are_accurate(size):
    losses = RNG.random(size, np.float32)
    parts = jl.compute_weighted_loss(losses, reduction="parts")
    assert parts.count == np.float32(size)
    np.testing.assert_allclose(parts.value, losses.mean(dtype=np.float64), rtol=1e-6)
    weights = losses < 0.75
    parts = jl.compute_weighted_loss(losses, weights, reduction="parts")
    assert parts.count == np.float32(weights.sum())
    expected = losses.mean(dtype=np.float64, where=weights)
    np.testing.assert_allclose(parts.value, expected, rtol=1e-6)


def test_doubles_stay_doubles():
    with jax.enable_x64(True):
        value = jl.mean_squared_error(np.array([1.0, 1 + 1e-9]), np.array([1.0, 1.0]))
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, 5e-19, rtol=1e-6)
        single = jl.mean_squared_error(np.ones(2, np.float32), np.ones(2, np.float32))
        assert single.dtype == jnp.float32


def test_a_logit_that_is_not_a_number_is_seen_whatever_the_label():
    logits, *labels = np.array([[[np.nan, 0]], [[0, 0]], [[0, 1]]], np.float32)
    for some in labels:
        assert np.isnan(jl.softmax_cross_entropy(logits, some))
