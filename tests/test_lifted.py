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
    return RNG.normal(size=shape).astype(np.float32)


def distributions(*shape):
    return RNG.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)


def bits(*shape):
    return RNG.integers(0, 2, shape).astype(np.float32)


def ids(*shape, low=0):
    return RNG.integers(low, CLASSES, shape).astype(np.int32)


def ppo(new, old, advantage):
    ratio = jnp.exp(new - old)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)


ELEMENTS, VECTORS, SCORES = (ROWS, 3), (ROWS, 3, CLASSES), (ROWS, CLASSES)
REALS = [reals(*ELEMENTS), reals(*ELEMENTS)]
BINARY = [reals(*ELEMENTS), bits(*ELEMENTS)]
SIGNS = [reals(*ELEMENTS), 2 * bits(*ELEMENTS) - 1]
PAIRS = [reals(*VECTORS), reals(*VECTORS)]
CLASS_PROBABILITIES = [reals(*VECTORS), distributions(*VECTORS)]
LOG_PROBABILITIES = [np.log(distributions(*VECTORS)), distributions(*VECTORS)]
CLASS_IDS = [reals(*VECTORS), ids(*ELEMENTS)]
PADDINGS = [np.zeros((ROWS, 6), np.float32), np.zeros((ROWS, 2), np.float32)]
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
        [LOG_PROBABILITIES[0], np.log(LOG_PROBABILITIES[1])],
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
        [CLASS_PROBABILITIES[0], np.eye(CLASSES, dtype=np.float32)[ids(*ELEMENTS)]],
    ),
    "ranking_softmax_loss": (
        functools.partial(losses.ranking_softmax_loss, reduce_fn=None),
        [reals(*SCORES), ids(*SCORES).astype(np.float32)],
    ),
    "triplet_margin_loss": (losses.triplet_margin_loss, [*PAIRS, reals(*VECTORS)]),
    "ctc_loss": (
        losses.ctc_loss,
        [reals(ROWS, 6, CLASSES), PADDINGS[0], ids(ROWS, 2, low=1), PADDINGS[1]],
    ),
    "gaussian": (gaussian, [*REALS, np.exp(reals(*ELEMENTS))]),
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
    return [full, row, rows != 0, (full > 0).astype(np.int8), 2.0]


def split(inputs):
    """The leaves that have derivatives, and a function that puts them back."""
    leaves, structure = jax.tree.flatten(inputs)
    floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def join(some, others):
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
        return np.where(spread(absent, x) > 0, np.asarray(filler, x.dtype), x)

    return jax.tree.map(hide_leaf, inputs)


@functools.cache
def program(name):
    """Compiled once: the lifted function with its derivatives, and the function with its own."""
    function, inputs = ALL[name]
    lifted = jl.weighted(function, num_inputs=len(inputs))
    join = split(inputs)[1]

    @jax.jit
    def both(floats, others, weights, tangents):
        def total(some, weights):
            parts = lifted(*join(some, others), weights, reduction="parts")
            return parts.total, parts.count

        def plain(some):
            return function(*join(some, others))

        parts, gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(floats, weights)
        _, tangent = jax.jvp(lambda some: total(some, weights)[0], (floats,), (tangents,))
        losses, pull_back = jax.vjp(plain, floats)
        return (*parts, *gradients, tangent), (losses, *pull_back(weights))

    return both


@pytest.mark.parametrize("name", ALL)
def test_it_is_differentiated_as_jax_differentiates_it(name):
    function, inputs = ALL[name]
    floats, _ = split(inputs)
    losses = jax.eval_shape(function, *inputs)
    tangents = [x[::-1] for x in floats]
    for weights in weights_for(losses.shape):
        w = np.broadcast_to(spread(weights, losses), losses.shape)
        found, plain = jax.device_get(program(name)(floats, inputs, w, tangents))
        values, gradient = plain
        parts = np.sum(w * values), np.float32(np.count_nonzero(w))
        slope = sum(np.sum(g * t) for g, t in zip(gradient, tangents, strict=True))
        close(found, (*parts, gradient, values, slope))


@pytest.mark.parametrize("shape", [ELEMENTS, (ROWS,)], ids=str)
def test_weights_of_every_kind_align_with_inputs_of_every_rank(shape):
    """The sum of the totals with all weights, of which none can stand for another."""

    def function(x, vector, matrix, class_ids):
        return class_ids * x * vector.sum(-1) * matrix.sum((-2, -1))

    inputs = [reals(*shape), reals(*shape, CLASSES), reals(*shape, 2, 3)]
    class_ids, factors = ids(*shape), [1.0, -0.7, 0.4, 1.3, -0.2]

    @jax.jit
    def of_weights(inputs, tangents, weights):
        """Total and counts, the gradient of the total, and a tangent of it."""

        def total(inputs):
            lifted = functools.partial(jl.weighted(function, num_inputs=4), reduction="parts")
            parts = [lifted(*inputs, class_ids, w) for w in weights]
            totals = [f * p.total for f, p in zip(factors, parts, strict=True)]
            return sum(totals), [p.count for p in parts]

        parts, gradient = jax.value_and_grad(total, has_aux=True)(inputs)
        return parts, gradient, jax.jvp(lambda x: total(x)[0], (inputs,), (tangents,))[1]

    @jax.jit
    def plain(inputs, tangents, weights):
        def total(inputs):
            return jnp.sum(weights * function(*inputs, class_ids))

        value, gradient = jax.value_and_grad(total)(inputs)
        return value, gradient, jax.jvp(total, (inputs,), (tangents,))[1]

    tangents, weights = [x[::-1] for x in inputs], weights_for(shape)
    spread_out = [np.broadcast_to(spread(w, inputs[0]), shape) for w in weights]
    counts = [np.float32(np.count_nonzero(w)) for w in spread_out]
    combined = sum(np.float32(f) * w for f, w in zip(factors, spread_out, strict=True))
    value, *derivatives = plain(inputs, tangents, combined)
    close(of_weights(inputs, tangents, weights), ((value, counts), *derivatives))


@pytest.mark.parametrize("name", INDEPENDENT)
def test_rubbish_at_absent_places_reaches_nothing(name):
    function, inputs = INDEPENDENT[name]
    floats, _ = split(inputs)
    weights = weights_for(jax.eval_shape(function, *inputs).shape)[0]
    ones = [np.ones_like(x) for x in floats]
    expected, _ = program(name)(floats, inputs, weights, ones)
    for rubbish in NOT_A_NUMBER:
        hidden = hide(inputs, weights == 0, rubbish)
        tangents = hide(ones, weights == 0, np.nan)
        found, _ = program(name)(split(hidden)[0], hidden, weights, tangents)
        chex.assert_tree_all_finite(found)
        *same, of_weights, tangent = found
        close(same, list(expected[:-2]))
        close(np.where(weights == 0, 0, of_weights), np.where(weights == 0, 0, expected[-2]))
        close(tangent, expected[-1], rtol=1e-4)


@functools.cache
def gradient_of_gaussian():
    return jax.jit(jax.grad(jl.weighted(gaussian, num_inputs=3), (0, 1, 2)))


@pytest.mark.parametrize("variance", [0.0, np.nan, -1.0])
@pytest.mark.parametrize("position", range(3))
def test_rubbish_in_any_one_input(position, variance):
    inputs = ALL["gaussian"][1]
    weights = weights_for(ELEMENTS)[0]
    hidden = list(inputs)
    hidden[position] = hide(inputs[position], weights == 0, variance)
    gradient = gradient_of_gaussian()
    close(gradient(*hidden, weights), gradient(*inputs, weights))


@functools.cache
def along_a_line(name):
    """Value and both derivatives at a point of a line through the inputs that count."""
    lifted = jl.weighted(COUPLED[name][0])

    @jax.jit
    def derivatives(t, hidden, present, weights):
        def along(t):
            points = [jnp.where(p == 0, x, x + t * p) for x, p in zip(hidden, present, strict=True)]
            return lifted(*points, weights, reduction="sum")

        return *jax.value_and_grad(along)(t), jax.jvp(along, (t,), (1.0,))[1]

    return derivatives


@pytest.mark.parametrize("rubbish", NOT_A_NUMBER)
@pytest.mark.parametrize("name", COUPLED)
def test_value_and_derivative_are_of_the_same_inputs(name, rubbish):
    """By finite differences in the rows that count, in float64."""
    inputs, weights = [np.float64(x) for x in COUPLED[name][1]], np.array([1.5, 0.0, 2.0, 0.0])
    step = 1e-6
    with jax.enable_x64(True):
        for absent in (weights == 0, np.array([0.0, 1.0, 0.0, 0.0]) > 0):
            hidden = hide(inputs, absent, rubbish)
            present = [spread(weights, x) * reals(*x.shape) for x in inputs]
            (after, *_), (before, *_), (_, *found) = (
                along_a_line(name)(t, hidden, present, weights) for t in (step, -step, 0.0)
            )
            expected = (float(after) - float(before)) / (2 * step)
            assert np.isfinite(expected)
            for derivative in found:
                close(derivative, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "n_pairs", "integer labels"])
def test_weights_of_zero_can_be_learned_through_a_gradient(name):
    """Meta-reweighting differentiates a gradient with respect to weights of zero."""
    function, inputs = ALL[name]
    floats, join = split(inputs)
    lifted = jl.weighted(function, num_inputs=len(inputs))

    def gradient(weights):
        return jax.grad(lambda s: lifted(*join(s, inputs), weights, reduction="sum"))(floats)

    def plain(weights):
        return jax.grad(lambda s: jnp.sum(weights * function(*join(s, inputs))))(floats)

    @jax.jit
    def jacobians(weights):
        transformed = jax.jacfwd(gradient), jax.jacrev(gradient), jax.jacrev(plain)
        return [jacobian(weights) for jacobian in transformed]

    *found, expected = jacobians(np.zeros(jax.eval_shape(function, *inputs).shape, np.float32))
    for jacobian in found:
        close(jacobian, expected)


@pytest.mark.parametrize("name", ["softmax_loss", "listmle_loss", "poly1_softmax_loss"])
def test_rax_losses_of_lists(name):
    rax = pytest.importorskip("rax")
    loss = functools.partial(getattr(rax, name), reduce_fn=None)
    scores, labels = reals(*SCORES), ids(*SCORES).astype(np.float32)
    where = np.array([[1, 1, 0, 1, 0], [0] * 5, [1] * 5, [1, 1, 1, 0, 0]], bool)
    weights = where.any(-1)

    def plain(scores):
        return jnp.sum(jnp.where(weights, loss(scores, labels, where=where), 0)) / 3

    def lifted(scores):
        function = jl.weighted(lambda s, y, mask: loss(s, y, where=mask), num_inputs=3)
        return function(scores, labels, where, weights)

    both = jax.jit(lambda s: [jax.value_and_grad(f)(s) for f in (plain, lifted)])
    expected, found = both(scores)
    close(found, expected)
    close(both(np.where(weights[:, None], scores, np.float32(np.nan)))[1], expected)


def test_every_loss_of_optax_is_lifted_here():
    public = {n for n, f in vars(losses).items() if callable(f) and not n.startswith("_")}
    assert public <= set(INDEPENDENT) | NO_LOSS_OF_EXAMPLES


def test_a_dynamic_loop_is_differentiated_forward():
    def power(x, n):
        start = (0, jnp.ones_like(x))
        return jax.lax.while_loop(
            lambda s: s[0] < jnp.max(n), lambda s: (s[0] + 1, s[1] * jnp.sqrt(x)), start
        )[1]

    x, n = np.array([4, 0, np.nan], np.float32), np.array([3, 1, 1], np.int32)
    weights, ones = np.array([2, 0, 0], np.float32), np.ones(3, np.float32)
    lifted = jl.weighted(power)
    found = jax.jit(lambda x, t: jax.jvp(lambda x: lifted(x, n, weights), (x,), (t,)))(x, ones)
    close(found, (16.0, 2 * 1.5 * 2.0))
    with pytest.raises(ValueError, match="Reverse-mode"):
        jax.jit(jax.grad(lambda x: lifted(x, n, weights)))(x)


def test_functions_with_derivatives_in_one_mode_or_none():
    @jax.custom_vjp
    def root(x):
        return jnp.sqrt(x)

    root.defvjp(lambda x: (jnp.sqrt(x), x), lambda x, g: (g / (2 * jnp.sqrt(x)),))
    x, weights = np.array([4, 0, np.nan], np.float32), np.array([1, 0, 0], np.int32)
    gradient = jax.jit(jax.grad(jl.weighted(root, num_inputs=1)))
    close(gradient(x, weights), np.array([0.25, 0, 0]))

    def called_back(x):
        return jax.pure_callback(np.sqrt, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with np.errstate(invalid="ignore"):
        close(jax.jit(jl.weighted(called_back, num_inputs=1))(x, weights), np.float32(2))


def test_a_weight_of_zero_is_learned_where_the_inputs_are_replaced():
    """The loss is finite there, and only its derivative is not."""

    def far(anchors, positives, negatives):
        near, distant = (jnp.linalg.norm(anchors - x, axis=-1) for x in (positives, negatives))
        return jnp.maximum(near - distant + 9, 0)

    anchors, negatives = reals(4, 2), reals(4, 2)
    positives = np.where(np.arange(4)[:, None] == 1, anchors, reals(4, 2))
    weights = np.array([1, 0, 1, 2], np.float32)
    lifted = functools.partial(jl.weighted(far, num_inputs=3), reduction="sum")

    @jax.jit
    def gradient_and_losses(*inputs):
        return jax.grad(lifted, (0, 1, 2, 3))(*inputs, weights), far(*inputs)

    gradient, losses = gradient_and_losses(anchors, positives, negatives)
    chex.assert_tree_all_finite(gradient)
    close(gradient[3], losses)


ON_A_MESH = reals(8, 3), np.ones((8, 3), np.float32), np.array([1, 0, 0, 1, 1, 0, 1, 1], np.float32)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
def test_inputs_on_a_mesh_need_not_be_sharded_alike(kind):
    def loss(x, y, w, axis_name=None):
        labels = jnp.ones(x.shape) if axis_name else y  # Made inside: the same on every device.
        function = jl.weighted(lambda x, y: jnp.minimum(jnp.logaddexp(0, x) - x * y, 9.0))
        return function(x, labels, w, axis_name=axis_name)

    x, y, w = ON_A_MESH
    expected = jax.jit(jax.value_and_grad(loss))(x, y, w)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    rows, whole = PartitionSpec("d"), PartitionSpec()
    with jax.set_mesh(mesh):
        if kind is AxisType.Auto:
            options = {"mesh": mesh, "in_specs": (rows, rows, rows), "out_specs": whole}
            mapped = jax.shard_map(functools.partial(loss, axis_name="d"), **options)
            for weights in (w, w > 0):
                close(jax.jit(jax.value_and_grad(mapped))(x, y, weights), expected)
        placed = jax.device_put((x, y, w), NamedSharding(mesh, rows))
        close(jax.value_and_grad(loss)(*placed), expected)  # Not in jit.


def test_an_input_may_be_whole_on_every_device_of_an_explicit_mesh():
    """With inputs or weights that are sharded, with and without jit and checkpoint."""
    if jax.__version_info__ < (0, 9):
        pytest.skip("the select of JAX 0.8 has a transpose that is sharded otherwise")
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("d",), ()))
    for loss in (jl.weighted(losses.squared_error), jl.mean_squared_error):
        gradient = jax.grad(loss, (0, 1, 2))
        checkpointed = jax.grad(jax.checkpoint(loss), (0, 1, 2))
        compiled = jax.jit(lambda *a, fs=(gradient, checkpointed): [f(*a) for f in fs])
        expected = jax.jit(gradient)(*ON_A_MESH)
        with jax.set_mesh(mesh):
            for places in ((rows, whole, rows), (whole, rows, rows), (whole, whole, rows)):
                placed = jax.device_put(ON_A_MESH, places)
                for found in (gradient(*placed), *compiled(*placed)):
                    close(found, expected)


def test_an_option_may_have_any_name():
    lifted = jl.weighted(lambda p, y, self, loss_fn: self * p - loss_fn * y)
    found = jax.jit(functools.partial(lifted, self=2.0, loss_fn=3.0))(*REALS)
    close(found, np.mean(2 * REALS[0] - 3 * REALS[1]))


def test_placeholders_differ_between_inputs_places_and_features():
    """Or a distance, or a standard deviation, would have an infinite derivative there."""
    x, weights = np.full((3, 4), np.nan, np.float32), np.zeros(3, np.float32)

    def scaled_distance(scale):
        def function(p, y):
            between_rows = jnp.sqrt(jnp.sum(jnp.square(p[:, None] - p[None]), -1) + jnp.eye(3))
            return scale * jnp.linalg.norm(p - y, axis=-1) / p.std(-1) + between_rows.sum(1)

        return jl.weighted(function)(x, x, weights)

    value, gradient = jax.jit(jax.value_and_grad(scaled_distance))(2.0)
    assert value == gradient == 0


@pytest.mark.parametrize(
    ("function", "inputs", "message"),
    [
        (losses.ntxent, [reals(4, 2), reals(4)], "one number.*vmap.*weighted_loss"),
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
