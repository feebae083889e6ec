"""The loss of a language model's last layer, from blocks of its logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxlosses._blocks import (
    Block,
    Blocks,
    BlockSize,
    Side,
    choose_blocks,
    matmul,
    per_token,
)
from jaxlosses._classification import class_losses
from jaxlosses._kernel import reduce_losses
from jaxlosses._labels import class_ids, nan_if_impossible, with_wide_labels
from jaxlosses._reduce import max_and_pick, sum_of
from jaxlosses._typing import (
    AxisName,
    Bias,
    ClassIds,
    Hidden,
    Kernel,
    Reduction,
    Result,
    Weights,
    as_floats,
    check_number,
    is_float,
    jit,
    precision,
)


@with_wide_labels
@jit
def linear_softmax_cross_entropy(
    hidden: Hidden,
    kernel: Kernel,
    labels: ClassIds,
    weights: Weights = 1.0,
    *,
    bias: Bias | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_soft_cap: float | None = None,
    ignore_index: int | None = None,
    block_size: BlockSize = None,
    reduction: Reduction = "mean",
    axis_name: AxisName = None,
) -> Result:
    r"""``sparse_softmax_cross_entropy(hidden @ kernel + bias)`` whose logits never exist, in nats.

    $$l = \log \sum_c e^{x_c} - (1 - s)\, x_y - \frac{s}{C} \sum_c x_c
    + z \left(\log \sum_c e^{x_c}\right)^2, \quad x = a \tanh\frac{h K + b}{a}$$

    Logits are computed block by block in float32 at least, and in the derivative again, for four
    matrix products instead of three. Temporary memory is that of one block, and in float32 of the
    gradient with respect to ``hidden``; the number of classes does not enter.

    Blocks are cut from the classes, or where these are sharded, from the tokens (then the float32
    gradient is that of ``kernel``). An Explicit mesh shows how arrays are sharded, an Auto mesh
    does not: where it has the classes sharded, ``block_size=(256, None)`` keeps the kernel from
    being gathered.

    Args:
        hidden: Real numbers ``[batch, d1, ..., dN, features]``.
        kernel: Real numbers ``[features, classes]``.
        labels: Integers ``[batch, d1, ..., dN]``, or with a last axis of one more.
        weights: Weights, aligned with ``[batch, d1, ..., dN]`` from the left.
        bias: Real numbers ``[classes]``, the $b$ above.
        label_smoothing: The $s$ above, from 0 to 1.
        z_loss: The $z$ above, not negative; keeps the logits from drifting.
        logit_soft_cap: The $a$ above, from 1e-30 to 1e30; logits stay within it.
        ignore_index: Labels of this value have weight zero.
        block_size: How many classes a block has, or ``(tokens, None)``, about how many tokens.
        reduction: ``"mean"``, ``"average"``, ``"sum"``, ``"none"`` or ``"parts"``.
        axis_name: Mapped axes to reduce over as well.

    Returns:
        The reduced loss, float32 at least.

    Raises:
        ValueError: if ``kernel`` is not ``[features, classes]``, or there is no class; if ``bias``
            is not ``[classes]``; if the labels are not integers of the shape of ``hidden`` without
            the features; if the weights do not align; or if an option is out of its range.

    References:
        ``tf.contrib.losses.sparse_softmax_cross_entropy``, TensorFlow 1.15. Wijmans et al., "Cut
        your losses in large-vocabulary language models", 2024. The soft cap is from Gemma Team,
        "Gemma 2", 2024, the z-loss from Chowdhery et al., "PaLM: scaling language modeling with
        pathways", 2022.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> hidden, kernel = jnp.ones((3, 4)), jnp.zeros((4, 2))
        >>> labels = jnp.array([1, 0, -100])
        >>> loss = jl.linear_softmax_cross_entropy(hidden, kernel, labels, ignore_index=-100)
        >>> print(loss.round(4))
        0.6931
    """
    (hidden,), (kernel,) = as_floats(hidden=hidden), as_floats(kernel=kernel)
    if kernel.ndim != 2 or hidden.shape[-1:] != kernel.shape[:1] or kernel.shape[1] == 0:
        raise ValueError(
            f"kernel must be [features, classes], the features those of the last axis of hidden, "
            f"got kernel of shape {kernel.shape} and hidden of shape {hidden.shape}"
        )
    classes = kernel.shape[1]
    (bias,) = as_floats(bias=jnp.zeros(classes, kernel.dtype) if bias is None else bias)
    if bias.shape != (classes,):
        raise ValueError(f"bias must have shape ({classes},), got {bias.shape}")
    check_number("label_smoothing", label_smoothing, 1)
    check_number("z_loss", z_loss)
    if logit_soft_cap is not None:
        # A wider cap would round logits to nothing, and a narrower one has no inverse.
        check_number("logit_soft_cap", logit_soft_cap, 1e30)
        if logit_soft_cap < 1e-30:
            raise ValueError(f"logit_soft_cap must be at least 1e-30, got {logit_soft_cap!r}")
    shape = (*hidden.shape[:-1], classes)
    labels, weights = class_ids(labels, weights, shape, ignore_index)
    blocks = choose_blocks(hidden, kernel, block_size)
    layer = _Layer(blocks, classes, logit_soft_cap, bool(label_smoothing))
    counts = jnp.broadcast_to(weights.astype(bool), labels.shape)
    statistics = per_token(
        functools.partial(_statistics, layer), hidden, kernel, bias, labels, counts
    )

    def formula(*inputs: Array) -> Array:
        *statistics, y = inputs
        losses = class_losses(*statistics, label_smoothing=label_smoothing, z_loss=z_loss)
        return nan_if_impossible(losses, y, classes)

    # To the kernel these are inputs like any other: what is absent has no slope there.
    inputs = [*statistics, labels]
    return reduce_losses(formula, inputs, weights, reduction=reduction, axis_name=axis_name)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What of the last layer is fixed when it is compiled."""

    blocks: Blocks
    classes: int
    cap: float | None
    smooth: bool

    def logits(self, block: Block, hidden: Array, kernel: Array, bias: Array) -> Array:
        """A block of them, not capped yet."""
        x = matmul(
            block.take("tokens", hidden), block.take("classes", kernel), [hidden.ndim - 1], [0]
        )
        bias = block.take("classes", bias).astype(x.dtype)
        return x + jnp.expand_dims(bias, range(x.ndim - 1))

    def capped(self, x: Array) -> Array:
        return x if self.cap is None else self.cap * jnp.tanh(x / self.cap)

    def is_label(self, block: Block, x: Array, labels: Array) -> Array:
        ids = block.places("classes", self.classes).astype(labels.dtype)
        return jnp.expand_dims(ids, range(x.ndim - 1)) == block.take("tokens", labels)[..., None]

    def shares(
        self, block: Block, labels: Array, top: Array, log_sum: Array, x: Array
    ) -> list[Array]:
        """A block's part of sums that have the derivatives of ``_statistics``.

        Probabilities stand for the log-sum-exp, whose slopes they are.
        """
        top, log_sum = (block.take("tokens", a)[..., None] for a in (top, log_sum))
        # Infinite is what stands for a token without use: not even a NaN in the kernel reaches it.
        x = self.capped(jnp.where(jnp.isposinf(log_sum), 0, x))
        hit = self.is_label(block, x, labels)
        terms = [jnp.exp((x - top) - log_sum), jnp.where(hit, x, 0)]
        terms += [x / self.classes] if self.smooth else []
        return [jnp.sum(term, -1) for term in terms]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _statistics(
    layer: _Layer, hidden: Array, kernel: Array, bias: Array, labels: Array, counts: Array
) -> list[Array]:
    """What the loss of a token takes of its logits.

    The largest, and below it: the logarithm of the sum of exponentials, the logit at the label, and
    where labels are smoothed, the mean logit. ``counts`` says which tokens do, to the derivative.
    """

    def step(block: Block, carry: list[Array]) -> list[Array]:
        top, total, at_label, *mean = (block.take("tokens", c) for c in carry)
        x = layer.capped(layer.logits(block, hidden, kernel, bias))
        largest, picked = max_and_pick(x, layer.is_label(block, x, labels))
        largest = jnp.maximum(top, largest)
        # A block, and all before it, can be ruled out: nothing but minus infinity.
        before, shift = (jnp.where(jnp.isneginf(t), 0, t) for t in (top, largest))
        below = x - shift[..., None]
        total = total * jnp.exp(top - shift) + sum_of(jnp.exp(below), x.ndim - 1)
        if mean:
            seen = jnp.asarray(block.places("classes", 1)[0], x.dtype)
            moved = (before - shift) * (seen / layer.classes)
            mean = [mean[0] + moved + sum_of(below, x.ndim - 1) / layer.classes]
        parts = [largest, total, at_label + picked, *mean]
        return [block.put("tokens", c, p) for c, p in zip(carry, parts, strict=True)]

    zeros = jnp.sum(jnp.zeros_like(hidden, precision(hidden, kernel, bias)), -1)
    carry = [zeros - jnp.inf, *[zeros] * (3 if layer.smooth else 2)]
    top, total, at_label, *mean = layer.blocks.fold(step, carry)
    # Under vmap, JAX wants values mapped over whatever their derivatives are, as counts may be.
    return [jnp.where(counts, s, s) for s in (top, jnp.log(total), at_label - top, *mean)]


def _statistics_jvp(layer: _Layer, primals: Any, tangents: Any) -> tuple[Any, Any]:
    hidden, kernel, bias, labels, counts = primals
    top, log_sum, *_ = statistics = _statistics(layer, *primals)
    moves = {i: tangents[i] for i in range(3) if not isinstance(tangents[i], SymbolicZero)}
    if not moves:
        return statistics, [jnp.zeros_like(s) for s in statistics]
    # A token that is absent and has no finite logits, or would have none to a derivative, is 0.
    finite = jnp.isfinite(jnp.sum(jnp.square(hidden.astype(top.dtype)), -1)) & jnp.isfinite(log_sum)
    usable = counts | finite
    hidden = jnp.where(usable[..., None], hidden, jnp.zeros_like(hidden))
    if 0 in moves:
        moves[0] = jnp.where(usable[..., None], moves[0], jnp.zeros_like(moves[0]))
    residuals = [hidden, kernel, bias, labels]
    residuals += [jnp.where(usable, top, 0), jnp.where(usable, log_sum, jnp.inf)]
    moved = _push.bind(*residuals, *moves.values(), layer=layer, moved=tuple(moves), batches=())
    return statistics, [jnp.zeros_like(top), *moved]


_statistics.defjvp(_statistics_jvp, symbolic_zeros=True)


def _push_forward(*arguments: Array, layer: _Layer, moved: Any, batches: Any) -> list[Array]:
    """How log-sum-exp, label's logit and mean logit move with what they are computed from.

    Args:
        arguments: Six that it is not linear in, and the moves of some of the first three.
        layer: The last layer.
        moved: Which of them.
        batches: For each axis that is mapped over beside the tokens, where arguments have it.
    """
    if batches:
        axes, *rest = batches
        push = functools.partial(_push_forward, layer=layer, moved=moved, batches=rest)
        return jax.vmap(push, axes)(*arguments)
    *layer_inputs, labels, top, log_sum = arguments[:6]

    def step(block: Block, carry: list[Array]) -> list[Array]:
        def shares(*points: Array) -> list[Array]:
            inputs = dict(enumerate(layer_inputs)) | dict(zip(moved, points, strict=True))
            x = layer.logits(block, *inputs.values())
            return layer.shares(block, labels, top, log_sum, x)

        _, parts = jax.jvp(shares, [arguments[i] for i in moved], list(arguments[6:]))
        return [block.add("tokens", c, p) for c, p in zip(carry, parts, strict=True)]

    return layer.blocks.fold(step, [jnp.zeros_like(top)] * (3 if layer.smooth else 2))


def _pull_back(*arguments: Array, layer: _Layer, moved: Any, batches: Any) -> list[Array]:
    """The transpose of ``_push_forward``, of six arguments and the cotangents."""
    if batches:
        axes, *rest = batches
        pull = functools.partial(_pull_back, layer=layer, moved=moved, batches=rest)
        of_cotangents = (0,) * (len(arguments) - 6)
        parts = jax.vmap(pull, (*axes[:6], *of_cotangents))(*arguments)
        return [
            jnp.sum(p, 0) if axis is None else jnp.moveaxis(p, 0, axis)
            for p, axis in zip(parts, axes[6:], strict=True)
        ]
    (hidden, kernel, bias, labels, top, log_sum), cotangents = arguments[:6], arguments[6:]
    sides: tuple[Side, ...] = ("tokens", "classes", "classes")
    # A CPU multiplies rows by columns faster than columns by columns: turned once, not each time.
    turned = jnp.moveaxis(hidden, -1, 0)

    def step(block: Block, sums: list[Array]) -> list[Array]:
        x = layer.logits(block, hidden, kernel, bias)
        _, pull = jax.vjp(functools.partial(layer.shares, block, labels, top, log_sum), x)
        (dx,) = pull([block.take("tokens", c) for c in cotangents])
        tokens = list(range(dx.ndim - 1))
        h, k = block.take("tokens", hidden), block.take("classes", kernel)

        def products(dx: Array) -> list[Array]:
            of_hidden = matmul(dx, k, [dx.ndim - 1], [1])
            if layer.blocks.side == "classes":
                return [of_hidden, matmul(turned, dx, [t + 1 for t in tokens], tokens)]
            return [of_hidden, matmul(h, dx, tokens, tokens)]

        def narrow_products(dx: Array) -> list[Array]:
            return products(dx.astype(jnp.bfloat16))

        # Not on a CPU, which gains nothing by it, and has no bfloat16 product of some shapes.
        # Not to float16 either: slopes are as small as a probability over a count.
        if h.dtype == k.dtype == jnp.bfloat16:
            parts = lax.platform_dependent(dx, cpu=products, default=narrow_products)
        else:
            parts = products(dx)
        parts = [*parts, jnp.sum(dx, tokens)]
        return [block.add(sides[i], s, parts[i]) for i, s in zip(moved, sums, strict=True)]

    # What is added to from block to block is exact until the end.
    inputs = [arguments[i] for i in moved]
    cut = [sides[i] == layer.blocks.side for i in moved]
    sums = [
        jnp.zeros_like(a, a.dtype if c else top.dtype) for a, c in zip(inputs, cut, strict=True)
    ]
    sums = layer.blocks.fold(step, sums)
    return [s.astype(a.dtype) for s, a in zip(sums, inputs, strict=True)]


def _push_batch(arguments: Any, axes: Any, *, layer: _Layer, moved: Any, batches: Any) -> Any:
    """Another axis of tokens, if it is one of tokens alone, as for a batch of examples."""
    of_tokens = {0, 3, 4, 5, *(6 + n for n, i in enumerate(moved) if i == 0)}
    if batches or any(axis is not None for i, axis in enumerate(axes) if i not in of_tokens):
        batches = (tuple(axes), *batches)
    else:
        size = next(a.shape[d] for a, d in zip(arguments, axes, strict=True) if d is not None)
        arguments = [
            batching.bdim_at_front(a, axis, size) if i in of_tokens else a
            for i, (a, axis) in enumerate(zip(arguments, axes, strict=True))
        ]
        layer = dataclasses.replace(layer, blocks=layer.blocks.with_batch_axis())
    moves = _push.bind(*arguments, layer=layer, moved=moved, batches=batches)
    return moves, (0,) * len(moves)


def _push_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    tangents = [
        ad.instantiate_zeros(t) if is_float(p) else np.zeros(p.shape, jax.dtypes.float0)
        for p, t in zip(primals, tangents, strict=True)
    ]
    return jax.jvp(functools.partial(_push_forward, **params), list(primals), tangents)


def _push_transpose(cotangents: Any, *arguments: Any, **params: Any) -> list[Any]:
    cotangents = [ad.instantiate_zeros(c) for c in cotangents]
    return [None] * 6 + _pull_back(*arguments[:6], *cotangents, **params)


# The derivative is linear, and its transpose is written out: JAX would add a gradient as large as
# the kernel for every block, and multiply float32 by bfloat16.
_push = Primitive("push_logit_statistics")
_push.multiple_results = True
_push.def_impl(_push_forward)
_push.def_abstract_eval(
    lambda *avals, **params: (
        jax.make_jaxpr(functools.partial(_push_forward, **params))(*avals).out_avals
    )
)
mlir.register_lowering(_push, mlir.lower_fun(_push_forward, multiple_results=True))
batching.primitive_batchers[_push] = _push_batch
ad.primitive_jvps[_push] = _push_jvp
ad.primitive_transposes[_push] = _push_transpose
