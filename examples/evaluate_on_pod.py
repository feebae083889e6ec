"""Evaluate over a dataset on one CPU, in several processes, or on a TPU pod, by the same program.

Each process gets a part of the handwritten digits, a fifth of which have no label (weight zero). It
pads its part with rows of weight zero, so that all processes take the same number of steps of the
same shape. Every step adds totals and counts over all devices, and nothing is divided before the
end. So the means printed are those of the labelled digits, whatever the number of devices.

On one machine::

    python examples/evaluate_on_pod.py

As two processes on one machine, each started with its own id (0 and 1)::

    python examples/evaluate_on_pod.py --coordinator localhost:9876 --num-processes 2 --process-id 0

On a TPU pod or under Slurm, where JAX finds the processes by itself, on every host::

    python examples/evaluate_on_pod.py --distributed
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from tqdm import trange

import jaxlosses as jl

LEARNED_FROM = 1000  # How many digits the classifier learns from; the others are evaluated.
UNLABELLED = -1


def load() -> tuple[np.ndarray, np.ndarray]:
    """Pixels from 0 to 1 of every digit, and which digit it is."""
    pixels, digits = load_digits(return_X_y=True)
    return np.asarray(pixels, np.float32) / 16, np.asarray(digits, np.int32)


def train(images: np.ndarray, labels: np.ndarray, steps: int = 100) -> Any:
    """A linear classifier; every process learns the same one."""
    optimizer = optax.adam(0.05)
    params = {"kernel": jnp.zeros((images.shape[1], 10)), "bias": jnp.zeros(10)}

    def loss(params: Any) -> Array:
        return jl.sparse_softmax_cross_entropy(images @ params["kernel"] + params["bias"], labels)

    @jax.jit
    def run(params: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, steps)[0][0]

    return jax.device_get(run(params))


@jax.jit
def evaluate(params: Any, batch: tuple[Array, Array], present: Array) -> jl.LossCollector:
    """The loss and the accuracy of one batch over all devices, as undivided means."""
    images, labels = batch
    logits = images @ params["kernel"] + params["bias"]
    weights = present & (labels != UNLABELLED)
    xent = jl.sparse_softmax_cross_entropy(logits, labels, weights, reduction="parts")
    right = jl.compute_weighted_loss(jnp.argmax(logits, -1) == labels, weights, reduction="parts")
    return jl.LossCollector().add_loss("cross_entropy", xent).add_metric("accuracy", right)


def main() -> None:
    """Join the other processes if there are any, and evaluate."""
    parser = argparse.ArgumentParser(description="Evaluate a classifier of digits.")
    parser.add_argument("--distributed", action="store_true", help="JAX finds the processes")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--batch", type=int, default=32, help="rows on each device")
    options = parser.parse_args()
    if options.distributed or options.coordinator:
        jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id)

    images, labels = load()
    params = train(images[:LEARNED_FROM], labels[:LEARNED_FROM])
    labels[::5] = UNLABELLED
    rank, processes = jax.process_index(), jax.process_count()
    part = images[LEARNED_FROM + rank :: processes], labels[LEARNED_FROM + rank :: processes]

    rows = options.batch * jax.local_device_count()
    longest = -(-(len(images) - LEARNED_FROM) // processes)
    steps = -(-longest // rows)
    padded = jl.pad_batch(part, steps * rows)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    to_devices = functools.partial(jax.make_array_from_process_local_data, sharding)
    losses = jl.LossCollector()
    for i in trange(steps, disable=rank > 0, desc="evaluating"):
        batch = jax.tree.map(lambda leaf, i=i: to_devices(leaf[i * rows : (i + 1) * rows]), padded)
        losses += evaluate(params, *batch)
    if rank == 0:
        print(f"\nOn {jax.device_count()} devices of {processes} processes\n{losses}")


if __name__ == "__main__":
    main()
