"""Losses compared with outputs of TensorFlow 1.15.5, recorded by ``record_tensorflow.py``."""

import collections
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from arguments import cases as find_losses

import jaxlosses as jl

# Both libraries round in float32. The difference is a few units in the last place of the result, or
# where terms cancel, of the largest term.
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


def load():
    """The cases, with the arrays of their inputs and outputs."""
    with np.load(pathlib.Path(__file__).parent / "tensorflow.npz") as file:
        cases = json.loads(file["cases"].tobytes())
        numbers = file["numbers"]
    start = 0

    def take(shape, dtype):
        nonlocal start
        stop = start + int(np.prod(shape))
        taken, start = numbers[start:stop].reshape(shape).astype(dtype), stop
        return taken

    for case in cases:
        case["inputs"] = {name: take(shape, dtype) for name, dtype, shape in case["inputs"]}
        case["outputs"] = {name: take(shape, np.float32) for name, shape in case["outputs"]}
    assert start == numbers.size
    return cases


def name_of(index, case):
    shapes = ["x".join(map(str, x.shape)) or "scalar" for x in case["inputs"].values()]
    options = [f"{k}={v:g}" for k, v in case["options"].items()]
    note = case["note"].replace(" ", "_")
    return "-".join([case["function"], *shapes, *options, *([note] if note else []), str(index)])


CASES = load()
NAMES = [name_of(i, c) for i, c in enumerate(CASES)]
LOSSES = sorted({case["function"] for case in CASES})


def cases_of(function, *, same):
    """The cases of a loss by name, where TensorFlow is right, or where it is not."""
    return {
        name: case
        for name, case in zip(NAMES, CASES, strict=True)
        if case["function"] == function and bool(case["why"]) is not same
    }


def of_jaxlosses(cases, names):
    """Values and gradients with respect to some inputs, from jaxlosses.

    All cases are one program, and their inputs are its constants, because to compile takes nearly
    all of the time: what XLA computes before the program runs needs no kernel. Cases that differ in
    their numbers alone are one batch.
    """
    batches = collections.defaultdict(dict)
    for name, case in cases.items():
        inputs = {k: as_jax(x) for k, x in case["inputs"].items()}
        shapes = [(k, x.shape, x.dtype) for k, x in inputs.items()]
        batches[str((shapes, case["options"], names[name]))][name] = inputs

    def value_and_gradients(inputs, case, names):
        def loss(chosen):
            return getattr(jl, case["function"])(**{**inputs, **chosen}, **case["options"])

        value, gradients = jax.value_and_grad(loss)({name: inputs[name] for name in names})
        return {"value": value, **gradients}

    def of_batch(batch):
        (first, inputs), *others = batch.items()
        of_one = functools.partial(value_and_gradients, case=cases[first], names=names[first])
        if not others:
            return jax.tree.map(lambda x: x[None], of_one(jax.device_put(inputs)))
        stacked = jax.tree.map(lambda *x: np.stack(x), *batch.values())
        return jax.vmap(of_one)(jax.device_put(stacked))

    @jax.jit
    def of_all():
        with jax.disable_jit():  # A jit within this one would be traced apart, and then once more.
            return [of_batch(batch) for batch in batches.values()]

    return {
        name: {k: np.asarray(x)[i] for k, x in found.items()}
        for batch, found in zip(batches.values(), of_all(), strict=True)
        for i, name in enumerate(batch)
    }


def as_jax(array):
    """JAX has no integers of 64 bits by default."""
    return array.astype(np.int32) if array.dtype == np.int64 else array


def element_losses(function, inputs, options):
    """The losses as they are defined, computed in float64."""
    x, *labels = inputs
    y = labels[0] if labels else None
    smoothing = options.get("label_smoothing", 0)
    if function == "compute_weighted_loss":
        return x
    if function == "absolute_difference":
        return np.abs(x - y)
    if function == "mean_squared_error":
        return (x - y) ** 2
    if function == "log_loss":
        epsilon = options.get("epsilon", 1e-7)
        return -y * np.log(x + epsilon) - (1 - y) * np.log(1 - x + epsilon)
    if function == "hinge_loss":
        return np.maximum(0, 1 - (2 * y - 1) * x)
    if function == "cosine_distance":
        return 1 - np.sum(x * y, axis=options["axis"])
    if function == "mean_pairwise_squared_error":
        d = (x - y).reshape(len(x), -1)
        return np.mean((d[:, :, None] - d[:, None, :]) ** 2, axis=(1, 2))
    if function == "sigmoid_cross_entropy":
        y = y * (1 - smoothing) + smoothing / 2
        return y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
    classes = x.shape[-1]
    if function == "sparse_softmax_cross_entropy":
        y = np.eye(classes)[y.reshape(x.shape[:-1]).astype(int)]
    y = y * (1 - smoothing) + smoothing / classes
    log_softmax = x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
    return -np.sum(np.where((y == 0) & np.isneginf(log_softmax), 0, y * log_softmax), axis=-1)


def by_definition(case, names):
    """Value and gradients (central differences) of the definition, in float64."""
    inputs = {name: x.astype(np.float64) for name, x in case["inputs"].items()}
    given = inputs["weights"]

    def reduced(inputs):
        *arrays, w = inputs.values()
        losses = element_losses(case["function"], arrays, case["options"])
        if w.ndim > losses.ndim:
            w = w.squeeze(-1)
        w = w.reshape(w.shape + (1,) * (losses.ndim - w.ndim))
        present = given.reshape(w.shape) != 0
        losses = np.where(present | np.isfinite(losses), losses, 0)
        count = np.broadcast_to(present, losses.shape).sum()
        if case["function"] == "mean_pairwise_squared_error":
            count = 1
        return np.sum(w * losses) / max(count, 1)

    def derivative(name, index, step=1e-5):
        values = []
        for sign in (1, -1):
            changed = inputs[name].copy()
            changed[index] += sign * step
            values.append(reduced({**inputs, name: changed}))
        return (values[0] - values[1]) / (2 * step)

    with np.errstate(all="ignore"):
        found = {"value": np.asarray(reduced(inputs))}
        for name in names:
            gradient = [derivative(name, index) for index in np.ndindex(inputs[name].shape)]
            found[name] = np.reshape(gradient, inputs[name].shape)
    return found


def assert_close(name, actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for k in expected:
        assert actual[k].shape == expected[k].shape, f"{name}: {k}"
        np.testing.assert_allclose(actual[k], expected[k], **tolerance, err_msg=f"{name}: {k}")


@pytest.mark.parametrize("function", LOSSES)
def test_the_result_is_that_of_tensorflow(function):
    cases = cases_of(function, same=True)
    names = {name: [k for k in case["outputs"] if k != "value"] for name, case in cases.items()}
    found = of_jaxlosses(cases, names)
    for name, case in cases.items():
        assert_close(name, found[name], case["outputs"], **ROUNDING)


@pytest.mark.parametrize("function", LOSSES)
def test_the_result_is_right_where_that_of_tensorflow_is_not(function):
    cases = cases_of(function, same=False)
    # Central differences would leave the domain of a graph optimizer's case. Other cases have p=1
    # with gradients.
    names = {
        name: [
            k
            for k, x in case["inputs"].items()
            if x.dtype == np.float32 and k != "labels" and case["note"] != "graph optimizer"
        ]
        for name, case in cases.items()
    }
    found = of_jaxlosses(cases, names)
    for name, case in cases.items():
        expected = by_definition(case, names[name])
        assert_close(name, found[name], expected, **ROUNDING)
        kept = case["outputs"].keys() & expected.keys()
        theirs, right = ({k: x[k] for k in kept} for x in (case["outputs"], expected))
        with pytest.raises(AssertionError):
            assert_close(name, theirs, right, rtol=1e-3, atol=1e-3)


def test_the_definition_is_what_tensorflow_computes():
    for case in CASES:
        if not case["why"]:
            value = case["outputs"]["value"]
            expected = by_definition(case, [])["value"]
            np.testing.assert_allclose(value, expected, **ROUNDING, err_msg=case)


def test_the_recording_covers_every_loss():
    same, different = (
        {function for function in LOSSES if cases_of(function, same=same)} for same in (True, False)
    )
    assert same == different <= set(find_losses(jl))
    assert len(same) == 10  # TensorFlow's nine losses, and compute_weighted_loss.
    assert len(CASES) >= 300
    assert len(set(NAMES)) == len(CASES)
    assert {next(iter(c["inputs"].values())).ndim for c in CASES} == {1, 2, 3, 4}
