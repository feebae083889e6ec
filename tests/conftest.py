"""Strict JAX, on eight forced host devices of a CPU."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# One needs Python 3.7 with TensorFlow 1.15, the other is a process of its own.
collect_ignore = ["record_tensorflow.py", "worker.py"]
