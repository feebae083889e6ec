"""The program of one of several processes; ``test_processes.py`` starts them.

Each has a part of the data. It prints value, count and gradient of a loss over all processes, as
one line of JSON.
"""

import functools
import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxlosses as jl


def loss(scale, batch, axis_name=None):
    return jl.sparse_softmax_cross_entropy(
        scale * batch["logits"],
        batch["labels"],
        batch["weights"],
        reduction="parts",
        axis_name=axis_name,
    )


def values_counts_and_gradients(batch, mesh):
    """Of the loss of sharded arrays, and of the loss in ``shard_map``."""
    loss_in_shard_map = jax.shard_map(
        functools.partial(loss, axis_name="data"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )

    def value_and_count(scale, batch, function):
        mean = function(scale, batch)
        return mean.value, mean.count

    @jax.jit
    def run(*args):
        run_one = jax.value_and_grad(value_and_count, has_aux=True)
        return [run_one(*args, function) for function in (loss, loss_in_shard_map)]

    results = run(np.float32(0.5), batch)
    return [[float(number) for number in jax.tree.leaves(result)] for result in results]


def main():
    coordinator, num_processes, process_id, path = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    num_processes, process_id = int(num_processes), int(process_id)
    jax.distributed.initialize(coordinator, num_processes, process_id)
    with np.load(path) as data:
        part = {name: np.array_split(data[name], num_processes)[process_id] for name in data}
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batch = {k: jax.make_array_from_process_local_data(sharding, a) for k, a in part.items()}
    print(json.dumps(values_counts_and_gradients(batch, mesh)))


if __name__ == "__main__":
    main()
