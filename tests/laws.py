"""What holds for means, collectors and accumulation. Each law takes the package."""

import functools
import itertools
from types import ModuleType

import chex
import jax
import jax.numpy as jnp
import numpy as np
from properties import raises

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
ROWS = 12
UNDIVIDED = {"parts": "mean", "average_parts": "average"}


def draw(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of inputs, labels, weights that are often zero, and the segment of each token."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 2, ROWS) * (rng.random(ROWS) > 0.4)
    present = rng.random((ROWS, 4)) > 0.5
    present[0] = False  # A sequence without a token.
    return {
        "x": rng.normal(size=(ROWS, 3)).astype(np.float32),
        "y": np.where(weights == 0, np.nan, rng.normal(size=ROWS)).astype(np.float32),
        "weights": weights.astype(np.float32),
        "tokens": np.where(present, rng.normal(size=(ROWS, 4)), np.nan).astype(np.float32),
        "present": present,
        "segments": rng.integers(-1, 4, (ROWS, 4)).astype(np.int32),
    }


def parts_of_every_split_add_up(package: ModuleType) -> None:
    """Batches of any sizes, padded to one size, have the mean of the whole."""
    batch = draw()

    @jax.jit
    def loss(x, y, weights):
        reductions = (*UNDIVIDED, *UNDIVIDED.values())
        means = [package.absolute_difference(x, y, weights, reduction=r) for r in reductions]
        return dict(zip(reductions, means, strict=True))

    whole = loss(batch["x"][:, 0], batch["y"], batch["weights"])
    for first, second in itertools.combinations(range(ROWS + 1), 2):
        pooled = []
        for piece in (slice(0, first), slice(first, second), slice(second, ROWS)):
            rows = (batch["x"][piece, 0], batch["y"][piece], batch["weights"][piece])
            (x, y, weights), present = package.pad_batch(rows, ROWS)
            pooled.append(loss(x, y, np.where(present, weights, 0)))
        for undivided, divided in UNDIVIDED.items():
            close(sum(p[undivided] for p in pooled).value, whole[divided])


def every_loss(package: ModuleType, params: dict, batch: dict, key=None):
    """A loss of each kind of denominator, and a metric."""
    x, y, weights = batch["x"], batch["y"], batch["weights"]
    predictions = jnp.tanh(x @ params["w"])
    confidences = jnp.where(weights == 0, 0, jax.nn.sigmoid(x @ params["c"]))
    error = functools.partial(package.mean_squared_error, reduction="parts")
    averaged = functools.partial(package.mean_squared_error, reduction="average_parts")
    tokens = jnp.tanh(x @ params["c"])[:, None] * jnp.arange(1.0, 5)[None]
    of_tokens = functools.partial(package.mean_squared_error, tokens, batch["tokens"])
    of_rows, learned = (jax.vmap(f) for f in (error, averaged))
    token_confidences = jnp.where(batch["present"], jax.nn.sigmoid(tokens), 0)
    of_segments = package.segment_means(
        of_tokens(batch["present"], reduction="none"), batch["segments"], 4, batch["present"]
    )
    losses = package.LossCollector()
    losses = losses.add_loss("mean", error(predictions, y, weights))
    losses = losses.add_loss("average", averaged(predictions, y, weights))
    losses = losses.add_loss("confidence", averaged(predictions, y, confidences))
    losses = losses.add_loss("coefficient", jnp.exp(params["s"]) * error(predictions, y, weights))
    losses = losses.add_loss(
        "sequences", of_rows(tokens, batch["tokens"], batch["present"]).macro()
    )
    of_learned = learned(tokens, batch["tokens"], token_confidences)
    losses = losses.add_loss("learned sequences", of_learned.macro())
    losses = losses.add_loss("segments", of_segments / 2)
    losses = losses.add_loss("scalar", package.WeightedMean(params["s"] ** 2, 1))
    losses = losses.add_metric("metric", 3 * error(predictions, y, weights))
    return losses.regularize(params, {"w": package.l2_regularizer(0.1)})


PARAMS = {
    "w": np.array([0.5, -1.0, 0.25], np.float32),
    "c": np.array([1.0, 0.5, -2.0], np.float32),
    "s": np.float32(0.3),
}


def microbatches_are_the_whole(package: ModuleType) -> None:
    """Values and gradients, also of denominators that depend on parameters."""
    batch, loss_fn = draw(), functools.partial(every_loss, package)

    def whole(params):
        losses = loss_fn(params, batch)
        return losses.get_total_loss(), losses

    whole = jax.jit(jax.value_and_grad(whole, has_aux=True))
    (total, losses), gradients = jax.device_get(whole(PARAMS))
    chex.assert_tree_all_finite((total, gradients))
    for num_microbatches in (1, 2, ROWS):
        step = jax.jit(package.accumulate_value_and_grad(loss_fn, num_microbatches))
        (value, found), found_gradients = jax.device_get(step(PARAMS, batch))
        close(value, total)
        close(found.to_dict(), losses.to_dict())
        for name, gradient in gradients.items():
            # The terms of a small entry may be as large as the largest entry is.
            close(found_gradients[name], gradient, atol=1e-6 * np.abs(gradient).max())


def second_derivatives_of_microbatches_are_the_whole(package: ModuleType) -> None:
    def loss_fn(params, batch):
        weights = jax.nn.sigmoid(batch["x"] @ params)
        error = package.mean_squared_error(
            batch["x"] @ params, batch["x"][:, 0], weights, reduction="average_parts"
        )
        return package.LossCollector().add_loss("error", error)

    batch, params = {"x": draw()["x"]}, PARAMS["w"]
    step = package.accumulate_value_and_grad(loss_fn, 3)
    of_microbatches = jax.jacfwd(lambda p: step(p, batch)[1])
    of_whole = jax.hessian(lambda p: loss_fn(p, batch).get_total_loss())
    close(*jax.jit(lambda p: (of_microbatches(p), of_whole(p)))(params))


def every_microbatch_has_a_key_of_its_own(package: ModuleType) -> None:
    def loss_fn(w, batch, key):
        noise = w * jax.random.normal(key, batch.shape)
        return package.LossCollector().add_loss("noise", noise), noise

    step = jax.jit(package.accumulate_value_and_grad(loss_fn, 3, has_aux=True))
    batch = np.zeros(ROWS, np.float32)
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        (value, (_, noise)), gradient = jax.device_get(step(1.0, batch, key=key))
        assert len(np.unique(noise)) == ROWS
        close((value, gradient), (noise.mean(), noise.mean()))
    again = np.asarray(step(1.0, batch, key=key)[0][1][1])
    other = np.asarray(step(1.0, batch, key=jax.random.PRNGKey(1))[0][1][1])
    assert (again == noise).all()
    assert not np.isin(other, noise).any()


def a_divided_mean_of_microbatches_is_refused(package: ModuleType) -> None:
    def loss_fn(w, batch):
        return package.LossCollector().add_loss(
            "xent", package.mean_squared_error(w * batch, batch)
        )

    def metric(w, batch):
        return package.LossCollector().add_metric("accuracy", jnp.mean(w * batch))

    def of_rows(w, batch):
        return jax.vmap(lambda x: package.LossCollector().add_loss("rows", w * x))(batch)

    batch, jitted = np.arange(4, dtype=np.float32), jax.jit(loss_fn)
    jitted(1.0, batch[:2])  # A program that is in JAX's cache does not escape.
    ways = {"jit": jitted, "checkpoint": jax.checkpoint(loss_fn), "metric": metric, "rows": of_rows}
    for name, function in ways.items():
        message = raises(package.accumulate_value_and_grad(function, 2), 1.0, batch)
        assert "got a scalar" in message, name
        assert "WeightedMean(value, 1)" in message, name
        jax.eval_shape(package.accumulate_value_and_grad(function, 1), 1.0, batch)

    def nested(w, batch):
        return package.accumulate_value_and_grad(loss_fn, 1)(w, batch)[0][1]

    assert "got a scalar" in raises(package.accumulate_value_and_grad(nested, 2), 1.0, batch)


def coefficients_scale_the_total_alone(package: ModuleType) -> None:
    def scaled(mean, factors):
        return [x for a in factors for x in (a * mean, mean * a, mean / (1 / a))]

    def mean_of(total, count, shape):
        arrays = (np.full(shape, x, np.float32) for x in (total, count))
        return package.WeightedMean(*arrays)

    for shape in ((), (3,)):
        mean, twos = mean_of(6, 4, shape), np.full(shape, 2, np.float32)
        two = (2, 2.0, np.float32(2), twos, jax.device_put(twos))
        for found in jax.jit(functools.partial(scaled, mean, two))():
            close((found.total, found.count), (2 * mean.total, mean.count))

    @jax.jit
    def learned_and_pooled(a):
        gradient = jax.grad(lambda a: (a * mean_of(6, 4, 3) / (1 - a)).value.sum())(a)
        return gradient, (0.5 * mean_of(6, 4, 3) + 2 * mean_of(1, 1, 3)).value

    # The second is (3 + 2) / (4 + 1).
    close(learned_and_pooled(0.5), (np.float32(3 * 1.5 * 4), np.ones(3, np.float32)))


def a_macro_average_leaves_out_what_has_no_count(package: ModuleType) -> None:
    total = np.float32([[1, np.nan], [-6, 0]])
    count = np.float32([[2, 0], [-3, 0]])  # Sums of negative weights count.

    @jax.jit
    def values_and_gradients(total, count):
        def value(total, count):
            macro = package.WeightedMean(total, count).macro()
            return macro.value, macro

        gradients, macro = jax.grad(value, (0, 1), has_aux=True)(total, count)
        empty = package.WeightedMean(total[:, 1], count[:, 1]).macro()
        return gradients, macro, empty, (empty.value, (macro + empty).value, macro.value)

    gradients, macro, empty, values = values_and_gradients(total, count)
    close((macro.total, macro.count), (np.float32(2.5), np.float32(2)))
    close(gradients, (np.float32([[1 / 4, 0], [-1 / 6, 0]]), np.float32([[-1 / 8, 0], [1 / 3, 0]])))
    close((values[0], empty.count), (np.float32(0), np.float32(0)))
    close(values[1], values[2])


def segments_are_groups(package: ModuleType) -> None:
    """Of any order and rank; ids that are no segment, and what is absent, touch nothing."""
    batch = draw()
    tokens, present, segments = batch["tokens"], batch["present"], batch["segments"]
    weights = np.where(present, 2.0, 0).astype(np.float32)
    outside = np.where(segments < 0, np.nan, tokens)
    order = np.argsort(segments.ravel(), kind="stable")
    in_order = [x.ravel()[order] for x in (outside, segments, weights)]
    weighted = np.where(present, 2 * tokens, 0)
    groups = [present & (segments == s) for s in range(4)]
    totals = np.stack([weighted[g].sum() for g in groups]).astype(np.float32)
    counts = np.stack([g.sum() for g in groups]).astype(np.float32)
    mean = functools.partial(package.segment_means, num_segments=4)
    far = np.where(segments < 0, 2**33 + 1, segments.astype(np.int64))
    all_arguments = (outside, segments, weights), in_order, (outside, far, weights)

    @jax.jit
    def means_and_gradient():
        means = [mean(losses, ids, weights=w) for losses, ids, w in all_arguments]
        gradient = jax.grad(lambda x: mean(x, segments, weights=weights).macro().value)(outside)
        return means, jax.vmap(mean)(outside, segments, weights=weights), gradient

    means, rows, gradient = jax.device_get(means_and_gradient())
    for found in means:
        close((found.total, found.count), (totals, counts))
    assert rows.total.shape == (ROWS, 4)
    close((rows.total.sum(0), rows.count.sum(0)), (totals, counts))
    is_in, where = (weights != 0) & (segments >= 0), np.clip(segments, 0, 3)
    close(gradient, np.where(is_in, 2 / counts[where] / 4, 0).astype(np.float32))


def metrics_are_no_part_of_the_total(package: ModuleType) -> None:
    mean = package.WeightedMean(np.float32(6), np.float32(2))
    losses = package.LossCollector().add_loss("loss", 1.0).add_metric("metric", mean)
    other = package.LossCollector().add_loss("loss", 3.0).add_metric("metric", 4 * mean)
    both = losses + other
    assert both.get_total_loss() == 2
    assert (both.get_losses(), both.get_metrics()) == ({"loss": 2}, {"metric": 7.5})
    assert both.get_metrics("x") == both.get_regularization_losses() == {}
    assert both.to_dict() == {"total_loss": 2, "loss": 2, "metric": 7.5}
    assert both.metrics["metric"].count == 4
    gathered = jax.vmap(lambda c: c.psum("i").get_metrics(), axis_name="i")(
        jax.tree.map(lambda *x: np.stack(x), losses, other)
    )
    close(gathered["metric"], np.full(2, 7.5, np.float32))
    for name in ("loss", "metric", "total_loss", ""):
        for add in (both.add_metric, both.add_loss):
            assert repr(name) in raises(add, name, 1.0)


def the_empty_collector_is_neutral(package: ModuleType) -> None:
    empty = package.LossCollector()
    losses = empty.add_loss("loss", 1.0).add_metric("metric", 2.0)
    assert empty + losses == losses == losses + empty
    assert (empty + empty).to_dict() == {"total_loss": 0}
    assert sum([losses, losses], empty).to_dict() == losses.to_dict()
    total, _ = jax.lax.scan(lambda c, _: (c + empty, None), empty, None, 3)
    assert total.to_dict() == {"total_loss": 0}
    assert "metrics" in raises(losses.merge, empty.add_loss("loss", 1.0))


def an_axis_is_summed_over_once(package: ModuleType) -> None:
    """XLA would end the process."""
    mean = package.WeightedMean(jnp.float32(6), jnp.float32(2))
    for sums in (mean, package.LossCollector().add_loss("loss", mean)):
        for call in (sums.psum, jax.jit(sums.psum, static_argnums=0)):
            assert "('data', 'data')" in raises(call, ("data", "data"))


LAWS = [
    value
    for value in list(vars().values())
    if getattr(value, "__annotations__", {}) == {"package": ModuleType, "return": None}
]
