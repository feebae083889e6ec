"""What holds for every loss. Each property takes a case and raises AssertionError."""

import functools
import inspect
import itertools
import operator
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from arguments import IMPOSSIBLE, NOT_A_NUMBER, Case, certain, extremes
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

REDUCTIONS = ("mean", "average", "sum", "none", "parts", "average_parts")
TOTALS = ("mean", "average", "sum")
close = functools.partial(chex.assert_trees_all_close, rtol=2e-6, atol=2e-6)


def every_argument(case: Case) -> tuple[int, ...]:
    return (*case.floats, len(case.inputs))


def replaced(arguments: Any, positions: Any, others: Any) -> list[Any]:
    """The arguments, with others at some positions."""
    chosen = dict(zip(positions, others, strict=True))
    return [chosen.get(i, argument) for i, argument in enumerate(arguments)]


# To compile takes nearly all of the time, and each kernel of each program costs the same, however
# small its arrays are. These programs are compiled once for all properties. What needs a program of
# its own, as a mesh does, compiles few and calls them with all that it has to try. The rest is
# computed operation by operation, because operations are the same in all losses.
def eagerly(case: Case) -> Any:
    """Operation by operation; but a loss that computes in a loop takes longer so."""
    return jax.disable_jit(not case.computes)


@functools.cache
def reduced(case: Case) -> Callable[..., Any]:
    """The loss in all reductions."""
    return jax.jit(lambda *a: [case.loss(*a, reduction=reduction) for reduction in REDUCTIONS])


@functools.cache
def differentiated(case: Case) -> Callable[..., Any]:
    """Value and gradient with respect to every argument, of all totals."""
    losses = [functools.partial(case.loss, reduction=reduction) for reduction in TOTALS]
    return jax.jit(lambda *a: [jax.value_and_grad(f, every_argument(case))(*a) for f in losses])


@functools.cache
def second_derivatives(case: Case) -> Callable[..., Any]:
    """Along directions of every argument: a forward and a reverse derivative of the gradient."""
    positions = every_argument(case)

    def along(directions, *arguments):
        def gradient(*some):
            return jax.grad(case.loss, positions)(*replaced(arguments, positions, some))

        points = [arguments[i] for i in positions]
        _, pull_back = jax.vjp(gradient, *points)
        return jax.jvp(gradient, points, directions)[1], pull_back(tuple(directions))

    return jax.jit(along)


def directions_of(case: Case, seed: int) -> list[Any]:
    """A number for each element of every argument that has a derivative."""
    rng = np.random.default_rng(seed)
    shapes = [case.shape(name) for name in case.inputs] + [case.losses_shape]
    return [rng.normal(size=shapes[i]).astype(np.float32) for i in every_argument(case)]


def by_default(case: Case) -> int:
    """The position, among the totals, of the one that the loss gives if it is not asked."""
    parameters = inspect.signature(case.loss).parameters
    return TOTALS.index(parameters["reduction"].default)


def for_devices(case: Case) -> list[Any]:
    """Inputs and weights whose rows several devices can share.

    They are NumPy's, because JAX cuts its own arrays into shards by a program.
    """
    return [*map(np.asarray, case.draw(batch=(8, 4))), np.float32([0, 1, 0, 0, 0, 0, 6, 7])]


@functools.cache
def on_one_device(case: Case) -> Any:
    """Value and gradient of the loss of all that several devices share."""
    return jax.jit(jax.value_and_grad(case.loss, every_argument(case)))(*for_devices(case))


def jit_is_eager_with_one_trace(case: Case) -> None:
    for program, seed in itertools.product((reduced(case), differentiated(case)), (0, 1)):
        arguments = (*case.draw(seed), case.weights(seed))
        with jax.no_tracing(seed > 0):
            found = program(*arguments)
        with jax.disable_jit():
            close(found, program(*arguments), rtol=1e-5, atol=1e-5)


def vmap_is_a_loop(case: Case) -> None:
    draws = [(*case.draw(seed), case.weights(seed)) for seed in range(3)]
    axes = (*case.of_each(lambda _: 0, [None] * len(case.inputs)), 0)
    columns = zip(zip(*draws, strict=True), axes, strict=True)
    stacked = [c[0] if axis is None else jnp.stack(c) for c, axis in columns]
    mean = functools.partial(case.loss, reduction="mean")

    def total(*some):
        return jnp.sum(jax.vmap(mean, axes)(*some))

    @jax.jit
    def mapped(*some):
        each = [jax.vmap(f, axes)(*some) for f in (reduced(case), differentiated(case))]
        return each, jax.grad(total, every_argument(case))(*some)

    with eagerly(case):
        each, of_total = mapped(*stacked)
    loop = [[f(*draw) for f in (reduced(case), differentiated(case))] for draw in draws]
    loop = jax.tree.map(lambda *x: np.stack(x), *loop)
    close(each, loop, rtol=1e-5)
    _, of_mean = loop[1][TOTALS.index("mean")]
    shared = [i for i in every_argument(case) if axes[i] is None]
    for i, gradient, expected in zip(every_argument(case), of_total, of_mean, strict=True):
        close(gradient, np.sum(expected, 0) if i in shared else expected, rtol=1e-4, atol=1e-5)


@jax.disable_jit()
def finite_differences_agree(case: Case) -> None:
    values = [*case.draw(), case.weights()]
    positions = every_argument(case)

    @jax.jit
    def loss(*some):
        chosen = replaced(values, positions, some)
        return [case.loss(*chosen, reduction=reduction) for reduction in ("mean", "none")]

    points = [values[i] for i in positions[:-1]] + [values[-1] + 1]
    check_grads(loss, points, 1, rtol=2e-2, atol=2e-2)


@jax.disable_jit()
def value_and_derivative_are_of_the_same_inputs(case: Case) -> None:
    """Whatever is absent, and even if a loss depends on it."""
    values, weights = case.draw(), case.weights()

    @jax.jit
    def along(t, hidden, directions, weights):
        points = [
            x + t * d if i in case.floats else x
            for i, (x, d) in enumerate(zip(hidden, directions, strict=True))
        ]
        return case.loss(*points, weights)

    for rubbish in NOT_A_NUMBER:
        hidden = case.hide(values, weights, rubbish, 0)
        directions = case.hide(case.draw(7), weights, 0.0, 0)
        loss = functools.partial(along, hidden=hidden, directions=directions, weights=weights)
        assert jnp.isfinite(loss(0.0))
        check_grads(loss, (0.0,), 1, rtol=2e-2, atol=2e-2)


def second_order_is_symmetric(case: Case) -> None:
    """Rows and columns of the matrix of second derivatives have the same sums, however weighted."""
    for seed in range(3):
        directions = directions_of(case, seed)
        found = second_derivatives(case)(directions, *case.draw(), case.weights())
        close(*found, rtol=1e-4, atol=1e-5)


@jax.disable_jit()
def weights_of_zero_can_be_learned(case: Case) -> None:
    """Through the gradient too: learning to reweight examples differentiates it at zero."""
    values, zeros = case.draw(), jnp.zeros(case.losses_shape)
    gradient = jax.jit(jax.grad(functools.partial(case.loss, reduction="sum"), case.floats[0]))
    derivative = gradient(*values, jnp.ones_like(zeros))
    learned = jax.jvp(lambda w: gradient(*values, w), (zeros,), (jnp.ones_like(zeros),))[1]
    close(learned, derivative, rtol=1e-4, atol=1e-5)


def finite_at_extremes_and_at_a_perfect_fit(case: Case) -> None:
    if case.is_lifted:
        return
    (_, first), *rest = case.inputs.items()
    names = list(case.inputs)
    grid = itertools.product(*(extremes(spec.domain) for spec in case.inputs.values()))
    gradient = jax.jit(jax.grad(case.loss, every_argument(case)))
    for point in grid:
        values = [
            jnp.full(case.shape(n), v, jnp.int32 if case.inputs[n].domain == "class id" else float)
            for n, v in zip(names, point, strict=True)
        ]
        chex.assert_tree_all_finite(case.loss(*values))
        chex.assert_tree_all_finite(gradient(*values, 1.0))
    if rest and rest[0][1] == first:
        value = case.draw()[0]
        chex.assert_tree_all_finite(gradient(value, value, 1.0))


def infinite_logits_rule_classes_out(case: Case) -> None:
    """As large ones do: what costs much there costs infinity, and gradients are the same."""
    positions = [i for i, spec in enumerate(case.inputs.values()) if spec.domain == "logit"]
    is_smoothed = "label_smoothing" in inspect.signature(case.loss).parameters
    drawn, domains = case.draw(), [spec.domain for spec in case.inputs.values()]
    nearest = [certain(*pair) for pair in zip(drawn, domains, strict=True)]
    for i, smoothing in itertools.product(positions, (0, 0.1, 1) if is_smoothed else (None,)):
        options = {} if smoothing is None else {"label_smoothing": smoothing}
        loss = functools.partial(case.loss, reduction="sum", **options)
        direction = case.draw(7)[i]

        @jax.jit
        def gradients(*values, i=i, loss=loss, direction=direction):
            def of_logits(x):
                return jax.grad(loss, i)(*values[:i], x, *values[i + 1 :])

            second = jax.jvp(of_logits, (values[i],), (direction,))[1]
            return *jax.value_and_grad(loss, case.floats)(*values), second

        places = np.ndindex(drawn[i].shape[1:])
        for values, sign, place in itertools.product((drawn, nearest), (1, -1), places):
            found, expected = (
                gradients(*values[:i], values[i].at[(0, *place)].set(sign * size), *values[i + 1 :])
                for size in (np.inf, 1e8)
            )
            close(found[0], np.where(expected[0] > 1e4, np.inf, expected[0]), rtol=1e-5)
            close(found[1][i], expected[1][i], rtol=1e-5)
            assert not any(np.isnan(g).any() for g in found[1])
            close(found[2], expected[2], rtol=1e-4, atol=1e-5)


def offsets_cost_no_digits(case: Case) -> None:
    """Where a small one changes nothing, a large one does not either."""
    if case.is_lifted or case.computes:
        return
    # On this grid even what is added to 2**20 is exact.
    values = case.draw(batch=(2, 3000))
    values = [jnp.round(v * 4) / 8 if i in case.floats else v for i, v in enumerate(values)]
    gradient = jax.jit(jax.value_and_grad(case.loss, case.floats))
    expected = gradient(*values)
    for i in case.floats:
        small, large = (
            [v + x if j == i else v for j, v in enumerate(values)] for x in (8.0, 2.0**20)
        )
        if np.allclose(gradient(*small)[0], expected[0], rtol=1e-4):
            found = gradient(*large)
            close(found[0], expected[0], rtol=1e-5)
            close(found[1], expected[1], rtol=1e-3, atol=1e-6)


def low_precision_accumulates_in_float32(case: Case) -> None:
    values = case.draw(batch=(300, 3))
    value_and_gradient = jax.jit(jax.value_and_grad(case.loss, case.floats))
    for dtype in (jnp.bfloat16, jnp.float16):
        low = [v.astype(dtype) if i in case.floats else v for i, v in enumerate(values)]
        exact = [v.astype(jnp.float32) if i in case.floats else v for i, v in enumerate(low)]
        with eagerly(case):
            result, gradients = value_and_gradient(*low)
            expected = case.loss(*exact)
        assert result.dtype == jnp.float32
        close(result, expected, rtol=1e-6)
        for gradient in gradients:
            assert gradient.dtype == dtype


def integers_are_read_as_float32(case: Case) -> None:
    if case.is_lifted or any(h.domain not in ("real", "logit") for h in case.inputs.values()):
        return
    values = [jnp.round(v) for v in case.draw()]
    close(case.loss(*(v.astype(jnp.int32) for v in values)), case.loss(*values))


def ones_are_the_default(case: Case) -> None:
    values = case.draw()
    many = (1, 1.0, True, np.ones(()), jnp.ones(case.losses_shape, bool))
    losses = jax.jit(lambda *a: [case.loss(*a, *ones) for ones in ((), *zip(many, strict=True))])
    expected, *found = losses(*values)
    for loss in found:
        close(loss, expected)


@jax.disable_jit()
def masks_are_weights(case: Case) -> None:
    values, mask = case.draw(), case.weights() != 0
    gradient = jax.jit(jax.value_and_grad(case.loss, case.floats))
    expected = gradient(*values, mask.astype(jnp.float32))
    for dtype in (bool, jnp.int8, jnp.uint32, jnp.bfloat16):
        close(gradient(*values, mask.astype(dtype)), expected)


def linear_in_the_weights(case: Case) -> None:
    values, weights, more = case.draw(), case.weights(), -3 * case.weights(5)[::-1]
    loss = functools.partial(case.loss, *values, reduction="sum")
    close(loss(2 * weights + more), 2 * loss(weights) + loss(more), rtol=1e-4, atol=1e-4)


def reductions_agree(case: Case) -> None:
    values, weights = case.draw(), case.weights()
    mean, average, total, none, parts, average_parts = reduced(case)(*values, weights)
    unweighted = np.asarray(case.loss(*values, reduction="none"), np.float64)
    w = np.asarray(weights, np.float64)
    assert none.shape == case.losses_shape
    close(none, np.float32(w * unweighted), atol=1e-5)
    close(total, np.float32((w * unweighted).sum()), rtol=1e-5)
    close(average, np.float32((w * unweighted).sum() / w.sum()), rtol=1e-5)
    close(mean, np.float32((w * unweighted).sum() / (w != 0).sum()), rtol=1e-5)
    close(parts.value, mean)
    assert int(parts.count) == (w != 0).sum()
    close(average_parts.value, average)
    close(average_parts.count, np.float32(w.sum()))
    close(reduced(case)(*values, -weights)[0], -mean)


def weights_align_from_the_left(case: Case) -> None:
    values, full = case.draw(), case.losses_shape
    ones = tuple(1 for _ in full)
    legal = [full[:1], full[:1] + ones[1:], ones, (*full, 1), (*full[:1], 1)]
    legal += [ones[:1] + full[1:], ones[:1]]
    given, aligned = [], []
    for shape in legal:
        weights = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        kept = weights.reshape(shape[: len(full)])
        padded = kept.reshape(kept.shape + (1,) * (len(full) - kept.ndim))
        given.append(weights)
        aligned.append(np.broadcast_to(padded, full))
    losses = jax.jit(lambda many, *a: [reduced(case)(*a, weights) for weights in many])
    with eagerly(case):
        found = losses(list(map(jnp.asarray, given)), *values)
    for some, spread in zip(found, aligned, strict=True):
        close(some, reduced(case)(*values, spread), rtol=1e-5)


def nothing_counts_gives_zero(case: Case) -> None:
    values = case.draw()
    zeros = jnp.zeros(case.losses_shape)
    hidden = case.hide(values, zeros, np.nan, 99)
    for value, gradients in differentiated(case)(*hidden, zeros):
        assert value == 0
        assert not any(gradient.any() for gradient in gradients)
    empty = case.draw(batch=(0, 3))
    assert case.loss(*empty) == 0
    assert case.loss(*empty, reduction="parts").count == 0


def a_zero_row_is_a_dropped_row(case: Case) -> None:
    if case.is_coupled:
        return
    values, weights = case.draw(), case.weights().at[2].set(0)
    kept = np.delete(np.arange(len(weights)), 2)
    whole = reduced(case)(*values, weights)
    values = case.of_each(lambda v: np.asarray(v)[kept], values)
    dropped = reduced(case)(*values, np.asarray(weights)[kept])
    for reduction, *both in zip(REDUCTIONS, whole, dropped, strict=True):
        if reduction != "none":
            close(*both, rtol=1e-5)


def what_is_absent_touches_nothing(case: Case) -> None:
    if case.is_coupled:
        return
    values, weights = case.draw(), case.weights()
    positions = every_argument(case)[:-1]
    # Zeros are a perfect fit, where a distance has an infinite derivative.
    labels = IMPOSSIBLE["class id"][: None if len(case.floats) < len(case.inputs) else 1]
    expected = differentiated(case)(*values, weights)
    for rubbish, label in itertools.product((*NOT_A_NUMBER, 0.0), labels):
        hidden = case.hide(values, weights, rubbish, label)
        found = differentiated(case)(*hidden, weights)
        for (value, gradients), (true, exact) in zip(found, expected, strict=True):
            close((value, gradients[:-1]), (true, exact[:-1]))
            # The derivative with respect to a weight of zero is the loss there.
            close(np.where(weights == 0, 0, gradients[-1]), np.where(weights == 0, 0, exact[-1]))
    hidden = case.hide(values, weights, np.nan, -1)
    for _, gradients in differentiated(case)(*hidden, weights):
        assert not gradients[-1][weights == 0].any()

    @jax.jit
    def along(points, tangents, weights):
        def loss(*some):
            return case.loss(*replaced(points, positions, some), weights)

        return jax.jvp(loss, *(tuple(x[i] for i in positions) for x in (points, tangents)))[1]

    ones = [jnp.ones_like(v) for v in values]
    tangents = case.hide(ones, weights, np.nan, 0)
    with eagerly(case):
        close(along(hidden, tangents, weights), along(values, ones, weights))
    *directions, of_weights = directions_of(case, 0)
    directions.append(0 * of_weights)  # Second derivatives by a weight of zero are not the same.
    some, others = (second_derivatives(case)(directions, *v, weights) for v in (hidden, values))
    for found, expected in zip(some, others, strict=True):
        close(found[:-1], expected[:-1], atol=1e-5)


def the_derivative_of_a_weight_is_its_loss(case: Case) -> None:
    values, weights = case.draw(), case.weights()
    losses = case.loss(*values, reduction="none")
    of_mean, of_average, _ = differentiated(case)(*values, weights)
    close(of_mean[1][-1], losses / np.float32(np.count_nonzero(weights)), rtol=1e-5)
    average, gradients = of_average
    close(gradients[-1], (losses - average) / jnp.sum(weights), rtol=1e-5, atol=1e-5)


def trouble_that_counts_propagates(case: Case) -> None:
    for position in case.floats:
        values = case.draw()
        values[position] = values[position].at[0].set(jnp.nan)
        assert jnp.isnan(case.loss(*values))


def impossible_labels_are_nan(case: Case) -> None:
    ids = [i for i, spec in enumerate(case.inputs.values()) if spec.domain == "class id"]
    derivative = jax.jit(jax.grad(case.loss))
    of_weights = jax.jit(jax.grad(functools.partial(case.loss, reduction="sum"), len(case.inputs)))
    mixed = jax.jit(jax.jacfwd(jax.grad(case.loss), len(case.inputs)))
    for i, label in itertools.product(ids, IMPOSSIBLE["class id"]):
        values = case.draw()
        values[i] = values[i].at[2, 1].set(label)
        losses = case.loss(*values, reduction="none")
        assert jnp.isnan(losses[2, 1])
        assert jnp.isnan(losses).sum() == 1
        gradient = derivative(*values)
        assert jnp.isnan(gradient[2, 1]).all()
        assert jnp.isnan(gradient).sum() == gradient[2, 1].size
        weights = jnp.ones(case.losses_shape).at[2, 1].set(0)
        close(of_weights(*values, weights), jnp.where(weights == 0, 0, losses))
        gradient = mixed(*values, weights)
        assert not gradient[..., 2, 1].any()


def shapes_must_match(case: Case) -> None:
    values, full = case.draw(), case.losses_shape
    if len(values) == 2:
        for other in (values[1][:, :1], values[1][..., None, None], values[1][None], values[1][:1]):
            message = raises(case.loss, values[0], other)
            names = [str(other.shape)] if case.is_lifted else case.inputs
            assert all(name in message for name in names)
    for weights in (
        np.ones((*full[:-1], full[-1] + 1)),
        np.ones((2, *full)),
        np.ones((*full, 2)),
        np.ones(7),
    ):
        message = raises(case.loss, *values, weights.astype(np.float32))
        assert str(weights.shape) in message
        assert str(full) in message
    assert "weights" in raises(case.loss, *values, np.ones(full, np.complex64))
    assert "reduction" in raises(case.loss, *values, reduction="avg")
    for rubbish in (None, "three", object(), [[1.0]]):
        if not (case.is_lifted and isinstance(rubbish, list)):  # A pytree of arrays.
            first = "inputs[0]" if case.is_lifted else next(iter(case.inputs))
            message = raises(case.loss, rubbish, *values[1:])
            assert first in message
            assert "must be an array" in message
        assert "weights must be an array" in raises(case.loss, *values, rubbish)


def members_of_an_axis_agree_with_the_whole(case: Case) -> None:
    """In shard_map, value and gradient; two devices have nothing that counts."""
    if case.is_coupled:
        return
    arguments = for_devices(case)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    specs = (*case.of_each(lambda _: rows, [PartitionSpec()] * len(case.inputs)), rows)

    def loss(*some, **options):
        """Totals, and a number whose gradient has a part of each of them."""
        factors = {"mean": 1, "average": 2, "sum": 0.1, "parts": 3, "average_parts": 4}
        totals = [case.loss(*some, reduction=reduction, **options) for reduction in factors]
        totals = [getattr(total, "value", total) for total in totals]
        return sum(map(operator.mul, factors.values(), totals)), totals

    mapped = jax.shard_map(
        functools.partial(loss, axis_name="data"),
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec(),
    )
    found, expected = (
        jax.jit(jax.value_and_grad(f, every_argument(case), has_aux=True))(*arguments)
        for f in (mapped, loss)
    )
    close(found, expected, rtol=1e-5)


def sharded_is_local(case: Case) -> None:
    """Under jit on Auto and Explicit meshes, value and gradient, and no input is gathered."""
    (*values, weights), expected = for_devices(case), on_one_device(case)
    gradient = jax.value_and_grad(case.loss, every_argument(case))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            for spec in (("data",), ("data", "model"), ("data", None, "model")):
                if len(spec) > max(v.ndim for v in values):
                    continue  # It would be the first one again.

                def place(v, spec, mesh=mesh):
                    return jax.device_put(v, NamedSharding(mesh, PartitionSpec(*spec[: v.ndim])))

                pairs = zip(values, case.inputs.values(), strict=True)
                inputs = [place(v, () if h.shared else spec) for v, h in pairs]
                both = [[*inputs, place(weights, of_weights)] for of_weights in (spec, ())]
                program = jax.jit(lambda a, b: (gradient(*a), case.loss(*b)))
                compiled = program.lower(*both).compile()
                close(compiled(*both), (expected, expected[0]), rtol=1e-5)
                if case.computes:  # The gradient may gather what all losses share.
                    compiled = jax.jit(case.loss).lower(*both[0]).compile()
                assert "all-gather" not in compiled.as_text(), spec


def leaves_no_effect(case: Case) -> None:
    """An effect costs a program JAX's fast way to call it."""
    values, weights = case.draw(), case.weights()
    gradient = jax.value_and_grad(case.loss, every_argument(case))
    assert not jax.make_jaxpr(gradient)(*values, weights).effects


def any_size_can_be_traced(case: Case) -> None:
    """Also one that no int32 can count."""

    def total(*some):
        mean, average, parts = (
            case.loss(*some, reduction=reduction) for reduction in ("mean", "average", "parts")
        )
        return mean + average + parts.total

    gradient = jax.value_and_grad(total, every_argument(case))
    for batch in ((2**16, 2**16), (2, 2**33)):
        inputs = [
            abstract(v, case.shape(name, batch))
            for v, name in zip(case.draw(), case.inputs, strict=True)
        ]
        losses = batch[: len(case.losses_shape)]
        shapes = ((), (1,) * len(losses), (*batch[:1], *(1,) * (len(losses) - 1)), losses)
        for shape in dict.fromkeys(shapes):
            weights = jax.ShapeDtypeStruct(shape, jnp.float32)
            value, gradients = jax.eval_shape(gradient, *inputs, weights)
            assert value.shape == ()
            assert gradients[0].shape == inputs[0].shape


def exports_with_symbolic_sizes(case: Case) -> None:
    """A program for every size of a batch, which gives what a program for one size gives."""
    sizes = jax.export.symbolic_shape("rows, columns")
    inputs = [
        abstract(v, case.shape(name, sizes))
        for v, name in zip(case.draw(), case.inputs, strict=True)
    ]
    gradient = jax.value_and_grad(case.loss, every_argument(case))

    @jax.jit
    def program(*some):
        *inputs, full, rows = some
        return gradient(*inputs, full), case.loss(*inputs, rows, reduction="average")

    full = case.weights()
    rows = np.asarray(full).reshape(case.batch[0], -1)[:, 0]
    shapes = abstract(full, sizes[: full.ndim]), abstract(rows, sizes[:1])
    exported = jax.export.export(program, platforms=("cpu", "cuda", "tpu"))(*inputs, *shapes)
    reloaded = jax.export.deserialize(exported.serialize())
    found, average = reloaded.call(*case.draw(), full, rows)
    close(found, differentiated(case)(*case.draw(), full)[by_default(case)], rtol=1e-5)
    spread = np.broadcast_to(rows.reshape(-1, *(1 for _ in full.shape[1:])), full.shape)
    totals = differentiated(case)(*case.draw(), spread)
    close(average, totals[TOTALS.index("average")][0], rtol=1e-5)


def exports_and_reloads(case: Case) -> None:
    values, weights = case.draw(), case.weights()
    gradient = jax.jit(jax.value_and_grad(case.loss, every_argument(case)))
    exported = jax.export.export(gradient, platforms=("cpu", "cuda", "tpu"))(*values, weights)
    reloaded = jax.export.deserialize(exported.serialize())
    expected = differentiated(case)(*values, weights)[by_default(case)]
    close(reloaded.call(*values, weights), expected, rtol=1e-5)


def raises_no_false_alarm(case: Case) -> None:
    """No NaN is made where nothing is wrong, not even to be masked: checkers would find it."""
    gradient = jax.jit(
        checkify.checkify(
            jax.value_and_grad(case.loss, every_argument(case)), errors=checkify.nan_checks
        )
    )
    values, weights = case.draw(), case.weights()
    for label in IMPOSSIBLE["class id"]:
        hidden = case.hide(values, weights, np.nan, label)
        labelled = [v if i in case.floats else hidden[i] for i, v in enumerate(values)]
        gradient(*labelled, weights)[0].throw()
    gradient(*values, 0 * weights)[0].throw()


def abstract(value: Any, shape: tuple[Any, ...]) -> Any:
    """What a program is compiled for: a dtype and a shape."""
    return jax.ShapeDtypeStruct(shape, value.dtype)


def maps_over_a_sharded_axis(case: Case) -> None:
    """On an Explicit mesh, value and gradient, also where some arguments lack the axis."""
    if jax.__version_info__ < (0, 9):
        return  # The select of JAX 0.8 cannot be mapped over one, even without this package.
    draws = [(*case.draw(seed), case.weights(seed)) for seed in range(4)]
    n = len(draws[0])
    gradient = jax.value_and_grad(case.loss, every_argument(case))
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    for axes in ((0,) * n, (0, *(None,) * (n - 1)), (*(None,) * (n - 1), 0)):
        rows = [[d[i] if axis == 0 else draws[0][i] for i, axis in enumerate(axes)] for d in draws]
        each = [differentiated(case)(*row)[by_default(case)] for row in rows]
        expected = jax.tree.map(lambda *x: np.stack(x), *each)
        with jax.set_mesh(mesh):
            placed = [
                jax.device_put(
                    draws[0][i] if axis is None else np.stack([d[i] for d in draws]),
                    NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec("data")),
                )
                for i, axis in enumerate(axes)
            ]
            found = jax.jit(jax.vmap(gradient, axes))(*placed)
        close(jax.tree.map(np.asarray, found), expected, rtol=1e-4, atol=1e-5)


def some_axes_of_a_mesh_may_be_manual(case: Case) -> None:
    """In shard_map over one axis of a mesh, the other one stays Auto or Explicit."""
    if case.is_coupled:
        return
    (*values, weights), expected = for_devices(case), on_one_device(case)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    specs = (*case.of_each(lambda _: rows, [whole] * len(values)), rows)
    loss = functools.partial(case.loss, axis_name="data")
    inside = jax.value_and_grad(loss, every_argument(case))
    gradient_specs = tuple(specs[i] for i in every_argument(case))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
        mapped = functools.partial(jax.shard_map, axis_names={"data"}, mesh=mesh, in_specs=specs)
        outside = jax.value_and_grad(mapped(loss, out_specs=whole), every_argument(case))
        ways = (mapped(inside, out_specs=(whole, gradient_specs)), outside)
        both = jax.jit(lambda *a, ways=ways: [f(*a) for f in ways])
        for of_rows in (("data", "model"), ("data", None, "model")):
            if len(of_rows) > max(v.ndim for v in values):
                continue  # All would be whole along the other axis, as these weights always are.

            def place(v, spec, of_rows=of_rows, mesh=mesh):
                spec = PartitionSpec(*of_rows[: v.ndim]) if spec == rows else spec
                return jax.device_put(v, NamedSharding(mesh, spec))

            with jax.set_mesh(mesh):
                placed = list(map(place, (*values, weights), specs))
                for found in both(*placed):
                    close(found, expected, rtol=1e-5)


def float64_stays_float64(case: Case) -> None:
    """Weakly typed or not, in any one argument; but a number of Python asks for nothing."""
    values, weights = case.draw(), case.weights()
    positions = every_argument(case)
    gradient = jax.value_and_grad(case.loss, positions)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = [v.astype(np.float64) if i in case.floats else v for i, v in enumerate(values)]
        weak = [weakly_typed(v) if i in case.floats else v for i, v in enumerate(values)]
        # The digits of float32 inputs are kept where any one argument is float64.
        tried = [[*weak, weights], [*weak, weights.astype(np.float64)]]
        for i in positions:
            tried.append([*values, weights])
            tried[-1][i] = tried[-1][i].astype(np.float64)
        for arguments in tried:
            value, gradients = jax.eval_shape(gradient, *arguments)
            assert value.dtype == np.float64
            for i, found in zip(positions, gradients, strict=True):
                assert found.dtype == arguments[i].dtype
                assert found.weak_type or not arguments[i].weak_type
        losses = jax.jit(lambda many: [case.loss(*arguments) for arguments in many])
        expected, *found = losses([[*wide, weights.astype(np.float64)], *tried])
        np.testing.assert_allclose(found, np.full(len(found), expected), rtol=1e-12)
        for w in ((), (0.5,), (2,), (jnp.asarray(0.5),)):
            of_constant = jax.eval_shape(lambda *some, w=w: case.loss(*some, *w), *values)
            assert of_constant.dtype == jax.eval_shape(case.loss, *values, *w).dtype == np.float32
            assert (
                jax.eval_shape(lambda *some, w=w: case.loss(*some, *w), *weak).dtype == np.float64
            )


def wrong_calls_name_the_function(case: Case) -> None:
    values = case.draw()
    name = repr(case.loss) if case.is_lifted else case.loss.__name__
    too_many = (*values, 1.0, "mean", None, 0)
    wrong: list[tuple] = [((), {}), (values[:-1], {}), (too_many, {})]
    if not case.is_lifted:  # There, options are for the function that is lifted.
        wrong += [(values, {"weigths": 1.0}), (values, {next(iter(case.inputs)): values[0]})]
    for arguments, options in wrong:
        assert f"{name}" in raises(case.loss, *arguments, kind=TypeError, **options)


def wrong_arguments_are_named(case: Case) -> None:
    values = case.draw()
    rubbish = [None, "three", object(), b"three", np.array(["three"]), np.ones((), complex)]
    rubbish += [1j, [1.0], (1.0,), {}, np.array([None]), jax.random.key(0)]
    rubbish += [np.ma.masked_array([1.0, 2.0], [False, True]), Convertible()]
    if np.finfo(np.longdouble).bits > 64:
        rubbish += [np.ones((), np.longdouble)]
    for i, name in enumerate((*case.inputs, "weights")):
        given = "weights" if name == "weights" else f"inputs[{i}]" if case.is_lifted else name
        is_label = i < len(values) and i not in case.floats
        for bad in (*rubbish, *[10**400] * (not is_label)):
            if case.is_lifted and i < len(values) and isinstance(bad, list | tuple):
                continue  # A pytree of arrays.
            arguments = [*values, 1.0]
            arguments[i] = bad
            assert given in raises(case.loss, *arguments)
    signature = inspect.signature(case.loss)
    for name, parameter in signature.parameters.items():
        is_option = parameter.kind is parameter.KEYWORD_ONLY and name not in case.inputs
        if not is_option or name in ("weights", "bias"):
            continue
        for bad in (jnp.ones(3), np.ones(()), ["mean"], {"mean": 1}):
            assert name in raises(case.loss, *values, **{name: bad})
    assert "once" in raises(case.loss, *values, axis_name=("data", "data"))


def wide_integers_keep_their_size(case: Case) -> None:
    """JAX would cut them to 32 bits, or refuse a number of Python."""
    values, large = case.draw(), 2**40
    for option in {"epsilon", "z_loss", "logit_soft_cap"} & {
        *inspect.signature(case.loss).parameters
    }:
        wide, exact = (case.loss(*values, **{option: number}) for number in (large, 2.0**40))
        np.testing.assert_array_equal(wide, exact)
    expected = case.loss(*values, jnp.float32(large))
    for weight in (large, np.int64(large), np.array(large), np.full(case.losses_shape, large)):
        close(case.loss(*values, weight), expected)
    if case.is_lifted or any(spec.inner for spec in case.inputs.values()):
        return
    ones = [jnp.float32(1) for _ in values]
    for i in range(len(values)):
        some = [*ones[:i], jnp.float32(large), *ones[i + 1 :]]
        for number in (large, np.int64(large)):
            given = [*ones[:i], number, *ones[i + 1 :]]
            np.testing.assert_array_equal(case.loss(*given), case.loss(*some))


def weakly_typed(x: jax.Array) -> jax.Array:
    """``x`` as a weakly typed float64: what a number of Python becomes when JAX traces it."""
    flat = jax.vmap(lambda i: jnp.asarray(0.0) + 0.0 * i)(jnp.arange(x.size))
    assert flat.weak_type
    return flat.reshape(x.shape).at[...].set(x.astype(np.float64))


class Convertible:
    """What only ``jax.numpy`` makes an array of, such as a variable of Keras."""

    def __jax_array__(self):
        return jnp.ones(())


def raises(loss, *arguments, kind=ValueError, **options) -> str:
    try:
        loss(*arguments, **options)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


PROPERTIES = [
    value
    for name, value in list(vars().items())
    if callable(value) and getattr(value, "__annotations__", {}) == {"case": Case, "return": None}
]
