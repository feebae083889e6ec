"""Learn rare classes by class weights, and see in confusion matrices what they change.

Of scikit-learn's handwritten digits, 0 is kept as often as it comes, and every further digit more
and more rarely, as in a collection where most things are rare. A classifier that minimises the
plain mean hardly learns the rare digits: they are a small part of the mean. Weights that are
inversely proportional to how often a class comes, with ``reduction="average"``, give every class
the same part. The batches differ in the sum of their weights, so the epoch's loss is added up
undivided. With many more epochs both classifiers know by heart what they learn from, and differ
less.

Run ``python examples/class_imbalance.py``; it takes a few seconds on two CPU cores.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import jaxlosses as jl

mpl.use("Agg")
import matplotlib.pyplot as plt

CLASSES, WIDTH, BATCH = 10, 64, 64
RAREST = 0.05  # Of 9, this part is kept; of 0, all.


def load() -> tuple[Any, Any]:
    """Images and digits to learn from, of which most are rare, and held-out ones, all as often."""
    images, digits = load_digits(return_X_y=True)
    images = np.asarray(images, np.float32) / 16
    split = train_test_split(images, digits, test_size=0.5, random_state=0, stratify=digits)
    train_images, test_images, train_digits, test_digits = split
    is_kept = np.zeros(len(train_digits), bool)
    for digit in range(CLASSES):
        rows = np.flatnonzero(train_digits == digit)
        is_kept[rows[: round(len(rows) * RAREST ** (digit / (CLASSES - 1)))]] = True
    return (train_images[is_kept], train_digits[is_kept]), (test_images, test_digits)


def init(key: Array) -> dict[str, Array]:
    """Parameters of two dense layers."""
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (64, WIDTH)) / 8,
        "first_bias": jnp.zeros(WIDTH),
        "second": jax.random.normal(second, (WIDTH, CLASSES)) / 8,
        "second_bias": jnp.zeros(CLASSES),
    }


def logits_of(params: dict[str, Array], images: Array) -> Array:
    """The logits ``[batch, classes]``."""
    hidden = jax.nn.relu(images @ params["first"] + params["first_bias"])
    return hidden @ params["second"] + params["second_bias"]


def loss_fn(params: dict[str, Array], batch: Any, class_weights: Array) -> jl.LossCollector:
    """The cross-entropy, in which a digit weighs as much as its class; its mean is undivided."""
    images, digits = batch
    weights = class_weights[digits]
    xent = jl.sparse_softmax_cross_entropy(
        logits_of(params, images), digits, weights, reduction="average_parts"
    )
    losses = jl.LossCollector().add_loss("cross_entropy", xent)
    return losses.regularize(params, {"first$|second$": jl.l2_regularizer(1e-4)})


def train(data: Any, class_weights: Array, epochs: int, **bar) -> tuple[Any, list[float]]:
    """Trained parameters, and the cross-entropy of each epoch."""
    images, digits = data
    params, optimizer = init(jax.random.key(0)), optax.adam(3e-3)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jl.LossCollector]:
        def total(params: Any) -> tuple[Array, jl.LossCollector]:
            losses = loss_fn(params, batch, class_weights)
            return losses.get_total_loss(), losses

        grads, losses = jax.grad(total, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, losses

    state, rng, history = optimizer.init(params), np.random.default_rng(0), []
    progress = trange(epochs, **bar)
    for _ in progress:
        order, epoch = rng.permutation(len(digits)), jl.LossCollector()
        for rows in np.array_split(order, -(-len(order) // BATCH)):
            params, state, losses = step(params, state, (images[rows], digits[rows]))
            epoch += losses  # Totals and sums of weights, so that the mean is that of the epoch.
        history.append(float(epoch.get_losses()["cross_entropy"]))
        progress.set_postfix(cross_entropy=f"{history[-1]:.4f}")
    return params, history


def confusion(params: Any, data: Any) -> np.ndarray:
    """How many of each held-out digit (rows) are taken for which digit (columns)."""
    images, digits = data
    guesses = np.asarray(jnp.argmax(logits_of(params, images), -1))
    return np.asarray(
        [np.bincount(guesses[digits == d], minlength=CLASSES) for d in range(CLASSES)]
    )


def draw(out: str, matrices: dict[str, np.ndarray], counts: np.ndarray) -> None:
    """Write the picture: how rare each digit is, and both confusion matrices."""
    figure, axes = plt.subplots(
        1, 3, figsize=(12.5, 4.8), layout="constrained", width_ratios=(1, 2, 2)
    )
    bars = axes[0].barh(np.arange(CLASSES), counts, color="tab:gray")
    axes[0].bar_label(bars, padding=2)
    axes[0].invert_yaxis()
    axes[0].set(title="Learned from", xlabel="examples", ylabel="digit", yticks=range(CLASSES))
    axes[0].set_xlim(0, counts.max() * 1.25)
    axes[0].spines[["top", "right"]].set_visible(False)
    for axis, (name, matrix) in zip(axes[1:], matrices.items(), strict=True):
        shares = matrix / matrix.sum(1, keepdims=True)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for true, guess in np.ndindex(matrix.shape):
            if matrix[true, guess]:
                color = "white" if shares[true, guess] > 0.5 else "black"
                label = str(matrix[true, guess])
                axis.text(guess, true, label, ha="center", va="center", color=color, fontsize=9)
        recall = np.mean(np.diag(shares))
        axis.set(title=f"{name}: {recall:.0%} right on held-out digits", xlabel="taken for")
        axis.set(ylabel="digit", xticks=range(CLASSES), yticks=range(CLASSES))
    figure.savefig(out, dpi=110)


def main() -> None:
    """Train without and with class weights, compare, draw."""
    parser = argparse.ArgumentParser(description="Learn rare classes by class weights.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", default="class_imbalance.png")
    options = parser.parse_args()

    data, held_out = load()
    counts = np.bincount(data[1], minlength=CLASSES)
    inverse = jnp.asarray(counts.mean() / counts, jnp.float32)
    runs = {"no weights": jnp.ones(CLASSES), "class weights": inverse}
    print(f"{'digit':16}" + "".join(f"{d:6}" for d in range(CLASSES)))
    print(f"{'learned from':16}" + "".join(f"{n:6}" for n in counts))
    matrices = {}
    for name, class_weights in runs.items():
        params, _ = train(data, class_weights, options.epochs, desc=name)
        matrices[name] = matrix = confusion(params, held_out)
        right = np.diag(matrix) / matrix.sum(1)
        print(f"{name:16}" + "".join(f"{r:6.0%}" for r in right) + f"   mean {right.mean():.1%}")
    draw(options.out, matrices, counts)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
