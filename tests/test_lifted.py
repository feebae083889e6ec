"""Functions written elsewhere, lifted: JAX's own numbers, and nothing from what is absent."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arguments import NOT_A_NUMBER, centred, gaussian
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax import losses

import jaxlosses as jl

RNG = np.random.default_rng(0)
ROWS, CLASSES = 4, 5
close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=1e-6)
# The functions' own code mixes dtypes and ranks.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def reals(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def distributions(*shape):
    return jnp.asarray(RNG.dirichlet(np.ones(shape[-1]), shape[:-1]), jnp.float32)


def bits(*shape):
    return jnp.asarray(RNG.integers(0, 2, shape), jnp.float32)


def ids(*shape, low=0):
    return jnp.asarray(RNG.integers(low, CLASSES, shape), jnp.int32)


def ppo(new, old, advantage):
    ratio = jnp.exp(new - old)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)


ELEMENTS, VECTORS, SCORES = (ROWS, 3), (ROWS, 3, CLASSES), (ROWS, CLASSES)
REALS = [reals(*ELEMENTS), reals(*ELEMENTS)]
BINARY = [reals(*ELEMENTS), bits(*ELEMENTS)]
SIGNS = [reals(*ELEMENTS), 2 * bits(*ELEMENTS) - 1]
PAIRS = [reals(*VECTORS), reals(*VECTORS)]
CLASS_PROBABILITIES = [reals(*VECTORS), distributions(*VECTORS)]
LOG_PROBABILITIES = [jnp.log(distributions(*VECTORS)), distributions(*VECTORS)]
CLASS_IDS = [reals(*VECTORS), ids(*ELEMENTS)]
PADDINGS = [jnp.zeros((ROWS, 6)), jnp.zeros((ROWS, 2))]
fenchel_young = losses.make_fenchel_young_loss(jax.nn.logsumexp)

# Each loss depends on its own place of the inputs alone.
INDEPENDENT = {
    "squared_error": (losses.squared_error, REALS),
    "l2_loss": (losses.l2_loss, REALS),
    "huber_loss": (functools.partial(losses.huber_loss, delta=0.7), REALS),
    "log_cosh": (losses.log_cosh, REALS),
    "cosine_similarity": (losses.cosine_similarity, PAIRS),
    "cosine_distance": (losses.cosine_distance, PAIRS),
    "hinge_loss": (losses.hinge_loss, SIGNS),
    "perceptron_loss": (losses.perceptron_loss, SIGNS),
    "sparsemax_loss": (losses.sparsemax_loss, BINARY),
    "sigmoid_binary_cross_entropy": (losses.sigmoid_binary_cross_entropy, BINARY),
    "sigmoid_focal_loss": (functools.partial(losses.sigmoid_focal_loss, alpha=0.3), BINARY),
    "softmax_cross_entropy": (losses.softmax_cross_entropy, CLASS_PROBABILITIES),
    "safe_softmax_cross_entropy": (losses.safe_softmax_cross_entropy, CLASS_PROBABILITIES),
    "integer labels": (losses.softmax_cross_entropy_with_integer_labels, CLASS_IDS),
    "poly_loss_cross_entropy": (losses.poly_loss_cross_entropy, CLASS_PROBABILITIES),
    "kl_divergence": (losses.kl_divergence, LOG_PROBABILITIES),
    "kl_divergence_with_log_targets": (
        losses.kl_divergence_with_log_targets,
        [LOG_PROBABILITIES[0], jnp.log(LOG_PROBABILITIES[1])],
    ),
    "generalized_kl_divergence": (losses.generalized_kl_divergence, LOG_PROBABILITIES),
    "multiclass_hinge_loss": (jax.vmap(losses.multiclass_hinge_loss), [reals(*SCORES), ids(ROWS)]),
    "multiclass_perceptron_loss": (
        jax.vmap(losses.multiclass_perceptron_loss),
        [reals(*SCORES), ids(ROWS)],
    ),
    "multiclass_sparsemax_loss": (
        losses.multiclass_sparsemax_loss,
        [reals(*SCORES), ids(ROWS)],
    ),
    "make_fenchel_young_loss": (jax.vmap(fenchel_young), [reals(*SCORES), distributions(*SCORES)]),
    "binary_dice_loss": (jax.vmap(losses.binary_dice_loss), BINARY),
    "dice_loss": (
        lambda p, y: losses.dice_loss(p, y, reduction="none").mean(-1),
        [CLASS_PROBABILITIES[0], jax.nn.one_hot(ids(*ELEMENTS), CLASSES)],
    ),
    "ranking_softmax_loss": (
        functools.partial(losses.ranking_softmax_loss, reduce_fn=None),
        [reals(*SCORES), ids(*SCORES).astype(jnp.float32)],
    ),
    "triplet_margin_loss": (losses.triplet_margin_loss, [*PAIRS, reals(*VECTORS)]),
    "ctc_loss": (
        losses.ctc_loss,
        [reals(ROWS, 6, CLASSES), PADDINGS[0], ids(ROWS, 2, low=1), PADDINGS[1]],
    ),
    "gaussian": (gaussian, [*REALS, jnp.exp(reals(*ELEMENTS))]),
    "ppo": (ppo, [*REALS, reals(*ELEMENTS)]),
    "one input": (lambda x: jnp.sqrt(jnp.abs(x)), REALS[:1]),
    "a pytree": (
        lambda model, y: jnp.square(model["mean"] - y) * model["extra"][0].sum(-1),
        [{"mean": REALS[0], "extra": (PAIRS[0], None)}, REALS[1]],
    ),
}
# One number for the whole batch, something else than a loss, or a loss under another name above.
NO_LOSS_OF_EXAMPLES = {
    "convex_kl_divergence",
    "ntxent",
    "smooth_labels",
    "make_fenchel_young_loss",
    "ctc_loss_with_forward_probs",
    "multiclass_generalized_dice_loss",
    "softmax_cross_entropy_with_integer_labels",
}


def n_pairs(anchors, positives):
    logits = anchors @ positives.T
    return jax.nn.logsumexp(logits, 1) - jnp.diagonal(logits)


def softmax_over_the_batch(scores, labels):
    return -labels * jax.nn.log_softmax(scores, 0)


COUPLED = {
    "n_pairs": (n_pairs, [reals(*SCORES), reals(*SCORES)]),
    "softmax_over_the_batch": (softmax_over_the_batch, [reals(ROWS), distributions(1, ROWS)[0]]),
    "centred": (centred, REALS),
}
ALL = INDEPENDENT | COUPLED


def weights_for(shape):
    """Of every shape that aligns and of every kind, with zeros; and a constant."""
    full = RNG.uniform(0.5, 2, shape).astype(np.float32)
    full[1], full.flat[0] = 0, 0
    row = np.array([1.5, 0, -2, 1], np.float32)
    rows = row.reshape(ROWS, *(1 for _ in shape[1:]))
    return [*map(jnp.asarray, (full, row, rows != 0, (full > 0).astype(np.int8))), 2.0]


def split(inputs):
    """The leaves that have derivatives, and a function that puts them back."""
    leaves, structure = jax.tree.flatten(inputs)
    floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def join(some, others=inputs):
        chosen = dict(zip(floats, some, strict=True))
        both = (chosen.get(i, x) for i, x in enumerate(jax.tree.leaves(others)))
        return jax.tree.unflatten(structure, both)

    return [leaves[i] for i in floats], join


def spread(weights, like):
    weights = np.asarray(weights, np.float32)
    return weights.reshape(weights.shape + (1,) * (like.ndim - weights.ndim))


def hide(inputs, absent, rubbish, label=99):
    def hide_leaf(x):
        filler = rubbish if jnp.issubdtype(x.dtype, jnp.floating) else label
        return jnp.asarray(np.where(spread(absent, x) > 0, np.asarray(filler, x.dtype), x))

    return jax.tree.map(hide_leaf, inputs)


@pytest.mark.parametrize("name", ALL)
def test_it_is_differentiated_as_jax_differentiates_it(name):
    function, inputs = ALL[name]
    floats, join = split(inputs)
    tangents = [x[::-1] for x in floats]
    lifted = jl.weighted(function, num_inputs=len(inputs))

    @jax.jit
    def of_weights(weights):
        """Total and count, the gradient of the total, and a tangent of it."""

        def total(some):
            parts = lifted(*join(some), weights, reduction="parts")
            return parts.total, parts.count

        parts, gradient = jax.value_and_grad(total, has_aux=True)(floats)
        return parts, gradient, jax.jvp(lambda some: total(some)[0], (floats,), (tangents,))[1]

    def plain(some):
        return function(*join(some))

    # Operation by operation, which other functions have as well. A loop takes longer so.
    with jax.disable_jit(name != "ctc_loss"):
        losses, pull_back = jax.vjp(plain, floats)
        _, slopes = jax.jvp(plain, (floats,), (tangents,))
        for weights in weights_for(losses.shape):
            w = np.broadcast_to(spread(weights, losses), losses.shape)
            parts = np.sum(w * losses), np.float32(np.count_nonzero(w))
            expected = parts, *pull_back(jnp.asarray(w)), np.sum(w * slopes)
            close(of_weights(weights), expected)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_rubbish_at_absent_places_reaches_nothing(name):
    function, inputs = INDEPENDENT[name]
    lifted = jl.weighted(function, num_inputs=len(inputs))
    weights = weights_for(jax.eval_shape(function, *inputs).shape)[0]
    floats, join = split(inputs)
    ones = [jnp.ones_like(x) for x in floats]

    def total(some, weights, others):
        return lifted(*join(some, others), weights, reduction="sum")

    @jax.jit
    def program(some, others, tangents):
        value, gradients = jax.value_and_grad(total, (0, 1))(some, weights, others)
        _, tangent = jax.jvp(lambda some: total(some, weights, others), (some,), (tangents,))
        return value, *gradients, tangent

    expected = program(floats, inputs, ones)
    for rubbish in NOT_A_NUMBER:
        hidden = hide(inputs, weights == 0, rubbish)
        found = program(split(hidden)[0], hidden, hide(ones, weights == 0, np.nan))
        chex.assert_tree_all_finite(found)
        value, gradients, of_weights, tangent = found
        close((value, gradients), expected[:2])
        close(np.where(weights == 0, 0, of_weights), np.where(weights == 0, 0, expected[2]))
        close(tangent, expected[3], rtol=1e-4)


@pytest.mark.parametrize("variance", [0.0, np.nan, -1.0])
@pytest.mark.parametrize("position", range(3))
def test_rubbish_in_any_one_input(position, variance):
    inputs = ALL["gaussian"][1]
    weights = weights_for(ELEMENTS)[0]
    hidden = list(inputs)
    hidden[position] = hide(inputs[position], weights == 0, variance)
    gradient = jax.grad(jl.weighted(gaussian, num_inputs=3), (0, 1, 2))
    close(gradient(*hidden, weights), gradient(*inputs, weights))


@pytest.mark.parametrize("rubbish", NOT_A_NUMBER)
@pytest.mark.parametrize("name", COUPLED)
def test_value_and_derivative_are_of_the_same_inputs(name, rubbish):
    """By finite differences in the rows that count, in float64."""
    function, inputs = COUPLED[name]
    with jax.enable_x64(True):
        inputs = [jnp.asarray(x, jnp.float64) for x in inputs]
        weights = jnp.array([1.5, 0.0, 2.0, 0.0])

        @jax.jit
        def along(t, hidden, present):
            points = [jnp.where(p == 0, x, x + t * p) for x, p in zip(hidden, present, strict=True)]
            return jl.weighted(function)(*points, weights, reduction="sum")

        @jax.jit
        def in_both_modes(*inputs):
            loss = functools.partial(along, hidden=inputs[0], present=inputs[1])
            return jax.grad(loss)(0.0), jax.jvp(loss, (0.0,), (1.0,))[1]

        for absent in (weights == 0, jnp.array([0.0, 1.0, 0.0, 0.0]) > 0):
            hidden = hide(inputs, absent, rubbish)
            present = [spread(weights, x) * reals(*x.shape) for x in inputs]
            step = 1e-6
            expected = (along(step, hidden, present) - along(-step, hidden, present)) / (2 * step)
            assert jnp.isfinite(expected)
            for derivative in in_both_modes(hidden, present):
                close(derivative, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "n_pairs", "integer labels"])
def test_weights_of_zero_can_be_learned_through_a_gradient(name):
    """Meta-reweighting differentiates a gradient with respect to weights of zero."""
    function, inputs = ALL[name]
    floats, join = split(inputs)
    shape = jax.eval_shape(function, *inputs).shape
    lifted = jl.weighted(function, num_inputs=len(inputs))

    def gradient(weights):
        return jax.grad(lambda some: lifted(*join(some), weights, reduction="sum"))(floats)

    def expected(weights):
        return jax.grad(lambda some: jnp.sum(weights * function(*join(some))))(floats)

    zeros = jnp.zeros(shape)
    for jacobian in (jax.jacfwd, jax.jacrev):
        close(jax.jit(jacobian(gradient))(zeros), jax.jit(jacobian(expected))(zeros))


@pytest.mark.parametrize("name", ["softmax_loss", "listmle_loss", "poly1_softmax_loss"])
def test_rax_losses_of_lists(name):
    rax = pytest.importorskip("rax")
    loss = functools.partial(getattr(rax, name), reduce_fn=None)
    scores, labels = reals(*SCORES), ids(*SCORES).astype(jnp.float32)
    where = jnp.array([[1, 1, 0, 1, 0], [0] * 5, [1] * 5, [1, 1, 1, 0, 0]], bool)
    weights = where.any(-1)

    @jax.jit
    @jax.value_and_grad
    def plain(scores):
        return jnp.sum(jnp.where(weights, loss(scores, labels, where=where), 0)) / 3

    expected = plain(scores)
    hidden = jnp.where(weights[:, None], scores, jnp.nan)

    def lifted(scores):
        function = jl.weighted(lambda s, y, mask: loss(s, y, where=mask), num_inputs=3)
        return function(scores, labels, where, weights)

    found = jax.jit(jax.value_and_grad(lifted))
    close(found(scores), expected)
    close(found(hidden), expected)


def test_every_loss_of_optax_is_lifted_here():
    public = {n for n, f in vars(losses).items() if callable(f) and not n.startswith("_")}
    assert public <= set(INDEPENDENT) | NO_LOSS_OF_EXAMPLES


def test_a_dynamic_loop_is_differentiated_forward():
    def power(x, n):
        start = (0, jnp.ones_like(x))
        return jax.lax.while_loop(
            lambda s: s[0] < jnp.max(n), lambda s: (s[0] + 1, s[1] * jnp.sqrt(x)), start
        )[1]

    x, n = jnp.array([4.0, 0.0, jnp.nan]), jnp.array([3, 1, 1])
    weights = jnp.array([2.0, 0.0, 0.0])
    lifted = jl.weighted(power)
    found = jax.jvp(lambda x: lifted(x, n, weights), (x,), (jnp.ones(3),))
    close(found, (16.0, 2 * 1.5 * 2.0))
    with pytest.raises(ValueError, match="Reverse-mode"):
        jax.grad(lambda x: lifted(x, n, weights))(x)


def test_functions_with_derivatives_in_one_mode_or_none():
    @jax.custom_vjp
    def root(x):
        return jnp.sqrt(x)

    root.defvjp(lambda x: (jnp.sqrt(x), x), lambda x, g: (g / (2 * jnp.sqrt(x)),))
    x, weights = jnp.array([4.0, 0.0, jnp.nan]), jnp.array([1, 0, 0])
    close(jax.grad(jl.weighted(root, num_inputs=1))(x, weights), jnp.array([0.25, 0, 0]))

    def called_back(x):
        return jax.pure_callback(np.sqrt, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with np.errstate(invalid="ignore"):
        close(jl.weighted(called_back, num_inputs=1)(x, weights), jnp.float32(2))


def test_a_weight_of_zero_is_learned_where_the_inputs_are_replaced():
    """The loss is finite there, and only its derivative is not."""

    def far(anchors, positives, negatives):
        near, distant = (jnp.linalg.norm(anchors - x, axis=-1) for x in (positives, negatives))
        return jnp.maximum(near - distant + 9, 0)

    anchors, negatives = reals(4, 2), reals(4, 2)
    positives = jnp.where(jnp.arange(4)[:, None] == 1, anchors, reals(4, 2))
    weights = jnp.array([1.0, 0.0, 1.0, 2.0])
    inputs = (anchors, positives, negatives)
    lifted = jl.weighted(far, num_inputs=3)
    gradient = jax.grad(functools.partial(lifted, reduction="sum"), (0, 1, 2, 3))(*inputs, weights)
    chex.assert_tree_all_finite(gradient)
    close(gradient[3], far(*inputs))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
def test_inputs_on_a_mesh_need_not_be_sharded_alike(kind):
    def loss(x, y, w, axis_name=None):
        labels = jnp.ones(len(x)) if axis_name else y  # Made inside: the same on every device.
        function = jl.weighted(lambda x, y: jnp.minimum(jnp.logaddexp(0, x) - x * y, 9.0))
        return function(x, labels, w, axis_name=axis_name)

    x, y, w = reals(8), jnp.ones(8), jnp.array([1.0, 0, 0, 1, 1, 0, 1, 1])
    expected = jax.jit(jax.value_and_grad(loss))(x, y, w)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    rows, whole = PartitionSpec("d"), PartitionSpec()
    with jax.set_mesh(mesh):
        if kind is AxisType.Auto:
            options = {"mesh": mesh, "in_specs": (rows, rows, rows), "out_specs": whole}
            mapped = jax.shard_map(functools.partial(loss, axis_name="d"), **options)
            for weights in (w, w > 0):
                close(jax.jit(jax.value_and_grad(mapped))(x, y, weights), expected)
        placed = [jax.device_put(a, NamedSharding(mesh, rows)) for a in (x, y, w)]
        close(jax.value_and_grad(loss)(*placed), expected)  # Not in jit.


def test_an_input_may_be_whole_on_every_device_of_an_explicit_mesh():
    """With inputs or weights that are sharded, with and without jit and checkpoint."""
    if jax.__version_info__ < (0, 9):
        pytest.skip("the select of JAX 0.8 has a transpose that is sharded otherwise")
    x, y, w = reals(8, 3), reals(8, 3), jnp.array([1.0, 0, 0, 1, 1, 0, 1, 1])
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    rows, whole = PartitionSpec("d"), PartitionSpec()
    for loss in (jl.weighted(losses.squared_error), jl.mean_squared_error):
        gradient = jax.grad(loss, (0, 1, 2))
        checkpointed = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))
        expected = jax.jit(gradient)(x, y, w)
        with jax.set_mesh(mesh):
            for specs in ((rows, whole, rows), (whole, rows, rows), (whole, whole, rows)):
                placed = [
                    jax.device_put(a, NamedSharding(mesh, s))
                    for a, s in zip((x, y, w), specs, strict=True)
                ]
                for function in (gradient, jax.jit(gradient), checkpointed):
                    close(function(*placed), expected)


def test_an_option_may_have_any_name():
    lifted = jl.weighted(lambda p, y, self, loss_fn: self * p - loss_fn * y)
    close(lifted(*REALS, self=2.0, loss_fn=3.0), jnp.mean(2 * REALS[0] - 3 * REALS[1]))


def test_placeholders_differ_between_inputs_places_and_features():
    """Or a distance, or a standard deviation, would have an infinite derivative there."""
    x = jnp.full((3, 4), jnp.nan)
    seen = []

    def scaled_distance(scale):
        def function(p, y):
            seen[:] = [p, y]
            between_rows = jnp.sqrt(jnp.sum(jnp.square(p[:, None] - p[None]), -1) + jnp.eye(3))
            return scale * jnp.linalg.norm(p - y, axis=-1) / p.std(-1) + between_rows.sum(1)

        return jl.weighted(function)(x, x, jnp.zeros(3))

    value, gradient = jax.value_and_grad(scaled_distance)(2.0)
    assert value == gradient == 0


@pytest.mark.parametrize(
    ("function", "inputs", "message"),
    [
        (losses.ntxent, [jnp.ones((4, 2)), jnp.ones(4)], "one number.*vmap.*weighted_loss"),
        (lambda p, y: (p, y), REALS, "one real array, got"),
        (lambda p, y: None, REALS, "one real array, got NoneType"),
        (lambda p, y: "three", REALS, "one real array, got str"),
        (lambda p, y: p.astype(complex), REALS, "one real array"),
        (lambda p, y: p.sum(0), REALS, r"leading axes.*\(3,\).*\(4, 3\)"),
        (lambda p, y: p + y, [reals(4, 3), reals(4, 1)], r"\(4, 3\).*\(4, 1\)"),
        (lambda p, y: p["a"], [{"a": reals(4), "b": "x"}, reals(4)], r"inputs\[0\]\['b'\].*str"),
        (lambda p, y: p, [None, reals(4)], r"inputs\[0\] must be.*got None"),
    ],
)
def test_what_is_no_loss_of_examples_is_refused(function, inputs, message):
    with pytest.raises(ValueError, match=message):
        jl.weighted(function)(*inputs)


def test_wrong_calls_say_how_many_inputs_are_wanted():
    three = jl.weighted(gaussian, num_inputs=3)
    x = reals(4)
    for wrong in ([x], [x, x], [x, x, x, x, x]):
        with pytest.raises(TypeError, match=r"weighted\(gaussian\) takes 3 inputs.*got \d"):
            three(*wrong)
    with pytest.raises(TypeError, match=r"weighted\(gaussian\) got weights twice"):
        three(x, x, x, x, weights=x)
    with pytest.raises(TypeError, match=r"got 2 by position and \['variance'\]"):
        three(x, x, variance=x)
    with pytest.raises(ValueError, match="loss_fn must be a function, got 'huber'"):
        jl.weighted("huber")
    for wrong in (0, -1, 1.5, None, True):
        with pytest.raises(ValueError, match="num_inputs must be"):
            jl.weighted(gaussian, num_inputs=wrong)


def test_a_lifted_function_can_be_pickled_and_compared():
    lifted = jl.weighted(losses.huber_loss)
    copied = pickle.loads(pickle.dumps(lifted))
    assert copied == lifted
    close(copied(*REALS, delta=0.5), lifted(*REALS, delta=0.5))
