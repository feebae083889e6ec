"""Tune a language model on preferences (DPO): lines of code in their order, or reversed.

The small transformer of ``language_model.py`` first learns to predict Python's standard library.
Then it sees pairs: six lines as they are in a file, which are preferred, and the same lines from
the last one to the first. Both follow the same two lines, and as they have the same words, neither
length nor frequent words tell them apart. Direct preference optimization (Rafailov et al., 2023)
takes as the reward of some lines how much likelier they are to the model than before the tuning, in
nats and times a factor, and learns that the preferred lines have the larger one.

``linear_log_probs`` gives the log-probability of each token and the entropy of each prediction, and
never holds all logits. Each half of a row is one side of a pair, and its sum is over the tokens
that count: padding and the two lines that are given have weight zero. In the microbatches different
numbers of tokens count, and the mean of the entropy is still that of the whole batch.

Run ``python examples/preferences.py``; it takes two to three minutes on two CPU cores.
"""

import argparse
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from jax import Array
from language_model import BATCH, LanguageModel, Rows, Tokenizer, load, make_optimizer, pack
from language_model import step as language_step
from tqdm import trange

import jaxlosses as jl

mpl.use("Agg")
import matplotlib.pyplot as plt

LINE = re.compile(rb"(?:\A|\n\s*)[^\n]+")  # With the end of the line before, and its indentation.
GIVEN, LINES, SIZE = 2, 6, 96  # Lines that are given, lines that follow, and tokens of them all.
PAIRS, MICROBATCHES, HELD_OUT = 16, 2, 256
BETA = 0.1  # The reward of one nat.


class Pairs(NamedTuple):
    """Rows whose first half is preferred to the second one; both are ``SIZE`` tokens long."""

    rows: Rows  # Their labels are -1 at padding and in the given lines.
    before: Any  # [pairs, 2]: the log-probability of both halves before the tuning.


class Example(NamedTuple):
    """The text of a pair."""

    given: bytes
    preferred: bytes
    other: bytes


def make_pairs(
    texts: list[bytes], tokenizer: Tokenizer, rng: np.random.Generator, size: int
) -> tuple[Rows, list[Example]]:
    """At most ``size`` pairs of the texts; those that are too long are left out."""
    examples, tokens = [], np.zeros((size, 2, SIZE), np.int32)
    labels, positions = np.full_like(tokens, -1), np.zeros_like(tokens)
    for text in (texts[i] for i in rng.permutation(len(texts))):
        lines = LINE.findall(text)
        for i in range(0, len(lines) - GIVEN - LINES + 1, GIVEN + LINES):
            given, follow = lines[i : i + GIVEN], lines[i + GIVEN : i + GIVEN + LINES]
            example = Example(*map(b"".join, (given, follow, follow[::-1])))
            start = tokenizer.encode(example.given)
            halves = [start + tokenizer.encode(end)[1:] for end in example[1:]]
            if len(examples) == size or max(map(len, halves)) > SIZE + 1:
                continue
            for half, ids in enumerate(halves):
                place, end = (len(examples), half), len(ids) - 1
                tokens[place][:end], positions[place][:end] = ids[:-1], np.arange(end)
                labels[place][len(start) - 1 : end] = ids[len(start) :]
            examples.append(example)
    arrays = (x[: len(examples)].reshape(-1, 2 * SIZE) for x in (tokens, labels, positions))
    tokens, labels, positions = arrays
    return Rows(tokens, labels, labels >= 0, positions), examples


def score(graph: Any, params: Any, rows: Rows) -> tuple[Array, jl.LogProbs]:
    """The log-probability of both halves of each row, ``[rows, 2]``, and what it is the sum of."""
    hidden, kernel = nnx.merge(graph, params)(rows)
    log_probs = jl.linear_log_probs(hidden, kernel, rows.labels)
    add_up = functools.partial(jl.compute_weighted_loss, reduction="sum")
    halves = (x.reshape(-1, 2, SIZE) for x in (log_probs.label, rows.weights))
    return jax.vmap(jax.vmap(add_up))(*halves), log_probs


def collect(graph: Any, params: Any, pairs: Pairs) -> jl.LossCollector:
    """The loss of DPO, and what is measured; rows of padding, which have no weights, are absent."""
    log_p, log_probs = score(graph, params, pairs.rows)
    reward = BETA * (log_p - pairs.before)
    margin = reward[:, 0] - reward[:, 1]
    present = pairs.rows.weights.any(1)
    xent = jl.sigmoid_cross_entropy(margin, jnp.ones_like(margin), present, reduction="parts")
    losses = jl.LossCollector().add_loss("dpo", xent)
    measured = {
        "reward_is_larger": (jnp.sign(margin) + 1)
        / 2,  # Half where they are equal: at first, up to rounding.
        "is_likelier": log_p[:, 0] > log_p[:, 1],
        "reward/preferred": reward[:, 0],
        "reward/other": reward[:, 1],
        "margin": margin,
    }
    for name, values in measured.items():
        mean = jl.compute_weighted_loss(values, present, reduction="parts")
        losses = losses.add_metric(name, mean)
    entropy = jl.compute_weighted_loss(log_probs.entropy, pairs.rows.weights, reduction="parts")
    return losses.add_metric("entropy", entropy)


@functools.partial(jax.jit, static_argnums=0)
def with_scores(graph: Any, params: Any, rows: Rows) -> Pairs:
    """Pairs that know how likely they are to the model with these parameters."""
    return Pairs(rows, score(graph, params, rows)[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(graph: Any, optimizer: Any, params: Any, state: Any, pairs: Pairs) -> Any:
    """One step, by the gradient of the mean over all pairs of all microbatches."""
    loss_fn = functools.partial(collect, graph)
    (_, losses), grads = jl.accumulate_value_and_grad(loss_fn, MICROBATCHES)(params, pairs)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, losses


def draw(out: str, example: Example, steps: list[int], measured: dict[str, list[float]]) -> None:
    """Write the picture: a pair, how many held-out pairs are ranked right, and the rewards."""
    plt.rc("axes.spines", top=False, right=False)
    figure = plt.figure(figsize=(12, 4.6), layout="constrained")
    text, left, right = figure.subplots(1, 3, width_ratios=(3, 4, 4))
    text.axis("off")
    text.set_title("What comes next?", loc="left")
    colors, y = ("0.3", "tab:blue", "tab:red"), 0.97
    for head, part, color in zip(("given", "preferred", "reversed"), example, colors, strict=True):
        code = part.decode(errors="replace").strip("\n")
        text.text(0, y, head, color=color, weight="bold", va="top")
        text.text(0, y - 0.05, code, color=color, family="monospace", size=9, va="top")
        y -= 0.09 + 0.0385 * (code.count("\n") + 1)
    label = "by reward: how much likelier than before"
    left.plot(steps, measured["reward_is_larger"], "o-", color="tab:green", label=label)
    label = "by how likely the lines are"
    left.plot(steps, measured["is_likelier"], "o-", color="tab:purple", label=label)
    left.axhline(0.5, color="black", linestyle="--", label="chance")
    left.set(ylim=(0.3, 1), xlabel="step", title="Held-out pairs that are ranked right")
    left.yaxis.set_major_formatter("{x:.0%}")
    left.legend(frameon=False, loc="lower right")
    preferred, other = measured["reward/preferred"], measured["reward/other"]
    right.fill_between(steps, preferred, other, color="0.9", label="margin")
    right.plot(steps, preferred, "o-", color="tab:blue", label="preferred lines")
    right.plot(steps, other, "o-", color="tab:red", label="reversed lines")
    right.set(xlabel="step", title=f"Reward of held-out lines ({BETA} for each nat)")
    right.legend(frameon=False)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Learn the language, then the preference."""
    parser = argparse.ArgumentParser(description="Tune a language model on preferences.")
    parser.add_argument("--pretraining", type=int, default=150)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--out", default="preferences.png")
    options = parser.parse_args()

    texts, held_texts = load()
    tokenizer, rng = Tokenizer(texts, options.vocabulary), np.random.default_rng(0)
    packed = pack(texts, tokenizer)
    train, _ = make_pairs(texts, tokenizer, rng, PAIRS * options.steps)
    held, examples = make_pairs(held_texts, tokenizer, rng, HELD_OUT)
    print(f"{len(train.tokens):,} pairs to learn from, {len(examples)} of held-out files")

    graph, params = nnx.split(LanguageModel(len(tokenizer.words), nnx.Rngs(0)))
    optimizer = make_optimizer(3e-3, options.pretraining)
    state, progress = optimizer.init(params), trange(options.pretraining, desc="language")
    for _ in progress:
        batch = packed.take(rng.choice(len(packed.tokens), BATCH, replace=False))
        params, state, losses = language_step(graph, True, optimizer, params, state, batch)
        progress.set_postfix(bits_per_byte=f"{tokenizer.bits_per_byte(losses, batch.labels):.2f}")

    before, optimizer = params, make_optimizer(2e-4, options.steps)
    batches = [held.take(slice(i, i + 64)) for i in range(0, len(examples), 64)]
    batches = [with_scores(graph, before, jl.pad_batch(batch, 64)[0]) for batch in batches]
    evaluate = jax.jit(collect, static_argnums=0)
    state, steps, history = optimizer.init(params), [], []
    progress = trange(options.steps + 1, desc="preferences")
    for i in progress:
        if i % 20 == 0 or i == options.steps:
            losses: Any = sum(evaluate(graph, params, batch) for batch in batches)
            steps.append(i)
            history.append({name: float(x) for name, x in losses.to_dict().items()})
            progress.set_postfix(held_out=f"{history[-1]['reward_is_larger']:.1%}")
        if i < options.steps:
            rows = train.take(np.arange(i * PAIRS, (i + 1) * PAIRS) % len(train.tokens))
            pairs = with_scores(graph, before, rows)
            params, state, losses = step(graph, optimizer, params, state, pairs)

    first, last = history[0], history[-1]
    print(f"\n{'Held-out pairs':42}{'before':>8}{'after':>8}")
    for name, text, form in (
        ("is_likelier", "preferred lines are likelier", ".1%"),
        ("reward_is_larger", "preferred lines have the larger reward", ".1%"),
        ("margin", "margin of the reward", ".3f"),
        ("dpo", "loss", ".3f"),
        ("entropy", "entropy of a prediction, nats", ".3f"),
    ):
        print(f"{text:42}{first[name]:8{form}}{last[name]:8{form}}")
    # Short lines of a function are shown.
    longest = [max(map(len, b"".join(example).split(b"\n"))) for example in examples]
    longest = [n + 99 * (b"return" not in e.other) for n, e in zip(longest, examples, strict=True)]
    measured = {name: [values[name] for values in history] for name in first}
    draw(options.out, examples[int(np.argmin(longest))], steps, measured)
    print(f"\nWrote {options.out}")


if __name__ == "__main__":
    main()
