"""Losses compared with float64 where float32 could lose digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlosses as jl

RNG = np.random.default_rng(0)
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
    logits = jnp.array([-80.0, 80.0, -30.0, 30.0])
    labels = jnp.array([0.0, 1.0, 0.0, 1.0])
    expected = np.exp(np.array([-80.0, -80.0, -30.0, -30.0]))
    losses = jl.sigmoid_cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    gradient = jax.grad(jl.sigmoid_cross_entropy)(logits, labels, reduction="sum")
    np.testing.assert_allclose(gradient, expected * [1, -1, 1, -1], rtol=1e-5)


def test_sigmoid_cross_entropy_has_two_derivatives_at_zero():
    def loss(x):
        return jl.sigmoid_cross_entropy(x, jnp.float32(1))

    assert jax.grad(loss)(0.0) == -0.5
    assert jax.grad(jax.grad(loss))(0.0) == 0.25


def test_the_derivative_is_zero_where_a_loss_has_a_kink():
    assert jax.grad(jl.absolute_difference)(1.0, 1.0) == 0
    assert jax.grad(jl.hinge_loss)(1.0, 1.0) == 0


def test_pairwise_error_with_a_large_offset_keeps_its_digits():
    labels = RNG.normal(size=(8, 4096)).astype(np.float32)
    predictions = (labels + 1e3 + RNG.normal(size=labels.shape)).astype(np.float32)
    difference = predictions.astype(np.float64) - labels
    expected = 2 * difference.var(axis=1)
    losses = jl.mean_pairwise_squared_error(predictions, labels, reduction="none")
    np.testing.assert_allclose(losses, expected, rtol=2e-6)


def test_log_loss_of_a_certain_prediction_is_that_of_epsilon():
    losses = jl.log_loss(jnp.array([0.0, 1.0, 0.0, 1.0]), jnp.array([0, 0, 1, 1]), reduction="none")
    # In float32, 0 + 1e-7 is exact, and 1 + 1e-7 is rounded to the next number after 1.
    near_zero, near_one = -np.log(1e-7), -np.log(np.float64(np.float32(1) + np.float32(1e-7)))
    np.testing.assert_allclose(losses, [near_one, near_zero, near_zero, near_one], rtol=1e-5)


def test_a_ruled_out_class_costs_nothing():
    logits = jnp.array([[1.0, -jnp.inf, 2.0]])
    expected = np.log1p(np.exp(1.0))
    labels = jnp.array([[1.0, 0.0, 0.0]])
    for loss in (
        lambda x: jl.sparse_softmax_cross_entropy(x, jnp.array([0])),
        lambda x: jl.softmax_cross_entropy(x, labels),
    ):
        value, gradient = jax.value_and_grad(loss)(logits)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        probability = 1 / (1 + np.exp(1.0))
        np.testing.assert_allclose(gradient, [[probability - 1, 0, 1 - probability]], rtol=1e-6)
    gradient = jax.grad(jl.softmax_cross_entropy, 1)(logits, labels)
    np.testing.assert_allclose(gradient, [[expected, 0, expected - 1]], rtol=1e-6)


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
    for labels in ([[0.0, 0.0]], [[0.0, 1.0]]):
        assert jnp.isnan(jl.softmax_cross_entropy(jnp.array([[jnp.nan, 0.0]]), jnp.array(labels)))
