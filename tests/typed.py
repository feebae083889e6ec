"""What a type checker must accept of a user, and must know; CI runs pyright on it."""
# pyright: strict

from collections.abc import Callable
from typing import Any, assert_type

import jax.numpy as jnp
from jax import Array

import jaxlosses as jl
import jaxlosses.flax as jlf


def sums_have_types(batches: list[Array], segments: Array) -> None:
    means = [jl.WeightedMean(jnp.sum(batch), batch.size) for batch in batches]
    mean = sum(means, jl.WeightedMean(0.0, 0.0))
    assert_type(mean, jl.WeightedMean)
    assert_type((0.1 * mean + mean / 2).macro().value, Array)
    collectors = [jl.LossCollector().add_loss("loss", m).add_metric("metric", m) for m in means]
    losses = sum(collectors, jl.LossCollector())
    assert_type(losses, jl.LossCollector)
    losses += collectors[0]
    assert_type(losses.get_total_loss(), Array)
    assert_type(jl.segment_means(batches[0], segments, 2), jl.WeightedMean)


def steps_have_types(apply: Callable[..., Any], params: Any, x: Array) -> None:
    def loss_fn(params: Any, batch: Array) -> jl.LossCollector:
        y, losses = jlf.capture(apply)({"params": params}, batch)
        assert_type(losses, jl.LossCollector)
        return losses.add_loss("error", jl.mean_squared_error(y, batch, reduction="parts"))

    (total, losses), _ = jl.accumulate_value_and_grad(loss_fn, 4)(params, x)
    assert_type(total, Array)
    assert_type(losses, jl.LossCollector)

    def with_aux(params: Any, batch: Array) -> tuple[jl.LossCollector, Array]:
        return loss_fn(params, batch), batch

    step = jl.accumulate_value_and_grad(with_aux, 4, has_aux=True)
    (_, (losses, _)), _ = step(params, x)
    assert_type(losses, jl.LossCollector)
