"""Weighted losses for JAX: ``tf.contrib.losses`` as pure, jitted, vmap-friendly functions.

The conventions below hold for every loss.

**Shapes.** Losses have shape ``[batch, d1, ..., dN]``. The inputs' shapes match exactly; nothing is
broadcast.

**Weights** are a scalar, or their axes match the leading axes of the losses, each equal or 1; a
last axis of one beyond the losses' rank is dropped. Booleans and integers are weights, and negative
weights count.

**A zero weight means absent.** An absent loss, and what it was computed from, may be NaN, infinite
or an impossible label, and touches neither value nor derivative. At a place that counts such values
propagate. Weights are differentiable: the derivative is the loss at that place, at a weight of zero
too unless the loss is not finite. The count is not differentiable.

**Reductions** of losses ``l`` with weights ``w``:

=================  ===============================================================
``mean``           ``sum(w * l) / count(w != 0)``, 0 where nothing counts;
                   TensorFlow's
``average``        ``sum(w * l) / sum(w)``, 0 where ``sum(w)`` is 0;
                   ``numpy.average``'s, and PyTorch's with class weights
``sum``            ``sum(w * l)``
``none``           ``w * l``, unreduced; ``axis_name`` has nothing to sum
``parts``          ``WeightedMean(sum(w * l), count(w != 0))``, to be merged
``average_parts``  ``WeightedMean(sum(w * l), sum(w))``, to be merged
=================  ===============================================================

With ``axis_name``, sum and count run over that mapped axis (or axes) as well.

**Infinite logits** are classes that are certain or ruled out: to be right costs 0, to be wrong
infinity, and gradients are those of a large logit. There, derivatives of labels and of z-losses are
taken as 0. Equal infinities that are the largest logits of a row share the probability.

**Dtypes.** Arithmetic and results are float32, or float64 where an input or an array of weights is;
a Python number asks for neither. Integers and booleans are read as numbers of that precision.
Gradients have the dtype of what they belong to.

**Options** (all that is keyword-only and no array) are Python values, fixed when a program is
compiled. Those of a function that :func:`weighted` lifts may be traced.

**Errors.** An argument that cannot be meant raises a ``ValueError`` that names it. A wrong call (an
unknown keyword, a missing argument) raises a ``TypeError`` that names the function.
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
