"""Means of segments on meshes. ``laws.py`` has their values."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlosses as jl

P = PartitionSpec
RNG = np.random.default_rng(0)
LOSSES, IDS = RNG.normal(size=(8, 4)).astype(np.float32), RNG.integers(-1, 4, (8, 4)).astype("i4")


def macro(losses, ids):
    """The mean of each segment over all rows, and over each row, and gradients."""

    def total(losses):
        means = jl.segment_means(losses, ids, 3)
        rows = jax.vmap(functools.partial(jl.segment_means, num_segments=3))(losses, ids)
        return means.macro().value + rows.macro().value, (means, rows)

    return jax.value_and_grad(total, has_aux=True)(losses)


@functools.cache
def expected_macro():
    return jax.jit(macro)(LOSSES, IDS)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("data"), P("data", "model"), P(None, "model")], ids=str)
def test_sharded_segments_are_local(kind, spec):
    expected = expected_macro()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        placed = jax.device_put((LOSSES, IDS), NamedSharding(mesh, spec))
        chex.assert_trees_all_close(jax.jit(macro)(*placed), expected, rtol=1e-5)


@pytest.mark.parametrize("axes", [{"data"}, {"data", "model"}], ids=["partly", "all"])
def test_members_of_an_axis_add_up(axes):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def total(losses, ids):
        return jl.segment_means(losses, ids, 3).psum("data").macro().value

    def whole(losses):
        return jl.segment_means(losses, IDS, 3).macro().value

    rows = P("data")
    mapped = jax.shard_map(total, mesh=mesh, axis_names=axes, in_specs=rows, out_specs=P())
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(mapped))(LOSSES, IDS)
    expected = jax.jit(jax.value_and_grad(whole))(LOSSES)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_arguments_are_checked():
    for arguments, message in (
        ((LOSSES, IDS[0], 3), r"segment_ids must have .* shape \(8, 4\), got \(4,\)"),
        ((LOSSES, LOSSES, 3), "segment_ids must be integers.* dtype float32"),
        ((LOSSES, IDS, 0), r"num_segments must be from 1 to 2\*\*31 - 1, got 0"),
        ((LOSSES, IDS, 2**40), "num_segments must be from 1"),
        ((LOSSES, IDS, 2.0), "num_segments must be an integer, got 2.0"),
        ((LOSSES, IDS, 3, np.ones(3)), r"weights must be .* \(3,\)"),
        (("a", IDS, 3), "losses must be an array"),
        ((LOSSES, None, 3), "segment_ids must be an array"),
    ):
        with pytest.raises(ValueError, match=message):
            jl.segment_means(*arguments)


def test_narrow_ids_and_low_precision():
    """An int8 cannot be compared with 200, and a bfloat16 cannot hold the sum."""
    losses, ids = np.ones(1000, jnp.bfloat16), np.zeros(1000, np.int8)
    means = jax.device_get(jax.jit(jl.segment_means, static_argnums=2)(losses, ids, 200))
    assert means.total.dtype == np.float32
    assert (means.total[0], means.count[0], means.count[1]) == (1000, 1000, 0)


def test_long_segments_lose_no_digits():
    """Ones that are added one by one stop at 2**24."""
    size, compiled = 2**25, jax.jit(jl.segment_means, static_argnums=2)
    means = jax.device_get(compiled(np.ones(size, jnp.bfloat16), np.zeros(size, np.int8), 3))
    assert (means.total[0], means.count[0]) == (size, size)
    rng = np.random.default_rng(0)
    losses, ids = rng.random(100_001, np.float32), rng.integers(0, 3, 100_001).astype(np.int32)
    totals = [losses[ids == i].astype(np.float64).sum() for i in range(3)]
    np.testing.assert_allclose(compiled(losses, ids, 3).total, totals, rtol=3e-7)
