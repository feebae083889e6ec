"""LossCollector and the regularizers."""

import collections
import copy
import dataclasses
import pickle

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import jaxlosses as jl

PARAMS = {
    "encoder": {"dense": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}},
    "head": {"kernel": jnp.array([[-4.0]])},
    "steps": jnp.array(7),
}


def collector(x=2.0):
    """A collector with every kind of value: scalar, array, undivided mean, the same with axes."""
    x = jnp.asarray(x)
    masked = jl.compute_weighted_loss(
        x * np.float32([0, 1, 2, 3]), np.arange(4) > 1, reduction="parts"
    )
    layers = jl.WeightedMean(x * np.float32([2, 6]), np.float32([1, 2]))
    losses = jl.LossCollector().add_loss("scalar", x).add_loss("losses", x * np.float32([1, 3]))
    losses = losses.add_loss("encoder/masked", masked).add_loss("encoder/layers", layers)
    return losses.add_regularization_loss("l2", x / 4).add_metric("accuracy", masked / 10)


EXPECTED = {
    "scalar": 2.0,
    "losses": 4.0,
    "encoder/masked": 5.0,
    "encoder/layers": np.array([4.0, 6.0]),
}


def test_values_are_found_by_name():
    losses = collector()
    chex.assert_trees_all_close(losses.get_losses(), EXPECTED)
    chex.assert_trees_all_close(losses.get_regularization_losses(), {"l2": 0.5})
    assert losses.get_total_loss() == 2 + 4 + 5 + (4 + 6) + 0.5
    assert losses.get_total_loss(add_regularization_losses=False) == 21
    assert collector().losses["losses"].count == 2
    assert collector().losses["scalar"].count == 1


def test_scope_is_a_regular_expression_that_matches_the_start():
    losses = collector()
    assert set(losses.get_losses("encoder")) == {"encoder/masked", "encoder/layers"}
    assert set(losses.get_losses("enc.*layers")) == {"encoder/layers"}
    assert losses.get_losses("masked") == {}
    assert losses.get_regularization_losses("l1") == {}
    with pytest.raises(ValueError, match=r"scope.*'\('"):
        losses.get_losses("(")


def test_an_empty_collector_has_a_total_of_zero():
    empty = jl.LossCollector()
    assert empty.get_total_loss() == 0
    assert empty.get_total_loss().dtype == jnp.float32
    assert empty.get_losses() == {}
    assert repr(empty) == "LossCollector()"
    assert str(empty).split() == ["loss", "value", "count", "total", "0"]


def test_adding_a_loss_does_not_change_the_collector():
    first = jl.LossCollector().add_loss("a", 1.0)
    first.add_loss("b", 2.0)
    assert list(first.get_losses()) == ["a"]
    with pytest.raises(AttributeError):
        first.losses = {}
    with pytest.raises(TypeError):
        first.losses["b"] = first.losses["a"]


@pytest.mark.parametrize(
    "name", ["", "total_loss", None, 3, True, 1.5, b"aux", ("a",), object(), jnp.float32]
)
def test_bad_names_are_refused(name):
    with pytest.raises(ValueError, match="name must be"):
        jl.LossCollector().add_loss(name, 1.0)
    with pytest.raises(ValueError, match="name must be"):
        jl.LossCollector().add_regularization_loss(name, 1.0)


def test_a_name_that_is_taken_is_refused():
    losses = jl.LossCollector().add_loss("a", 1.0)
    for add in (losses.add_loss, losses.add_regularization_loss):
        with pytest.raises(ValueError, match="'a' is taken"):
            add("a", 2.0)


@pytest.mark.parametrize(
    "value", [None, "1", [1.0], jnp.ones(2, jnp.complex64), np.array("a"), np.array([None])]
)
def test_bad_values_are_refused(value):
    for wrong, name in (
        (value, "aux"),
        (jl.WeightedMean(value, 1.0), "aux.total"),
        (jl.WeightedMean(1.0, value), "aux.count"),
    ):
        for add in (jl.LossCollector().add_loss, jl.LossCollector().add_regularization_loss):
            with pytest.raises(ValueError, match=rf"^{name} must be"):
                add("aux", wrong)


def test_a_count_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"aux.total.*\(2,\).*aux.count.*\(\)"):
        jl.LossCollector().add_loss("aux", jl.WeightedMean(jnp.ones(2), 1.0))


def test_low_precision_is_widened():
    mean = jl.WeightedMean(jnp.bfloat16(3), jnp.bfloat16(1))
    losses = jl.LossCollector().add_loss("mean", mean).add_loss("scalar", jnp.bfloat16(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(losses)} == {jnp.dtype("float32")}
    # A count in bfloat16 could not grow past 256.
    assert sum(losses for _ in range(1000)).losses["mean"].count == 1000


def test_merged_means_are_the_means_of_the_whole():
    whole = np.arange(10.0, dtype=np.float32)
    batches = [
        jl.LossCollector()
        .add_loss("xent", jl.compute_weighted_loss(whole[a:b], reduction="parts"))
        .add_loss("array", whole[a:b])
        .add_regularization_loss("l2", 0.25)
        for a, b in ((0, 4), (4, 8), (8, 10))
    ]
    for merged in (batches[0].merge(batches[1]) + batches[2], sum(batches)):
        np.testing.assert_allclose(merged.get_losses()["xent"], whole.mean())
        np.testing.assert_allclose(merged.get_losses()["array"], whole.mean())
        assert merged.get_regularization_losses()["l2"] == 0.25


def test_merging_collectors_of_other_names_or_shapes_is_refused():
    a, b = jl.LossCollector().add_loss("a", 1.0), jl.LossCollector().add_loss("b", 1.0)
    with pytest.raises(ValueError, match=r"first has \['a'\].*second has \['b'\]"):
        a.merge(b)
    with pytest.raises(ValueError, match=r"regularization_losses.*second has \['l2'\]"):
        a + a.add_regularization_loss("l2", 1.0)
    array = jl.LossCollector().add_loss("a", jl.WeightedMean(jnp.ones(3), jnp.ones(3)))
    with pytest.raises(ValueError, match=r"a must have the same shape.*\(\), \(3,\)"):
        a + array
    for other in (None, 1.0, 1):
        with pytest.raises(ValueError, match="LossCollector"):
            a + other


def test_a_collector_passes_through_every_transformation():
    traced = jax.jit(chex.assert_max_traces(collector, n=1))
    chex.assert_trees_all_equal(traced(2.0), collector(2.0))
    chex.assert_trees_all_close(traced(3.0), collector(3.0))
    doubled = jax.tree.map(lambda x: 2 * x, collector())
    chex.assert_trees_all_close(doubled.get_losses(), EXPECTED)

    @jax.jit
    def transformed(is_first):
        def total(x):
            return collector(x).get_total_loss()

        def add(total, x):
            return total + collector(x), None

        start = jax.tree.map(jnp.zeros_like, collector())
        return (
            jax.vmap(total)(jnp.array([2.0, 4.0])),
            jax.lax.cond(is_first, collector, lambda x: collector(2 * x), 2.0),
            jax.grad(jax.checkpoint(total))(2.0),
            jax.lax.scan(add, start, jnp.array([1.0, 3.0]))[0],
        )

    mapped, either, derivative, scanned = transformed(True)
    np.testing.assert_allclose(mapped, [21.5, 43.0])
    chex.assert_trees_all_equal(either, collector())
    assert derivative == 21.5 / 2
    chex.assert_trees_all_close(scanned.get_losses(), EXPECTED)
    # The order in which losses were added does not change the pytree's structure.
    a = jl.LossCollector().add_loss("a", 1.0).add_loss("b", 2.0)
    b = jl.LossCollector().add_loss("b", 2.0).add_loss("a", 1.0)
    chex.assert_trees_all_equal(a, b)
    assert list(jax.jit(lambda: b)().losses) == list(b.losses)


def test_psum_is_one_collective_of_exact_means():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(losses, mask):
        found = jl.LossCollector().add_loss(
            "xent", jl.compute_weighted_loss(losses, mask, reduction="parts")
        )
        found = found.add_regularization_loss("l2", 0.5)
        return found.psum("data")

    spec = PartitionSpec("data")
    losses, mask = np.arange(8, dtype=np.float32), np.arange(8) > 2
    mapped = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec())
    )
    compiled = mapped.lower(losses, mask).compile()
    found = jax.device_get(compiled(losses, mask))
    assert found.get_losses()["xent"] == losses[3:].mean()
    assert found.get_regularization_losses()["l2"] == 0.5
    assert compiled.as_text().count(" all-reduce(") == 1


def test_str_is_a_table():
    assert str(collector()).split("\n") == [
        "loss               value  count",
        "encoder/layers[0]      4      1",
        "encoder/layers[1]      6      2",
        "encoder/masked         5      2",
        "losses                 4      2",
        "scalar                 2      1",
        "regularization",
        "l2                   0.5      1",
        "total               21.5",
        "metric",
        "accuracy             0.5      2",
    ]
    fractions = jl.LossCollector().add_loss("weighted", jl.WeightedMean(1.0, 2.5))
    fractions = fractions.add_metric("unknown", jl.WeightedMean(1.0, jnp.nan))
    assert [line.split()[-1] for line in str(fractions).split("\n")[1::3]] == ["2.5", "nan"]


def test_repr_shows_values_or_what_stands_in_their_place():
    assert repr(collector()) == (
        "LossCollector(losses={encoder/layers: [4, 6], encoder/masked: 5, losses: 4, scalar: 2}, "
        "regularization_losses={l2: 0.5}, metrics={accuracy: 0.5})"
    )
    seen = []
    jax.eval_shape(lambda: (losses := collector(), seen.extend([repr(losses), str(losses)]))[0])
    assert seen[0] == seen[1]
    assert "scalar: 2" in seen[0] or "scalar: float32[]" in seen[0]
    jax.jit(lambda x: seen.append(str(collector(x))))(2.0)
    assert "encoder/layers: float32[2]" in seen[-1]
    assert "scalar: object" in repr(jax.tree.map(lambda _: "object", collector())).replace("'", "")
    for leaf in (
        None,
        jnp.float32,
        jnp.dtype("float32"),
        jax.ShapeDtypeStruct((), jnp.float32),
        jnp.complex64(1),
        jax.random.key(0),
        np.array("a"),
        PartitionSpec("data"),
    ):
        mapped = jax.tree.map(lambda _, leaf=leaf: leaf, collector())
        assert repr(mapped) == str(mapped)


def test_to_dict_has_scalars_only():
    flat = collector().to_dict()
    assert {name: float(value) for name, value in flat.items()} == {
        "encoder/layers/0": 4,
        "encoder/layers/1": 6,
        "encoder/masked": 5,
        "losses": 4,
        "scalar": 2,
        "l2": 0.5,
        "accuracy": 0.5,
        "total_loss": 21.5,
    }
    assert all(value.shape == () for value in jax.jit(collector().to_dict)().values())


def test_to_dict_refuses_one_name_for_two_values():
    layers = jl.WeightedMean(jnp.ones(2), jnp.ones(2))
    losses = jl.LossCollector().add_loss("a", layers).add_loss("a/0", 1.0)
    with pytest.raises(ValueError, match="'a/0' must not be the name of two values"):
        losses.to_dict()


def test_a_collector_is_restored_from_a_checkpoint(tmp_path):
    losses = collector()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "losses", losses)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "losses", jax.tree.map(jnp.zeros_like, losses))
        plain = checkpointer.restore(tmp_path / "losses")
    assert isinstance(restored, jl.LossCollector)
    chex.assert_trees_all_equal(restored, losses)
    # Who has no collector to restore into reads the names that are public.
    expected = {
        kind: {name: {"total": m.total, "count": m.count} for name, m in means.items()}
        for kind in ("losses", "regularization_losses", "metrics")
        for means in [getattr(losses, kind)]
    }
    chex.assert_trees_all_equal(plain, expected)
    shown = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(losses)]
    assert ".losses['scalar'].total" in shown
    assert ".regularization_losses['l2'].count" in shown


@pytest.mark.parametrize("losses", [jl.LossCollector(), collector()], ids=["empty", "full"])
def test_a_collector_passes_through_an_exported_program(losses):
    """Also a WeightedMean, its leaves."""

    def add(losses, x):
        total = jax.tree.map(lambda leaf: leaf + x, losses)
        return total, jl.compute_weighted_loss(jnp.stack([x, x]), reduction="parts")

    saved = jax.export.export(jax.jit(add))(losses, 2.0).serialize()
    loaded = jax.export.deserialize(saved).call(losses, 2.0)
    assert isinstance(loaded[0], jl.LossCollector)
    assert isinstance(loaded[1], jl.WeightedMean)
    chex.assert_trees_all_equal(loaded, add(losses, jnp.float32(2)))
    assert b"jaxlosses.LossCollector" in saved
    assert b"jaxlosses._" not in saved  # No private module is named by what users keep.


def test_regularizers_are_those_of_tensorflow():
    w = np.float32([[1, -2], [0, 3]])
    assert jl.l1_regularizer(0.5)(w) == 3
    assert jl.l2_regularizer(0.5)(w) == 3.5
    gradients = jax.jit(
        lambda w: [jax.grad(f(0.5))(w) for f in (jl.l1_regularizer, jl.l2_regularizer)]
    )
    np.testing.assert_array_equal(gradients(w), [0.5 * np.sign(w), 0.5 * w])
    for regularizer in (jl.l1_regularizer, jl.l2_regularizer):
        assert regularizer(1.0)(w.astype(jnp.bfloat16)).dtype == jnp.float32
        with pytest.raises(ValueError, match=r"scale.*-1"):
            regularizer(-1.0)
        for wrong in (jnp.ones(2), jnp.complex64(1), np.array("a"), np.array(True), "1", None):
            with pytest.raises(ValueError, match=r"^scale must be"):
                regularizer(wrong)
        assert regularizer(jnp.float32(2))(w) == regularizer(2.0)(w)
        assert jax.jit(lambda s, r=regularizer: r(s)(w))(2.0) == regularizer(2.0)(w)
        for scale in (np.array(2.0), jnp.float32(2)):
            assert jax.jit(lambda r=regularizer, s=scale: r(s)(w))() == regularizer(2.0)(w)


def test_collectors_and_regularizers_can_be_pickled():
    losses, w = collector(), jnp.array([1.0, -2.0])
    for copied in (lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy):
        assert jax.tree.structure(copied(losses)) == jax.tree.structure(losses)
        chex.assert_trees_all_equal(copied(losses), losses)
        assert repr(copied(losses)) == repr(losses)
        for regularizer in (jl.l1_regularizer, jl.l2_regularizer):
            for scale in (0.5, 2, jnp.float32(0.5)):
                same = copied(regularizer(scale))
                assert same(w) == regularizer(scale)(w)
                assert repr(same) == f"{regularizer.__name__}({scale})"


def test_regularizers_are_functions_to_every_transformation():
    w = np.float32([[1, -2], [0, 3]])
    for regularizer in (jl.l1_regularizer, jl.l2_regularizer):
        for scale in (0.5, jnp.float32(0.5)):
            loss = regularizer(scale)
            expected = np.stack([loss(row) for row in w])
            for mapped in (jax.vmap(loss), jax.jit(jax.vmap(loss)), jax.vmap(jax.checkpoint(loss))):
                chex.assert_trees_all_close(mapped(w), expected)
        for arguments, options in (((), {}), ((w, w), {}), ((w,), {"scale": 1.0})):
            with pytest.raises(TypeError, match=rf"^{regularizer.__name__}\(0.5\) was called"):
                regularizer(0.5)(*arguments, **options)
        for wrong in (None, "a", jnp.ones(2, jnp.complex64), jax.random.key(0)):
            with pytest.raises(ValueError, match=r"^w must be"):
                regularizer(0.5)(wrong)


def test_a_pattern_is_searched_for_in_paths():
    patterns = {
        "kernel$": jl.l1_regularizer(1.0),
        "encoder/dense": jl.l2_regularizer(2.0),
        "^head": jl.l2_regularizer(1.0),
    }
    losses = jl.LossCollector().regularize(PARAMS, patterns)
    # Two patterns find the kernel of the encoder, and it counts in both losses.
    expected = {"kernel$": 7.0, "encoder/dense": 14.0, "^head": 8.0}
    chex.assert_trees_all_close(losses.get_regularization_losses(), expected)
    assert losses.get_losses() == {}


def test_patterns_and_regularizers_that_cannot_work_are_refused():
    empty = jl.LossCollector()
    with pytest.raises(ValueError, match=r"'kernels' matches no parameter.*encoder/dense/kernel"):
        empty.regularize(PARAMS, {"kernels": jl.l2_regularizer(1.0)})
    with pytest.raises(ValueError, match="'steps' matches no parameter"):
        empty.regularize(PARAMS, {"steps": jl.l2_regularizer(1.0)})
    with pytest.raises(ValueError, match=r"pattern.*regular expression.*'\['"):
        empty.regularize(PARAMS, {"[": jl.l2_regularizer(1.0)})
    with pytest.raises(ValueError, match=r"'head' must return a scalar.*\(1, 1\)"):
        empty.regularize(PARAMS, {"head": jnp.abs})
    for wrong in (None, "0.1", 1j, [1.0]):
        with pytest.raises(ValueError, match="what the regularizer of 'head' returns must be"):
            empty.regularize(PARAMS, {"head": lambda w, wrong=wrong: wrong})
    with pytest.raises(ValueError, match="regularizer of 'head' must be a function"):
        empty.regularize(PARAMS, {"head": 0.1})
    with pytest.raises(ValueError, match="regularizers must be a mapping"):
        empty.regularize(PARAMS, jl.l2_regularizer(1.0))


def test_a_shared_parameter_counts_once():
    class Tied(nnx.Module):
        def __init__(self):
            self.encoder = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.decoder = self.encoder

    def total(model):
        return (
            jl.LossCollector()
            .regularize(model, {"kernel": jl.l2_regularizer(1.0)})
            .get_total_loss()
        )

    model = Tied()
    kernel = model.encoder.kernel[...]
    np.testing.assert_allclose(total(model), jnp.sum(jnp.square(kernel)) / 2, rtol=1e-6)
    np.testing.assert_allclose(total(nnx.state(model)), total(model))
    gradient = nnx.grad(total)(model)
    np.testing.assert_allclose(jax.tree.leaves(gradient["decoder"])[-1], kernel, rtol=1e-6)


def test_patterns_find_parameters_of_linen_and_nnx():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = nn.with_partitioning(nn.initializers.ones, (None, "model"))
            return nn.Dense(2, kernel_init=kernel, name="dense")(x)

    class Nnx(nnx.Module):
        def __init__(self):
            ones = nnx.initializers.ones
            self.dense = nnx.Linear(3, 2, kernel_init=ones, rngs=nnx.Rngs(0))

    variables = Linen().init(jax.random.key(0), jnp.ones((1, 3)))
    assert isinstance(variables["params"]["dense"]["kernel"], nn.Partitioned)
    model = Nnx()
    for params in (variables["params"], nnx.state(model, nnx.Param), nnx.state(model), model):
        losses = jl.LossCollector().regularize(params, {"^dense/kernel$": jl.l1_regularizer(1.0)})
        assert losses.get_total_loss() == 6


ATTENTION = ("query", "key", "value")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dataclass:
    query: object
    key: object
    value: object


@jax.tree_util.register_pytree_with_keys_class
class Module(Dataclass):
    """A module as equinox makes it: a pytree with a static field, whose keys are attributes."""

    width: int = 3

    def get_value(self):
        return self.value

    unbox = add_axis = get_value

    def tree_flatten_with_keys(self):
        keys = map(jax.tree_util.GetAttrKey, ATTENTION)
        return list(zip(keys, [self.query, self.key, self.value], strict=True)), self.width

    @classmethod
    def tree_unflatten(cls, width, children):
        module = cls(*children)
        module.width = width
        return module


class NnxModule(nnx.Module):
    def __init__(self, query, key, value):
        self.query, self.key, self.value = (
            nnx.data(x) if isinstance(x, nnx.Module | nnx.Variable) else nnx.Param(x)
            for x in (query, key, value)
        )


@jax.tree_util.register_pytree_with_keys_class
class OwnBox(nn.meta.AxisMetadata):
    """A box that calls its content otherwise."""

    def __init__(self, content):
        self.content = content

    def unbox(self):
        raise AssertionError("The array must stay where it is.")

    replace_boxed = add_axis = remove_axis = unbox

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("content"), self.content)], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class OpaqueBox(OwnBox):
    """A box that is no pytree, so that its content is hidden from JAX."""


CONTAINERS = {
    "dict": lambda *leaves: dict(zip(ATTENTION, leaves, strict=True)),
    "frozen dict": lambda *leaves: nn.FrozenDict(zip(ATTENTION, leaves, strict=True)),
    "namedtuple": collections.namedtuple("Named", ATTENTION),
    "dataclass": Dataclass,
    "module": Module,
    "list": lambda *leaves: list(leaves),
    "tuple": lambda *leaves: leaves,
    "haiku": lambda *leaves: {f"a/~/{k}": v for k, v in zip(ATTENTION, leaves, strict=True)},
    "none": lambda *leaves: [dict(zip(ATTENTION, leaves, strict=True)), None],
    "nnx": NnxModule,
    "nnx state": lambda *leaves: nnx.state(NnxModule(*leaves)),
    "pure nnx state": lambda *leaves: nnx.to_pure_dict(nnx.state(NnxModule(*leaves))),
}
NAMES = {
    "list": ("0", "1", "2"),
    "tuple": ("0", "1", "2"),
    "haiku": tuple(f"a/~/{name}" for name in ATTENTION),
    "none": tuple(f"0/{name}" for name in ATTENTION),
}
WRAPPERS = {
    "plain": lambda x: x,
    "Partitioned": lambda x: nn.Partitioned(x, ("model",)),
    "LogicallyPartitioned": lambda x: nn.LogicallyPartitioned(x, ("model",)),
    "nested boxes": lambda x: nn.Partitioned(nn.Partitioned(x, ("model",)), ("data",)),
    "own box": OwnBox,
    "variable": nnx.Param,
    "box in variable": lambda x: nnx.Param(OwnBox(x)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_path_names_every_parameter_of_every_container(container, wrapper):
    names = NAMES.get(container, ATTENTION)
    wrapped = [WRAPPERS[wrapper](jnp.full(1, scale)) for scale in (1.0, 10.0, 100.0)]
    params = CONTAINERS[container](*wrapped)
    if "nnx" not in container:
        assert len(jax.tree.leaves(params)) == 3
    patterns = {f"^{name}$": jl.l1_regularizer(1.0) for name in names}
    losses = jl.LossCollector().regularize(params, patterns)
    expected = dict(zip(patterns, (1.0, 10.0, 100.0), strict=True))
    chex.assert_trees_all_equal(losses.get_regularization_losses(), expected)


@pytest.mark.parametrize("outer", CONTAINERS)
@pytest.mark.parametrize("inner", [name for name in CONTAINERS if "nnx" not in name])
def test_a_path_names_every_parameter_of_nested_containers(outer, inner):
    leaves = iter(jnp.full(1, 2.0**i) for i in range(9))
    params = CONTAINERS[outer](*[CONTAINERS[inner](*[next(leaves) for _ in "abc"]) for _ in "abc"])
    names = [f"{a}/{b}" for a in NAMES.get(outer, ATTENTION) for b in NAMES.get(inner, ATTENTION)]
    patterns = {f"^{name}$": jl.l1_regularizer(1.0) for name in names}
    losses = jl.LossCollector().regularize(params, patterns)
    expected = {pattern: 2.0**i for i, pattern in enumerate(patterns)}
    chex.assert_trees_all_equal(losses.get_regularization_losses(), expected)


def test_boxes_hold_pytrees_and_may_be_hidden_from_jax():
    pytree = {"value": jnp.ones(1), "steps": jnp.array(7)}
    for box in (OwnBox(pytree), nn.Partitioned(pytree, ()), nnx.Param(pytree)):
        losses = jl.LossCollector().regularize({"value": box}, {"^value/value$": jnp.sum})
        assert losses.get_total_loss() == 1
    both = {"hidden": OpaqueBox(jnp.ones(1)), "seen": jnp.ones(1)}
    assert jl.LossCollector().regularize(both, {".": jnp.sum}).get_total_loss() == 1


def test_a_regularizer_has_the_precision_of_its_parameters():
    with jax.enable_x64(True):
        for scale in (np.float64(0.5), jnp.float64(0.5), 0.5):
            for regularizer in (jl.l1_regularizer, jl.l2_regularizer):
                for w in (np.ones(3, np.float32), np.ones(3)):
                    found = jax.eval_shape(lambda r=regularizer, s=scale, w=w: r(s)(w))
                    assert found.dtype == w.dtype
                w = np.ones(3, np.float32)
                traced = jax.eval_shape(lambda s, r=regularizer, w=w: r(s)(w), scale)
                assert traced.dtype == np.float32
