"""Strict JAX, on eight forced host devices of a CPU."""

import gc
import platform
import time

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Nearly all of the time goes into programs that run once. So XLA optimises its graph as always, and
# makes the same kernels and buffers, but LLVM does not optimise the code of a kernel. What has been
# compiled once is in pytest's cache, for the other processes of a run and for the next runs.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# One needs Python 3.7 with TensorFlow 1.15, the other is a process of its own.
collect_ignore = ["record_tensorflow.py", "worker.py"]

WEEK = 7 * 24 * 3600  # seconds


def pytest_configure(config):
    programs = config.cache.mkdir(f"programs_{platform.node()}")  # They are for this machine's CPU.
    jax.config.update("jax_compilation_cache_dir", str(programs))
    if not hasattr(config, "workerinput"):  # The process that starts the others cleans up.
        for program in programs.iterdir():
            if time.time() - program.stat().st_mtime > WEEK:
                program.unlink()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Neighbours stay together, because they share traces."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


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
