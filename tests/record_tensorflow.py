# ruff: noqa: B905, RUF005, UP031
"""Record what ``tf.contrib.losses`` of TensorFlow 1.15.5 computes, into ``tensorflow.npz``.

The recording is in the repository; this program is only needed to add cases. It needs Python 3.7,
the last one with TensorFlow 1.15, and does not need jaxlosses::

    python3.7 -m pip install tensorflow==1.15.5 'protobuf<3.21'
    python3.7 tests/record_tensorflow.py

The file holds ``cases``, a JSON list in UTF-8, and ``numbers``, all arrays of all cases joined into
one, because a file of many small arrays would be mostly zip headers. A case is::

    {"function": ..., "note": ..., "options": {...}, "why": null or why jaxlosses differs,
     "inputs": [[name, dtype, shape], ...], "outputs": [[name, shape], ...]}

and its outputs are ``value`` and the gradients with respect to inputs, by the name of the input.
"""

import itertools
import json
import pathlib

import numpy as np
import tensorflow as tf
from tensorflow.contrib import losses as contrib

RANDOM = np.random.RandomState(1155)
SHAPES = [(4,), (3, 4), (4, 1), (2, 3, 4), (1, 3, 2), (2, 3, 2, 2), (2, 1, 3, 2)]
CLASS_SHAPES = [(4, 3), (1, 5), (2, 3, 4), (2, 3, 2, 2)]
INPUTS = {
    "absolute_difference": ("predictions", "labels"),
    "mean_squared_error": ("predictions", "labels"),
    "mean_pairwise_squared_error": ("predictions", "labels"),
    "cosine_distance": ("predictions", "labels"),
    "log_loss": ("predictions", "labels"),
    "hinge_loss": ("logits", "labels"),
    "sigmoid_cross_entropy": ("logits", "labels"),
    "softmax_cross_entropy": ("logits", "labels"),
    "sparse_softmax_cross_entropy": ("logits", "labels"),
    "compute_weighted_loss": ("losses",),
}
ELEMENTWISE = [
    "absolute_difference",
    "mean_squared_error",
    "log_loss",
    "hinge_loss",
    "sigmoid_cross_entropy",
    "compute_weighted_loss",
]
CASES = []
OPTIMIZED = "graph optimizer"


def add(function, arrays, weights, note="", why=None, **options):
    names = INPUTS[function] + ("weights",)
    arrays = [np.asarray(a) for a in tuple(arrays) + (weights,)]
    arrays = [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays]
    CASES.append(
        {
            "function": function,
            "note": note,
            "why": why,
            "options": options,
            "arrays": list(zip(names, arrays)),
        }
    )


def draw(function, shape):
    normal, labels = RANDOM.normal(size=shape) * 2, RANDOM.randint(2, size=shape)
    if function == "compute_weighted_loss":
        return (normal,)
    if function == "log_loss":
        return RANDOM.uniform(0.02, 0.98, shape), labels.astype(np.float32)
    if function in ("hinge_loss", "sigmoid_cross_entropy"):
        return normal, labels.astype(np.float32)
    if function == "softmax_cross_entropy":
        return normal, RANDOM.dirichlet(np.ones(shape[-1]), shape[:-1])
    if function == "sparse_softmax_cross_entropy":
        return normal, RANDOM.randint(shape[-1], size=shape[:-1]).astype(np.int32)
    return normal, RANDOM.normal(size=shape)


def unit_vectors(shape, axis):
    x = RANDOM.normal(size=shape)
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def draw_weights(kind, shape):
    w = RANDOM.uniform(0.25, 2.0, shape)
    if kind == "ones":
        w = np.ones(shape)
    if kind == "zeros":
        w = np.zeros(shape)
    if kind == "some zero" and w.size > 1:
        w.flat[:: 2 + RANDOM.randint(2)] = 0
    if kind == "some negative":
        w = w * np.where(RANDOM.uniform(size=shape) < 0.4, -1, 1)
        w = np.where(np.arange(w.size).reshape(shape) == 0, -0.75, w)
    return w


def right_shapes(shape):
    """Shapes of weights with which TensorFlow counts losses of a shape right: leading axes."""
    found = [()]
    for k in range(1, len(shape) + 1):
        found += [shape[:k], shape[:k] + (1,)]
    return sorted(set(found), key=lambda s: (len(s), s))


KINDS = itertools.cycle(["positive", "some zero", "some negative"])


def add_agreeing():
    for function in ELEMENTWISE:
        for shape in SHAPES:
            for weights_shape in right_shapes(shape):
                kind = next(KINDS)
                add(function, draw(function, shape), draw_weights(kind, weights_shape), kind)
        for shape in [(4,), (2, 3)]:
            for kind in ("ones", "zeros"):
                for weights_shape in [(), shape]:
                    w = draw_weights(kind, weights_shape)
                    add(function, draw(function, shape), w, kind)
        for w in ([True, False, True], [1, 0, 3]):
            w = np.asarray(w, np.bool_ if w[0] is True else np.int32)
            add(function, draw(function, (3, 2)), w, "%s weights" % w.dtype)

    for function in ("absolute_difference", "mean_squared_error", "mean_pairwise_squared_error"):
        for w in (1.0, [0.5, 2.0]):
            p, y = RANDOM.randint(-9, 9, (2, 2, 4)).astype(np.int32)
            add(function, (p, y), w, "integers")
            add(function, (p.astype(np.float32), y), w, "integer labels")
            add(function, (y.astype(np.float32), y), w, "perfect fit")
            add(function, (p * 1e4, y * 1e-4), w, "large")
    p = np.array([[0, 1, 1, 0]], np.int32)
    add("log_loss", (p, p), 1.0, "integers")
    add("cosine_distance", (p, 1 - p), 1.0, "integers", axis=1)
    for function in ("hinge_loss", "sigmoid_cross_entropy"):
        for x, y in (draw(function, (2, 3)), draw(function, (4, 2))):
            add(function, (x, y.astype(np.int32)), 1.0, "integer labels")

    for shape in CLASS_SHAPES:
        for weights_shape in right_shapes(shape[:-1]):
            for function in ("softmax_cross_entropy", "cosine_distance"):
                kind = next(KINDS)
                w, options = draw_weights(kind, weights_shape), {}
                arrays = draw(function, shape)
                if function == "cosine_distance":
                    arrays = [unit_vectors(shape, -1) for _ in arrays]
                    options = {"axis": len(shape) - 1}
                add(function, arrays, w, kind, **options)
    for shape in [(3, 4), (2, 3, 4), (2, 3, 2, 2)]:
        for axis in range(-len(shape), len(shape) - 1):
            kept = tuple(np.delete(shape, axis))
            arrays = [unit_vectors(shape, axis) for _ in range(2)]
            add("cosine_distance", arrays, draw_weights(next(KINDS), kept[:1]), axis=axis)

    for kind in ("positive", "some zero", "some negative", "zeros"):
        for weights_shape in [(), (4,), (4, 1)]:
            for labels_shape in [(4,), (4, 1)]:
                for dtype in (np.int32,) if kind == "zeros" else (np.int32, np.int64):
                    x, y = draw("sparse_softmax_cross_entropy", (4, 3))
                    arrays = x, y.reshape(labels_shape).astype(dtype)
                    w = draw_weights(kind, weights_shape)
                    add("sparse_softmax_cross_entropy", arrays, w, kind)

    for shape in SHAPES:
        for kind in ("positive", "some negative", "some zero"):
            for weights_shape in [(), shape[:1]]:
                arrays = draw("mean_pairwise_squared_error", shape)
                w = draw_weights(kind, weights_shape)
                why = None
                if (w == 0).any() and arrays[0][0].size > 1:
                    why = "the derivative for a weight of zero is the sample's loss, not 0"
                add("mean_pairwise_squared_error", arrays, w, kind, why)

    for smoothing in (0.1, 0.5, 0.9, 1.0):
        for shape in [(3, 4), (2, 3, 3), (2, 2, 3, 2), (1, 1)]:
            add(
                "sigmoid_cross_entropy",
                draw("sigmoid_cross_entropy", shape),
                draw_weights(next(KINDS), shape[:1]),
                "smoothing",
                label_smoothing=smoothing,
            )
        for shape in [(3, 4), (4, 2), (2, 3, 3), (2, 2, 3, 2), (3, 1)]:
            add(
                "softmax_cross_entropy",
                draw("softmax_cross_entropy", shape),
                draw_weights(next(KINDS), shape[:1]),
                "smoothing",
                label_smoothing=smoothing,
            )

    x = np.array([1e4, -1e4, 80.0, -80.0, 1e4, -1e4, 80.0, -80.0, 0.0, -0.0, 1e-30, -1e-30])
    y = np.array([1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0], np.float32)
    for w in (1.0, draw_weights("some negative", x.shape)):
        add("hinge_loss", (x, y), w, "extreme")
        add("sigmoid_cross_entropy", (x, y), w, "extreme")
        add("sigmoid_cross_entropy", (x, y), w, "extreme", label_smoothing=0.1)
    for one in (1e4, -1e4, 80.0, -80.0, 30.0, -30.0):
        for label in (0.0, 1.0):
            add("sigmoid_cross_entropy", ([one], [label]), 1.0, "extreme %g" % one)
    add("hinge_loss", ([1.0, -1.0, 1.0, -1.0], [1.0, 0.0, 0.0, 1.0]), 1.0, "kink")
    rows = [[1e4, -1e4, 0.0], [80.0, -80.0, 80.0], [-1e4, -1e4, -1e4], [1e4, 1e4 - 1, 1e4 - 2]]
    rows = np.array(rows)
    eye = np.eye(3, dtype=np.float32)
    for i, row in enumerate(rows):
        for label in range(3):
            note = "extreme row %d label %d" % (i, label)
            add("softmax_cross_entropy", ([row], [eye[label]]), 1.0, note)
            add("sparse_softmax_cross_entropy", ([row], np.array([label], np.int32)), 1.0, note)
    add("softmax_cross_entropy", (rows, np.eye(3, dtype=np.int32)[[0, 1, 2, 0]]), 1.0, "integers")
    add("softmax_cross_entropy", (rows, eye[[0, 1, 2, 0]]), 1.0, "extreme", label_smoothing=0.1)

    for epsilon in (1e-7, 1e-3, 0.1, 1.0):
        for p in (0.0, 1.0):
            for label in (0.0, 1.0, 0.5):
                note = "p=%g y=%g" % (p, label)
                add("log_loss", ([p], [label]), 1.0, note, epsilon=epsilon)
        add("log_loss", draw("log_loss", (3, 2)), [0.5, 0.0, 2.0], "epsilon", epsilon=epsilon)
    for p in (1e-7, 1e-4, 1 - 2.0**-20, 1 - 2.0**-12):
        add("log_loss", ([p, p], [0.0, 1.0]), [1.0, 0.5], "p=%.7g" % p)
    add("log_loss", ([0.5, 0.25], [1.0, 0.0]), 1.0, "no epsilon", epsilon=0.0)


def add_differing():
    """Cases where jaxlosses differs on purpose; ``why`` says what TensorFlow does wrong."""
    why = "the numerator broadcasts the weights, the count does not"
    losses = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for shape in [(1,), (1, 3), (1, 3, 4), (2, 1, 1), (2, 1, 4), (1, 1, 1)]:
        add("compute_weighted_loss", (losses,), np.ones(shape), "ones", why)
        for function in ELEMENTWISE:
            w = draw_weights("positive", shape)
            add(function, draw(function, (2, 3, 4)), w, "positive", why)
    for function in ("softmax_cross_entropy", "cosine_distance"):
        for shape in [(1,), (1, 3)]:
            options = {"axis": 2} if function == "cosine_distance" else {}
            w = draw_weights("positive", shape)
            add(function, draw(function, (2, 3, 4)), w, "positive", why, **options)
    arrays = draw("sparse_softmax_cross_entropy", (4, 3))
    add("sparse_softmax_cross_entropy", arrays, [0.75], "positive", why)

    why = "smoothing divides by shape[1], which above rank 2 is not the number of classes"
    for shape in [(2, 3, 4), (2, 2, 2, 3)]:
        for smoothing in (0.1, 0.9):
            arrays = draw("softmax_cross_entropy", shape)
            w = draw_weights("positive", shape[:1])
            note = "smoothing"
            add("softmax_cross_entropy", arrays, w, note, why, label_smoothing=smoothing)

    why = "zero times NaN or infinity is NaN, where a weight of zero means absent"
    w = [1.0, 0.0, 2.0]
    for bad in (np.nan, np.inf, -np.inf):
        add("compute_weighted_loss", ([1.0, bad, 3.0],), w, "absent %g" % bad, why)
        for function in ("absolute_difference", "mean_squared_error", "hinge_loss"):
            if (function, bad) != ("hinge_loss", np.inf):  # Its loss is 0.
                add(function, ([1.0, bad, 3.0], [0.0, 1.0, 1.0]), w, "absent %g" % bad, why)
    for function in ("absolute_difference", "mean_squared_error", "sigmoid_cross_entropy"):
        add(function, ([1.0, 2.0, 3.0], [0.0, np.nan, 1.0]), w, "absent label", why)
    add("log_loss", ([0.5, 2.0, 0.25], [0.0, 1.0, 1.0]), w, "absent impossible prediction", why)
    add("log_loss", ([0.5, -1.0, 0.25], [0.0, 1.0, 1.0]), w, "absent impossible prediction", why)
    rows = [[0.5, 0.0], [np.nan, 1.0], [0.25, -1.0]]
    ids, onehot = np.array([0, 1, 1], np.int32), np.eye(2)[[0, 1, 1]]
    add("softmax_cross_entropy", (rows, onehot), w, "absent logit", why)
    add("sparse_softmax_cross_entropy", (rows, ids), w, "absent logit", why)
    add("cosine_distance", (rows, onehot), w, "absent prediction", why, axis=1)
    add("mean_pairwise_squared_error", (rows, onehot), w, "absent prediction", why)

    why = "weights [B, 1] broadcast against losses [B] to [B, B], and count elements wrongly"
    for shape in [(2, 3), (3, 2, 2), (2, 3, 2, 2)]:
        arrays = draw("mean_pairwise_squared_error", shape)
        w = draw_weights("positive", (shape[0], 1))
        add("mean_pairwise_squared_error", arrays, w, "positive", why)
    why = "a difference of squares loses every digit when the mean difference is large"
    p = 4000 + np.array([[0.25, 0.5, 0.125, 0.75]])
    add("mean_pairwise_squared_error", (p, np.zeros((1, 4))), 1.0, "offset", why)

    why = "hinge_loss is neither reduced nor weighted"
    for shape in [(4,), (3, 2), (2, 3, 4)]:
        add("hinge_loss", draw("hinge_loss", shape), 1.0, "unreduced", why)
    why = "the mean is cast back to the integer dtype of the losses"
    add("compute_weighted_loss", (np.array([1, 2, 4], np.int32),), 1.0, "integers", why)
    why = "zero times minus infinity: a class that is ruled out costs nothing"
    rows = [[-np.inf, 0.5, 1.0], [0.25, -np.inf, 0.0]]
    add("softmax_cross_entropy", (rows, np.eye(3)[[1, 0]]), 1.0, "ruled out", why)
    why = "the graph optimizer reads 1 - p + epsilon as (1 + epsilon) - p, and 1 + epsilon rounds"
    for label in (0.0, 0.5):
        add("log_loss", ([1.0], [label]), 1.0, OPTIMIZED, why)
    add("log_loss", ([1 - 2.0**-20, 0.5], [0.0, 0.0]), 1.0, OPTIMIZED, why)


def loss_of(case, tensors):
    function, options = case["function"], dict(case["options"])
    inputs, weights = tensors[:-1], tensors[-1]
    if function == "hinge_loss":
        losses = contrib.hinge_loss(*inputs)
        return (
            losses
            if case["note"] == "unreduced"
            else contrib.compute_weighted_loss(losses, weights)
        )
    return getattr(contrib, function)(*inputs, weights=weights, **options)


def main():
    tf.compat.v1.logging.set_verbosity(tf.compat.v1.logging.ERROR)
    add_agreeing()
    add_differing()
    feeds, fetches = {}, []
    for case in CASES:
        assert all(array.size <= 24 for _, array in case["arrays"]), case
        tensors = [tf.compat.v1.placeholder(a.dtype, a.shape) for _, a in case["arrays"]]
        feeds.update(zip(tensors, (a for _, a in case["arrays"])))
        outputs = [("value", loss_of(case, tensors))]
        for (name, array), tensor in zip(case["arrays"], tensors):
            if array.dtype == np.float32 and name != "labels" and outputs[0][1].dtype == tf.float32:
                gradient = tf.gradients(outputs[0][1], tensor)[0]
                if gradient is not None:
                    outputs.append((name, gradient))
        fetches.append(dict(outputs))
    # Run the operations of TensorFlow's losses without the graph optimizer, which changes them.
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    with tf.compat.v1.Session(config=config) as session:
        results = session.run(fetches, feeds)
    with tf.compat.v1.Session() as session:
        for i, case in enumerate(CASES):
            if case["note"] == OPTIMIZED:
                results[i] = session.run(fetches[i], feeds)

    numbers = []
    for case, result in zip(CASES, results):
        arrays = case.pop("arrays")
        outputs = [(name, np.asarray(result[name])) for name in result]
        case["inputs"] = [[name, str(a.dtype), a.shape] for name, a in arrays]
        case["outputs"] = [[name, a.shape] for name, a in outputs]
        numbers += [np.ravel(a).astype(np.float32) for _, a in arrays + outputs]
    path = pathlib.Path(__file__).parent / "tensorflow.npz"
    cases = json.dumps(CASES).encode("utf-8")
    np.savez_compressed(
        str(path), cases=np.frombuffer(cases, np.uint8), numbers=np.concatenate(numbers)
    )
    print("%d cases, %d bytes" % (len(CASES), path.stat().st_size))


if __name__ == "__main__":
    main()
