"""How fast memory allows a loss to be: a plain C loop for each, with one thread on each core."""

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.workloads import weighted_mean

FLAGS = "-O3 -march=native -ffast-math -fopenmp-simd -fPIC"

SOURCE = r"""
#include <float.h>
#include <math.h>
#define SIMD(...) _Pragma(#__VA_ARGS__) for (long i = 0; i < n; i++)
#define LOOP(NAME, ...)                                                                    \
  void NAME(const float *p, const float *y, const float *w, long begin, long end, long n,  \
            double *out) {                                                                 \
    for (long r = begin; r < end; r++) {                                                   \
      const float *P = p + r * n, *Y = y + r * n, *W = w + r * n;                          \
      __VA_ARGS__                                                                          \
    }                                                                                      \
  }
#define ELEMENTS(NAME, ...)                                                                \
  LOOP(NAME, float sum = 0; int count = 0;                                                 \
       SIMD(omp simd reduction(+ : sum, count)) {                                          \
         sum += W[i] != 0 ? (__VA_ARGS__) * W[i] : 0; count += W[i] != 0;                  \
       }                                                                                   \
       out[0] += sum; out[1] += count;)
#define ROWS(NAME, ...)                                                                    \
  LOOP(NAME, float loss, sum = 0, max_logit = -FLT_MAX; __VA_ARGS__                        \
       out[0] += w[r] != 0 ? loss * w[r] : 0; out[1] += w[r] != 0;)
#define LOG_SUM_EXP                                                                        \
  SIMD(omp simd reduction(max : max_logit)) max_logit = P[i] > max_logit ? P[i] : max_logit;\
  SIMD(omp simd reduction(+ : sum)) sum += expf(P[i] - max_logit);                         \
  float lse = max_logit + logf(sum);

ELEMENTS(compute_weighted_loss, P[i])
ELEMENTS(absolute_difference, fabsf(P[i] - Y[i]))
ELEMENTS(mean_squared_error, (P[i] - Y[i]) * (P[i] - Y[i]))
ELEMENTS(hinge_loss, fmaxf(0, 1 - (2 * Y[i] - 1) * P[i]))
ELEMENTS(sigmoid_cross_entropy, fmaxf(P[i], 0) - P[i] * Y[i] + log1pf(expf(-fabsf(P[i]))))
ELEMENTS(log_loss, -Y[i] * logf(P[i] + 1e-7f) - (1 - Y[i]) * logf(1 - P[i] + 1e-7f))
ROWS(mean_pairwise_squared_error, float mean = 0;
     SIMD(omp simd reduction(+ : mean)) mean += (P[i] - Y[i]) / n;
     SIMD(omp simd reduction(+ : sum)) sum += (P[i] - Y[i] - mean) * (P[i] - Y[i] - mean);
     loss = 2 * sum / n;)
ROWS(cosine_distance, SIMD(omp simd reduction(+ : sum)) sum += P[i] * Y[i]; loss = 1 - sum;)
ROWS(softmax_cross_entropy, LOG_SUM_EXP loss = 0;
     SIMD(omp simd reduction(+ : loss)) loss += Y[i] * (lse - P[i]);)
ROWS(sparse_softmax_cross_entropy, LOG_SUM_EXP loss = lse - P[((const int *)y)[r]];)
"""


class NumPyLoop:
    """NumPy on one thread, where there is no C compiler."""

    def __init__(self, name: str):
        self.name, self.notes = name, {}

    def arrays(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return inputs

    def function(self, name: str, mode: str) -> Callable[..., float] | None:
        forward = functools.partial(weighted_mean, name, dtype=np.float32)
        return forward if mode == "forward" else None


class CLoop(NumPyLoop):
    """One function in C for each loss. Raises an error where there is no C compiler."""

    def __init__(self, name: str):
        super().__init__(name)
        self.pool = ThreadPoolExecutor(os.cpu_count())
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "loops.c").write_text(SOURCE)
            # Linking with -ffast-math would make the whole process treat tiny numbers as zero.
            for command in (f"cc {FLAGS} -c loops.c", "cc -shared -o loops.so loops.o -lm"):
                subprocess.run(command.split(), cwd=folder, capture_output=True, check=True)
            self.library = ctypes.CDLL(str(Path(folder, "loops.so")))

    def function(self, name: str, mode: str) -> Callable[..., float] | None:
        loop = getattr(self.library, name)
        loop.argtypes = 3 * [ctypes.c_void_p] + 3 * [ctypes.c_long] + [ctypes.c_void_p]

        def forward(*inputs: np.ndarray) -> float:
            rows, columns = inputs[0].shape
            threads = min(os.cpu_count() or 1, rows) if inputs[0].nbytes > 2**18 else 1
            out, (first, *rest) = np.zeros((threads, 2)), [a.ctypes.data for a in inputs]

            def work(i: int) -> None:
                cut = rows * i // threads, rows * (i + 1) // threads
                loop(first, rest[0], rest[-1], *cut, columns, out[i].ctypes.data)

            work(0) if threads == 1 else list(self.pool.map(work, range(threads)))
            total, count = out.sum(0)
            return total / count

        return forward if mode == "forward" else None
