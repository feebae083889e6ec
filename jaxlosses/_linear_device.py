"""What one device computes of a last layer: statistics of its logits and their derivatives.

A loss needs only a few statistics of a token's logits (``_linear_layer.py``). These, their jvp and
its transpose are loops over blocks of logits::

    for each block:
        logits = hidden @ kernel + bias, for the tokens and the classes of the block
        linear_sums:       sums        = those of the blocks before, joined with these logits
        linear_jvp:        tangents of the statistics += tangents from these logits
        linear_transpose:  gradients of hidden, kernel, bias += gradients through these logits

Where a mesh is known, a device has its part of each array (``_layout.py``). Parts of the kernel
that other devices have are gathered for a block, or before the loop if all blocks need all of them;
their gradients are scattered in the same way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxlosses._blocks import (
    PLATFORMS,
    BlockPlan,
    BlockSlice,
    Platform,
    Side,
    matmul,
    plan_blocks,
)
from jaxlosses._layout import Kind, Layout
from jaxlosses._linear_layer import KINDS, Layer, Residuals, Sums, split
from jaxlosses._logits import shifted, times_logit
from jaxlosses._masking import where
from jaxlosses._primitive import vary_alike
from jaxlosses._reduce import max_and_pick, max_sum_exp_and_pick, sum_of
from jaxlosses._typing import precision

_SIDES: dict[str, Side] = {"hidden": "tokens", "kernel": "classes", "bias": "classes"}


@dataclasses.dataclass(frozen=True)
class _Device:
    """One device's part of a layer, computed in the way that suits its platform.

    Attributes:
        layer: The layer.
        plan: How this device's part is cut into blocks.
        classes: How many classes this device's part of the kernel has.
        dtype: The dtype to which factors of products are cast; None if they are not cast.
        in_one_pass: Whether maximum and sums are one reduction.
        transposes_hidden: Whether hidden is transposed for its product with the cotangents.
    """

    layer: Layer
    plan: BlockPlan
    classes: int
    dtype: Any
    in_one_pass: bool
    transposes_hidden: bool

    @property
    def layout(self) -> Layout:
        """The layer's layout."""
        return self.layer.layout

    @property
    def classes_axis(self) -> int:
        """Which axis of this device's kernel is that of the classes.

        Where classes are gathered it is the first one, so that a gathered block is contiguous.
        """
        return 0 if self.layout.gathered_classes else 1

    def prepare(self, kernel: Array, bias: Array) -> tuple[Array, Array]:
        """The kernel that blocks are taken from, and the bias as ``[gathered shards, classes]``."""
        kernel = kernel if self.classes_axis else kernel.T
        if self.plan.side == "tokens":
            kernel = self._gather(kernel)
        return kernel, self.layout.gather(bias[None], -1, 0) if self.layer.has_bias else bias

    def kernel_of(self, block: BlockSlice, kernel: Array) -> Array:
        """The kernel of the classes of a block, from the prepared kernel."""
        if self.plan.side == "tokens":
            return kernel
        part = block.take("classes", kernel, self.classes_axis)
        if self.dtype is not None and part.dtype != self.dtype:
            # Without a product in between, XLA casts the whole kernel before the loop and keeps it.
            part = part * lax.optimization_barrier(jnp.ones((), part.dtype))
        return self._gather(part)

    def _gather(self, kernel: Array) -> Array:
        # Cast before, so that fewer bytes are gathered.
        kernel = kernel if self.dtype is None else kernel.astype(self.dtype)
        return self.layout.gather(kernel, 1 - self.classes_axis, self.classes_axis)

    def matmul(self, x: Array, y: Array, x_axes: Sequence[int], y_axes: Sequence[int]) -> Array:
        """The sum of products over some axes, in float32 at least."""
        options = {"dtype": self.dtype, "precision": self.layer.matmul_precision}
        return matmul(x, y, x_axes, y_axes, **options)

    def logits(self, block: BlockSlice, hidden: Array, kernel: Array, bias: Array) -> Array:
        """The products and the bias, from hidden and kernel of a block and the prepared bias."""
        x = self.matmul(hidden, kernel, [hidden.ndim - 1], [1 - self.classes_axis])
        if not self.layer.has_bias:
            return x
        bias = block.take("classes", bias).reshape(-1).astype(x.dtype)
        return x + jnp.expand_dims(bias, range(x.ndim - 1))

    def is_label(self, block: BlockSlice, labels: Array) -> Array:
        """Which logits of a block are that of their token's label."""
        cut = block.plan.side == "classes"
        start, size = (block.start, block.length) if cut else (0, self.classes)
        first = jnp.asarray(self.layout.shard_numbers() * self.classes + start, labels.dtype)
        ids = (first[:, None] + jnp.arange(size, dtype=labels.dtype)[None]).reshape(-1)
        labels = block.take("tokens", labels)[..., None]
        return jnp.expand_dims(ids, range(labels.ndim - 1)) == labels

    def fraction(self, classes: Any) -> Any:
        """Which fraction of all classes this number of classes from each gathered shard is."""
        return classes * (self.layout.num_gathered / self.layer.classes)


def _devices(
    layer: Layer, hidden: Array, kernel: Array, is_transpose: bool
) -> dict[Platform, _Device]:
    """This device's part of the layer, for each platform that the program may be compiled for."""
    *tokens, features = hidden.shape
    classes, shards = kernel.shape[1], layer.layout.num_gathered
    bfloat16, float32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    dtypes = {hidden.dtype, kernel.dtype}
    is_asked = layer.matmul_precision not in (None, "default", "bfloat16", "fastest")
    in_bfloat16 = dtypes == {bfloat16} or (dtypes == {bfloat16, float32} and not is_asked)
    devices: dict[Platform, _Device] = {}
    for platform in PLATFORMS:
        # A CPU gains nothing by bfloat16, and XLA lacks this product for some shapes there.
        dtype = jnp.bfloat16 if in_bfloat16 and platform != "cpu" else None
        sizes = tuple(tokens), features, classes, shards, layer.block_size, platform
        itemsize, is_local = jnp.dtype(precision(hidden, kernel)).itemsize, layer.layout.is_local
        plan = plan_blocks(*sizes, itemsize, may_cut_tokens=is_local)
        is_gathered = shards > 1 or bool(layer.layout.features)
        if is_transpose and platform == "tpu" and plan.side == "tokens" and not is_gathered:
            # The kernel's gradient is rewritten for every block, so longer blocks are better. There
            # is room: a TPU computes the cotangents of logits while it multiplies and keeps nothing
            # else. (A gathered kernel would take this room.)
            plan = plan_blocks(*sizes, jnp.dtype(dtype or hidden.dtype).itemsize)
        # A GPU writes logits to memory, and reads them once more for each reduction.
        in_one_pass = platform == "default" and plan.count > 1 and not is_transpose
        # A CPU multiplies rows by columns faster than columns by columns. A GPU gains nothing, and
        # would hold one more array of hidden's size.
        transposes_hidden = is_transpose and platform != "default" and plan.side == "classes"
        devices[platform] = _Device(layer, plan, classes, dtype, in_one_pass, transposes_hidden)
    return devices


def _for_each_platform(
    loop: Callable[..., list[Array]],
    layer: Layer,
    hidden: Array,
    kernel: Array,
    *rest: Array,
    is_transpose: bool = False,
) -> list[Array]:
    """``loop(device, hidden, kernel, *rest)``, for the platform that the program runs on."""
    devices = _devices(layer, hidden, kernel, is_transpose)
    if len(set(devices.values())) == 1:
        return loop(devices["default"], hidden, kernel, *rest)
    ways = {platform: functools.partial(loop, device) for platform, device in devices.items()}
    return lax.platform_dependent(hidden, kernel, *rest, **ways)


def linear_sums(layer: Layer, *arrays: Array) -> list[Array]:
    """The sums over all classes (:class:`Sums`), from hidden, kernel, bias and labels."""
    run = functools.partial(_for_each_platform, _sums_loop, layer)
    kinds: Sequence[Kind] = ("hidden", "kernel", "bias", "tokens")
    return layer.layout.on_devices(run, arrays, kinds, _tokens(layer.num_statistics))


def _sums_loop(device: _Device, *arrays: Array) -> list[Array]:
    hidden, kernel, bias, labels = vary_alike(*arrays)
    layer, is_cut = device.layer, device.plan.side == "classes"
    kernel, bias = device.prepare(kernel, bias)

    def step(block: BlockSlice, carry: Sums) -> Sums:
        before = jax.tree.map(functools.partial(block.take, "tokens"), carry)
        k = device.kernel_of(block, kernel)
        x = layer.final(device.logits(block, block.take("tokens", hidden), k, bias))
        sums = _sums_of_block(device, x, device.is_label(block, labels), before.max_logit)
        max_logit = jnp.maximum(before.max_logit, sums.max_logit)
        so_far = device.fraction(block.start if is_cut else 0)
        _, *before = before.relative_to(max_logit, so_far)
        after = Sums(max_logit, *jax.tree.map(jnp.add, before, list(sums[1:])))
        return jax.tree.map(functools.partial(block.put, "tokens"), carry, after)

    zeros = jnp.sum(jnp.zeros_like(hidden, precision(hidden, kernel)), -1)
    sums = layer.named([zeros - jnp.inf, *[zeros] * (layer.num_statistics - 1)])
    sums = device.plan.loop(step, Sums(*sums))
    sums = sums.over_devices(layer.layout.class_axes, device.fraction(device.classes))
    return jax.tree.leaves(sums)


def _sums_of_block(device: _Device, x: Array, is_label: Array, max_before: Array) -> Sums:
    """The sums over the logits of a block, relative to the largest logit so far."""
    layer, last = device.layer, x.ndim - 1
    if device.in_one_pass and layer.num_statistics == 3:
        block_max, exp, picked = max_sum_exp_and_pick(x, is_label)
        max_logit = jnp.maximum(max_before, block_max)
        return Sums(max_logit, exp * jnp.exp(shifted(block_max, max_logit)), picked, None, None)
    block_max, picked = max_and_pick(x, is_label)
    max_logit = jnp.maximum(max_before, block_max)
    x = shifted(x, max_logit[..., None])
    exp = jnp.exp(x)
    logit = sum_of(x, last) / layer.classes if layer.needs_mean else None
    exp_times_logit = sum_of(times_logit(exp, x), last) if layer.needs_expected else None
    return Sums(max_logit, sum_of(exp, last), picked, logit, exp_times_logit)


def linear_jvp(layer: Layer, wrt: Sequence[str], *arrays: Array) -> list[Array]:
    """The tangents of all statistics except the largest logit, whose derivative is taken as 0.

    Args:
        layer: The last layer.
        wrt: Which of hidden, kernel and bias have a tangent.
        arrays: The residuals, and a tangent for each name in ``wrt``.
    """
    run = functools.partial(_for_each_platform, functools.partial(_jvp_loop, wrt), layer)
    kinds = _kinds((*Residuals._fields, *wrt))
    return layer.layout.on_devices(run, arrays, kinds, _tokens(layer.num_statistics - 1))


def _jvp_loop(wrt: Sequence[str], device: _Device, *arrays: Array) -> list[Array]:
    residuals, tangents = split(vary_alike(*arrays))
    masked = residuals.is_masked
    residuals = residuals._replace(hidden=_without(masked, residuals.hidden))
    given = dict(zip(wrt, tangents, strict=True))
    zeros = {name: jnp.zeros_like(getattr(residuals, name)) for name in _SIDES}
    tangents = zeros | given
    tangents["hidden"] = _without(masked, tangents["hidden"])

    def prepared(arrays: dict[str, Array]) -> dict[str, Array]:
        kernel, bias = device.prepare(arrays["kernel"], arrays["bias"])
        return {"hidden": arrays["hidden"], "kernel": kernel, "bias": bias}

    points = prepared({name: getattr(residuals, name) for name in _SIDES})
    tangents = {n: t for n, t in prepared(tangents).items() if n in given}

    def step(block: BlockSlice, carry: list[Array]) -> list[Array]:
        def of_block(arrays: dict[str, Array]) -> dict[str, Array]:
            taken = dict(arrays)
            if "hidden" in arrays:
                taken["hidden"] = block.take("tokens", arrays["hidden"])
            if "kernel" in arrays:
                taken["kernel"] = device.kernel_of(block, arrays["kernel"])
            return taken

        constants, of_tokens = of_block(points), _of_block(block, residuals)
        is_label = device.is_label(block, residuals.labels)

        def surrogates(some: dict[str, Array]) -> list[Array]:
            x = device.logits(block, **(constants | some))
            return device.layer.surrogates(x, is_label, of_tokens)

        some = {name: constants[name] for name in given}
        _, parts = jax.jvp(surrogates, (some,), (of_block(tangents),))
        return [block.add("tokens", *pair) for pair in zip(carry, parts, strict=True)]

    zero = jnp.zeros_like(residuals.max_logit)
    sums = device.plan.loop(step, [zero] * (device.layer.num_statistics - 1))
    return [device.layout.sum_over_classes(s) for s in sums]


def linear_transpose(
    layer: Layer, wrt: Sequence[str], residuals: Residuals, cotangents: Sequence[Array]
) -> list[Array]:
    """The transpose of :func:`linear_jvp`: from cotangents of results to those of tangents."""
    loop = functools.partial(_transpose_loop, wrt)
    run = functools.partial(_for_each_platform, loop, layer, is_transpose=True)
    kinds = _kinds(Residuals._fields) + _tokens(len(cotangents))
    return layer.layout.on_devices(run, [*residuals, *cotangents], kinds, _kinds(wrt))


def _transpose_loop(wrt: Sequence[str], device: _Device, *arrays: Array) -> list[Array]:
    given, _ = split(arrays)
    residuals, cotangents = split(vary_alike(*arrays))
    layer, layout, axis = device.layer, device.layout, device.classes_axis
    cut_side = device.plan.side
    kernel, bias = device.prepare(residuals.kernel, residuals.bias)
    whole_hidden = hidden_transposed = None
    if cut_side == "classes":
        whole_hidden = _without(residuals.is_masked, residuals.hidden)
        if device.transposes_hidden:  # Once, before the loop, and not in every block.
            hidden_transposed = jnp.moveaxis(whole_hidden, -1, 0)

    def settle(name: str, gradient: Array, masked: Array) -> Array:
        """A gradient in its own dtype, and its sum over the devices that have to add it up."""
        like = getattr(given, name)
        if name == "hidden":
            gradient = _without(masked, gradient.astype(like.dtype))
            return layout.sum_gradient("hidden", gradient, like)
        if name == "kernel":
            return layout.scatter(gradient.astype(like.dtype), 1 - axis, axis, like)
        return layout.scatter(gradient, -1, 0, like).astype(like.dtype)

    def is_settled_by_block(name: str) -> bool:
        # A bias is small. One sum of all of it is better than one for each block.
        return _SIDES[name] == cut_side and name != "bias"

    def step(block: BlockSlice, carry: dict[str, Array]) -> dict[str, Array]:
        of_tokens = _of_block(block, residuals)
        masked, k = of_tokens.is_masked, device.kernel_of(block, kernel)
        h = _without(masked, of_tokens.hidden) if whole_hidden is None else whole_hidden
        is_label = device.is_label(block, residuals.labels)

        def surrogates(x: Array) -> list[Array]:
            return layer.surrogates(x, is_label, of_tokens)

        _, pullback = jax.vjp(surrogates, device.logits(block, h, k, bias))
        (cotangent,) = pullback([block.take("tokens", c) for c in cotangents])
        last = cotangent.ndim - 1
        tokens = list(range(last))
        parts = {"bias": jnp.sum(cotangent, tokens).reshape(layout.num_gathered, -1)}
        cotangent = cotangent if device.dtype is None else cotangent.astype(device.dtype)
        parts["hidden"] = device.matmul(cotangent, k, [last], [axis])
        if axis == 0:
            parts["kernel"] = device.matmul(cotangent, h, tokens, tokens)
        elif hidden_transposed is None:
            parts["kernel"] = device.matmul(h, cotangent, tokens, tokens)
        else:
            of_hidden = [t + 1 for t in tokens]
            parts["kernel"] = device.matmul(hidden_transposed, cotangent, of_hidden, tokens)
        added = {}
        for name, so_far in carry.items():
            part = parts[name]
            part = settle(name, part, masked) if is_settled_by_block(name) else part
            classes_axis = axis if name == "kernel" else 1
            added[name] = block.add(_SIDES[name], so_far, part, classes_axis)
        return added

    # Accumulate in float32; cast once at the end. On the side that is cut nothing accumulates: each
    # block has its own part.
    wide = residuals.max_logit.dtype
    sums = {"hidden": residuals.hidden, "kernel": kernel, "bias": bias}
    carry = {
        name: jnp.zeros_like(getattr(given, name), shape=sums[name].shape)
        if is_settled_by_block(name)
        else jnp.zeros_like(sums[name], wide)
        for name in wrt
    }
    gradients = device.plan.loop(step, carry)
    for name, gradient in gradients.items():
        if not is_settled_by_block(name):
            gradients[name] = settle(name, gradient, residuals.is_masked)
    if "kernel" in wrt and axis == 0:
        gradients["kernel"] = gradients["kernel"].T
    if "bias" in wrt:
        gradients["bias"] = gradients["bias"][0]
    return [gradients[name] for name in wrt]


def _of_block(block: BlockSlice, residuals: Residuals) -> Residuals:
    """The residuals of a block's tokens."""
    return Residuals(
        *(
            x if name in ("kernel", "bias") else block.take("tokens", x)
            for name, x in residuals._asdict().items()
        )
    )


def _kinds(names: Sequence[str]) -> list[Kind]:
    return [KINDS[name] for name in names]


def _tokens(count: int) -> list[Kind]:
    return ["tokens"] * count


def _without(masked: Array, x: Array) -> Array:
    """``x``, and 0 where a token is masked."""
    return where(~masked, x, jnp.zeros_like(x))
