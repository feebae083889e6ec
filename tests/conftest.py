"""Strict JAX, on eight forced host devices."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

collect_ignore = ["record_tensorflow.py"]  # Python 3.7 with TensorFlow 1.15
