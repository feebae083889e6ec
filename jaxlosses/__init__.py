"""Weighted losses for JAX: ``tf.contrib.losses`` as pure, jitted, vmap-friendly functions.

The conventions below hold for every loss.

**Shapes.** Losses have shape ``[batch, d1, ..., dN]``. A position is one index into these axes. The
inputs' shapes match exactly; nothing is broadcast.

**Weights** are a scalar, or aligned with the losses from the left: their axes match the leading
axes of the losses, and each has the same length or length 1. A last axis of length 1 beyond the
losses' rank is dropped. Weights may be booleans, integers or negative.

**A zero weight means absent.** A position counts if its weight is not zero. At an absent position,
losses and inputs may be NaN, infinite or an impossible label (a class id outside of
``[0, classes)``), and change neither the value nor a derivative. At a position that counts, such
values propagate. Weights are differentiable: the derivative of ``sum(w * l)`` with respect to a
weight is the loss, also where the weight is zero, if the loss there is finite (else 0). The count
is not differentiable.

**Reductions** of losses ``l`` with weights ``w``:

=================  ===============================================================
``mean``           ``sum(w * l) / count(w != 0)``, 0 where nothing counts;
                   as in TensorFlow
``average``        ``sum(w * l) / sum(w)``, 0 where ``sum(w)`` is 0; as in
                   ``numpy.average``, and in PyTorch with class weights
``sum``            ``sum(w * l)``
``none``           ``w * l``, unreduced; ``axis_name`` has no effect
``parts``          ``WeightedMean(sum(w * l), count(w != 0))``, the undivided
                   ``mean``
``average_parts``  ``WeightedMean(sum(w * l), sum(w))``, the undivided ``average``
=================  ===============================================================

``axis_name`` names mapped axes (of ``shard_map`` or ``vmap``); sums and counts are then over the
members of these axes too.

**Infinite logits** mean that a class is certain (plus infinity) or ruled out (minus infinity). The
loss is 0 if that is right and infinity if it is wrong, and the gradient is that of a large finite
logit. The derivatives with respect to labels and of z-losses are taken as 0 there. If several
logits of a row are the largest one and infinite, they share the probability.

**Dtypes.** Arithmetic and results are in float32, or in float64 if an input or an array of weights
is float64; a Python number does not change the dtype. Integers and booleans are converted to it.
A gradient has the dtype of the argument that it belongs to.

**Options** (keyword-only arguments that are not arrays) are Python values and static under
``jax.jit``. Options of a function lifted by :func:`weighted` may be traced.

**Errors.** An invalid argument raises a ``ValueError`` that names it. A wrong call (an unknown
keyword, a missing argument) raises a ``TypeError`` that names the function.
"""

from importlib.metadata import version as _version

from jaxlosses._accumulate import accumulate_value_and_grad, pad_batch
from jaxlosses._classification import (
    hinge_loss,
    log_loss,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    sparse_softmax_cross_entropy,
)
from jaxlosses._collector import LossCollector
from jaxlosses._linear import LogProbs, linear_log_probs, linear_softmax_cross_entropy
from jaxlosses._mean import WeightedMean
from jaxlosses._regression import (
    absolute_difference,
    compute_weighted_loss,
    cosine_distance,
    mean_pairwise_squared_error,
    mean_squared_error,
)
from jaxlosses._regularization import l1_regularizer, l2_regularizer
from jaxlosses._segments import segment_means
from jaxlosses._weighted import weighted

__version__ = _version("jaxlosses")

__all__ = [
    "LogProbs",
    "LossCollector",
    "WeightedMean",
    "absolute_difference",
    "accumulate_value_and_grad",
    "compute_weighted_loss",
    "cosine_distance",
    "hinge_loss",
    "l1_regularizer",
    "l2_regularizer",
    "linear_log_probs",
    "linear_softmax_cross_entropy",
    "log_loss",
    "mean_pairwise_squared_error",
    "mean_squared_error",
    "pad_batch",
    "segment_means",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "sparse_softmax_cross_entropy",
    "weighted",
]
