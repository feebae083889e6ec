"""A test of the tests: the package with one thing wrong, each time, and a check that notices.

A mutant is the package's own source with one piece replaced, imported under another name.
"""

import functools
import importlib
import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from arguments import Case, cases, lifted_cases
from jax.sharding import AxisType, PartitionSpec
from laws import LAWS
from properties import PROPERTIES, close
from test_properties import CASES

import jaxlosses as jl

SOURCE = Path(jl.__file__).parent
KERNEL, MASKING, MEAN, LABELS = "_kernel.py", "_masking.py", "_mean.py", "_labels.py"
REDUCE, REDUCE_CPU, TYPING = "_reduce.py", "_reduce_cpu.py", "_typing.py"
LIFT, SEGMENTS = "_weighted.py", "_segments.py"
COLLECTOR, ACCUMULATE = "_collector.py", "_accumulate.py"
REGRESSION, CLASSES, LOGITS = "_regression.py", "_classification.py", "_logits.py"
LAYOUT, LAYER, DERIVATIVE = "_layout.py", "_linear_layer.py", "_linear_derivative.py"
DEVICE = "_linear_device.py"


@functools.cache
def of_a_last_layer() -> tuple[list[Any], Any, Any]:
    """Hidden and kernel, labels among 16 classes, and the derivatives through all the logits."""
    hidden, kernel, labels = map(np.array, CASES["linear_softmax_cross_entropy"].draw(batch=(8,)))
    kernel = np.concatenate([kernel, -kernel[:, ::-1], kernel[:, :4]], 1)
    labels[::2] += 10

    def loss(hidden, kernel):
        return jl.sparse_softmax_cross_entropy(hidden @ kernel, labels, label_smoothing=0.1)

    floats = [hidden, kernel]
    return floats, labels, derivatives(loss, *floats)


def derivatives(loss: Any, *floats: Any) -> Any:
    """Value and gradient, and the tangent of the value, as one program."""

    @jax.jit
    def program(*floats):
        return jax.value_and_grad(loss, (0, 1))(*floats), jax.jvp(loss, floats, floats)[1]

    return program(*floats)


def takes_shards_of_the_classes(case: Case) -> None:
    """A last layer in shard_map, with the classes over one axis, and over that of the tokens."""
    rows, whole = PartitionSpec("data"), PartitionSpec()
    floats, labels, expected = of_a_last_layer()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for axis, check_vma in itertools.product(("data", "model"), (True, False)):
        names = {"axis_name": "data", "class_axis_name": axis, "block_size": 3}
        mapped = jax.shard_map(
            functools.partial(case.loss, label_smoothing=0.1, **names),
            mesh=mesh,
            in_specs=(rows, PartitionSpec(None, axis), rows),
            out_specs=whole,
            check_vma=check_vma,
        )
        found = derivatives(lambda *a, mapped=mapped: mapped(*a, labels), *floats)
        close(found, expected, rtol=1e-4, atol=1e-5)


CHECKS = (*PROPERTIES, *LAWS, takes_shards_of_the_classes)
BY_NAME = {check.__name__: check for check in CHECKS}

MUTANTS = {
    # name: (file, what it says, what the mutant says, the loss, the property that notices),
    # or without a loss, the law that notices.
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
        "losses = _select(usable, function(*replaced))",
        "losses = _select(usable, function(*replaced))\n"
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
        "count(mask, axes, x.dtype) * copies",
        "count(mask, axes, x.dtype) * 1.0",
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
        'if reduction in ("average", "average_parts"):',
        "if False:",
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
        "dtype = precision(*inputs, weights=weights)",
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
        "lax.select(is_empty, zero + 1, count)",
        "count",
        "mean_squared_error",
        "nothing_counts_gives_zero",
    ),
    "NaN where nothing counts": (
        MEAN,
        "lax.select(is_empty, zero, total)",
        "lax.select(is_empty, zero + jnp.nan, total)",
        "mean_squared_error",
        "nothing_counts_gives_zero",
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
        "times_log(y, p + epsilon)",
        "times_log(y, p)",
        "log_loss",
        "finite_at_extremes_and_at_a_perfect_fit",
    ),
    "exponentiate raw logits": (
        CLASSES,
        "max_logit = max_over_members(max_of(x, x.ndim - 1), class_axis_name)",
        "max_logit = jnp.zeros_like(x[..., 0])",
        "softmax_cross_entropy",
        "finite_at_extremes_and_at_a_perfect_fit",
    ),
    "logarithm of a sigmoid": (
        LOGITS,
        "jax.nn.softplus(wrong)",
        "-jnp.log(jax.nn.sigmoid(-wrong))",
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
        "labels = as_class_ids(labels, logits_shape)",
        "labels = as_class_ids(labels, logits_shape)\n"
        "    labels = jnp.where(labels < 0, labels + logits_shape[-1], labels)",
        "sparse_softmax_cross_entropy",
        "impossible_labels_are_nan",
    ),
    "clamp a label": (
        LABELS,
        "labels = as_class_ids(labels, logits_shape)",
        "labels = jnp.clip(as_class_ids(labels, logits_shape), 0, logits_shape[-1] - 1)",
        "sparse_softmax_cross_entropy",
        "impossible_labels_are_nan",
    ),
    "NaN in the value only": (
        LABELS,
        "return losses * factor.astype(losses.dtype)",
        "return jnp.where(is_class(labels, classes), losses, jnp.nan)",
        "sparse_softmax_cross_entropy",
        "impossible_labels_are_nan",
    ),
    "take infinity from infinity": (
        LOGITS,
        "jnp.where(jnp.isnan(result) & jnp.isinf(x), replacement, result)",
        "result",
        "sparse_softmax_cross_entropy",
        "infinite_logits_rule_classes_out",
    ),
    "multiply an infinite logit by 0": (
        LOGITS,
        "jnp.where(probability == 0, 0, product)",
        "product",
        "sigmoid_cross_entropy",
        "infinite_logits_rule_classes_out",
    ),
    "let a NaN that counts be a certain class": (
        LOGITS,
        "jnp.isnan(result) & jnp.isinf(x)",
        "jnp.isnan(result)",
        "softmax_cross_entropy",
        "trouble_that_counts_propagates",
    ),
    "leave the mean rounded in the value": (
        REGRESSION,
        "mean_square - jnp.square(correction)",
        "mean_square",
        "mean_pairwise_squared_error",
        "offsets_cost_no_digits",
    ),
    "leave the mean rounded in the gradient": (
        REGRESSION,
        " - expand(correction, p)",
        "",
        "mean_pairwise_squared_error",
        "offsets_cost_no_digits",
    ),
    "count in an integer": (
        REDUCE,
        "known = np.asarray(math.prod(n for n in sizes if isinstance(n, int)), dtype)",
        "known = math.prod(n for n in sizes if isinstance(n, int))",
        "mean_squared_error",
        "any_size_can_be_traced",
    ),
    "mix the samples of a batch": (
        REGRESSION,
        "return jax.lax.platform_dependent(p, y, **ways)",
        "return [jnp.full(p.shape[:1], jnp.mean(p - y)), jnp.zeros(p.shape[:1])]",
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
    "compute what is weakly float64 in float32": (
        TYPING,
        "if not x.weak_type] or floats",
        "if not x.weak_type]",
        "mean_squared_error",
        "float64_stays_float64",
    ),
    "let a number of Python ask for float64": (
        TYPING,
        "if weights is not None and not weights.weak_type:",
        "if weights is not None:",
        "mean_squared_error",
        "float64_stays_float64",
    ),
    "multiply a last layer in float32 for a bias in float64": (
        "_linear.py",
        "if precision(hidden, kernel, bias, weights=weights) == jnp.float64:",
        "if False:",
        "linear_softmax_cross_entropy",
        "float64_stays_float64",
    ),
    "number the classes of each shard from 0": (
        DEVICE,
        "self.layout.shard_numbers() * self.classes + start",
        "self.layout.shard_numbers() * 0 + start",
        "linear_softmax_cross_entropy",
        "takes_shards_of_the_classes",
    ),
    "take the largest logit of a shard for that of all": (
        LAYER,
        "lax.pmax(self.max_logit, axes)",
        "self.max_logit",
        "linear_softmax_cross_entropy",
        "takes_shards_of_the_classes",
    ),
    "sum tangents inside of the primitive and outside": (
        LAYOUT,
        "return super().sum_over_classes(x) if self.is_checked else x",
        "return super().sum_over_classes(x)",
        "linear_softmax_cross_entropy",
        "takes_shards_of_the_classes",
    ),
    "gather classes without a sum of their gradients": (
        LAYOUT,
        "x = lax.psum_scatter(x, axes, tiled=True, **options)",
        "n = x.shape[classes_axis] // self.num_gathered; "
        "x = lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * n, n, classes_axis)",
        "linear_softmax_cross_entropy",
        "takes_shards_of_the_classes",
    ),
    "sum no gradient of a kernel that devices share": (
        LAYOUT,
        'axes = self.summed_axes + (self.features if kind == "bias" else ())',
        "axes = ()",
        "linear_softmax_cross_entropy",
        "sharded_is_local",
    ),
    "sum no gradient of what does not vary": (
        LAYOUT,
        "tuple(varying_axes(x) - varying_axes(like) - set(self.gathered))",
        "()",
        "linear_softmax_cross_entropy",
        "members_of_an_axis_agree_with_the_whole",
    ),
    "mask no absent token of a last layer": (
        DERIVATIVE,
        "jnp.full_like(max_logit, jnp.inf)",
        "log_sum_exp_shifted",
        "linear_softmax_cross_entropy",
        "what_is_absent_touches_nothing",
    ),
    "leave a wrong call to JAX": (
        TYPING,
        "arguments = _bind(function.__name__, signature, args, kwargs)",
        "arguments = signature.bind(*args, **kwargs).arguments",
        "mean_squared_error",
        "wrong_calls_name_the_function",
    ),
    "take what is no real number": (
        TYPING,
        'raise ValueError(f"{name} must be real, got dtype {dtype}")',
        "pass",
        "mean_squared_error",
        "wrong_arguments_are_named",
    ),
    "count where weights are to be summed": (
        KERNEL,
        'if reduction in ("average", "average_parts"):',
        'if reduction == "average":',
        None,
        "parts_of_every_split_add_up",
    ),
    "learn the weight of an absent loss from the sum of weights": (
        KERNEL,
        "where(weights.astype(bool) | jnp.isfinite(losses), zeros + 1, zeros)",
        "zeros + 1",
        "mean_squared_error",
        "what_is_absent_touches_nothing",
    ),
    "hold the sum of weights constant": (
        KERNEL,
        "if isinstance(tangent, SymbolicZero):",
        "if True:",
        "mean_squared_error",
        "the_derivative_of_a_weight_is_its_loss",
    ),
    "scale the count": (
        MEAN,
        'WeightedMean(jnp.multiply(*_alike(total, "factor", factor)), count)',
        'WeightedMean(*(jnp.multiply(*_alike(x, "factor", factor)) for x in (total, count)))',
        None,
        "coefficients_scale_the_total_alone",
    ),
    "average over empty groups": (
        MEAN,
        "jnp.sum(count != 0)",
        "jnp.sum(count == count)",
        None,
        "a_macro_average_leaves_out_what_has_no_count",
    ),
    "average groups of a positive count": (
        MEAN,
        "jnp.sum(count != 0)",
        "jnp.sum(count > 0)",
        None,
        "a_macro_average_leaves_out_what_has_no_count",
    ),
    "differentiate where the count is 0": (
        MEAN,
        "lax.select(is_empty, zero, total)",
        "total",
        None,
        "a_macro_average_leaves_out_what_has_no_count",
    ),
    "hold denominators constant in microbatches": (
        ACCUMULATE,
        "part.total - mean * jnp.asarray(part.count, mean.dtype)",
        "part.total",
        None,
        "microbatches_are_the_whole",
    ),
    "take the mean of the microbatch for that of the batch": (
        ACCUMULATE,
        "mean = divide(whole.total, whole.count)",
        "mean = divide(part.total, part.count)",
        None,
        "microbatches_are_the_whole",
    ),
    "hold the mean of the batch constant in second derivatives": (
        ACCUMULATE,
        "mean = divide(whole.total, whole.count)",
        "mean = jax.lax.stop_gradient(divide(whole.total, whole.count))",
        None,
        "second_derivatives_of_microbatches_are_the_whole",
    ),
    "accept divided means of microbatches": (
        COLLECTOR,
        "is_microbatch.value and kind",
        "False and kind",
        None,
        "a_divided_mean_of_microbatches_is_refused",
    ),
    "give all microbatches one key": (
        ACCUMULATE,
        "(jax.random.split(_check_key(key), self.num_microbatches),)",
        "(jnp.stack([_check_key(key)] * self.num_microbatches),)",
        None,
        "every_microbatch_has_a_key_of_its_own",
    ),
    "add metrics to the total": (
        COLLECTOR,
        "values = list(self.get_losses().values())",
        "values = [*self.get_losses().values(), *self.get_metrics().values()]",
        None,
        "metrics_are_no_part_of_the_total",
    ),
    "merge what has no names with nothing": (
        COLLECTOR,
        "if not empty._all_means():",
        "if False:",
        None,
        "the_empty_collector_is_neutral",
    ),
    "wrap ids of segments": (
        SEGMENTS,
        "weights = jnp.where(in_segment, weights, jnp.zeros_like(weights))",
        "ids, in_segment = ids % num_segments, True",
        None,
        "segments_are_groups",
    ),
    "let JAX cut ids of segments": (
        SEGMENTS,
        'narrow_integers("segment_ids", segment_ids)',
        "segment_ids",
        None,
        "segments_are_groups",
    ),
    "let JAX cut wide integers": (
        TYPING,
        "return value.astype(np.float32) if is_cut else value",
        "return value",
        "compute_weighted_loss",
        "wide_integers_keep_their_size",
    ),
}


def test_the_package_takes_shards_of_the_classes():
    takes_shards_of_the_classes(CASES["linear_softmax_cross_entropy"])


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
    # test_properties.py and test_laws.py find that the right package passes.
    subject = (cases(mutant) | lifted_cases(mutant))[loss] if loss else mutant
    assert not loss or loss in CASES
    # JAX itself refuses some; a NameError would be a mutant that says nothing.
    with pytest.raises((AssertionError, ValueError, TypeError, OverflowError)):
        BY_NAME[noticed_by](subject)
    for name in [n for n in sys.modules if n.startswith(package)]:
        del sys.modules[name]
