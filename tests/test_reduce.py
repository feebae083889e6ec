"""The memory of compiled programs, and sums whose lengths are not a multiple of a block."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arguments import cases
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlosses as jl
from jaxlosses import _reduce

CASES = {name: case for name, case in cases(jl).items() if not case.computes}
EVEN, ODD = (2048, 8192), (331, 65537)  # Two blocks in a row; a row that no block divides.


def compiled(name, shape, dtype, weights_dtype, differentiate):
    """The program of a loss on one device, which is not run."""
    case = CASES[name]
    arguments = [
        jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        if spec.domain == "class id"
        else jax.ShapeDtypeStruct(shape, dtype)
        for spec in case.inputs.values()
    ]
    by_row = any(spec.inner for spec in case.inputs.values())
    weights = jax.ShapeDtypeStruct(shape[:1] if by_row else shape, weights_dtype)
    loss = jax.value_and_grad(case.loss) if differentiate else case.loss
    return jax.jit(loss).lower(*arguments, weights).compile()


@pytest.mark.parametrize("differentiate", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_temporaries_are_small(name, dtype, differentiate):
    """There is no copy of an input, in any dtype, and no array of losses."""
    for shape, weights_dtype in ((EVEN, jnp.float32), (ODD, jnp.bool_)):
        program = compiled(name, shape, dtype, weights_dtype, differentiate)
        assert program.memory_analysis().temp_size_in_bytes < 2**20


def test_a_sum_without_a_count_is_fused_too():
    """XLA would remove its unused count, and then would not fuse the sum."""
    inputs = [jax.ShapeDtypeStruct(EVEN, jnp.float32)] * 3
    for reduction in ("sum", "average"):

        def loss(*arguments, reduction=reduction):
            return jl.mean_squared_error(*arguments, reduction=reduction)

        program = jax.jit(loss).lower(*inputs).compile()
        assert program.memory_analysis().temp_size_in_bytes < 2**20


SHAPES = [
    (),
    (1,),
    (4095,),
    (4097,),
    (3, 5, 7, 11),
    (257, 300),
    (300, 257),
    (7, 1, 4099),
    (2, 1_000_001),
    (1_000_001, 2),
    (65_537,),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_counts_are_right_for_any_shape(shape, full_optimization):
    rng = np.random.default_rng(0)
    losses = np.asarray(rng.normal(size=shape), np.float32)
    full = np.asarray(rng.random(shape) * (rng.random(shape) > 0.3), np.float32)
    rows = full[(slice(None), *(slice(1) for _ in shape[1:]))] if shape else full
    columns = full[..., :1] if shape else full
    tried = (1.0, full, full > 0, rows, columns)
    loss = jl.compute_weighted_loss

    @jax.jit
    def of_all(losses, tried):
        return [[loss(losses, w, reduction=name) for name in ("parts", "sum")] for w in tried]

    for weights, (parts, value) in zip(tried, of_all(losses, tried), strict=True):
        w = np.asarray(weights, np.float64)
        w = np.broadcast_to(w.reshape(w.shape + (1,) * (len(shape) - w.ndim)), shape)
        total, count = (w * losses).sum(), (w != 0).sum()
        scale = np.abs(w * losses).sum() + 1e-30
        assert float(parts.count) == count
        np.testing.assert_allclose(parts.total, total, rtol=0, atol=2e-7 * scale)
        np.testing.assert_allclose(value, total, rtol=0, atol=2e-7 * scale)


@pytest.mark.parametrize(
    "shape", [(3, 1_000_001), (1_000_001, 3), (1, 4097), (3, 65_537), (5, 2, 3)], ids=str
)
def test_reductions_of_rows_are_right_for_any_length(shape, full_optimization):
    """A loss reduces each row of logits with the same primitive."""
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    labels = np.zeros(shape[:-1], np.int32)
    losses = jl.sparse_softmax_cross_entropy(logits, labels, reduction="none")
    exact = logits.astype(np.float64)
    expected = np.log(np.exp(exact).sum(-1)) - exact[..., 0]
    # The logarithm of a float32 near 1 has the absolute error of that float32.
    np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=2e-7)


def test_counts_past_the_integers_of_float32_are_exact(full_optimization):
    """A float32 that is counted up one by one cannot grow past 2**24."""
    size = 2**24 + 2
    losses, keep = np.ones(size, np.float32), np.ones(size, bool)
    loss = functools.partial(jl.compute_weighted_loss, reduction="parts")
    parts = loss(losses, keep)
    assert float(parts.count) == float(parts.total) == size
    for axis, weights in ((0, keep[None]), (None, keep)):
        many = jax.vmap(loss, (0, axis))(losses[None], weights)
        np.testing.assert_array_equal(many.count, [size])


def test_counts_of_several_devices_have_64_bits():
    """Together they may hold more than 2**31 numbers, too many to try it here."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    losses, weights = (jax.ShapeDtypeStruct((64, 8), t, sharding=rows) for t in (jnp.float32, bool))
    program = jax.jit(jl.compute_weighted_loss).lower(losses, weights).compile().as_text()
    assert re.search(r"= s64\[\]\S* all-reduce", program)
    assert not re.search(r"= s32\[\]\S* all-reduce", program)


def test_maximum_sum_and_pick_in_one_reduction():
    """A CPU never takes this way; infinities are limits, and NaN stays NaN."""
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=(6, 1000)) * 9, np.float32)
    x[1, 5], x[2], x[3, 7:9], x[4, 3] = -np.inf, -np.inf, np.inf, np.nan
    mask = np.arange(1000) == np.array([3, 4, 5, 6, 7, -1])[:, None]
    found = jax.jit(_reduce.max_sum_exp_and_pick)(x, mask)
    maximum, total, picked = map(np.asarray, found)
    np.testing.assert_array_equal(maximum, np.max(x, -1))
    np.testing.assert_array_equal(picked, np.where(mask, x, 0).sum(-1))
    with np.errstate(invalid="ignore"):
        relative = np.where(x == maximum[:, None], 0, x - maximum[:, None])
    np.testing.assert_allclose(total, np.exp(np.float64(relative)).sum(-1), rtol=1e-6)
    assert np.isnan(total[4])
