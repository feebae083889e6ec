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
from plain import differentiated, plain, through_logits

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


# How many chips "data" and "model" have, how the kernel is sharded, and of a step: megabytes of
# temporaries, bytes of memory over those of the plain way, gigabytes and number of collectives.
LAYOUTS = {
    "replicated": ((256, 1), (), (135, 0.9, 1.08, 33)),
    "features over data": ((256, 1), ("data",), (169, 0.8, 3.23, 97)),
    "classes over data": ((256, 1), (None, "data"), (144, 0.7, 3.23, 97)),
    "classes over model": ((16, 16), (None, "model"), (237, 1.15, 0.61, 20)),
    "both": ((16, 16), ("data", "model"), (203, 0.4, 0.68, 37)),
}


def language_model_step(layout, kind, loss, kernel_dtype=jnp.bfloat16):
    """Value and gradients of a loss of a million tokens and 131072 classes, on 256 chips."""
    devices = np.array(topologies.get_topology_desc("v5e:16x16", "tpu").devices)
    num_devices, of_kernel, _ = LAYOUTS[layout]
    mesh = Mesh(devices.reshape(num_devices), ("data", "model"), axis_types=(kind, kind))
    hidden, kernel, labels = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, dtype, spec in (
            ((2**20, 4096), jnp.bfloat16, ("data",)),
            ((4096, 2**17), kernel_dtype, of_kernel),
            ((2**20,), jnp.int32, ("data",)),
        )
    )
    shardings = (NamedSharding(mesh, PartitionSpec()), (hidden.sharding, kernel.sharding))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=shardings)
        return gradient.lower(hidden, kernel, labels).compile()


def told(layout):
    in_specs = (PartitionSpec("data"), PartitionSpec(*LAYOUTS[layout][1]))
    return functools.partial(jl.linear_softmax_cross_entropy, in_specs=in_specs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_vocabulary_needs_one_block_of_logits(layout):
    _, _, (temporaries, ratio, collective_gigabytes, num_collectives) = LAYOUTS[layout]
    program = language_model_step(layout, AxisType.Auto, told(layout))
    counts = programs.count(program)
    plain_counts = programs.count(language_model_step(layout, AxisType.Auto, through_logits))
    assert program.memory_analysis().temp_size_in_bytes < temporaries * 1e6 < 256e6
    assert counts.bytes < ratio * plain_counts.bytes
    assert counts.collective_bytes < collective_gigabytes * 1e9
    assert counts.collective_bytes < 1.6 * plain_counts.collective_bytes
    assert counts.collectives <= num_collectives < 130


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kernel_in_float32_is_cast_in_blocks(layout):
    """Flax's usual pair: a TPU multiplies in bfloat16, but keeps no copy of the kernel in it."""
    ours, theirs = (
        language_model_step(layout, AxisType.Auto, loss, jnp.float32)
        for loss in (told(layout), through_logits)
    )
    # Where tokens are cut, every block needs all of the kernel, which is small there.
    assert ours.memory_analysis().temp_size_in_bytes < 305e6
    assert programs.count(ours).bytes < 1.11 * programs.count(theirs).bytes


def test_an_explicit_mesh_and_a_shard_map_need_no_more():
    layout = "classes over model"
    names = {"axis_name": "data", "class_axis_name": "model"}
    loss = functools.partial(jl.linear_softmax_cross_entropy, **names)
    rows, of_kernel = PartitionSpec("data"), PartitionSpec(*LAYOUTS[layout][1])
    specs = {"in_specs": (rows, of_kernel, rows), "out_specs": PartitionSpec()}
    mapped = language_model_step(layout, AxisType.Auto, jax.shard_map(loss, **specs))
    shown = language_model_step(layout, AxisType.Explicit, jl.linear_softmax_cross_entropy)
    _, _, (temporaries, _, collective_gigabytes, num_collectives) = LAYOUTS[layout]
    for program in (mapped, shown):
        counts = programs.count(program)
        assert program.memory_analysis().temp_size_in_bytes < temporaries * 1e6
        assert counts.collective_bytes < collective_gigabytes * 1e9
        assert counts.collectives <= num_collectives
