"""Learn a reward from preferences, of which some are wrong and some are missing.

A judge sees two of scikit-learn's handwritten digits, and prefers the one that is the larger
number. One judgement in five is wrong, and three pairs in ten were never judged: their preference
is NaN, and their weight is zero. The model learns a reward for each image, so that the probability
of a preference is the sigmoid of the difference of the two rewards (Bradley and Terry, 1952). It
never sees which number an image shows. A step takes its pairs in microbatches, in which different
numbers of pairs were judged, and its gradient is still that of the mean over all judged pairs.

Run ``python examples/preferences.py``; it takes a few seconds on two CPU cores.
"""

import argparse
from typing import Any, NamedTuple

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

WRONG, MISSING = 0.2, 0.3  # Parts of the judgements that are wrong, and of the pairs without one.
PAIRS, MICROBATCHES, WIDTH = 64, 4, 64


class Pairs(NamedTuple):
    """Images ``[pairs, 64]``, and the preference: 1 for the first, 0 for the second, or NaN."""

    first: Any
    second: Any
    preferred: Any


def load() -> tuple[Any, Any]:
    """Images and digits to learn from, and held-out ones."""
    images, digits = load_digits(return_X_y=True)
    images = np.asarray(images, np.float32) / 16
    split = train_test_split(images, digits, test_size=0.3, random_state=0, stratify=digits)
    return (split[0], split[2]), (split[1], split[3])


def judge(rng: np.random.Generator, data: Any, size: int, wrong: float, missing: float) -> Pairs:
    """Pairs of images of different digits, and what the judge says."""
    images, digits = data
    rows = rng.integers(0, len(digits), (2, 2 * size))
    first, second = rows[:, digits[rows[0]] != digits[rows[1]]][:, :size]
    is_larger = digits[first] > digits[second]
    says = np.where(rng.random(len(first)) < wrong, ~is_larger, is_larger).astype(np.float32)
    says[rng.random(len(first)) < missing] = np.nan
    return Pairs(images[first], images[second], says)


def reward(params: dict[str, Array], images: Array) -> Array:
    """One number for each image."""
    hidden = jax.nn.relu(images @ params["first"] + params["bias"])
    return (hidden @ params["second"])[..., 0]


def loss_fn(params: dict[str, Array], pairs: Pairs) -> jl.LossCollector:
    """The loss of the preferences that are known, and how many of them the rewards agree with."""
    margin = reward(params, pairs.first) - reward(params, pairs.second)
    is_known = jnp.isfinite(pairs.preferred)
    xent = jl.sigmoid_cross_entropy(margin, pairs.preferred, is_known, reduction="parts")
    agrees = (margin > 0) == (pairs.preferred > 0.5)
    agreement = jl.compute_weighted_loss(agrees, is_known, reduction="parts")
    losses = jl.LossCollector().add_loss("preference", xent).add_metric("agreement", agreement)
    return losses.regularize(params, {"first|second": jl.l2_regularizer(1e-4)})


def train(data: Any, held_out: Pairs, steps: int) -> tuple[Any, list[float], list[float]]:
    """Trained parameters, and in each step the agreement with judgements and with the truth."""
    first, second = jax.random.split(jax.random.key(0))
    params = {
        "first": jax.random.normal(first, (64, WIDTH)) / 8,
        "bias": jnp.zeros(WIDTH),
        "second": jax.random.normal(second, (WIDTH, 1)) / 8,
    }
    optimizer = optax.adam(3e-3)
    accumulate = jl.accumulate_value_and_grad(loss_fn, MICROBATCHES)

    @jax.jit
    def step(params: Any, state: Any, pairs: Pairs) -> tuple[Any, Any, jl.LossCollector]:
        (_, losses), grads = accumulate(params, pairs)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, losses

    state, rng, learned, right = optimizer.init(params), np.random.default_rng(0), [], []
    evaluate = jax.jit(loss_fn)
    progress = trange(steps)
    for _ in progress:
        params, state, losses = step(params, state, judge(rng, data, PAIRS, WRONG, MISSING))
        learned.append(float(losses.get_metrics()["agreement"]))
        right.append(float(evaluate(params, held_out).get_metrics()["agreement"]))
        progress.set_postfix(agreement=f"{learned[-1]:.2f}", held_out=f"{right[-1]:.2f}")
    return params, learned, right


def draw(out: str, rewards: np.ndarray, digits: np.ndarray, learned: Any, right: Any) -> None:
    """Write the picture: the reward of each held-out image by its digit, and the agreement."""
    plt.rc("axes.spines", top=False, right=False)
    figure, (left, middle) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    groups = [rewards[digits == d] for d in range(10)]
    boxes = left.boxplot(groups, tick_labels=range(10), patch_artist=True, widths=0.7)
    for i, box in enumerate(boxes["boxes"]):
        box.set_facecolor(mpl.colormaps["viridis"](i / 9))
    left.set(xlabel="digit, which the model never sees", ylabel="learned reward")
    left.set_title("Reward of held-out images")
    size = min(25, len(learned))
    mean = np.convolve(learned, np.ones(size) / size, "valid")
    steps = np.arange(1, len(right) + 1)
    middle.plot(steps, right, color="tab:blue", label="held-out pairs, ranked right")
    middle.plot(
        steps[-len(mean) :], mean, color="tab:orange", label="pairs learned from, as judged"
    )
    middle.axhline(1 - WRONG, color="black", linestyle="--", label="judgements that are right")
    middle.set(ylim=(0.4, 1), xlabel="step", ylabel="share of pairs", title="Agreement")
    middle.legend(frameon=False, loc="lower right")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Train, evaluate, draw."""
    parser = argparse.ArgumentParser(description="Learn a reward from preferences.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default="preferences.png")
    options = parser.parse_args()

    data, held_data = load()
    held_out = judge(np.random.default_rng(1), held_data, 2000, wrong=0, missing=0)
    params, learned, right = train(data, held_out, options.steps)
    rewards = np.asarray(reward(params, held_data[0]))
    print(f"\n{MISSING:.0%} of the pairs were not judged, {WRONG:.0%} of the judgements are wrong.")
    print(f"Held-out pairs that are ranked right: {right[-1]:.1%}\n\ndigit  mean reward")
    for digit in range(10):
        print(f"{digit:5}{rewards[held_data[1] == digit].mean():13.2f}")
    draw(options.out, rewards, held_data[1], learned, right)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
