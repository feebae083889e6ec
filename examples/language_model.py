"""Learn to write Python from the standard library, with a vocabulary of tens of thousands.

A small causal transformer learns from the source code that comes with every Python. Several
definitions are packed into a row, and the padding has weight zero. With a vocabulary of 32,768, the
logits would be by far the largest array of a training step. ``linear_log_probs`` takes the last
hidden layer and the kernel instead, and never holds all logits; cross-entropy, z-loss, entropy and
accuracy are made of its results. Its memory is compared with that of a loss of logits, and the
model is compared, on files that are held out, with a unigram model, which knows only how frequent
each token is.

Run ``python examples/language_model.py``; it takes about four minutes on two CPU cores.
"""

import argparse
import collections
import functools
import math
import re
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from jax import Array
from tqdm import trange

import jaxlosses as jl

mpl.use("Agg")
import matplotlib.pyplot as plt

SKIPPED = {"test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data"}
DEFINITION = re.compile(rb"(?<=\n\n)(?=\S)")  # After a blank line, and not indented.
WORD = re.compile(rb"[ .(]?_*[A-Za-z]+(?:__\b)?|_+|\d|\n\s*| ?[^\w\s]+ ?|\s+|.", re.DOTALL)
LENGTH, BATCH, MICROBATCHES, WIDTH, LAYERS = 256, 4, 2, 128, 3
Z_LOSS = 1e-4  # How strongly the logits are kept from drifting.


class Tokenizer:
    """Tokens are the most frequent words and all bytes, so any text has some; 0 begins a text."""

    def __init__(self, texts: list[bytes], size: int):
        counts = collections.Counter(word for text in texts for word in WORD.findall(text))
        frequent = sorted((word for word in counts if len(word) > 1), key=lambda w: (-counts[w], w))
        self.words = [b"", *(bytes([byte]) for byte in range(256)), *frequent][:size]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: bytes) -> list[int]:
        """Token ids; a word that is no token is split into its longest beginning and the rest."""
        ids = [0]
        for word in WORD.findall(text):
            while word:
                known = next(n for n in range(len(word), 0, -1) if word[:n] in self.ids)
                ids.append(self.ids[word[:known]])
                word = word[known:]
        return ids

    def bits_per_byte(self, losses: jl.LossCollector, labels: Any) -> float:
        """The total loss in bits, divided by the number of bytes that the labels stand for."""
        nats: Any = losses.losses["cross_entropy"].total
        return float(nats) / math.log(2) / sum(len(self.words[i]) for i in labels[labels >= 0])


class Rows(NamedTuple):
    """Definitions packed into rows; all arrays are ``[rows, LENGTH]``."""

    tokens: Any
    labels: Any  # The next token; -1, which is not a token, at padding.
    weights: Any  # False at padding.
    positions: Any  # The position in the token's definition; 0 at padding.

    def take(self, rows: Any) -> "Rows":
        """Some of the rows."""
        return Rows(*(array[rows] for array in self))


def load() -> tuple[list[bytes], list[bytes]]:
    """The definitions in the files to learn from, and in every 25th file, which is held out."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(library) for path in library.rglob("*.py"))
    paths = [library / path for path in paths if not SKIPPED.intersection(path.parts)]
    texts, held_out = [], []
    for i, path in enumerate(paths):
        (texts if i % 25 else held_out).extend(DEFINITION.split(path.read_bytes()))
    return texts, held_out


def pack(texts: list[bytes], tokenizer: Tokenizer) -> Rows:
    """Cut definitions that are longer than a row, and put each piece in the first row with room."""
    streams = map(tokenizer.encode, texts)
    pieces = [s[i : i + LENGTH + 1] for s in streams for i in range(0, len(s) - 1, LENGTH)]
    room = np.full(len(pieces), LENGTH)
    tokens, positions = np.zeros((2, room.size, LENGTH), np.int32)
    labels = np.full_like(tokens, -1)
    for piece in pieces:
        size = len(piece) - 1
        row = np.argmax(room >= size)
        place = row, slice(LENGTH - room[row], LENGTH - room[row] + size)
        tokens[place], labels[place], positions[place] = piece[:-1], piece[1:], np.arange(size)
        room[row] -= size
    return Rows(tokens, labels, labels >= 0, positions).take(room < LENGTH)


class LanguageModel(nnx.Module):
    """A transformer that returns the two factors of its logits, ``hidden @ kernel``."""

    def __init__(self, size: int, rngs: nnx.Rngs):
        normal, zeros = nnx.initializers.normal(0.02), nnx.initializers.zeros
        self.embed = nnx.Embed(size, WIDTH, embedding_init=normal, rngs=rngs)
        self.position = nnx.Embed(LENGTH, WIDTH, embedding_init=normal, rngs=rngs)
        self.shifts, self.norms = nnx.List(), nnx.List()
        self.attention, self.dense = nnx.List(), nnx.List()
        options = {"decode": False, "out_kernel_init": zeros, "rngs": rngs}
        for _ in range(LAYERS):
            self.shifts.append(nnx.Linear(WIDTH, WIDTH, kernel_init=zeros, rngs=rngs))
            self.norms.append(nnx.RMSNorm(WIDTH, rngs=rngs))
            self.attention.append(nnx.MultiHeadAttention(4, WIDTH, **options))
            norm, up = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
            down = nnx.Linear(4 * WIDTH, WIDTH, kernel_init=zeros, rngs=rngs)
            self.dense.append(nnx.Sequential(norm, up, nnx.gelu, down))
        self.kernel = nnx.Param(normal(rngs.params(), (WIDTH, size)))
        self.last_norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, rows: Rows) -> tuple[Array, Array]:
        """``hidden`` is ``[batch, length, width]``, and ``kernel`` is ``[width, vocabulary]``."""
        definition = jnp.cumsum(rows.positions == 0, axis=1)  # Its number within the row.
        same = definition[:, :, None] == definition[:, None, :]
        mask = same & jnp.tri(rows.tokens.shape[1], dtype=bool)
        x = math.sqrt(WIDTH) * self.embed(rows.tokens) + self.position(rows.positions)
        layers = zip(self.shifts, self.norms, self.attention, self.dense, strict=True)
        for shift, norm, attention, dense in layers:
            # The token before is given directly; attention would take long to learn to find it.
            x = x + shift(jnp.where(rows.positions[..., None] > 0, jnp.roll(norm(x), 1, 1), 0))
            x = x + attention(norm(x), mask=mask[:, None])
            x = x + dense(x)
        return self.last_norm(x), self.kernel[...]


def collect(graph: Any, fused: bool, params: Any, rows: Rows) -> jl.LossCollector:
    """What is learned, as undivided means: cross-entropy and z-loss, each under its name."""
    hidden, kernel = nnx.merge(graph, params)(rows)
    if fused:
        log_probs = jl.linear_log_probs(hidden, kernel, rows.labels)
        log_p, log_partition = log_probs.label, log_probs.log_partition
    else:
        logits = hidden @ kernel
        log_partition = jax.nn.logsumexp(logits, -1)
        label_logit = jnp.take_along_axis(logits, rows.labels[..., None], -1)[..., 0]
        log_p = label_logit - log_partition
    mean = functools.partial(jl.compute_weighted_loss, weights=rows.weights, reduction="parts")
    losses = jl.LossCollector().add_loss("cross_entropy", mean(-log_p))
    return losses.add_loss("z_loss", mean(Z_LOSS * jnp.square(log_partition)))


@functools.partial(jax.jit, static_argnums=0)
def evaluate(graph: Any, params: Any, rows: Rows) -> jl.LossCollector:
    """What is measured, all from one pass over the logits, as undivided means."""
    hidden, kernel = nnx.merge(graph, params)(rows)
    log_probs = jl.linear_log_probs(hidden, kernel, rows.labels)
    measured = {
        "cross_entropy": -log_probs.label,
        "entropy": log_probs.entropy,
        "accuracy": log_probs.is_top,
    }
    losses = jl.LossCollector()
    for name, values in measured.items():
        mean = jl.compute_weighted_loss(values, rows.weights, reduction="parts")
        losses = losses.add_loss(name, mean)
    return losses


def make_optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW whose rate rises for a tenth of the steps and then falls to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 10 + 1, steps + 1)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def step(graph: Any, fused: bool, optimizer: Any, params: Any, state: Any, rows: Rows) -> Any:
    """One step, by a gradient that is exact though microbatches have different padding."""
    loss_fn = functools.partial(collect, graph, fused)
    (_, losses), grads = jl.accumulate_value_and_grad(loss_fn, MICROBATCHES)(params, rows)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, losses


@nnx.jit
def write(model: LanguageModel, tokens: Any, start: Any, key: Array) -> Array:
    """Continue ``tokens[:start]``, one token after the other, by samples of the model."""

    def add(i: Array, tokens: Array) -> Array:
        row = tokens[None]
        hidden, kernel = model(Rows(row, row, row, jnp.arange(LENGTH)[None]))
        logits = hidden[0, i - 1] @ kernel / 0.7  # The temperature.
        return tokens.at[i].set(jax.random.categorical(jax.random.fold_in(key, i), logits))

    return jax.lax.fori_loop(start, LENGTH, add, tokens)


def draw(out: str, learned: list, held: list, unigram: float, memory: dict[str, float]) -> None:
    """Write the picture: bits per byte during training, and the memory of a step."""
    plt.rc("axes.spines", top=False, right=False)
    figure = plt.figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5, 2))
    left.plot(np.arange(len(learned)) + 1, learned, color="0.8", label="batches learned from")
    left.plot(*zip(*held, strict=True), "o-", label="held-out files")
    left.axhline(unigram, color="black", linestyle="--", label="held-out files, unigram model")
    left.set(xlabel="step", ylabel="bits per byte", title="How well Python is predicted")
    left.legend(frameon=False)
    bars = right.bar(list(memory), list(memory.values()), 0.6, color=["tab:blue", "tab:red"])
    right.bar_label(bars, fmt="{:,.0f}")
    right.set(ylabel="MB of temporaries", title="Memory of a training step")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description="Learn to write Python.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--out", default="language_model.png")
    options = parser.parse_args()

    texts, held_texts = load()
    tokenizer = Tokenizer(texts, options.vocabulary)
    train, held, size = pack(texts, tokenizer), pack(held_texts, tokenizer), len(tokenizer.words)
    print(f"{train.weights.sum():,} tokens, {size:,} kinds, {1 - train.weights.mean():.2%} padding")
    graph, params = nnx.split(LanguageModel(size, nnx.Rngs(0)))
    steps, optimizer = options.steps, make_optimizer(3e-3, options.steps)
    state, rng = optimizer.init(params), np.random.default_rng(0)
    arguments = optimizer, params, state, train.take(slice(BATCH))
    fused, of_logits = (step.lower(graph, f, *arguments).compile() for f in (True, False))
    programs: dict[str, Any] = {"fused loss": fused, "loss of logits": of_logits}
    memory = {n: p.memory_analysis().temp_size_in_bytes / 1e6 for n, p in programs.items()}

    batches = [held.take(slice(i, i + BATCH)) for i in range(0, len(held.tokens), BATCH)]
    batches = [jl.pad_batch(batch, BATCH)[0] for batch in batches]  # The weights become 0.
    collected: Any = None
    learned, held_out, progress = [], [(0, math.nan)], trange(1, steps + 1)
    for i in progress:
        batch = train.take(rng.choice(len(train.tokens), BATCH, replace=False))
        params, state, losses = fused(params, state, batch)
        learned.append(tokenizer.bits_per_byte(losses, batch.labels))
        if i % 100 == 0 or i == steps:
            collected = sum(evaluate(graph, params, batch) for batch in batches)
            held_out.append((i, tokenizer.bits_per_byte(collected, held.labels)))
        progress.set_postfix(bits_per_byte=f"{learned[-1]:.2f}", held_out=f"{held_out[-1][1]:.2f}")

    counts = 1 + np.bincount(train.labels[train.weights], minlength=size)
    nats = -np.log(counts / counts.sum())[held.labels[held.weights]]
    losses = jl.LossCollector().add_loss("cross_entropy", nats)
    unigram = tokenizer.bits_per_byte(losses, held.labels)
    print(f"\nHeld-out files, bits per byte\n{'transformer':16}{held_out[-1][1]:8.3f}")
    print(f"{'unigram model':16}{unigram:8.3f}\n\nOf the transformer, on a held-out token")
    measured = {name: float(mean.value) for name, mean in collected.losses.items()}
    print(f"{'is the likeliest':16}{measured['accuracy']:8.1%}")
    print(
        f"{'entropy, nats':16}{measured['entropy']:8.3f}\n\nTemporary memory of a training step, MB"
    )
    print("\n".join(f"{name:16}{megabytes:8,.0f}" for name, megabytes in memory.items()))
    for seed, prompt in enumerate((b"def", b"class")):
        ids = tokenizer.encode(prompt)
        tokens = np.pad(np.array(ids, np.int32), (0, LENGTH - len(ids)))
        tokens = write(nnx.merge(graph, params), tokens, len(ids), jax.random.key(seed))
        text = b"".join(tokenizer.words[i] for i in np.asarray(tokens)).decode(errors="replace")
        print("\n" + text.partition("\n\n\n")[0])  # Up to the end of the definition.
    draw(options.out, learned, held_out, unigram, memory)
    print(f"\nWrote {options.out}")


if __name__ == "__main__":
    main()
