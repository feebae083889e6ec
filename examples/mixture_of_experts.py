"""Keep the experts of a mixture busy, with losses that the layers themselves sow.

A small Switch Transformer reads scikit-learn's handwritten digits as 16 patches of 2 by 2 pixels.
In each of its mixture layers a router sends every patch to one of eight experts. Left alone, the
router comes to favour a few of them; so every layer sows a load-balance loss and a router z-loss,
deep inside of the model, and the training step collects them by name. The same model is trained
with and without the load-balance loss.

Run ``python examples/mixture_of_experts.py``; it takes about a minute on two CPU cores.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import sklearn.datasets
import sklearn.model_selection
from flax import nnx
from tqdm import trange

import jaxlosses as jl
import jaxlosses.flax as jlf

mpl.use("Agg")
import matplotlib.pyplot as plt

EXPERTS, LAYERS, WIDTH, HIDDEN, BATCH = 8, 2, 32, 32, 128
BALANCE, ROUTER_Z, DECAY = 1e-2, 1e-3, 1e-4  # Coefficients; the first two are the papers'.
EXPECTED = [f"layers/{i}/moe/{name}" for i in range(LAYERS) for name in ("load_balance", "router_z")]


class MixtureOfExperts(nnx.Module):
    """A layer of experts, one of which each token is sent to."""

    def __init__(self, balance: float, rngs: nnx.Rngs):
        self.balance = balance
        self.router = nnx.Linear(WIDTH, EXPERTS, use_bias=False, rngs=rngs)
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.up_kernel = nnx.Param(init(rngs.params(), (EXPERTS, WIDTH, HIDDEN)))
        self.down_kernel = nnx.Param(init(rngs.params(), (EXPERTS, HIDDEN, WIDTH)))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map ``[batch, tokens, width]`` to the same, and the choices ``[..., experts]``."""
        logits = self.router(x)
        probabilities = jax.nn.softmax(logits)
        chosen = jax.nn.one_hot(jnp.argmax(logits, -1), EXPERTS)
        fractions = chosen.mean((0, 1))
        # One loss per token, whose mean is experts * sum(fraction * mean probability).
        jlf.sow_loss(self, "load_balance", self.balance * EXPERTS * probabilities @ fractions)
        jlf.sow_loss(self, "router_z", ROUTER_Z * jnp.square(jax.nn.logsumexp(logits, -1)))
        hidden = nnx.relu(jnp.einsum("btw,ewh->bteh", x, self.up_kernel[...]))
        gated = hidden * (chosen * probabilities)[..., None]
        return jnp.einsum("bteh,ehw->btw", gated, self.down_kernel[...]), chosen


class Layer(nnx.Module):
    """Attention between the tokens, then experts for each, both residual."""

    def __init__(self, balance: float, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.moe = MixtureOfExperts(balance, rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As the mixture."""
        x = x + self.attention(self.norms[0](x))
        update, chosen = self.moe(self.norms[1](x))
        return x + update, chosen


class Classifier(nnx.Module):
    """A Switch Transformer for images of 8 by 8 pixels."""

    def __init__(self, balance: float, rngs: nnx.Rngs):
        self.embed = nnx.Linear(4, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.5 * rngs.params.normal((16, WIDTH)))
        self.layers = nnx.List([Layer(balance, rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits, and choices ``[layers, batch, tokens, experts]``."""
        patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x, choices = self.embed(patches) + self.position[...], []
        for layer in self.layers:
            x, chosen = layer(x)
            choices.append(chosen)
        return self.head(x.mean(1)), jnp.stack(choices)


def forward(
    model: Classifier, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jl.LossCollector]:
    """Logits, choices, and every loss by name."""
    (logits, choices), losses = jlf.capture(model, expected=EXPECTED)(images)
    xent = jl.sparse_softmax_cross_entropy(logits, labels, reduction="parts")
    losses = losses.add_loss("cross_entropy", xent)
    losses = losses.regularize(nnx.state(model, nnx.Param), {"kernel$": jl.l2_regularizer(DECAY)})
    return logits, choices, losses


@nnx.jit
def step(
    model: Classifier, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jl.LossCollector:
    """Update the model; return the losses."""
    print("TRACE")
    def total(model: Classifier) -> tuple[jax.Array, jl.LossCollector]:
        *_, losses = forward(model, images, labels)
        return losses.get_total_loss(), losses

    grads, losses = nnx.grad(total, has_aux=True)(model)
    optimizer.update(model, grads)
    return losses


@nnx.jit
def evaluate(
    model: Classifier, images: jax.Array, labels: jax.Array
) -> tuple[jl.LossCollector, jl.LossCollector]:
    logits, choices, losses = forward(model, images, labels)
    load = jl.WeightedMean(choices.sum((1, 2)), jnp.full((LAYERS, EXPERTS), choices[0, ..., 0].size))
    metrics = jl.LossCollector().add_loss("accuracy", logits.argmax(-1) == labels)
    return losses, metrics.add_loss("load", load)


def main():
    import sys, time
    ap = argparse.ArgumentParser()
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--steps", type=int, default=300)
    ap.add_argument("--seed", type=int, default=0)
    o = ap.parse_args()
    digits = sklearn.datasets.load_digits()
    split = sklearn.model_selection.train_test_split(
        (digits.images / 16).astype(np.float32), digits.target.astype(np.int32), test_size=360, random_state=0, stratify=digits.target)
    xtr, xte, ytr, yte = split
    for balance in (BALANCE, 0.0):
        t = time.time()
        model = Classifier(balance, nnx.Rngs(o.seed))
        opt = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(o.lr, o.steps)), wrt=nnx.Param)
        rng = np.random.default_rng(0)
        for i in range(o.steps):
            r = rng.choice(len(xtr), BATCH, replace=False)
            losses = step(model, opt, xtr[r], ytr[r])
        parts = [evaluate(model, xte[i:i+BATCH], yte[i:i+BATCH]) for i in range(0, 360, BATCH)]
        losses, metrics = map(sum, zip(*parts))
        m = metrics.get_losses()
        print(balance, time.time() - t, m["accuracy"]); print(np.round(m["load"], 3)); print(losses)
main()
