"""What a TPU would run, compiled ahead of time: no TPU is needed, only libtpu."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from arguments import cases
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from plain import differentiated, plain

import jaxlosses as jl

pytest.importorskip("libtpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There is no machine to ask what it is.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Nor one that only one could use.

# Bytes accessed per byte of the arguments, as the compiler counts them: rows are reduced twice.
READS = {
    "cosine_distance": 1.02,
    "softmax_cross_entropy": 3.55,
    "sparse_softmax_cross_entropy": 6.05,
    "mean_pairwise_squared_error": 6.05,
}
ALL_REDUCE = {1: "all-reduce f32[]", 2: "all-reduce (f32[], f32[])"}  # Of so many sums.
CASES = {name: case for name, case in cases(jl).items() if not case.computes}


@pytest.fixture(scope="module", params=["v5e:4x4", "v5e:16x16"])
def devices(request):
    return np.array(topologies.get_topology_desc(request.param, "tpu").devices)


def compiled(function, arguments):
    return jax.jit(function).lower(*arguments).compile()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("spec", [("data",), ("data", "model")], ids=["rows", "rows and columns"])
@pytest.mark.parametrize("name", CASES)
def test_a_slice_reads_once_and_talks_once(name, spec, dtype, devices):
    case, shape = CASES[name], (256 * devices.size, 4096)
    mesh = Mesh(devices.reshape((-1, 4) if len(spec) == 2 else -1), spec)
    arguments = programs.abstract_arguments(case, shape, dtype, "full", mesh, *spec)
    program = compiled(case.loss, arguments)
    memory = program.memory_analysis()
    reads = program.cost_analysis()["bytes accessed"] / memory.argument_size_in_bytes
    assert reads <= READS.get(name, 1.002)
    assert memory.temp_size_in_bytes < 2**20
    assert "all-gather" not in program.as_text()
    found = programs.collectives(program)
    if len(spec) == 1 or name not in READS:
        assert found == [ALL_REDUCE[programs.num_sums(case, "full")]]
    else:
        plain_program = compiled(plain(name, case), arguments)
        assert len(found) <= len(programs.collectives(plain_program)) + 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("weights", ["none", "full"])
@pytest.mark.parametrize("name", CASES)
def test_a_gradient_needs_no_more_than_the_plain_way(name, weights, dtype):
    """Of arrays that are too large for a chip's fast memory."""
    chips = np.array(topologies.get_topology_desc("v5e:4x4", "tpu").devices)
    case, shape = CASES[name], (16384 * chips.size, 8192)
    mesh = Mesh(chips, ("data",))
    arguments = programs.abstract_arguments(case, shape, dtype, weights, mesh, "data")
    ours, theirs = (
        compiled(differentiated(loss, case.floats[:1]), arguments)
        for loss in (case.loss, plain(name, case))
    )
    assert programs.count(ours).bytes <= 1.05 * programs.count(theirs).bytes
    assert programs.collectives(ours) == [ALL_REDUCE[programs.num_sums(case, weights)]]


@pytest.mark.parametrize(
    ("kind", "of_hidden", "of_kernel", "block_size"),
    [
        (AxisType.Auto, ("x",), (), None),
        (AxisType.Explicit, (), (None, "x"), None),
        (AxisType.Auto, (), (None, "x"), (256, None)),
    ],
    ids=["tokens", "classes", "classes that do not show"],
)
def test_a_vocabulary_needs_one_block_of_logits(kind, of_hidden, of_kernel, block_size):
    devices = topologies.get_topology_desc("v5e:4x4", "tpu").devices
    mesh = Mesh(np.array(devices), ("x",), axis_types=(kind,))
    hidden, kernel, labels = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, dtype, spec in (
            ((65536, 4096), jnp.bfloat16, of_hidden),
            ((4096, 131072), jnp.bfloat16, of_kernel),
            ((65536,), jnp.int32, of_hidden),
        )
    )

    with jax.set_mesh(mesh):
        loss = functools.partial(jl.linear_softmax_cross_entropy, block_size=block_size)
        shardings = (NamedSharding(mesh, PartitionSpec()), (hidden.sharding, kernel.sharding))
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=shardings)
        program = gradient.lower(hidden, kernel, labels).compile()
    assert "all-gather" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 0.15e9
