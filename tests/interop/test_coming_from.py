"""Each line of the tables in ``.github/docs/coming_from.md`` is a test against the real library."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlosses as jl

PAGE = Path(__file__).parents[2] / ".github" / "docs" / "coming_from.md"
if not PAGE.exists():
    pytest.skip("the pages are not here, only the tests", allow_module_level=True)
BATCH, CLASSES, FEATURES = 6, 3, 4


def sections():
    """The text of each library's section, by its title."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def lines(title):
    """What is written there, and what is written here, of each line of a section's table."""
    found = re.findall(r"^\| `(.+?)` \| `(.+?)` \|.*\|$", sections()[title], re.MULTILINE)
    assert found
    return pytest.mark.parametrize(("theirs", "ours"), found, ids=[theirs for theirs, _ in found])


def test_every_line_of_a_table_is_found():
    titles = ["PyTorch", "Keras 3", "tf.losses (tf.compat.v1.losses)", "optax", "rax"]
    for title in titles:
        found = lines(title).args[1]
        table = re.findall(r"^\|", sections()[title], re.MULTILINE)
        assert len(found) == len(table) - 2, title  # The head, and the line below it.


def unit(a):
    return a * jax.lax.rsqrt((a * a).sum(-1, keepdims=True))


def arrays():
    rng = np.random.default_rng(0)
    y = np.array([0, 2, 1, 1, 2, 0])
    valid = np.ones((BATCH, CLASSES), bool)
    valid[1], valid[2, 0] = False, False
    drawn = {
        "x": rng.normal(size=(BATCH, CLASSES)),
        "y": y,
        "onehot": np.eye(CLASSES)[y],
        "ignored": np.where([0, 1, 0, 0, 0, 1], -100, y),
        "soft": rng.dirichlet(np.ones(CLASSES), BATCH),
        "cw": np.array([0.2, 1.0, 5.0]),
        "s": rng.normal(size=BATCH),
        "t": np.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0]),
        "prob": rng.uniform(0.05, 0.95, BATCH),
        "pw": np.array(3.0),
        "p": rng.normal(size=BATCH),
        "q": rng.normal(size=BATCH),
        "a": rng.normal(size=(BATCH, FEATURES)),
        "b": rng.normal(size=(BATCH, FEATURES)),
        "w": np.array([1.0, 0.0, 0.5, 2.0, 0.0, 3.0]),
        "mask": np.array([True, False, True, True, False, True]),
        "valid": valid,
        "images": rng.normal(size=(BATCH, CLASSES, 4, 5)),
        "pixels": rng.integers(0, CLASSES, (BATCH, 4, 5)),
    }
    kinds = {"f": np.float32, "i": np.int32, "b": np.bool_}
    return {name: value.astype(kinds[value.dtype.kind]) for name, value in drawn.items()}


PREDICTIONS = ("x", "s", "p", "a", "images", "prob")


def predictions_of(code):
    """The first of the names that is in the code, which derivatives are taken of."""
    return next(name for name in PREDICTIONS if re.search(rf"\b{name}\b", code))


def in_jax(code, name, **libraries):
    """Value and gradient of an expression."""
    values = {k: jnp.asarray(v) for k, v in arrays().items()}
    names = {"jax": jax, "jnp": jnp, "jl": jl, "optax": optax, "unit": unit, **libraries}

    def function(array):
        return eval(code, {**names, **values, name: array})

    return jax.value_and_grad(function)(values[name])


def check(theirs, ours, name):
    value, gradient = in_jax(ours, name)
    np.testing.assert_allclose(value, theirs[0], rtol=2e-5)
    np.testing.assert_allclose(gradient, theirs[1], rtol=2e-4, atol=2e-6)
    assert np.any(np.asarray(gradient) != 0)


@lines("PyTorch")
def test_pytorch(theirs, ours):
    torch = pytest.importorskip("torch")
    values = {k: torch.tensor(v) for k, v in arrays().items()}
    for k in ("y", "ignored", "pixels"):
        values[k] = values[k].long()
    name = predictions_of(ours)
    values[name].requires_grad_()
    loss = eval(theirs, {"torch": torch, "F": torch.nn.functional, **values})
    loss.backward()
    check((loss.item(), values[name].grad.numpy()), ours, name)


def test_pytorch_is_nan_where_all_is_ignored():
    torch = pytest.importorskip("torch")
    assert torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.tensor([-100, -100])).isnan()
    nothing = jl.sparse_softmax_cross_entropy(
        jnp.zeros((2, 3)), jnp.array([-100, -100]), ignore_index=-100
    )
    assert nothing == 0


@lines("Keras 3")
def test_keras(theirs, ours, keras):
    name = predictions_of(ours)
    check(in_jax(theirs, name, loss=keras.losses), ours, name)


@lines("tf.losses (tf.compat.v1.losses)")
def test_tf_losses(theirs, ours):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed").compat.v1
    values = {k: tf.constant(v) for k, v in arrays().items()}
    name = predictions_of(ours)

    def unit(a):
        return a * tf.math.rsqrt(tf.reduce_sum(a * a, -1, keepdims=True))

    with tf.GradientTape() as tape:
        tape.watch(values[name])
        loss = eval(theirs, {"tf": tf, "unit": unit, **values})
    gradient = tape.gradient(loss, values[name])
    check((loss.numpy(), gradient.numpy()), ours, name)


@lines("optax")
def test_optax(theirs, ours):
    name = predictions_of(ours)
    check(in_jax(theirs, name), ours, name)


def losses_that_lift():
    (text,) = re.findall(r"- As they are: (.+?)\.$", sections()["optax"], re.DOTALL | re.MULTILINE)
    return re.findall(r"`(\w+)`", text)


@pytest.mark.parametrize("name", losses_that_lift())
def test_optax_losses_lift(name):
    loss_fn = getattr(optax.losses, name)
    drawn = arrays()
    second = list(inspect.signature(loss_fn).parameters)[1]
    if name.startswith("cosine"):
        inputs = drawn["a"], drawn["b"]
    elif name.startswith("kl"):
        is_log = "log" in name
        inputs = jax.nn.log_softmax(drawn["x"]), np.log(drawn["soft"]) if is_log else drawn["soft"]
    elif name == "dice_loss":
        inputs = drawn["x"], drawn["onehot"]
    elif name == "binary_dice_loss":
        inputs = drawn["x"], drawn["valid"].astype(np.float32)
    elif name.startswith("multiclass") or "integer" in name:
        inputs = drawn["x"], drawn["y"]
    elif name in ("softmax_cross_entropy", "safe_softmax_cross_entropy", "poly_loss_cross_entropy"):
        inputs = drawn["x"], drawn["soft"]
    elif second in ("labels", "targets") and name not in ("squared_error", "l2_loss", "huber_loss"):
        inputs = drawn["s"], drawn["t"]
    else:
        inputs = drawn["p"], drawn["q"]
    inputs, weights = [jnp.asarray(x) for x in inputs], jnp.asarray(drawn["w"])

    def theirs(x):
        return jnp.sum(loss_fn(x, inputs[1]) * weights) / jnp.count_nonzero(weights)

    want = jax.value_and_grad(theirs)(inputs[0])
    got = jax.value_and_grad(lambda x: jl.weighted(loss_fn)(x, inputs[1], weights))(inputs[0])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6)


def test_optax_losses_of_more_inputs_lift():
    a, b, c = (jnp.asarray(x) for x in np.random.default_rng(0).normal(size=(3, BATCH, FEATURES)))
    loss_fn = optax.losses.triplet_margin_loss
    got, want = jl.weighted(loss_fn, num_inputs=3)(a, b, c), loss_fn(a, b, c).mean()
    np.testing.assert_allclose(got, want, rtol=1e-6)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, CLASSES)), jnp.float32)
    inputs = logits, jnp.zeros((2, 5)), jnp.array([[1, 2], [1, 1]]), jnp.zeros((2, 2))
    got, want = jl.weighted(optax.ctc_loss, num_inputs=4)(*inputs), optax.ctc_loss(*inputs).mean()
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_optax_fenchel_young_losses_lift():
    x, soft, w = (jnp.asarray(arrays()[name]) for name in ("x", "soft", "w"))
    loss_fn = optax.losses.make_fenchel_young_loss(jax.nn.logsumexp)
    want = jnp.sum(loss_fn(x, soft) * w) / jnp.count_nonzero(w)
    np.testing.assert_allclose(jl.weighted(loss_fn)(x, soft, w), want, rtol=1e-6)


@pytest.mark.parametrize("name", ["ntxent", "multiclass_generalized_dice_loss"])
def test_optax_losses_of_a_whole_batch_are_refused(name):
    labels = arrays()["y" if name == "ntxent" else "onehot"]
    with pytest.raises(ValueError, match="mean of means"):
        jl.weighted(getattr(optax.losses, name))(jnp.asarray(arrays()["x"]), jnp.asarray(labels))


@lines("rax")
def test_rax(theirs, ours):
    rax = pytest.importorskip("rax")
    value, gradient = in_jax(ours, "x", rax=rax)
    want, want_gradient = in_jax(theirs, "x", rax=rax)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-6)
