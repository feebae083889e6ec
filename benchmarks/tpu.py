"""What the TPU's compiler predicts for rows sharded over a slice. No TPU is needed."""

import functools
import re
from typing import Any

import jax
import numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import workloads
from benchmarks.peers import JaxPeer

HEADER = ("bytes accessed / bytes of arguments", "all-reduces", "all-gathers", "temporaries")
ROWS = 256  # On each chip.


def sharding(topology_name: str) -> NamedSharding:
    """The rows over all chips of a slice. Raises an error where there is no libtpu."""
    chips = get_topology_desc(platform="tpu", topology_name=topology_name).devices
    return NamedSharding(Mesh(np.array(chips), ("rows",)), PartitionSpec("rows"))


def measure(peer: JaxPeer, name: str, mode: str, sharding: NamedSharding) -> list[Any]:
    """The numbers that ``HEADER`` names, for one chip."""
    rows, columns = ROWS * sharding.mesh.size, workloads.shape_of(name)[1]
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    inputs = workloads.make(name, (1, columns))
    arrays = [struct((rows, *a.shape[1:]), a.dtype) for a in inputs]
    compiled = peer.jitted(name, mode).lower(*arrays).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    accessed = compiled.cost_analysis()["bytes accessed"] / memory.argument_size_in_bytes
    counts = [len(re.findall(rf" all-{k}(?:-start)?\(", text)) for k in ("reduce", "gather")]
    return [f"{accessed:.2f}", *counts, memory.temp_size_in_bytes]
