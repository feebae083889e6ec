"""The last layer's loss from blocks of logits is the same loss of all logits."""

import functools
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlosses as jl

TOKENS, FEATURES, CLASSES = (10, 3), 6, 12
ALL_OPTIONS = {"label_smoothing": 0.2, "z_loss": 0.1, "logit_soft_cap": 1.5}
ALL_FLOATS = (0, 1, 2, 3)  # Positions of hidden, kernel, bias and weights.
linear = jl.linear_softmax_cross_entropy
close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-6)


def through_logits(hidden, kernel, labels, *rest, bias=None, logit_soft_cap=None, **options):
    wide = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
    logits = jnp.matmul(hidden, kernel, preferred_element_type=wide)
    logits = logits if bias is None else logits + jnp.expand_dims(bias, range(logits.ndim - 1))
    if logit_soft_cap:
        logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    options.pop("block_size", None)
    return jl.sparse_softmax_cross_entropy(logits, labels, *rest, **options)


def draw(tokens=TOKENS, features=FEATURES, classes=CLASSES):
    rng = np.random.default_rng(0)
    shapes = ((*tokens, features), (features, classes), (classes,))
    hidden, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in shapes)
    weights = rng.uniform(0.5, 2, tokens).astype(np.float32)
    labels = rng.integers(0, classes, tokens).astype(np.int32)
    return hidden, kernel, bias, weights, labels


def both(labels, **options):
    """The loss from blocks and the loss of all logits, as functions of their float arguments."""

    def of(loss):
        return lambda h, k, b, w: loss(h, k, labels, w, bias=b, **options)

    return of(linear), of(through_logits)


def derivatives(loss, floats, tangents):
    """The value, its gradient and a tangent, from one trace of the loss.

    If the value is a total and a count, the gradient is that of the total.
    """
    value, push = jax.linearize(loss, *floats)
    leaves, tree = jax.tree.flatten(value)
    cotangents = [jnp.ones_like(leaves[0]), *map(jnp.zeros_like, leaves[1:])]
    pull = jax.linear_transpose(push, *floats)
    return value, pull(jax.tree.unflatten(tree, cotangents)), push(*tangents)


BLOCK_SIZES = {
    "a shorter last block of two classes": ({"label_smoothing": 0.1}, 5),
    "one block": ({"z_loss": 0.1}, 12),
    "tokens from two segments": ({"logit_soft_cap": 2.0}, (6, None)),
    "tokens from two segments, and a shorter last block": (ALL_OPTIONS, (12, None)),
    "single classes": (ALL_OPTIONS, 1),
    "no block size": ({}, None),
}


@pytest.mark.parametrize("case", BLOCK_SIZES)
def test_value_and_derivatives_are_those_of_all_logits(case):
    options, block_size = BLOCK_SIZES[case]
    *floats, labels = draw()
    losses = both(labels, block_size=block_size, **options)

    @jax.jit
    def program(*floats):
        return [derivatives(f, floats, [x[::-1] for x in floats]) for f in losses]

    close(*program(*floats))


def test_gradients_of_some_arguments_are_right_for_any_cotangent():
    *floats, labels = draw()
    cotangent = np.cos(np.arange(30, dtype=np.float32)).reshape(TOKENS)
    blocks, whole = both(labels, reduction="none", block_size=4)

    @jax.jit
    def gradients(*floats):
        def of(loss, argnums):
            return jax.grad(lambda *a: jnp.sum(loss(*a) * cotangent), argnums)(*floats)

        return of(blocks, (1,)), of(blocks, (0, 2)), of(whole, (0, 1, 2))

    (of_kernel,), (of_hidden, of_bias), expected = gradients(*floats)
    close((of_hidden, of_kernel, of_bias), expected)


def test_second_derivatives_are_those_of_all_logits():
    *floats, labels = draw((3,), 2, 5)
    by_classes, whole = both(labels, block_size=4, **ALL_OPTIONS)
    by_tokens, _ = both(labels, block_size=(2, None), **ALL_OPTIONS)
    ways = ((by_classes, jax.jacfwd, jax.jacfwd), (by_tokens, jax.jacrev, jax.jacrev))

    @jax.jit
    def hessians(*floats):
        every = (*ways, (whole, jax.jacfwd, jax.jacrev))
        return [outer(inner(f, (0, 1, 3)), (0, 1, 3))(*floats) for f, outer, inner in every]

    *found, expected = hessians(*floats)
    close(found, [expected] * 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shared", "block_size"), [((1,), 4), ((1, 2), (6, None)), ((0, 3), 4), ((0, 1, 2), 4)], ids=str
)
def test_gradients_under_vmap_are_those_of_all_logits(shared, block_size):
    *floats, labels = draw()
    axes = [None if i in shared else 0 for i in ALL_FLOATS]
    stacked = [x if i in shared else np.stack([x, -x]) for i, x in enumerate(floats)]

    def gradient(loss):
        return jax.grad(lambda *a: jnp.sin(jax.vmap(loss, axes)(*a)).sum(), ALL_FLOATS)

    losses = both(labels, block_size=block_size)
    close(*jax.jit(lambda *a: [gradient(f)(*a) for f in losses])(*stacked))


def test_checkpoint_within_a_scan_gives_the_same_gradient():
    *floats, labels = draw()
    loss, whole = both(labels, block_size=4)

    def total(*a):
        step = jax.checkpoint(lambda c, _: (c + loss(*a) / 2, None))
        return jax.lax.scan(step, 0.0, length=2)[0]

    close(*jax.jit(lambda *a: [jax.grad(f, ALL_FLOATS)(*a) for f in (total, whole)])(*floats))


@pytest.mark.parametrize(
    ("options", "bad", "label", "block_size"),
    [({}, np.nan, -1, 4), (ALL_OPTIONS, -np.inf, CLASSES, (6, None))],
    ids=["nan", "inf"],
)
def test_what_is_absent_touches_nothing(options, bad, label, block_size):
    hidden, kernel, bias, weights, labels = draw()
    absent = np.zeros(TOKENS, bool)
    absent[0, 1] = absent[2] = True
    weights[absent] = 0
    rubbish, no_labels = hidden.copy(), labels.copy()
    # In one feature, so that the logits are infinite and a soft cap makes them finite again.
    rubbish[absent, 1], no_labels[absent] = bad, label

    @jax.jit
    def value_and_derivatives(labels, *a):
        loss, _ = both(labels, block_size=block_size, **options)
        second = jax.jvp(jax.grad(loss, (0, 1)), a, a)[1]
        return jax.value_and_grad(loss, ALL_FLOATS)(*a), jax.jvp(loss, a, a)[1], second

    results = []
    for h, y in ((rubbish, no_labels), (hidden, labels)):
        (value, gradients), *rest = value_and_derivatives(y, h, kernel, bias, weights)
        # The derivative by a weight of zero is the loss there, which is not the same in both.
        of_weights = np.where(absent & np.isfinite(gradients[3]), 0, gradients[3])
        results.append((value, *gradients[:3], of_weights, *rest))
    close(*results, atol=1e-5)


def test_ignored_labels_are_absent_and_impossible_ones_are_nan():
    *floats, labels = draw()
    labels[0] = -100

    @jax.jit
    def gradients(labels, *floats):
        losses = both(labels, ignore_index=-100, block_size=4)
        return [jax.grad(f, ALL_FLOATS)(*floats) for f in losses]

    close(*gradients(labels, *floats))
    labels[2] = -1, CLASSES, 2**31 - 1
    found = np.asarray(gradients(labels, *floats)[0][0])
    assert np.isnan(found[2]).all()
    assert np.isnan(found).sum() == found[2].size


def test_large_logits_keep_their_digits():
    hidden, kernel, bias, _, labels = draw()
    floats = [np.asarray(x, np.float64) for x in (hidden, kernel, np.float32(1e4) + bias)]
    exact = floats[0] @ floats[1] + floats[2]
    log_sum = 1e4 + np.log(np.exp(exact - 1e4).sum(-1))
    at_label = np.take_along_axis(exact, np.asarray(labels)[..., None], -1)[..., 0]
    options = {"label_smoothing": 0.5, "block_size": 2, "reduction": "none"}
    losses = linear(hidden, kernel, labels, bias=np.float32(1e4) + bias, **options)
    expected = log_sum - at_label / 2 - exact.mean(-1) / 2
    np.testing.assert_allclose(
        losses, expected, atol=2e-3
    )  # Twice the rounding of a logit near 1e4.


def test_a_block_of_ruled_out_classes_adds_nothing():
    """The first block and another one have no logit but minus infinity."""
    *floats, labels = draw()
    floats[2][[0, 1, 2, 3, 10, 11]] = -np.inf
    losses = both(np.clip(labels, 4, 8), block_size=2)
    close(*jax.jit(lambda *a: [jax.value_and_grad(f, (0, 1))(*a) for f in losses])(*floats))


@functools.cache
def value_and_gradient_of_all_logits():
    """A jitted function of labels and floats, so that tests with the same shapes share it."""
    return jax.jit(lambda y, *a: jax.value_and_grad(both(y)[1], ALL_FLOATS)(*a))


@pytest.mark.parametrize(
    ("dtypes", "block_size"),
    [("bfloat16 bfloat16", 8), ("float16 float16", (40, None)), ("bfloat16 float32", 64)],
)
def test_low_precision_accumulates_in_float32(dtypes, block_size):
    hidden, kernel, bias, weights, labels = draw((40, 5), 64, 320)
    of_hidden, of_kernel = dtypes.split()
    # With small weights, the gradients of most logits are too small for float16.
    low = (hidden.astype(of_hidden), (kernel / 8).astype(of_kernel), bias, weights / 64)
    gradient = jax.jit(jax.value_and_grad(both(labels, block_size=block_size)[0], ALL_FLOATS))
    value, gradients = gradient(*low)
    exact = [x.astype(np.float32) for x in low]
    expected, exactly = value_and_gradient_of_all_logits()(labels, *exact)
    assert value.dtype == np.float32
    close(value, expected, rtol=1e-6)
    for found, true, x in zip(gradients, exactly, low, strict=True):
        assert found.dtype == x.dtype
        # Two things are rounded, once each: the gradient of a logit, and the result.
        error = np.abs(np.asarray(found, np.float32) - true)
        assert error.max() < 1.1 * float(jnp.finfo(of_hidden).eps) * np.abs(true).max()


def test_integers_and_doubles_are_taken():
    hidden, kernel, _, _, labels = draw()

    def expected(hidden, kernel):
        logits = hidden.astype(np.float64) @ kernel
        at_label = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return np.mean(np.log(np.exp(logits).sum(-1)) - at_label)

    integers = [np.round(x).astype(np.int32) for x in (hidden, kernel)]
    close(linear(*integers, labels), np.float32(expected(*integers)))
    with jax.enable_x64(True):
        doubles = [x.astype(np.float64) for x in (hidden, kernel)]
        value = linear(*doubles, labels, block_size=4)
        np.testing.assert_allclose(value, expected(*doubles), rtol=1e-12)


@pytest.mark.parametrize("block_size", [4, (6, None), None], ids=str)
def test_one_double_is_enough_for_all_digits(block_size):
    """NumPy's doubles as options impose nothing."""
    options = {name: np.float64(value) for name, value in ALL_OPTIONS.items()}
    *floats, labels = draw()
    loss, _ = both(labels, block_size=block_size, **options)
    _, whole = both(labels, **ALL_OPTIONS)

    @jax.jit
    def program(*floats):
        exact = [x.astype(np.float64) for x in floats]
        # One of hidden, kernel, bias and weights is double. The values are those of the others, so
        # that XLA compiles what all four have in common once.
        some = [[*floats[:i], exact[i], *floats[i + 1 :]] for i in ALL_FLOATS]
        gradient = jax.value_and_grad(loss, ALL_FLOATS)
        return [gradient(*a) for a in some], jax.value_and_grad(whole, ALL_FLOATS)(*exact)

    with jax.enable_x64(True):
        assert jax.eval_shape(loss, *floats).dtype == np.float32
        found, (value, gradients) = program(*floats)
        for position, (found_value, found_gradients) in enumerate(found):
            np.testing.assert_allclose(found_value, value, rtol=1e-12)
            pairs = zip(found_gradients, gradients, strict=True)
            for i, (gradient, right) in enumerate(pairs):
                assert gradient.dtype == (np.float64 if i == position else np.float32)
                eps = np.finfo(gradient.dtype).eps
                np.testing.assert_allclose(gradient, right, rtol=4 * eps, atol=1e-7)


@jax.jit
def gradient_of_all_logits(*arguments):
    """What exported programs have to find, compiled once for each number of tokens."""
    options = {"bias": draw()[2], "ignore_index": -1, **ALL_OPTIONS}
    return jax.value_and_grad(through_logits, (0, 1, 3))(*arguments, **options)


@pytest.mark.parametrize("block_size", [None, 4, (6, None)], ids=str)
@pytest.mark.parametrize("sizes", ["b", "b, 3", "b, s"])
def test_the_number_of_tokens_may_be_symbolic(sizes, block_size):
    tokens = jax.export.symbolic_shape(sizes)
    *_, bias, _, _ = draw()

    def gradient(*arguments):
        options = {"bias": bias, "block_size": block_size, "ignore_index": -1, **ALL_OPTIONS}
        return jax.value_and_grad(linear, (0, 1, 3))(*arguments, **options)

    shapes = [(*tokens, FEATURES), (FEATURES, CLASSES), tokens, tokens]
    dtypes = ["float32", "float32", "int32", "float32"]
    arguments = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
    # A program for a TPU, of operations that a CPU has too.
    checks = [jax.export.DisabledSafetyCheck.platform()]
    exported = jax.export.export(jax.jit(gradient), platforms=["tpu"], disabled_checks=checks)
    exported = exported(*arguments)
    for batch in (4, 7):
        hidden, kernel, _, weights, labels = draw((batch, 3)[: len(tokens)])
        labels[0] = -1
        arguments = hidden, kernel, labels, weights
        close(exported.call(*arguments), gradient_of_all_logits(*arguments))


def test_the_number_of_classes_may_not_be_symbolic():
    (classes,) = jax.export.symbolic_shape("c")
    shapes = [((3, 4), "float32"), ((4, classes), "float32"), ((3,), "int32")]
    arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]
    with pytest.raises(ValueError, match=r"kernel must have a fixed number of classes.*\(4, c\)"):
        jax.export.export(jax.jit(linear))(*arguments)


def test_there_may_be_one_token_no_token_or_no_feature():
    hidden, kernel, _, _, labels = draw()
    close(linear(hidden[0, 0], kernel, labels[0, 0]), linear(hidden[:1, 0], kernel, labels[:1, :1]))
    one = linear(hidden[0, 0], kernel, labels[0, 0], block_size=(1, None))
    close(one, linear(hidden[0, 0], kernel, labels[0, 0]))
    assert linear(hidden[:0], kernel, labels[:0], block_size=(2, None)) == 0
    for block_size in (4, (2, None)):
        no_feature = linear(hidden[..., :0], kernel[:0], labels, block_size=block_size)
        close(no_feature, np.log(CLASSES))


def log_probs_of_logits(hidden, kernel, labels, *, bias, temperature=1.0, logit_soft_cap=None, **_):
    """What ``linear_log_probs`` has to be, in plain JAX."""
    logits = hidden @ kernel + jnp.expand_dims(bias, range(hidden.ndim - 1))
    if logit_soft_cap:
        logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    log_p = jax.nn.log_softmax(logits / temperature)
    p = jnp.exp(log_p)
    return (
        jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0],
        -jnp.sum(jnp.where(p > 0, p * log_p, 0), -1),
        jax.nn.logsumexp(logits / temperature, -1),
        jnp.argmax(logits, -1) == labels,
    )


def value_and_all_derivatives(log_probs, floats, labels, **options):
    """The results, their tangents, gradients of two sums of theirs, and a second derivative."""
    floats = tuple(floats)

    def results(hidden, kernel, bias):
        return tuple(log_probs(hidden, kernel, labels, bias=bias, **options))

    def total(*some):
        label, entropy, log_partition, _ = results(*some)
        return jnp.sum(label * jnp.cos(entropy) + jnp.square(log_partition))

    found, (*tangents, _) = jax.jvp(results, floats, tuple(x[::-1] for x in floats))
    of_entropy = jax.grad(lambda *a: jnp.sum(jnp.sin(results(*a)[1])), (0, 1, 2))
    gradient_and_second = jax.jvp(jax.grad(total, (0, 1, 2)), floats, floats)
    return found, tangents, of_entropy(*floats), gradient_and_second


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 5, "temperature": 0.7},
        {"block_size": (6, None), "logit_soft_cap": 2.0, "temperature": 2},
        {},
    ],
    ids=["classes", "tokens", "default"],
)
def test_log_probs_are_those_of_all_logits(options):
    *floats, _, labels = draw()

    @jax.jit
    def program(*floats):
        both = jl.linear_log_probs, log_probs_of_logits
        return [value_and_all_derivatives(f, floats, labels, **options) for f in both]

    found, expected = program(*floats)
    close(found, expected, rtol=1e-4, atol=1e-5)
    assert 0 < found[0][3].sum() < labels.size


all_of_log_probs = jax.jit(functools.partial(value_and_all_derivatives, log_probs_of_logits))


@pytest.mark.parametrize("layout", ["classes over the devices of tokens", "both"])
def test_log_probs_of_shards_are_those_of_all_logits(layout):
    *floats, _, labels = draw(*SHARDED)
    floats[0] /= 4  # So that logits are not so large that second derivatives are inaccurate.
    of_hidden, of_kernel, block_size = LAYOUTS[layout]
    in_specs = (PartitionSpec(*of_hidden), PartitionSpec(*of_kernel))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    program = jax.jit(
        functools.partial(value_and_all_derivatives, jl.linear_log_probs),
        static_argnames=("in_specs", "block_size"),
    )
    with jax.set_mesh(mesh):
        found = program(floats, labels, in_specs=in_specs, block_size=block_size)
    close(found, all_of_log_probs(floats, labels), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("axis", ["data", "model"])
def test_log_probs_in_shard_map_are_those_of_all_logits(axis):
    """Where an axis shards tokens and classes, JAX knows that labels vary over it."""
    hidden, kernel, bias, _, labels = draw((8, 2), 4, 16)
    rows, classes = PartitionSpec("data"), PartitionSpec(axis)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def inside(hidden, kernel, bias, labels):
        found = jl.linear_log_probs(hidden, kernel, labels, bias=bias, class_axis_name=axis)
        return found.label, found.entropy, found.log_partition

    in_specs = (rows, PartitionSpec(None, axis), classes, rows)
    mapped = jax.shard_map(inside, mesh=mesh, in_specs=in_specs, out_specs=(rows,) * 3)

    def plain(hidden, kernel, bias, labels):
        return log_probs_of_logits(hidden, kernel, labels, bias=bias)[:3]

    def results_and_gradient(function):
        def total(*floats):
            label, entropy, log_partition = results = function(*floats, labels)
            return jnp.sum(label * jnp.cos(entropy) + jnp.square(log_partition)), results

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

    found, expected = (results_and_gradient(f)(hidden, kernel, bias) for f in (mapped, plain))
    close(found, expected, rtol=1e-4, atol=1e-5)


def test_log_probs_of_ruled_out_classes_are_finite():
    hidden, kernel, bias, _, labels = draw()
    bias[[0, 1, 2, 3, 9]] = -np.inf
    labels = np.clip(labels, 4, 8)

    @jax.jit
    def program(hidden, kernel):
        def results(block_size):
            options = {"bias": bias, "block_size": block_size}
            return tuple(jl.linear_log_probs(hidden, kernel, labels, **options))

        def total(*floats):
            found = jl.linear_log_probs(*floats, labels, block_size=2, bias=bias)
            return jnp.sum(found.entropy + found.label)

        expected = log_probs_of_logits(hidden, kernel, labels, bias=bias)
        gradients = jax.grad(total, (0, 1))(hidden, kernel)
        return [results(2), results((6, None))], expected, gradients

    found, expected, gradients = program(hidden, kernel)
    close(found, [expected] * 2, rtol=1e-5)
    chex.assert_tree_all_finite(gradients)


def test_absent_log_probs_touch_nothing_and_trouble_that_counts_propagates():
    hidden, kernel, _, _, labels = draw((10,))
    rubbish, impossible = hidden.copy(), labels.copy()
    rubbish[3, 1], rubbish[4], impossible[3] = np.nan, np.inf, -1

    @jax.jit
    def results_and_gradients(hidden, labels, counts):
        def total(hidden, kernel):
            found = jl.linear_log_probs(hidden, kernel, labels, block_size=4)
            terms = (found.label, found.entropy, found.log_partition)
            label, *rest = (jnp.where(counts, term, 0) for term in terms)
            return jnp.sum(label + rest[0] * rest[1]), found

        return jax.grad(total, (0, 1), has_aux=True)(hidden, kernel)

    def gradients(*arguments):
        return jax.tree.map(np.asarray, results_and_gradients(*arguments)[0])

    counts = ~np.isin(np.arange(10), [3, 4])
    close(gradients(rubbish, impossible, counts), gradients(hidden, labels, counts))
    of_hidden, of_kernel = gradients(rubbish, impossible, np.ones(10, bool))
    assert np.isnan(of_hidden[3]).all()
    assert np.isnan(of_hidden[4]).all()
    assert np.isnan(of_kernel).all()
    assert np.isfinite(of_hidden[5:]).all()
    labels[0] = CLASSES
    of_impossible, _ = gradients(hidden, labels, np.arange(10) < 5)
    assert np.isnan(of_impossible[0]).all()
    assert np.isfinite(of_impossible[1:]).all()
    _, found = results_and_gradients(hidden, labels, counts)
    assert np.isnan(found.label[0])
    assert not found.is_top[0]
    assert np.isfinite(found.label[1:]).all()
    assert np.isfinite(found.entropy).all()


def test_where_nothing_counts_value_and_gradient_are_zero():
    """Even if there is a NaN in the kernel or the bias."""
    hidden, kernel, bias, weights, labels = draw()
    for bad, options in ((np.nan, ALL_OPTIONS), (np.inf, {})):
        for block_size in (4, (6, None)):
            loss, _ = both(labels, block_size=block_size, **options)
            kernel[1, 2] = bias[3] = bad
            found = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(hidden, kernel, bias, 0 * weights)
            close(found, jax.tree.map(np.zeros_like, found), rtol=0, atol=0)


def test_absent_logits_beyond_float32_have_no_tangent():
    hidden, kernel, bias, weights, labels = draw()
    loss, _ = both(labels, block_size=4, logit_soft_cap=2.0)
    weights[1] = 0
    tangents = (*map(np.ones_like, (hidden, kernel, bias)), np.zeros_like(weights))

    @jax.jit
    def jvp(*floats):
        return jax.jvp(loss, floats, tangents)

    large, rubbish = hidden.copy(), hidden.copy()
    large[1], rubbish[1] = 3e38, np.nan
    close(*(jvp(h, kernel, bias, weights) for h in (large, rubbish)))


def test_gradients_in_bfloat16_work_on_a_cpu_for_any_shape():
    """XLA on a CPU lacks the product of two bfloat16 arrays for some shapes, such as these."""
    hidden, kernel, *_, labels = draw((32,), 8, 128)
    low = [x.astype(jnp.bfloat16) for x in (hidden, kernel)]
    gradient = jax.jit(jax.grad(linear, (0, 1)))
    found = gradient(*low, labels)
    exact = gradient(*(x.astype(np.float32) for x in low), labels)
    close([np.asarray(x, np.float32) for x in found], list(exact), rtol=1e-2)


def test_matmul_precision_is_respected():
    """That of the place where the loss is called, not of the one where it is compiled."""
    hidden, kernel, *_, labels = draw()

    for precision in ("DEFAULT", "HIGHEST"):

        def loss(hidden, kernel, precision=precision):
            with jax.default_matmul_precision(precision.lower()):
                return linear(hidden, kernel, labels)

        def derivatives(*floats, loss=loss):
            return jax.value_and_grad(loss, (0, 1))(*floats), jax.jvp(loss, floats, floats)

        text = jax.jit(derivatives).lower(hidden, kernel).as_text()
        found = re.findall(r"dot_general.*precision = \[(\w+), (\w+)\]", text)
        assert len(found) >= 5
        assert set(found) == {(precision, precision)}


def test_bfloat16_and_float32_are_multiplied_in_bfloat16_unless_more_is_asked_for():
    """Not on a CPU."""
    hidden, kernel, *_, labels = draw()
    low = hidden.astype(jnp.bfloat16)

    def products(platform):
        lowered = jax.jit(jax.grad(linear, (0, 1))).trace(low, kernel, labels)
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
        return set(re.findall(r"dot_general.*: \(tensor<\w*x(\w+)>, tensor<\w*x(\w+)>\)", text))

    assert products("tpu") == products("cuda") == {("bf16", "bf16")}
    assert products("cpu") == {("f32", "f32")}
    with jax.default_matmul_precision("float32"):
        assert products("tpu") == {("f32", "f32")}


@pytest.mark.parametrize("classes", [32768, 131072, 50257])
def test_memory_does_not_grow_with_the_vocabulary(classes):
    shapes = (((2048, 512), "float32"), ((512, classes), "float32"), ((2048,), "int32"))
    arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]
    gradient = jax.jit(jax.value_and_grad(linear, (0, 1))).lower(*arguments).compile()
    assert gradient.memory_analysis().temp_size_in_bytes < 64e6


# How hidden and kernel are sharded over four devices of "data" and two of "model", and blocks that
# do not divide a device's tokens or classes.
LAYOUTS = {
    "whole": ((("data",),), (), 12),
    "features over the devices of tokens": ((("data",),), ("data",), 12),
    "classes over the devices of tokens": ((("data",),), (None, "data"), 12),
    "classes over their own devices": ((("data",),), (None, "model"), (3, None)),
    "both": ((("data",),), ("data", "model"), (3, None)),
    "classes over all devices": (("data",), (None, ("data", "model")), None),
    "features over devices that have the same tokens": (("data", None, "model"), ("model",), None),
    "features over all devices": ((None, "data"), (("model", "data"),), 12),
}
SHARDED = (8, 4), 8, 64  # Tokens, features and classes.
SHARDED_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_soft_cap": 3.0}


def sharded_as(of_hidden, of_kernel):
    """How hidden, kernel, bias, weights and labels are sharded."""
    return tuple(
        PartitionSpec(*s)
        for s in (of_hidden, of_kernel, of_kernel[1:2], of_hidden[:2], of_hidden[:2])
    )


@functools.cache
def of_all_logits():
    """What the sharded programs have to find."""
    *floats, labels = draw(*SHARDED)
    floats[3][2:6] = 0  # So on two devices nothing counts.
    loss = both(labels, reduction="parts", **SHARDED_OPTIONS)[1]
    value, gradients, tangent = jax.jit(lambda *a: derivatives(loss, a, a))(*floats)
    # Now absent tokens hold NaN, so that the derivative of their weights is 0.
    rubbish, of_weights = np.array(floats[0]), np.array(gradients[3])
    rubbish[2:6], of_weights[2:6] = np.nan, 0
    return (rubbish, *floats[1:], labels), (value, (*gradients[:3], of_weights), tangent)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_is_local(layout):
    """On an Auto mesh that is told the layout, and on an Explicit mesh that shows it."""
    arguments, expected = of_all_logits()
    of_hidden, of_kernel, block_size = LAYOUTS[layout]
    specs = sharded_as(of_hidden, of_kernel)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def program(*arguments, in_specs=None):
        *floats, labels = arguments
        options = {"block_size": block_size, "in_specs": in_specs, **SHARDED_OPTIONS}
        loss = both(labels, reduction="parts", **options)[0]
        return derivatives(loss, floats, floats)

    def on_both_meshes(*arguments):
        explicit = jax.sharding.explicit_axes(program, in_sharding=specs)
        return program(*arguments, in_specs=specs[:2]), explicit(*arguments)

    with jax.set_mesh(mesh):
        shardings = [NamedSharding(mesh, spec) for spec in specs]
        whole, kept = NamedSharding(mesh, PartitionSpec()), tuple(shardings[:4])
        # One program, because XLA compiles once what both meshes have in common.
        out_shardings = ((whole, kept, whole),) * 2
        found = jax.jit(on_both_meshes, out_shardings=out_shardings)(
            *map(jax.device_put, arguments, shardings)
        )
    for result in found:
        close(result, expected, rtol=1e-4)


# Which classes a device of a caller's own shard_map has, and the axis over which they are sharded.
MAPPED = {
    "whole": ((), None, 12),
    "classes over the devices of tokens": ((None, "data"), "data", 12),
    "classes over their own devices": ((None, "model"), "model", (3, None)),
    "classes over all devices": ((None, ("model", "data")), ("model", "data"), None),
}


@pytest.mark.parametrize("layout", MAPPED)
def test_a_shard_of_the_classes_is_enough(layout):
    """In a caller's own shard_map, with and without its check, and labels among all classes."""
    arguments, expected = of_all_logits()
    of_kernel, class_axis_name, block_size = MAPPED[layout]
    names = {"axis_name": "data", "class_axis_name": class_axis_name}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = sharded_as(("data",), of_kernel)

    def inside(*arguments):
        *floats, labels = arguments
        options = {"block_size": block_size, **names, **SHARDED_OPTIONS}
        return both(labels, reduction="parts", **options)[0](*floats)

    @jax.jit
    def program(*arguments):
        *floats, labels = arguments
        shard_map = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs)

        def sharded(check_vma):
            mapped = shard_map(inside, out_specs=PartitionSpec(), check_vma=check_vma)
            return derivatives(lambda *a: mapped(*a, labels), floats, floats)

        # Without the check, JAX does not sum the gradients of the members.
        gradient = jax.grad(lambda *a: inside(*a).total, ALL_FLOATS)
        of_members = shard_map(gradient, out_specs=specs[:4])(*arguments)
        return [sharded(True), sharded(False)], of_members

    found, of_members = program(*arguments)
    for result in found:
        close(result, expected, rtol=1e-4)
    close(of_members, expected[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("reduction", "block_size", "check_vma"), [("sum", 16, True), ("mean", (6, None), False)]
)
def test_members_of_an_axis_agree_with_the_whole(reduction, block_size, check_vma):
    arguments = draw((8, 3), FEATURES, 40)
    arguments[3][2:6] = 0  # On two devices nothing counts.
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def loss(*a, axis_name=None):
        options = {"reduction": reduction, "block_size": block_size, "axis_name": axis_name}
        return both(a[4], **options)[0](*a[:4])

    inside = functools.partial(loss, axis_name="data")
    in_specs = rows, whole, whole, rows, rows
    shard_map = functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, check_vma=check_vma)

    @jax.jit
    def program(*arguments):
        mapped = shard_map(inside, out_specs=whole)
        found, expected = (jax.value_and_grad(f, ALL_FLOATS)(*arguments) for f in (mapped, loss))
        if not check_vma:  # Without it, JAX does not sum the gradients of the members.
            return found, expected, expected[1]
        of_members = shard_map(jax.grad(inside, ALL_FLOATS), out_specs=in_specs[:4])
        return found, expected, of_members(*arguments)

    found, expected, of_members = program(*arguments)
    close(found, expected)
    close(of_members, expected[1])


@pytest.mark.parametrize("is_sparse", [True, False], ids=["class ids", "distributions"])
def test_losses_of_logits_take_shards_of_the_classes(is_sparse):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 3, 6)).astype(np.float32)
    # A class that is ruled out, and on two of the four devices, where nothing counts, rubbish.
    logits[1, 0, 4], logits[2:6] = -np.inf, np.nan
    weights = np.arange(8, dtype=np.float32)
    weights[2:6] = 0
    labels = rng.integers(0, 4, (8, 3)).astype(np.int32)
    rows, classes = PartitionSpec("data"), PartitionSpec("data", None, "model")
    loss, of_labels = jl.sparse_softmax_cross_entropy, rows
    if not is_sparse:
        loss, of_labels = jl.softmax_cross_entropy, classes
        labels = np.eye(6, dtype=np.float32)[labels]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def values_and_derivatives(loss, logits, weights):
        plain, smooth = (
            lambda x, w, o=o: loss(x, labels, w, **o)
            for o in ({}, {"z_loss": 0.1, "label_smoothing": 0.1})
        )
        finite = jnp.where(jnp.isinf(logits), 0, logits)
        gradient = jax.value_and_grad(plain, (0, 1))(logits, weights)
        return gradient, derivatives(smooth, (finite, weights), (finite, weights))

    def mapped(*arguments, check_vma, **options):
        inside = functools.partial(loss, axis_name="data", class_axis_name="model", **options)
        specs = {"in_specs": (classes, of_labels, rows), "out_specs": PartitionSpec()}
        return jax.shard_map(inside, mesh=mesh, check_vma=check_vma, **specs)(*arguments)

    @jax.jit
    def program(*floats):
        ways = (functools.partial(mapped, check_vma=c) for c in (True, False))
        return [values_and_derivatives(way, *floats) for way in ways]

    expected = jax.jit(functools.partial(values_and_derivatives, loss))(logits, weights)
    close(program(logits, weights), [expected] * 2)


def test_members_that_share_a_row_do_not_add_it_up():
    with pytest.raises(ValueError, match=r"class_axis_name must be other axes than axis_name.*'i'"):
        jax.vmap(
            lambda x: jl.sparse_softmax_cross_entropy(
                x, jnp.zeros(3, int), axis_name="i", class_axis_name="i"
            ),
            axis_name="i",
        )(jnp.zeros((2, 3, 4)))


SPEC = PartitionSpec("data")


@pytest.mark.parametrize(
    ("in_specs", "message"),
    [
        (SPEC, "in_specs must be a PartitionSpec of hidden and a PartitionSpec of kernel, got"),
        ((SPEC,), "in_specs must be a PartitionSpec of hidden and"),
        ([SPEC, SPEC], "in_specs must be a Python value.* \\(a tuple, not a list\\)"),
        ((SPEC, "data"), "in_specs must be a PartitionSpec of hidden and.*'data'"),
        ((PartitionSpec("rows"), SPEC), r"in_specs of hidden must name axes.*'data'.*'rows'"),
        ((SPEC, PartitionSpec(None, "data")), r"equal shards.*\(6, 11\).*axis of 11 has 4 shards"),
        ((SPEC, PartitionSpec(None, None, "data")), r"fit kernel of shape \(6, 11\)"),
    ],
)
def test_in_specs_are_checked(in_specs, message):
    hidden, kernel, _, _, labels = draw((8, 3), classes=11)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        linear(hidden, kernel, labels, in_specs=in_specs)


def test_in_specs_are_what_an_explicit_mesh_shows():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    rows, of_classes = PartitionSpec("data"), PartitionSpec(None, "model")
    with jax.set_mesh(mesh):
        hidden, kernel, labels = (
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in (
                (jnp.ones((8, 4)), rows),
                (jnp.ones((4, 16)), of_classes),
                (jnp.zeros(8, int), rows),
            )
        )
        for in_specs in (None, (rows, of_classes), (PartitionSpec("data", None), of_classes)):
            chex.assert_trees_all_close(
                linear(hidden, kernel, labels, in_specs=in_specs), np.log(16)
            )
        for name, in_specs in (
            ("hidden", (PartitionSpec("model"), of_classes)),
            ("kernel", (rows, PartitionSpec())),
            ("kernel", (rows, PartitionSpec("data", "model"))),
        ):
            with pytest.raises(ValueError, match=f"in_specs of {name} must be None or what the"):
                linear(hidden, kernel, labels, in_specs=in_specs)


def test_in_specs_need_a_mesh_and_no_shard_map():
    hidden, kernel, _, _, labels = draw((8, 3))
    with pytest.raises(ValueError, match=r"in_specs need a mesh: .*jax.set_mesh"):
        linear(hidden, kernel, labels, in_specs=(SPEC, SPEC))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (SPEC, PartitionSpec()), "class_axis_name": "i"}
    mapped = jax.vmap(functools.partial(linear, hidden, kernel, **specs), axis_name="i")
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"class_axis_name.*None, got 'i'"):
        mapped(labels[None])


@pytest.mark.parametrize(
    ("argument", "given", "message"),
    [
        ("kernel", (5, 11), r"kernel must be \[features, classes\].*\(5, 11\).*\(4, 3, 6\)"),
        ("kernel", (6,), r"kernel.*\(6,\)"),
        ("kernel", (6, 0), r"kernel.*\(6, 0\)"),
        ("hidden", (), r"hidden of shape \(\)"),
        ("bias", (1,), r"bias must have shape \(11,\), got \(1,\)"),
        ("labels", (4,), r"labels.*\(4, 3\).*\(4,\)"),
        ("logit_soft_cap", 0.0, "logit_soft_cap must be a number from 1e-30 to 1e\\+30, got 0.0"),
        ("logit_soft_cap", 1e31, "logit_soft_cap.*1e\\+31"),
        ("logit_soft_cap", np.ones(()), "logit_soft_cap must be a Python value"),
        ("label_smoothing", 2.0, "label_smoothing.*2.0"),
        ("z_loss", -1.0, "z_loss.*-1.0"),
        ("block_size", 0, "block_size.*got 0"),
        ("block_size", (2, 3), r"block_size.*got \(2, 3\)"),
        ("block_size", 1.5, "block_size.*1.5"),
        ("block_size", (None, 3), r"block_size.*\(None, 3\)"),
        ("ignore_index", 2**40, "ignore_index.*int32"),
    ],
)
def test_arguments_are_checked(argument, given, message):
    options = {"hidden": (4, 3, 6), "kernel": (6, 11), "labels": (4, 3), argument: given}
    for name in options.keys() & {"hidden", "kernel", "labels", "bias"}:
        options[name] = np.ones(options[name], np.int32 if name == "labels" else np.float32)
    with pytest.raises(ValueError, match=message):
        linear(**options)


def test_hidden_of_its_own_means_tokens_of_its_own():
    """Also if all members have the same labels, which are then known not to vary."""
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    hidden, kernel, *_ = draw((4,), 8, 16)
    labels, of_classes = np.array([0, 9], np.int32), PartitionSpec(None, "model")

    def log_probs(hidden, kernel, labels):
        return jl.linear_log_probs(hidden, kernel, labels, class_axis_name="model").label

    specs = (PartitionSpec("model"), of_classes, PartitionSpec())
    mapped = jax.shard_map(log_probs, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("model"))
    expected = jl.linear_log_probs(hidden, kernel, np.tile(labels, 2)).label
    chex.assert_trees_all_close(jax.jit(mapped)(hidden, kernel, labels), expected, rtol=1e-5)


def test_classes_that_are_no_shards_are_refused():
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    hidden, kernel, *_, labels = draw((4,), 8, 16)
    of_layer = functools.partial(jl.linear_softmax_cross_entropy, hidden)
    of_logits = jl.sparse_softmax_cross_entropy

    def mapped(loss, classes, **options):
        def local(x, labels):
            return loss(x, labels, **options)

        specs = (PartitionSpec(None, classes), PartitionSpec())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())

    for loss, x, name in ((of_layer, kernel, "kernel"), (of_logits, kernel[:4], "logits")):
        for options, message in (
            ({"class_axis_name": "model"}, f"{name} must have its classes sharded over"),
            ({"class_axis_name": "nope"}, "class_axis_name must name axes of a shard_map"),
            ({"class_axis_name": ("model", "model")}, "class_axis_name must name each axis once"),
            ({"axis_name": ("model", "model")}, "axis_name must name each axis once"),
        ):
            with pytest.raises(ValueError, match=message):
                mapped(loss, None, **options)(x, labels)
        with pytest.raises(ValueError, match="class_axis_name must name axes of a shard_map"):
            loss(x, labels, class_axis_name="model")
    told = {"class_axis_name": "model", "in_specs": (PartitionSpec(), PartitionSpec())}
    with pytest.raises(ValueError, match="class_axis_name is for axes of a shard_map"):
        mapped(of_layer, "model", **told)(kernel, labels)
