"""Learn depth from a stereo pair whose ground truth has holes.

The Middlebury Motorcycle pair is a part of scikit-image: two photographs and the true disparity,
which is how far a point lies apart in them, in pixels (depth is inversely proportional to it). The
disparity is infinite where the sensor measured nothing. These labels stay infinite, and their
weight is zero; nothing else needs to be done. The right part of the picture also has weight zero,
and is held out for evaluation.

Run ``python examples/depth_from_stereo.py``; it takes a minute or two on two CPU cores.
"""

import argparse
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import skimage
from tqdm import trange

import jaxlosses as jl
import jaxlosses.flax as jlf

mpl.use("Agg")
import matplotlib.pyplot as plt

SCALE = 3  # Photographs are made smaller by this factor, so that the example takes minutes.
CANDIDATES = 24  # How many disparities are tried; the network sees how well each one fits.
HELD_OUT = 0.72  # The part of the width that is learned from; the rest is held out.
BLOCK = 8  # Height and width, in pixels, of the blocks for the pairwise loss.


class StereoNet(nn.Module):
    """Disparity in pixels from how well the photographs match at each candidate disparity."""

    prior: float
    width: int = 32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Map ``[batch, height, width, channels]`` to ``[batch, height, width]``."""
        x = features
        for dilation in (1, 2, 4, 1):
            x = nn.relu(nn.Conv(self.width, (3, 3), kernel_dilation=dilation)(x))
        depth = self.prior + 10 * nn.Conv(1, (3, 3))(x)[..., 0]
        for axis in (1, 2):  # Depth should be smooth, except where the photograph has an edge.
            edge = jnp.mean(jnp.abs(jnp.diff(features[..., :3], axis=axis)), -1)
            rough = jnp.abs(jnp.diff(depth, axis=axis)) * jnp.exp(-30 * edge)
            jlf.sow_loss(self, f"smoothness_{'yx'[axis - 1]}", 0.05 * rough)
        return depth


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The left photograph, the features of the pair, and the true disparity with its holes."""
    left, right, disparity = skimage.data.stereo_motorcycle()
    rows, columns = (SCALE * BLOCK * (n // (SCALE * BLOCK)) for n in disparity.shape)
    pair = [
        skimage.transform.downscale_local_mean(photo[:rows, :columns] / 255.0, (SCALE, SCALE, 1))
        for photo in (left, right)
    ]
    costs = [
        np.abs(pair[0] - np.roll(pair[1], shift, axis=1)).mean(-1) for shift in range(CANDIDATES)
    ]
    smooth = [skimage.filters.gaussian(cost, 1.5) for cost in costs]
    features = np.concatenate([pair[0], np.stack([*costs, *smooth], -1) * 10], -1)
    truth = disparity[:rows:SCALE, :columns:SCALE]
    return pair[0], features.astype(np.float32), truth.astype(np.float32)


def normals(depth: jax.Array) -> jax.Array:
    """Normals of the surface, unit vectors ``[batch, height - 1, width - 1, 3]``."""
    down = depth[:, 1:, :-1] - depth[:, :-1, :-1]
    across = depth[:, :-1, 1:] - depth[:, :-1, :-1]
    vectors = jnp.stack([-down, -across, jnp.ones_like(down)], -1)
    return vectors / jnp.sqrt(jnp.sum(jnp.square(vectors), -1, keepdims=True))


def blocks(image: jax.Array) -> jax.Array:
    """Cut ``[1, height, width]`` into samples of ``[BLOCK, BLOCK]``."""
    _, height, width = image.shape
    cut = image.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return cut.swapaxes(1, 2).reshape(-1, BLOCK, BLOCK)


def selected_losses(
    losses: jl.LossCollector, depth: jax.Array, truth: jax.Array, known: jax.Array
) -> jl.LossCollector:
    """The losses of a depth; wherever the truth is infinite, the weight is zero."""
    on_surface = known[:, 1:, :-1] & known[:, :-1, 1:] & known[:, :-1, :-1]
    whole = blocks(known).all((1, 2))
    pairwise = jl.mean_pairwise_squared_error(
        blocks(depth), blocks(truth), 0.02 * whole, reduction="parts"
    )
    directions = jl.cosine_distance(normals(depth), normals(truth), on_surface, reduction="parts")
    return (
        losses.add_loss("absolute", jl.absolute_difference(depth, truth, known, reduction="parts"))
        .add_loss("pairwise", pairwise)
        .add_loss("normals", directions)
    )


def multiplied_losses(
    losses: jl.LossCollector, depth: jax.Array, truth: jax.Array, known: jax.Array
) -> jl.LossCollector:
    """The same absolute difference, multiplied by weights of zero, which gives NaN."""
    error = jnp.abs(depth - truth) * known.astype(jnp.float32)
    return losses.add_loss("absolute", jnp.sum(error) / jnp.sum(known).astype(jnp.float32))


def train(
    features: np.ndarray, truth: np.ndarray, known: np.ndarray, add_losses: Any, steps: int, **bar
) -> tuple[np.ndarray, jl.LossCollector, dict[str, list[float]]]:
    """The learned disparity of the whole picture, the last losses, and the history of each."""
    model = StereoNet(prior=float(truth[known].mean()))
    inputs, targets, weights = (jnp.asarray(x)[None] for x in (features, truth, known))
    params = model.init(jax.random.key(0), inputs)
    forward = jlf.capture(model.apply, expected=["smoothness_x", "smoothness_y"])
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, max(steps, 1)))

    def total(params: Any) -> tuple[jax.Array, jl.LossCollector]:
        depth, losses = forward(params, inputs)
        losses = add_losses(losses, depth, targets, weights)
        losses = losses.regularize(params, {"kernel$": jl.l2_regularizer(1e-4)})
        return losses.get_total_loss(), losses

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> tuple[Any, Any, jl.LossCollector]:
        grads, losses = jax.grad(total, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, losses

    state, losses, history = optimizer.init(params), jl.LossCollector(), {}
    progress = trange(steps, **bar)
    for _ in progress:
        params, state, losses = step(params, state)
        values = {name: float(value) for name, value in losses.to_dict().items()}
        for name, value in values.items():
            history.setdefault(name, []).append(value)
        progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
    return np.asarray(jax.jit(model.apply)(params, inputs))[0], losses, history


def report(depth: np.ndarray, truth: np.ndarray, known: np.ndarray, held_out: np.ndarray) -> None:
    """Print the errors on the held-out part, where the truth is known."""
    mean = np.full_like(truth, truth[known].mean())
    print(f"\nHeld-out error in pixels of disparity, over {held_out.sum()} pixels")
    print(f"{'':24}{'mean absolute':>15}{'root mean square':>18}{'off by > 3':>12}")
    for name, guess in (("the learned model", depth), ("predicting the mean", mean)):
        error = np.abs(guess - truth)[held_out]
        rms, off = np.sqrt(np.mean(error**2)), np.mean(error > 3)
        print(f"{name:24}{error.mean():15.2f}{rms:18.2f}{off:12.0%}")


def draw(out: str, photo: np.ndarray, truth: np.ndarray, depth: np.ndarray, history: dict) -> None:
    """Write the picture: photograph, true and predicted disparity, loss curves."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
    edge = HELD_OUT * truth.shape[1]
    low, high = np.percentile(truth[np.isfinite(truth)], (1, 99))
    colours = mpl.colormaps["viridis"].with_extremes(bad="crimson")
    axes[0, 0].imshow(photo)
    axes[0, 0].set_title("Left photograph")
    holes = np.ma.masked_invalid(truth)
    axes[0, 1].imshow(holes, cmap=colours, vmin=low, vmax=high)
    axes[0, 1].set_title("True disparity (red: the sensor saw nothing)")
    image = axes[1, 0].imshow(depth, cmap=colours, vmin=low, vmax=high)
    axes[1, 0].set_title("Learned disparity")
    figure.colorbar(image, ax=[axes[0, 1], axes[1, 0]], label="disparity (pixels)", shrink=0.6)
    for panel in (axes[0, 0], axes[0, 1], axes[1, 0]):
        panel.axvline(edge, color="white", linestyle="--", linewidth=1.5)
        panel.text(edge + 3, 12, "held out", color="white", fontsize=9)
        panel.set_axis_off()
    for name, values in history.items():
        axes[1, 1].plot(np.arange(1, len(values) + 1), values, label=name)
    axes[1, 1].set(yscale="log", ylim=(None, 100), xlabel="step", ylabel="loss", title="Losses")
    axes[1, 1].legend(ncols=3, loc="upper right")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Train, compare, draw."""
    parser = argparse.ArgumentParser(description="Learn depth from a stereo pair with holes.")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--out", default="depth_from_stereo.png")
    options = parser.parse_args()

    photo, features, truth = load()
    learned_from = np.isfinite(truth) & (np.arange(truth.shape[1]) < HELD_OUT * truth.shape[1])
    held_out = np.isfinite(truth) & ~learned_from
    print(f"{np.mean(~np.isfinite(truth)):.1%} of the true disparities are infinite: weight zero.")

    depth, losses, history = train(features, truth, learned_from, selected_losses, options.steps)
    print(f"\nThe losses of the last step\n{losses}")
    report(depth, truth, learned_from, held_out)
    *_, multiplied = train(features, truth, learned_from, multiplied_losses, 2, disable=True)
    print(f"\nWith zero weights that multiply instead of select: {multiplied['absolute'][-1]:.3f}")
    draw(options.out, photo, truth, depth, history)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
