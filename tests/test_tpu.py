"""What a TPU would run, compiled ahead of time: no TPU is needed, only libtpu."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arguments import cases
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
CASES = {name: case for name, case in cases(jl).items() if not case.computes}


@pytest.fixture(scope="module", params=["v5e:4x4", "v5e:16x16"])
def devices(request):
    return np.array(topologies.get_topology_desc(request.param, "tpu").devices)


def compiled(name, mesh, spec, dtype):
    """The loss of 4096 by 4096 numbers on every 16 devices, sharded by rows or rows and columns."""
    case, columns = CASES[name], 4096
    rows = columns * mesh.size // 16
    by_row = any(held.inner for held in case.inputs.values())

    def abstract(shape, dtype):
        sharding = NamedSharding(mesh, PartitionSpec(*spec[: len(shape)]))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    arguments = [
        abstract((rows,), jnp.int32)
        if held.domain == "class id"
        else abstract((rows, columns), dtype)
        for held in case.inputs.values()
    ]
    arguments.append(abstract((rows,) if by_row else (rows, columns), jnp.float32))
    return jax.jit(case.loss).lower(*arguments).compile()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("spec", [("data",), ("data", "model")], ids=["rows", "rows and columns"])
@pytest.mark.parametrize("name", CASES)
def test_a_slice_reads_once_and_talks_once(name, spec, dtype, devices):
    shape = (devices.size // 4, 4) if len(spec) == 2 else (devices.size,)
    program = compiled(name, Mesh(devices.reshape(shape), spec), spec, dtype)
    memory, text = program.memory_analysis(), program.as_text()
    reads = program.cost_analysis()["bytes accessed"] / memory.argument_size_in_bytes
    assert reads <= READS.get(name, 1.002)
    assert memory.temp_size_in_bytes < 2**20
    assert "all-gather" not in text
    text = re.sub(r"\{[^{}]*\}", "", text)  # Layouts.
    collectives = re.findall(r"= (.*) all-reduce\(", text)
    if len(spec) == 1 or name not in READS:
        # Of total and count together; the pairwise error is a sum.
        assert collectives == ["f32[]" if "pairwise" in name else "(f32[], f32[])"]


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
