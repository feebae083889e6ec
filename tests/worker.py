"""The program of one of several processes; ``test_processes.py`` starts them.

Each has a part of the data. It prints value, count and gradient of a loss over all processes, as
one line of JSON.
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxlosses as jl

coordinator, num_processes, process_id, path = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
if int(num_processes) > 1:
    jax.distributed.initialize(coordinator, int(num_processes), int(process_id))

with np.load(path) as data:
    rows = {name: data[name] for name in data}
part = {name: np.array_split(a, int(num_processes))[int(process_id)] for name, a in rows.items()}
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
batch = {k: jax.make_array_from_process_local_data(sharding, a) for k, a in part.items()}


def loss(scale, batch, axis_name=None):
    return jl.sparse_softmax_cross_entropy(
        scale * batch["logits"],
        batch["labels"],
        batch["weights"],
        reduction="parts",
        axis_name=axis_name,
    )


def loss_in_shard_map(scale, batch):
    specs = (PartitionSpec(), PartitionSpec("data"))
    mapped = jax.shard_map(
        lambda *a: loss(*a, axis_name="data"),
        mesh=sharding.mesh,
        in_specs=specs,
        out_specs=PartitionSpec(),
    )
    return mapped(scale, batch)


results = []
for function in (loss, loss_in_shard_map):
    mean = jax.jit(function)(np.float32(0.5), batch)
    derivative = jax.jit(jax.grad(lambda *a, f=function: f(*a).value))(np.float32(0.5), batch)
    results.append([float(mean.value), float(mean.count), float(derivative)])
print(json.dumps(results))
