"""A last layer, sums over its logits, and the statistics that losses are computed from.

``_linear_device.py`` computes the sums over blocks of logits, and ``_linear_derivative.py`` has the
rules by which JAX transforms them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlosses._blocks import BlockSize
from jaxlosses._layout import Kind, Layout
from jaxlosses._logits import shifted, times_logit


class Statistics(NamedTuple):
    """Numbers of each token's logits; all but the first are relative to the largest logit."""

    max_logit: Array
    log_sum_exp_shifted: Array
    label_logit_shifted: Array
    mean_logit_shifted: Array | None  # None if the layer does not need it.
    expected_logit_shifted: Array | None  # Weighted by the softmax; None if it is not needed.


class Residuals(NamedTuple):
    """What the derivative of the statistics is computed from, beside tangents or cotangents.

    A token whose ``log_sum_exp_shifted`` is infinity is masked: whatever it holds, it has no
    tangent and no gradient.
    """

    hidden: Array
    kernel: Array
    bias: Array
    labels: Array
    max_logit: Array
    log_sum_exp_shifted: Array
    expected_logit_shifted: Array  # Any number if it is not needed.

    @property
    def is_masked(self) -> Array:
        """Which tokens are masked."""
        return jnp.isposinf(self.log_sum_exp_shifted)


KINDS: dict[str, Kind] = {
    "hidden": "hidden",
    "kernel": "kernel",
    "bias": "bias",
    "labels": "tokens",
    "max_logit": "tokens",
    "log_sum_exp_shifted": "tokens",
    "expected_logit_shifted": "tokens",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """The static options of a last layer, fixed when the program is compiled.

    Attributes:
        layout: How the arrays are sharded.
        classes: How many classes there are, on all devices.
        block_size: How many classes or tokens a block has, as the caller asked.
        soft_cap: Logits stay between minus this and this.
        temperature: Capped logits are divided by it.
        has_bias: Whether the bias is used.
        needs_mean: Whether the mean logit is a statistic.
        needs_expected: Whether the expected logit is a statistic.
        masks_all_absent: Whether all tokens that are not present are masked, not only those whose
            numbers are not finite.
        matmul_precision: The ``jax.default_matmul_precision`` at the call.
    """

    layout: Layout
    classes: int
    block_size: BlockSize = None
    soft_cap: float | None = None
    temperature: float = 1.0
    has_bias: bool = True
    needs_mean: bool = False
    needs_expected: bool = False
    masks_all_absent: bool = False
    matmul_precision: Any = None

    @property
    def num_statistics(self) -> int:
        """How many statistics a token has."""
        return 3 + self.needs_mean + self.needs_expected

    def final(self, x: Array) -> Array:
        """The logits that the softmax takes: with soft cap and temperature applied."""
        x = x if self.soft_cap is None else self.soft_cap * jnp.tanh(x / self.soft_cap)
        return x if self.temperature == 1 else x / self.temperature

    def named(self, statistics: Sequence[Array]) -> Statistics:
        """Statistics by name, from a list of those that are needed."""
        first, rest = statistics[:3], iter(statistics[3:])
        used = (self.needs_mean, self.needs_expected)
        return Statistics(*first, *(next(rest) if is_used else None for is_used in used))

    def surrogates(self, x: Array, is_label: Array, of_tokens: Residuals) -> list[Array]:
        """Sums over the logits of a block that have the derivatives of the statistics.

        For log-sum-exp it is the sum of ``exp(logit - log-sum-exp)``, with log-sum-exp held
        constant. The derivative of either with respect to a logit is the softmax. For the expected
        logit ``e`` it is the sum of ``softmax * (logit - e)``, with ``e`` held constant too.
        """
        # A NaN in the kernel must not reach the derivative of a masked token either.
        x = self.final(jnp.where(of_tokens.is_masked[..., None], 0, x))
        x_shifted = shifted(x, of_tokens.max_logit[..., None])
        softmax = jnp.exp(x_shifted - of_tokens.log_sum_exp_shifted[..., None])
        terms = [softmax, jnp.where(is_label, x, 0)]
        if self.needs_mean:
            terms.append(x / self.classes)
        if self.needs_expected:
            expected = of_tokens.expected_logit_shifted[..., None]
            terms.append(times_logit(softmax, x_shifted - expected))
        return [jnp.sum(term, -1) for term in terms]


class Sums(NamedTuple):
    """Sums over some classes, relative to the largest of their logits."""

    max_logit: Array
    exp: Array
    label_logit: Array  # Not relative; 0 if the label is none of these classes.
    logit: Array | None  # Divided by the number of all classes.
    exp_times_logit: Array | None

    def relative_to(self, max_logit: Array, fraction: Any) -> Sums:
        """The sums relative to another maximum. They are over this fraction of all classes."""
        correction = shifted(self.max_logit, max_logit)
        scale = jnp.exp(correction)
        exp, logit, exp_times_logit = self.exp * scale, self.logit, self.exp_times_logit
        if logit is not None:
            logit = logit + times_logit(jnp.asarray(fraction, logit.dtype), correction)
        if exp_times_logit is not None:
            exp_times_logit = exp_times_logit * scale + times_logit(exp, correction)
        return Sums(max_logit, exp, self.label_logit, logit, exp_times_logit)

    def over_devices(self, axes: Any, fraction: float) -> Sums:
        """The sums over the classes of all devices; each has this fraction of all classes."""
        if not axes:
            return self
        _, *sums = self.relative_to(max_logit := lax.pmax(self.max_logit, axes), fraction)
        return Sums(max_logit, *jax.tree.map(lambda x: lax.psum(x, axes), sums))

    def statistics(self) -> list[Array]:
        """The statistics, from sums over all classes."""
        found = [self.max_logit, jnp.log(self.exp), shifted(self.label_logit, self.max_logit)]
        found += [] if self.logit is None else [self.logit]
        return found + ([] if self.exp_times_logit is None else [self.exp_times_logit / self.exp])


def split(arrays: Sequence[Any]) -> tuple[Residuals, list[Any]]:
    """The residuals, which come first, and the rest."""
    count = len(Residuals._fields)
    return Residuals(*arrays[:count]), list(arrays[count:])
