"""A test of the tests: the package with one thing wrong, each time, and a property that notices.

A mutant is the package's own source with one piece replaced, imported under another name.
"""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
from arguments import cases, lifted_cases
from properties import PROPERTIES
from test_properties import CASES

import jaxlosses as jl

SOURCE = Path(jl.__file__).parent
KERNEL, MASKING, MEAN, LABELS = "_kernel.py", "_masking.py", "_mean.py", "_labels.py"
REDUCE, REDUCE_CPU, TYPING = "_reduce.py", "_reduce_cpu.py", "_typing.py"
LIFT = "_weighted.py"
REGRESSION, CLASSES = "_regression.py", "_classification.py"
BY_NAME = {check.__name__: check for check in PROPERTIES}

MUTANTS = {
    # name: (file, what it says, what the mutant says, the loss, the property that notices)
    "multiply instead of select": (
        MASKING,
        "return lax.mul(_select(weights.astype(bool), losses), scale)",
        "return lax.mul(losses, scale)",
        "mean_squared_error",
        "what_is_absent_touches_nothing",
    ),
    "forget derivatives at weights of zero": (
        MASKING,
        "_select(weights.astype(bool) | jnp.isfinite(losses), losses)",
        "_select(weights.astype(bool), losses)",
        "mean_squared_error",
        "the_derivative_of_a_weight_is_its_loss",
    ),
    "drop the derivative of the weights": (
        MASKING,
        "terms.append(_guard(absent, finite) * weights_tangent.astype(dtype))",
        "terms.append(jnp.zeros_like(losses))",
        "log_loss",
        "the_derivative_of_a_weight_is_its_loss",
    ),
    "mask a coupled function like an independent one": (
        LIFT,
        "lifted_losses(losses_of,",
        "__import__('jaxlosses')._masking.masked_losses(losses_of,",
        "weighted(centred)",
        "value_and_derivative_are_of_the_same_inputs",
    ),
    "take the value at the inputs as they are": (
        MASKING,
        "losses = jnp.where(usable, function(*replaced), 0)",
        "losses = jnp.where(usable, function(*replaced), 0)\n"
        "    losses = lax.stop_gradient(jnp.where(present, raw, 0) - losses) + losses",
        "weighted(centred)",
        "value_and_derivative_are_of_the_same_inputs",
    ),
    "replace all that is absent": (
        MASKING,
        "usable = present | is_differentiable",
        "usable = present | (is_differentiable & False)",
        "weighted(gaussian)",
        "weights_of_zero_can_be_learned",
    ),
    "look at losses alone": (
        MASKING,
        "losses, derivatives = derive()",
        "losses, derivatives = derive()[0], []",
        "weighted(root)",
        "what_is_absent_touches_nothing",
    ),
    "count from unbroadcast weights": (
        REDUCE,
        "or x.dtype).astype(x.dtype) * float(copies)",
        "or x.dtype).astype(x.dtype) * 1.0",
        "absolute_difference",
        "sharded_is_local",
    ),
    "divide by the batch": (
        KERNEL,
        "total, count = sum_and_count(losses, weights.astype(bool))",
        "total, count = sum_of(losses), 0 * sum_of(losses) + losses.shape[0]",
        "absolute_difference",
        "reductions_agree",
    ),
    "divide by the number of elements": (
        KERNEL,
        "total, count = sum_and_count(losses, weights.astype(bool))",
        "total, count = sum_of(losses), 0 * sum_of(losses) + losses.size",
        "absolute_difference",
        "a_zero_row_is_a_dropped_row",
    ),
    "count positive weights only": (
        KERNEL,
        "total, count = sum_and_count(losses, weights.astype(bool))",
        "total, count = sum_and_count(losses, weights > 0)",
        "hinge_loss",
        "reductions_agree",
    ),
    "average as if it were the mean": (
        KERNEL,
        'if reduction == "average":',
        'if reduction == "averages":',
        "mean_squared_error",
        "reductions_agree",
    ),
    "align weights from the right": (
        KERNEL,
        "kept + (1,) * (len(shape) - len(kept))",
        "(1,) * (len(shape) - len(kept)) + kept",
        "mean_squared_error",
        "weights_align_from_the_left",
    ),
    "let any weights through": (
        KERNEL,
        "if len(kept) > len(shape) or any(",
        "if False and any(",
        "mean_squared_error",
        "shapes_must_match",
    ),
    "drop the shape check": (
        TYPING,
        "if array.shape != head.shape:",
        "if False:",
        "mean_squared_error",
        "shapes_must_match",
    ),
    "take weights of None": (
        KERNEL,
        'weights = as_array("weights", weights)',
        'weights = as_array("weights", 1.0 if weights is None else weights)',
        "mean_squared_error",
        "shapes_must_match",
    ),
    "accumulate in bf16": (
        TYPING,
        "dtype = precision(*inputs, weights)",
        "dtype = inputs[0].dtype",
        "mean_squared_error",
        "low_precision_accumulates_in_float32",
    ),
    "forget the collective of the count": (
        KERNEL,
        "total, count = psum((total, count), axis_name)",
        "total = psum(total, axis_name)",
        "mean_squared_error",
        "members_of_an_axis_agree_with_the_whole",
    ),
    "forget the collective of a sum": (
        KERNEL,
        "total if axis_name is None else psum(total, axis_name)",
        "total",
        "mean_squared_error",
        "members_of_an_axis_agree_with_the_whole",
    ),
    "divide by a count of zero": (
        MEAN,
        "return lax.select(is_empty, zero, lax.div(",
        "return (lambda ratio: total / count)(lax.div(",
        "mean_squared_error",
        "nothing_counts_gives_zero",
    ),
    "NaN where nothing counts": (
        MEAN,
        "return lax.select(is_empty, zero, lax.div(",
        "return lax.select(is_empty, zero + jnp.nan, lax.div(",
        "mean_squared_error",
        "nothing_counts_gives_zero",
    ),
    "differentiate the largest logit under vmap": (
        REDUCE,
        "jnp.max(lax.stop_gradient(x), axes)",
        "jnp.max(x, axes)",
        "sparse_softmax_cross_entropy",
        "vmap_is_a_loop",
    ),
    "swallow NaN that counts": (
        REDUCE_CPU,
        "return [lax.add(a[0], b[0]), lax.add(a[1], b[1])]",
        "return [jnp.nan_to_num(a[0]) + jnp.nan_to_num(b[0]), lax.add(a[1], b[1])]",
        "mean_squared_error",
        "trouble_that_counts_propagates",
    ),
    "mask what is absent and finite": (
        MASKING,
        "lax.select(is_finite, x, lax.full_like(x, 0))",
        "lax.full_like(x, 0)",
        "mean_squared_error",
        "weights_of_zero_can_be_learned",
    ),
    "leave the inputs without a guard": (
        MASKING,
        "formula(*(_guard(absent, x) if is_float(x) else x for x in inputs))",
        "formula(*inputs)",
        "log_loss",
        "what_is_absent_touches_nothing",
    ),
    "mask tangents of a weighted loss on the way in alone": (
        MASKING,
        "terms.append(_mask(absent, lax.mul(scale, losses_tangent)))",
        "terms.append(lax.mul(scale, losses_tangent))",
        "log_loss",
        "what_is_absent_touches_nothing",
    ),
    "let derivatives pass that are not finite": (
        MASKING,
        "lax.select(is_finite, x, lax.full_like(x, 0))",
        "x",
        "mean_squared_error",
        "what_is_absent_touches_nothing",
    ),
    "sqrt(x^2) for |x|": (
        REGRESSION,
        "d * jnp.sign(d)",
        "jnp.sqrt(jnp.square(d))",
        "absolute_difference",
        "finite_at_extremes_and_at_a_perfect_fit",
    ),
    "forget epsilon": (
        CLASSES,
        "jnp.log(p + epsilon)",
        "jnp.log(p)",
        "log_loss",
        "finite_at_extremes_and_at_a_perfect_fit",
    ),
    "exponentiate raw logits": (
        CLASSES,
        "max_logit = max_of(x, x.ndim - 1)",
        "max_logit = jnp.zeros_like(x[..., 0])",
        "softmax_cross_entropy",
        "finite_at_extremes_and_at_a_perfect_fit",
    ),
    "logarithm of a sigmoid": (
        CLASSES,
        "jax.nn.softplus((1 - 2 * nearest) * x)",
        "-jnp.log(jax.nn.sigmoid((2 * nearest - 1) * x))",
        "sigmoid_cross_entropy",
        "finite_at_extremes_and_at_a_perfect_fit",
    ),
    "leave an effect in the program": (
        LABELS,
        "if not _HAS_CHECKIFY_RULES:",
        "if True:",
        "sparse_softmax_cross_entropy",
        "leaves_no_effect",
    ),
    "make NaN where an impossible label is absent": (
        LABELS,
        "jnp.where(absent, 0, labels)",
        "labels",
        "sparse_softmax_cross_entropy",
        "raises_no_false_alarm",
    ),
    "learn the weight of an impossible label": (
        LABELS,
        "weights = jnp.where(absent, jnp.zeros_like(weights), weights)",
        "weights = jnp.where(absent, 1, 1) * weights",
        "sparse_softmax_cross_entropy",
        "impossible_labels_are_nan",
    ),
    "wrap a negative label": (
        LABELS,
        "labels = labels.reshape(logits_shape[:-1])",
        "labels = jnp.where(labels < 0, labels + classes, labels).reshape(logits_shape[:-1])",
        "sparse_softmax_cross_entropy",
        "impossible_labels_are_nan",
    ),
    "clamp a label": (
        LABELS,
        "labels = labels.reshape(logits_shape[:-1])",
        "labels = jnp.clip(labels, 0, classes - 1).reshape(logits_shape[:-1])",
        "sparse_softmax_cross_entropy",
        "impossible_labels_are_nan",
    ),
    "NaN in the value only": (
        LABELS,
        "return losses * factor.astype(losses.dtype)",
        "return jnp.where(_is_class(labels, classes), losses, jnp.nan)",
        "sparse_softmax_cross_entropy",
        "impossible_labels_are_nan",
    ),
    "mix the samples of a batch": (
        REGRESSION,
        "mean = jax.lax.platform_dependent(p, y, **ways) / _sample_size(p)",
        "mean = jnp.full(p.shape[:1], jnp.mean(p - y))",
        "mean_pairwise_squared_error",
        "a_zero_row_is_a_dropped_row",
    ),
    "stop the gradient of the labels": (
        REGRESSION,
        "jnp.square(p - y)",
        "jnp.square(p - __import__('jax').lax.stop_gradient(y))",
        "mean_squared_error",
        "finite_differences_agree",
    ),
}


@pytest.mark.parametrize("mutation", MUTANTS)
def test_mutant_is_caught(mutation, tmp_path, monkeypatch):
    file, right, wrong, loss, noticed_by = MUTANTS[mutation]
    package = f"mutant_{list(MUTANTS).index(mutation)}"
    shutil.copytree(SOURCE, tmp_path / package)
    for path in (tmp_path / package).glob("*.py"):
        text = path.read_text()
        if path.name == file:
            assert text.count(right) == 1, "the mutation no longer says what to change"
            text = text.replace(right, wrong)
        imports = text.replace("from jaxlosses.", f"from {package}.")
        path.write_text(imports)
    monkeypatch.syspath_prepend(tmp_path)
    mutant = importlib.import_module(package)
    case = (cases(mutant) | lifted_cases(mutant))[loss]
    check = BY_NAME[noticed_by]
    assert loss in CASES  # So test_properties.py finds that the right package has the property.
    # JAX itself refuses some; a NameError would be a mutant that says nothing.
    with pytest.raises((AssertionError, ValueError, TypeError)):
        check(case)
    for name in [n for n in sys.modules if n.startswith(package)]:
        del sys.modules[name]
