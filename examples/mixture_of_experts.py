"""Make a mixture of experts use all experts, by losses that its layers sow.

A small Switch Transformer reads scikit-learn's handwritten digits row by row. In each layer a
router sends every row of pixels to one of 16 experts. At first it prefers a few of them, and
without a loss against it, some experts are never used. So each layer sows a load-balance loss and a
router z-loss, deep inside of the model where they are known. The training step collects them by
name and adds its own losses. The model is trained without and with the load-balance loss.

Run ``python examples/mixture_of_experts.py``; it takes about half a minute on two CPU cores.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import jaxlosses as jl
import jaxlosses.flax as jlf

mpl.use("Agg")
import matplotlib.pyplot as plt

EXPERTS, LAYERS, WIDTH, ROWS = 16, 2, 32, 8
BATCH, HELD_OUT = 64, 360  # The last batch of the held-out digits has 40 rows.
BALANCE, ROUTER_Z, DECAY = 0.05, 1e-3, 1e-4  # The coefficients of the losses.
SOWN = [f"layers/{i}/{name}" for i in range(LAYERS) for name in ("load_balance", "router_z")]
KINDS = {"cross_entropy": "black", "load_balance": "C0", "router_z": "C2", "kernel$": "C4"}


class Layer(nnx.Module):
    """Attention between the tokens, and then for each token the expert that its router chooses."""

    def __init__(self, balance: float, rngs: nnx.Rngs):
        self.balance = balance
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.router = nnx.Linear(WIDTH, EXPERTS, use_bias=False, rngs=rngs)
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.up_kernel = nnx.Param(init(rngs.params(), (EXPERTS, WIDTH, WIDTH)))
        self.down_kernel = nnx.Param(init(rngs.params(), (EXPERTS, WIDTH, WIDTH)))

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Map ``[batch, tokens, width]`` to new ones, and to the choices, ``[..., experts]``."""
        x = x + self.attention(self.norms[0](x))
        y = self.norms[1](x)
        logits = self.router(y)
        probabilities = jax.nn.softmax(logits)
        chosen = jax.nn.one_hot(jnp.argmax(logits, -1), EXPERTS)
        # A loss for each token; their mean is experts * sum(fraction * mean probability).
        balance = EXPERTS * probabilities @ chosen.mean((0, 1))
        jlf.sow_loss(self, "load_balance", self.balance * balance)
        jlf.sow_loss(self, "router_z", ROUTER_Z * jax.nn.logsumexp(logits, -1) ** 2)
        # The experts are small, so all of them compute, and the choice selects one result.
        hidden = nnx.relu(jnp.einsum("btw,ewh->bteh", y, self.up_kernel[...]))
        gated = hidden * (chosen * probabilities)[..., None]
        return x + jnp.einsum("bteh,ehw->btw", gated, self.down_kernel[...]), chosen


class Classifier(nnx.Module):
    """A transformer whose tokens are the rows of an image."""

    def __init__(self, balance: float, rngs: nnx.Rngs):
        self.embed = nnx.Linear(ROWS, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.02 * rngs.params.normal((ROWS, WIDTH)))
        self.layers = nnx.List([Layer(balance, rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """The logits, and the choices, ``[layers, batch, tokens, experts]``."""
        x, choices = self.embed(images) + self.position[...], []
        for layer in self.layers:
            x, chosen = layer(x)
            choices.append(chosen)
        return self.head(x.mean(1)), jnp.stack(choices)


def run(model: Classifier, images: Array, labels: Array) -> tuple[jl.LossCollector, Any]:
    """The losses with the accuracy, and the share of tokens of each expert in each layer."""
    (logits, choices), losses = jlf.capture(model, expected=SOWN)(images)
    cross_entropy = jl.sparse_softmax_cross_entropy(logits, labels, reduction="parts")
    losses = losses.add_loss("cross_entropy", cross_entropy)
    losses = losses.regularize(nnx.state(model, nnx.Param), {r"kernel$": jl.l2_regularizer(DECAY)})
    tokens = jnp.full((LAYERS, EXPERTS), labels.size * ROWS)
    losses = losses.add_metric("accuracy", jnp.argmax(logits, -1) == labels)
    return losses, jl.WeightedMean(choices.sum((1, 2)), tokens)


@nnx.jit
def step(model: Classifier, optimizer: nnx.Optimizer, images: Array, labels: Array) -> Any:
    """One step down the gradient of the total loss; returns the losses."""

    def total(model: Classifier) -> tuple[Array, jl.LossCollector]:
        losses, _ = run(model, images, labels)
        return losses.get_total_loss(), losses

    grads, losses = nnx.grad(total, has_aux=True)(model)
    optimizer.update(model, grads)
    return losses


def train(balance: float, images: Array, labels: Array, steps: int, **bar) -> tuple[Any, dict]:
    """A trained model, and the history of each kind of loss, summed over the layers."""
    model = Classifier(balance, nnx.Rngs(0))
    schedule = optax.cosine_decay_schedule(3e-3, max(steps, 1))
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    rng, history = np.random.default_rng(0), {}
    progress = trange(steps, **bar)
    for _ in progress:
        batch = rng.choice(len(images), BATCH, replace=False)
        losses = step(model, optimizer, images[batch], labels[batch]).to_dict()
        for kind in KINDS:
            value = sum(float(loss) for name, loss in losses.items() if name.endswith(kind))
            history.setdefault(kind, []).append(value)
        progress.set_postfix({kind: f"{values[-1]:.3f}" for kind, values in history.items()})
    return model, history


def evaluate(model: Classifier, images: Array, labels: Array) -> tuple[jl.LossCollector, Any]:
    """What ``run`` gives, of all batches, also of the last one, which is smaller."""
    batches = [slice(i, i + BATCH) for i in range(0, len(images), BATCH)]
    jitted = nnx.jit(run)
    # Totals and counts add up, so these means are exact. (Except for the load balance, which is a
    # product of two means of a batch, and so depends on how the data is cut into batches.)
    parts = [jitted(model, images[batch], labels[batch]) for batch in batches]
    losses, loads = zip(*parts, strict=True)
    return sum(losses, jl.LossCollector()), sum(loads)


def report(metrics: dict[str, dict[str, Array]]) -> None:
    """Print the accuracy, and how evenly each layer uses its experts."""
    print(f"\n{'load-balance loss':18}{'accuracy':>9}{'layer':>7}{'busiest':>9}{'under 1%':>10}")
    for title, values in metrics.items():
        accuracy, loads = float(values["accuracy"]), np.asarray(values["load"])
        for i, load in enumerate(loads):
            idle = f"{np.sum(load < 0.01)} of {EXPERTS}"
            print(f"{title:18}{accuracy:9.1%}{i:7}{load.max():9.1%}{idle:>10}")


def draw(out: str, metrics: dict[str, dict[str, Array]], histories: dict[str, dict]) -> None:
    """Write the picture: how many tokens each expert gets, and the losses during training."""
    figure = plt.figure(figsize=(11, 7.6), layout="constrained")
    grid, places = figure.add_gridspec(2, LAYERS, hspace=0.06), np.arange(1, EXPERTS + 1)
    top = 105 * max(float(values["load"].max()) for values in metrics.values())
    for i in range(LAYERS):
        panel = figure.add_subplot(grid[0, i])
        for title, shift, colour in (("without", -0.2, "tab:red"), ("with", 0.2, "tab:blue")):
            share = 100 * np.sort(metrics[title]["load"][i])[::-1]
            panel.bar(places + shift, share, 0.4, color=colour, label=f"{title} load-balance loss")
        panel.axhline(100 / EXPERTS, color="black", linestyle="--", label=f"fair: 1/{EXPERTS}")
        panel.set(title=f"Layer {i}", xlabel="expert, busiest first", xticks=places, ylim=(0, top))
        panel.set_ylabel("% of the held-out rows")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    curves = figure.add_subplot(grid[1, :])
    for title, style in (("without", ":"), ("with", "-")):
        for kind, values in histories[title].items():
            window = max(1, len(values) // 20)
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            steps, label = np.arange(len(smooth)) + window, kind if title == "with" else None
            curves.plot(steps, smooth, style, color=KINDS[kind], label=label)
    curves.set(yscale="log", xlabel="step", ylabel="loss, running mean")
    curves.set_title("Losses, summed over the layers (dotted: without the load-balance loss)")
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False, ncols=2)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Train without and with the load-balance loss, compare, draw."""
    parser = argparse.ArgumentParser(description="Keep a mixture of experts busy.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default="mixture_of_experts.png")
    options = parser.parse_args()

    pixels, digits = load_digits(return_X_y=True)
    images = np.reshape(pixels, (-1, ROWS, ROWS)) / 16
    split = train_test_split(images, digits, test_size=HELD_OUT, random_state=0)
    images, held_images, labels, held_labels = map(jnp.asarray, split)
    metrics, histories = {}, {}
    for title, balance in (("without", 0.0), ("with", BALANCE)):
        model, histories[title] = train(balance, images, labels, options.steps, desc=title)
        losses, load = evaluate(model, held_images, held_labels)
        metrics[title] = {**losses.get_metrics(), "load": load.value}
    print(f"\nHeld-out losses of the model with the load-balance loss\n{losses}")
    report(metrics)
    draw(options.out, metrics, histories)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
