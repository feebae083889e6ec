"""Strict JAX, on eight forced host devices of a CPU."""

import gc
import os
import tempfile

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Nearly all of the time goes into programs that run once. So XLA optimises its graph as always, and
# makes the same kernels and buffers, but LLVM does not optimise the code of a kernel. No process
# compiles what another one has compiled in the same run.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# One needs Python 3.7 with TensorFlow 1.15, the other is a process of its own.
collect_ignore = ["record_tensorflow.py", "worker.py"]


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        programs = tempfile.TemporaryDirectory()
        config.add_cleanup(programs.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def pytest_collection_finish():
    gc.freeze()  # What is imported by now stays, and need not be searched for garbage.
    gc.set_threshold(20_000, 20, 20)  # Nor what JAX keeps of programs, again and again.


@pytest.fixture(scope="module")
def full_optimization():
    """For tests of the digits that a user gets."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
