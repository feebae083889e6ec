"""The last layer's loss from blocks of logits, against the same loss of all logits."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlosses as jl

TOKENS, FEATURES, CLASSES = (10, 3), 6, 11
EVERYTHING = {"label_smoothing": 0.2, "z_loss": 0.1, "logit_soft_cap": 1.5}
EVERY = (0, 1, 2, 3)
linear = jl.linear_softmax_cross_entropy
close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-6)


def through_logits(hidden, kernel, labels, *rest, bias=None, logit_soft_cap=None, **options):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + jnp.expand_dims(bias, range(logits.ndim - 1))
    if logit_soft_cap:
        logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    options.pop("block_size", None)
    return jl.sparse_softmax_cross_entropy(logits, labels, *rest, **options)


def draw(tokens=TOKENS, features=FEATURES, classes=CLASSES):
    rng = np.random.default_rng(0)
    shapes = ((*tokens, features), (features, classes), (classes,))
    hidden, kernel, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    weights = jnp.asarray(rng.uniform(0.5, 2, tokens), jnp.float32)
    labels = jnp.asarray(rng.integers(0, classes, tokens), jnp.int32)
    return hidden, kernel, bias, weights, labels


def both(labels, **options):
    """Either loss as a function of all that it can be differentiated by."""

    def of(loss):
        return lambda h, k, b, w: loss(h, k, labels, w, bias=b, **options)

    return of(linear), of(through_logits)


CUTS = {
    "a rest of three classes": ({"label_smoothing": 0.1}, 4),
    "one block": ({"z_loss": 0.1}, 11),
    "tokens from two segments": ({"logit_soft_cap": 2.0}, (6, None)),
    "tokens from two segments, and a rest": (EVERYTHING, (12, None)),
    "single classes": (EVERYTHING, 1),
    "as chosen": ({}, None),
}


@pytest.mark.parametrize("cut", CUTS)
def test_value_and_derivatives(cut):
    options, block_size = CUTS[cut]
    *floats, labels = draw()

    def everything(loss):
        moved = jax.jvp(loss, floats, [x[::-1] for x in floats])
        return jax.value_and_grad(loss, EVERY)(*floats), moved

    blocks, whole = both(labels, block_size=block_size, **options)
    close(*(jax.jit(everything, static_argnums=0)(f) for f in (blocks, whole)))


@pytest.mark.parametrize("moved", [(1,), (0, 2)], ids=str)
def test_uneven_cotangents_where_some_arguments_are_held(moved):
    *floats, labels = draw()
    cotangent = jnp.cos(jnp.arange(30.0)).reshape(TOKENS)

    def gradient(loss):
        return jax.grad(lambda *a: jnp.sum(loss(*a) * cotangent), moved)(*floats)

    blocks, whole = both(labels, reduction="none", block_size=4)
    close(*(jax.jit(gradient, static_argnums=0)(f) for f in (blocks, whole)))


def test_second_order():
    *floats, labels = draw((3,), 2, 5)
    for block_size, twice in ((4, jax.jacfwd), ((2, None), jax.jacrev)):
        blocks, whole = both(labels, block_size=block_size, **EVERYTHING)
        expected = jax.jit(jax.hessian(whole, (0, 1, 3)))(*floats)
        found = jax.jit(twice(twice(blocks, (0, 1, 3)), (0, 1, 3)))(*floats)
        close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shared", "block_size"), [((1,), 4), ((1, 2), (6, None)), ((0, 3), 4), ((0, 1, 2), 4)], ids=str
)
def test_vmap(shared, block_size):
    *floats, labels = draw()
    axes = [None if i in shared else 0 for i in EVERY]
    stacked = [x if i in shared else jnp.stack([x, -x]) for i, x in enumerate(floats)]

    def gradient(loss):
        return jax.grad(lambda *a: jnp.sin(jax.vmap(loss, axes)(*a)).sum(), EVERY)(*stacked)

    close(*(jax.jit(gradient, static_argnums=0)(f) for f in both(labels, block_size=block_size)))


def test_checkpoint_and_scan():
    *floats, labels = draw()
    loss, whole = both(labels, block_size=4)

    def total(*a):
        step = jax.checkpoint(lambda c, _: (c + loss(*a) / 2, None))
        return jax.lax.scan(step, 0.0, length=2)[0]

    close(jax.jit(jax.grad(total, EVERY))(*floats), jax.grad(whole, EVERY)(*floats))


@pytest.mark.parametrize(
    ("options", "rubbish", "label", "block_size"),
    [({}, np.nan, -1, 4), (EVERYTHING, -np.inf, CLASSES, (6, None))],
    ids=["nan", "inf"],
)
def test_what_is_absent_touches_nothing(options, rubbish, label, block_size):
    hidden, kernel, bias, weights, labels = draw()
    absent = jnp.zeros(TOKENS, bool).at[0, 1].set(True).at[2].set(True)
    weights = jnp.where(absent, 0, weights)
    # In one feature, so that a soft cap makes the logits finite again.
    hide = jnp.where(absent[..., None] & (jnp.arange(FEATURES) == 1)[None, None], rubbish, hidden)
    results = []
    for h, y in ((hide, jnp.where(absent, label, labels)), (hidden, labels)):
        loss, _ = both(y, block_size=block_size, **options)

        def everything(*a, loss=loss):
            value, slopes = jax.value_and_grad(loss, EVERY)(*a)
            curve = jax.jvp(jax.grad(loss, (0, 1)), a, a)[1]
            slopes = (*slopes[:3], jnp.where(absent & jnp.isfinite(slopes[3]), 0, slopes[3]))
            return value, slopes, jax.jvp(loss, a, a)[1], curve

        results.append(jax.jit(everything)(h, kernel, bias, weights))
    close(*results, atol=1e-5)


def test_ignored_and_impossible_labels():
    *floats, labels = draw()
    labels = labels.at[0].set(-100)
    blocks, whole = both(labels, ignore_index=-100, block_size=4)
    close(*(jax.jit(jax.grad(f, EVERY))(*floats) for f in (blocks, whole)))
    impossible = labels.at[2].set(jnp.array([-1, CLASSES, 2**31 - 1]))
    blocks, _ = both(impossible, ignore_index=-100, block_size=4)
    found = jax.jit(jax.grad(blocks))(*floats)
    assert jnp.isnan(found[2]).all()
    assert jnp.isnan(found).sum() == found[2].size


def test_large_logits_keep_their_digits():
    hidden, kernel, bias, _, labels = draw()
    floats = [np.asarray(x, np.float64) for x in (hidden, kernel, 1e4 + bias)]
    exact = floats[0] @ floats[1] + floats[2]
    log_sum = 1e4 + np.log(np.exp(exact - 1e4).sum(-1))
    at_label = np.take_along_axis(exact, np.asarray(labels)[..., None], -1)[..., 0]
    options = {"label_smoothing": 0.5, "block_size": 2, "reduction": "none"}
    losses = linear(hidden, kernel, labels, bias=1e4 + bias, **options)
    expected = log_sum - at_label / 2 - exact.mean(-1) / 2
    np.testing.assert_allclose(losses, expected, atol=2e-3)  # Two units of a logit's last place.


def test_classes_can_be_ruled_out():
    """All of the first block, and of another."""
    *floats, labels = draw()
    floats[2] = floats[2].at[jnp.array([0, 1, 2, 3, 9, 10])].set(-jnp.inf)
    losses = both(jnp.clip(labels, 4, 8), block_size=2)
    close(*(jax.jit(jax.value_and_grad(f, (0, 1)))(*floats) for f in losses))


@pytest.mark.parametrize(
    ("dtypes", "block_size"),
    [("bfloat16 bfloat16", 8), ("float16 float16", (40, None)), ("bfloat16 float32", 64)],
)
def test_low_precision_accumulates_in_float32(dtypes, block_size):
    hidden, kernel, bias, weights, labels = draw((40, 5), 64, 300)
    of_hidden, of_kernel = dtypes.split()
    # The weights are small: the slope of most logits is, and no number of float16.
    low = (hidden.astype(of_hidden), (kernel / 8).astype(of_kernel), bias, weights / 64)
    exact = [x.astype(jnp.float32) for x in low]
    gradient = jax.jit(jax.value_and_grad(both(labels, block_size=block_size)[0], EVERY))
    (value, gradients), (expected, exactly) = gradient(*low), gradient(*exact)
    assert value.dtype == jnp.float32
    close(value, expected, rtol=1e-6)
    for found, true, x in zip(gradients, exactly, low, strict=True):
        assert found.dtype == x.dtype
        # What is rounded is the gradient, and the slope of a logit, once each.
        error = jnp.abs(found.astype(jnp.float32) - true)
        assert error.max() < 1.1 * float(jnp.finfo(of_hidden).eps) * jnp.abs(true).max()


def test_integers_doubles_one_token_and_none():
    hidden, kernel, _, _, labels = draw()
    rounded = [jnp.round(x) for x in (hidden, kernel)]
    close(linear(*(x.astype(jnp.int32) for x in rounded), labels), linear(*rounded, labels))
    close(linear(hidden[0, 0], kernel, labels[0, 0]), linear(hidden[:1, 0], kernel, labels[:1, :1]))
    one = linear(hidden[0, 0], kernel, labels[0, 0], block_size=(1, None))
    close(one, linear(hidden[0, 0], kernel, labels[0, 0]))
    assert linear(hidden[:0], kernel, labels[:0], block_size=(2, None)) == 0
    for block_size in (4, (2, None)):
        nothing = linear(hidden[..., :0], kernel[:0], labels, block_size=block_size)
        close(nothing, np.log(CLASSES))
    with jax.enable_x64(True):
        doubles = [np.asarray(x, np.float64) for x in (hidden, kernel)]
        value = linear(*doubles, labels, block_size=4)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(doubles[0] @ doubles[1]), labels[..., None], -1
        )
        np.testing.assert_allclose(value, -picked.mean(), rtol=1e-12)


def test_where_nothing_counts_nothing_is_touched():
    """Not by a kernel or a bias of NaN either."""
    hidden, kernel, bias, weights, labels = draw()
    for rubbish, options in ((np.nan, EVERYTHING), (np.inf, {})):
        for block_size in (4, (6, None)):
            loss, _ = both(labels, block_size=block_size, **options)
            floats = (hidden, kernel.at[1, 2].set(rubbish), bias.at[3].set(rubbish), 0 * weights)
            found = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*floats)
            close(found, jax.tree.map(jnp.zeros_like, found), rtol=0, atol=0)


def test_absent_logits_beyond_float32_have_no_tangent():
    hidden, kernel, bias, weights, labels = draw()
    loss, _ = both(labels, block_size=4, logit_soft_cap=2.0)
    weights = weights.at[1].set(0)
    ones = [jnp.ones_like(x) for x in (hidden, kernel, bias)]
    moves = (*ones, jnp.zeros_like(weights))
    found, expected = (
        jax.jvp(loss, (hidden.at[1].set(value), kernel, bias, weights), moves)
        for value in (3e38, np.nan)
    )
    close(found, expected)


def test_a_kernel_in_bfloat16_whatever_its_shape():
    """XLA has no product of bfloat16 on a CPU, where it does not widen both."""
    hidden, kernel, *_, labels = draw((32,), 8, 128)
    low = [x.astype(jnp.bfloat16) for x in (hidden, kernel)]
    found = jax.jit(jax.grad(linear, (0, 1)))(*low, labels)
    exact = jax.grad(linear, (0, 1))(*(x.astype(jnp.float32) for x in low), labels)
    close([x.astype(jnp.float32) for x in found], list(exact), rtol=1e-2)


def test_matmul_precision_is_respected():
    hidden, kernel, *_, labels = draw()
    for precision in ("DEFAULT", "HIGHEST"):
        with jax.default_matmul_precision(precision.lower()):
            text = str(jax.make_jaxpr(jax.grad(linear, (0, 1)))(hidden, kernel, labels))
        assert set(re.findall(r"precision=\(?Precision\.(\w+)", text)) == {precision}


@pytest.mark.parametrize("classes", [32768, 131072, 50257])
def test_memory_does_not_grow_with_the_vocabulary(classes):
    shapes = (((2048, 512), "float32"), ((512, classes), "float32"), ((2048,), "int32"))
    arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]
    gradient = jax.jit(jax.value_and_grad(linear, (0, 1))).lower(*arguments).compile()
    assert gradient.memory_analysis().temp_size_in_bytes < 64e6


# Of hidden and of kernel, and a block: a side that is sharded is not the one to cut.
LAYOUTS = {
    "tokens": (("data", None, None), (None, None), 64),
    "both axes of tokens": (("data", "model", None), (None, None), 64),
    "features": (("data", None, "model"), ("model", None), 64),
    "classes": ((None, None, None), (None, "model"), (32, None)),
    "tokens and classes": (("data", None, None), (None, "model"), (32, None)),
    "features over the tokens' devices": (("data", None, None), ("data", "model"), (32, None)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
def test_sharded_is_local(kind, layout):
    *floats, labels = draw((16, 8), 32, 512)
    floats[3] = floats[3].at[2:6].set(0)
    of_hidden, of_kernel, block_size = LAYOUTS[layout]
    options = {"label_smoothing": 0.1, "logit_soft_cap": 3.0, "block_size": block_size}
    expected = jax.jit(jax.value_and_grad(both(labels, **options)[1], EVERY))(*floats)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    specs = (of_hidden, of_kernel, of_kernel[1:], of_hidden[:2], of_hidden[:2])
    shardings = [NamedSharding(mesh, PartitionSpec(*s)) for s in specs]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(*pair) for pair in zip((*floats, labels), shardings, strict=True)]

        def gradient(*arguments):
            return jax.value_and_grad(both(arguments[4], **options)[0], EVERY)(*arguments[:4])

        kept = (NamedSharding(mesh, PartitionSpec()), tuple(shardings[:4]))
        compiled = jax.jit(gradient, out_shardings=kept).lower(*placed).compile()
        close(compiled(*placed), expected, rtol=1e-4)
        if "over" not in layout:  # There the kernel has to be gathered.
            gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather", compiled.as_text())
            assert not any("32" in shape.split(",") for shape in gathered), gathered


@pytest.mark.parametrize(
    ("reduction", "block_size", "check_vma"), [("sum", 16, True), ("mean", (6, None), False)]
)
def test_members_of_an_axis_agree_with_the_whole(reduction, block_size, check_vma):
    *floats, labels = draw((8, 3), FEATURES, 40)
    floats[3] = floats[3].at[2:6].set(0)  # Two devices have nothing that counts.
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def loss(*a, axis_name=None):
        options = {"reduction": reduction, "block_size": block_size, "axis_name": axis_name}
        return both(a[4], **options)[0](*a[:4])

    inside = functools.partial(loss, axis_name="data")
    specs = {"mesh": mesh, "in_specs": (rows, whole, whole, rows, rows), "check_vma": check_vma}
    mapped = jax.shard_map(inside, out_specs=whole, **specs)
    expected = jax.value_and_grad(loss, EVERY)(*floats, labels)
    close(jax.jit(jax.value_and_grad(mapped, EVERY))(*floats, labels), expected)
    if check_vma:  # Or each member has a gradient of its own.
        local = jax.shard_map(jax.grad(inside, EVERY), out_specs=specs["in_specs"][:4], **specs)
        close(jax.jit(local)(*floats, labels), expected[1])


@pytest.mark.parametrize(
    ("argument", "given", "message"),
    [
        ("kernel", (5, 11), r"kernel must be \[features, classes\].*\(5, 11\).*\(4, 3, 6\)"),
        ("kernel", (6,), r"kernel.*\(6,\)"),
        ("kernel", (6, 0), r"kernel.*\(6, 0\)"),
        ("hidden", (), r"hidden of shape \(\)"),
        ("bias", (1,), r"bias must have shape \(11,\), got \(1,\)"),
        ("labels", (4,), r"labels.*\(4, 3\).*\(4,\)"),
        ("logit_soft_cap", 0.0, "logit_soft_cap must be at least 1e-30, got 0.0"),
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
