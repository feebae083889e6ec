"""Losses over several JAX processes on this machine, each of which has a part of the data."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import worker
from jax.sharding import Mesh

EXAMPLE = Path(__file__).parents[1] / "examples" / "evaluate_on_pod.py"


def run(*commands):
    """Run commands at the same time, and return what each of them prints."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}
    environment = os.environ | settings
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for command in commands
    ]
    outputs = [process.communicate(timeout=240) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]


def coordinator():
    """An address with a port that is free."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def test_two_processes_agree_with_one(tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.random(64).astype(np.float32)
    weights[:30] = 0  # Only two rows of the first process count.
    logits = rng.normal(size=(64, 5)).astype(np.float32)
    labels = rng.integers(0, 5, 64).astype(np.int32)
    batch = {"logits": logits, "labels": labels, "weights": weights}
    data, address = tmp_path / "data.npz", coordinator()
    np.savez(data, **batch)
    found = run(*([worker.__file__, address, 2, rank, data] for rank in (0, 1)))
    expected = worker.values_counts_and_gradients(batch, Mesh(jax.devices()[:1], ("data",)))
    assert expected[0][1] == 34
    np.testing.assert_allclose(expected[0], expected[1], rtol=1e-6)
    for output in found:
        np.testing.assert_allclose(json.loads(output.splitlines()[-1]), expected, rtol=1e-6)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here")
def test_the_example_gives_the_same_table_on_two_processes():
    address = coordinator()
    options = ["--coordinator", address, "--num-processes", 2, "--process-id"]
    alone, first, second = run([EXAMPLE], *([EXAMPLE, *options, rank] for rank in (0, 1)))
    table = re.compile(r"loss .*", re.DOTALL)
    assert "On 2 devices of 2 processes" in first
    assert table.search(first)[0] == table.search(alone)[0]
    assert "637" in first
    assert "loss" not in second
