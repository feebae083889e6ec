"""What a type checker must accept of a user; CI runs pyright on it."""

from typing import assert_type

import jax.numpy as jnp
from jax import Array

import jaxlosses as jl


def sums_have_types(batches: list[Array]) -> None:
    means = [jl.WeightedMean(jnp.sum(batch), batch.size) for batch in batches]
    mean = sum(means, jl.WeightedMean(0.0, 0.0))
    assert_type(mean, jl.WeightedMean)
    assert_type((0.1 * mean + mean / 2).macro().value, Array)
    collectors = [jl.LossCollector().add_loss("loss", m).add_metric("metric", m) for m in means]
    losses = sum(collectors, jl.LossCollector())
    assert_type(losses, jl.LossCollector)
    losses += collectors[0]
    assert_type(losses.get_total_loss(), Array)
    assert_type(jl.segment_means(batches[0], jnp.zeros(3, int), 2), jl.WeightedMean)
