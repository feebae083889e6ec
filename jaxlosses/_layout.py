"""How the devices of a mesh share a last layer, and how each of them gets its own part.

Each device has some of the tokens, and some of the classes or all of them::

    hidden  [tokens, features]    a device keeps its tokens, with all of their features
    kernel  [features, classes]   shards over devices that share the same tokens are kept ("class
                                  axes"); other shards ("gathered axes") are gathered, a block at a
                                  time, because each device needs all classes for its own tokens

Nothing here knows a loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlosses._primitive import varying_axes
from jaxlosses._typing import AxisName, axis_names, is_integer

Names: TypeAlias = tuple[str, ...]
Kind = Literal["hidden", "kernel", "bias", "tokens"]
InSpecs: TypeAlias = tuple[PartitionSpec, PartitionSpec] | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a mesh shard which axes of the arrays.

    Attributes:
        tokens: For each axis of the tokens, the axes of the mesh that shard it.
        features: The axes of the mesh that shard the kernel's features; they shard tokens too.
        classes: The axes of the mesh that shard the classes.
        mesh: The mesh; None if an array's sharding is not known, or there is none.
        mapped: The axes of the mesh over which this layout may map.
        is_local: Whether the shapes in a device's computation are those of its own part. They are
            not if XLA partitions the arrays.
    """

    tokens: tuple[Names, ...]
    features: Names = ()
    classes: Names = ()
    mesh: Any = None
    mapped: Names = ()
    is_local: bool = True

    @property
    def token_axes(self) -> Names:
        """The axes of the mesh over which tokens are sharded."""
        return tuple(name for names in self.tokens for name in names)

    @property
    def class_axes(self) -> Names:
        """The axes of the mesh over which each device keeps classes of its own."""
        return tuple(name for name in self.classes if name not in self.token_axes)

    @property
    def gathered_classes(self) -> Names:
        """The axes of the mesh over which classes are gathered."""
        return tuple(name for name in self.classes if name in self.token_axes)

    @property
    def num_gathered(self) -> int:
        """How many shards of the classes are gathered."""
        return self.size(self.gathered_classes) if self.gathered_classes else 1

    @property
    def summed_axes(self) -> Names:
        """The axes of the mesh over which gradients of the kernel are summed, not scattered."""
        gathered = (*self.features, *self.classes)
        return tuple(name for name in self.token_axes if name not in gathered)

    @property
    def outer_sums(self) -> Names:
        """Axes over which tangents must still be summed after :meth:`on_devices`."""
        return ()

    def size(self, names: Iterable[str]) -> int:
        """The product of the sizes of axes of the mesh."""
        return math.prod(self.mesh.shape[name] for name in names)

    def spec(self, kind: Kind) -> PartitionSpec:
        """How an array of this kind is sharded."""
        tokens = [names or None for names in self.tokens]
        features, classes = self.features or None, self.classes or None
        return PartitionSpec(
            *{
                "hidden": [*tokens, None],
                "kernel": [features, classes],
                "bias": [classes],
                "tokens": tokens,
            }[kind]
        )

    def with_batch_axis(self, names: Any) -> Layout:
        """The layout of arrays of tokens that have one more axis in front, sharded over names."""
        return dataclasses.replace(self, tokens=(_names(names), *self.tokens))

    def place(self, kind: Kind, x: Array) -> Array:
        """The array, sharded in this way on those axes of the mesh whose type is Explicit."""
        return self._reshard(x, self.spec(kind))

    def place_back(self, x: Array, like: Array) -> Array:
        """An array of tokens, with each axis sharded like that of ``like``, if that is sharded."""
        pairs = zip(self.tokens, _spec(like), strict=False)
        return self._reshard(x, PartitionSpec(*(old or new or None for new, old in pairs)))

    def _reshard(self, x: Array, spec: PartitionSpec) -> Array:
        if self.mesh is None or not (explicit := axes_of_type(self.mesh, AxisType.Explicit)):
            return x
        kept = [names or None for names in _among(explicit, map(_names, spec))]
        return jax.sharding.reshard(x, NamedSharding(self.mesh, PartitionSpec(*kept)))

    def on_devices(
        self,
        function: Callable[..., list[Array]],
        arrays: Sequence[Array],
        kinds: Sequence[Kind],
        out_kinds: Sequence[Kind],
    ) -> list[Array]:
        """``function(*arrays)``, where each device has its part of arrays and results.

        The first array is hidden. With a mesh, the function gets arrays whose tokens have one axis.
        Where no sharding is known, there is no mesh and XLA partitions the work.
        """
        if self.mesh is None:
            return function(*arrays)

        def on_one_device(*arrays: Array) -> list[Array]:
            tokens = arrays[0].shape[: len(self.tokens)]
            results = zip(function(*map(self._flat, arrays, kinds)), out_kinds, strict=True)
            return [
                r.reshape(*tokens, *r.shape[1:]) if kind in ("hidden", "tokens") else r
                for r, kind in results
            ]

        # With an empty set, JAX maps over all axes except those that a vmap already maps over.
        some = set() if set(self.mapped) == set(self.mesh.axis_names) else set(self.mapped)
        return jax.shard_map(
            on_one_device,
            mesh=self.mesh,
            in_specs=tuple(map(self.spec, kinds)),
            out_specs=list(map(self.spec, out_kinds)),
            axis_names=some,
        )(*arrays)

    def _flat(self, x: Array, kind: Kind) -> Array:
        if kind not in ("hidden", "tokens"):
            return x
        return x.reshape(-1, *x.shape[len(self.tokens) :])

    # What follows is for one device.

    def gather(self, x: Array, features_axis: int, classes_axis: int) -> Array:
        """A device's part of the kernel or bias, joined with those gathered from others."""
        if self.gathered_classes:
            x = lax.all_gather(x, self.gathered_classes, axis=classes_axis, tiled=True)
        if self.features and features_axis >= 0:
            x = lax.all_gather(x, self.features, axis=features_axis, tiled=True)
        return x

    def scatter(self, x: Array, features_axis: int, classes_axis: int, like: Array) -> Array:
        """The transpose of :meth:`gather`: the sum over devices, of which each keeps its part.

        ``like`` is this device's part of the array that ``x`` is the gradient of.
        """
        x = self.sum_gradient("kernel" if features_axis >= 0 else "bias", x, like)
        if self.features and features_axis >= 0:
            x = lax.psum_scatter(x, self.features, scatter_dimension=features_axis, tiled=True)
        if self.gathered_classes:
            axes, options = self.gathered_classes, {"scatter_dimension": classes_axis}
            x = lax.psum_scatter(x, axes, tiled=True, **options)
        return x

    def sum_gradient(self, kind: Kind, x: Array, like: Array) -> Array:
        """The sum over the devices that have the same part of the array of this gradient."""
        axes = self.class_axes
        if kind != "hidden":
            axes = self.summed_axes + (self.features if kind == "bias" else ())
        return lax.psum(x, axes) if axes else x

    def sum_over_classes(self, x: Array) -> Array:
        """The sum over the devices that have the same tokens and other classes."""
        return lax.psum(x, self.class_axes) if self.class_axes else x

    def shard_numbers(self) -> Any:
        """Which shard of the classes each gathered part is, as an array of one axis."""
        gathered = self.gathered_classes
        sizes = [self.size([name]) for name in gathered]
        places = np.unravel_index(np.arange(math.prod(sizes)), sizes) if sizes else ()
        number: Any = np.zeros(math.prod(sizes), np.int32)
        for name in self.classes:
            is_gathered = name in gathered
            index = places[gathered.index(name)] if is_gathered else lax.axis_index(name)
            number = number * self.size([name]) + index
        return jnp.asarray(number, jnp.int32)


@dataclasses.dataclass(frozen=True)
class MappedLayout(Layout):
    """The layout inside of the caller's own ``shard_map``, where arrays are parts already.

    Attributes:
        gathered: The axes that shard the classes over devices with different tokens.
        is_checked: Whether JAX knows which array varies over which axis (``check_vma``). If so, the
            gradients of an array that does not vary are summed here; if not, JAX sums them later.
    """

    gathered: Names = ()
    is_checked: bool = False

    @property
    def class_axes(self) -> Names:
        return tuple(name for name in self.classes if name not in self.gathered)

    @property
    def gathered_classes(self) -> Names:
        return tuple(name for name in self.classes if name in self.gathered)

    @property
    def outer_sums(self) -> Names:
        return () if self.is_checked else self.class_axes

    def size(self, names: Iterable[str]) -> int:
        return math.prod(lax.axis_size(name) for name in names)

    def sum_gradient(self, kind: Kind, x: Array, like: Array) -> Array:
        del kind
        axes = tuple(varying_axes(x) - varying_axes(like) - set(self.gathered))
        return lax.psum(x, axes) if axes else x

    def sum_over_classes(self, x: Array) -> Array:
        return super().sum_over_classes(x) if self.is_checked else x


def plan_layout(
    hidden: Array,
    kernel: Array,
    labels: Array,
    in_specs: InSpecs,
    axis_name: AxisName,
    class_axis_name: AxisName,
) -> Layout:
    """The layout given by ``in_specs``, by an Explicit mesh, or by the caller's ``shard_map``.

    In the caller's ``shard_map``, tokens are sharded over ``axis_name``, and over axes over which
    hidden or labels are known to vary.

    Axes of the mesh that shard only features shard tokens instead, if the number of tokens can be
    divided by them: else these devices would do the same work.

    Raises:
        ValueError: if ``in_specs`` are not two ``PartitionSpec`` that fit mesh and arrays, or if
            there is a ``class_axis_name`` too.
    """
    # Inside of a vmap over an axis that is sharded, the arrays' mesh lacks this axis.
    meshes = [jax.typeof(x).sharding.mesh for x in (hidden, kernel)]
    mesh = next((m for m in meshes if not m.empty), jax.sharding.get_abstract_mesh())
    if in_specs is not None:
        _check_specs(in_specs, mesh, hidden, kernel)
        *tokens, of_features = _padded(in_specs[0], hidden.ndim)
        features, classes = _padded(in_specs[1], 2)
        mapped = _not_manual(mesh)
    elif not mesh.empty and (mapped := axes_of_type(mesh, AxisType.Explicit)):
        *tokens, of_features = _spec(hidden)
        features, classes = _spec(kernel)
    else:
        classes = axis_names(class_axis_name)
        sharding_tokens = {*axis_names(axis_name), *varying_axes(labels), *varying_axes(hidden)}
        gathered = tuple(name for name in classes if name in sharding_tokens)
        is_checked = bool(varying_axes(hidden) | varying_axes(kernel))
        return MappedLayout(
            ((),) * (hidden.ndim - 1),
            classes=classes,
            is_local=not (mesh.empty or _not_manual(mesh)),
            gathered=gathered,
            is_checked=is_checked,
        )
    if class_axis_name is not None:
        raise ValueError(
            f"class_axis_name is for axes of a shard_map around the call; where in_specs or an "
            f"Explicit mesh say how arrays are sharded it must be None, got {class_axis_name!r}"
        )
    sizes = [
        n // math.prod(mesh.shape[a] for a in names)
        for n, names in zip(hidden.shape, tokens, strict=False)
    ]
    others = (*features, *(name for name in of_features if name not in features))
    for name in others:
        if any(name in names for names in (*tokens, classes)):
            continue
        size = mesh.shape[name]
        fitting = [i for i, n in enumerate(sizes) if is_integer(n) and n % size == 0]
        if fitting:
            # An axis that is not sharded yet, if there is one. Not the first one if possible: the
            # caller's shard_map may shard it, and JAX 0.8 cannot mix both kinds on one axis.
            i = max(fitting, key=lambda i: (not tokens[i], i))
            tokens[i], sizes[i] = (*tokens[i], name), sizes[i] // size
    kept = tuple(name for name in features if any(name in names for names in tokens))
    return Layout(tuple(tokens), kept, classes, mesh, mapped)


def _check_specs(in_specs: Any, mesh: Any, hidden: Array, kernel: Array) -> None:
    if (
        not isinstance(in_specs, tuple)
        or len(in_specs) != 2
        or not all(isinstance(spec, PartitionSpec) for spec in in_specs)
    ):
        raise ValueError(
            f"in_specs must be a PartitionSpec of hidden and a PartitionSpec of kernel, "
            f"got {in_specs!r}"
        )
    if mesh.empty:
        raise ValueError("in_specs need a mesh: call this inside of jax.set_mesh(mesh), got none")
    for name, x, spec in (("hidden", hidden, in_specs[0]), ("kernel", kernel, in_specs[1])):
        if len(spec) > x.ndim:
            raise ValueError(f"in_specs must fit {name} of shape {x.shape}, got {spec}")
        axes = [n for names in spec for n in _names(names)]
        known = _not_manual(mesh)
        if not set(axes) <= set(known):
            raise ValueError(f"in_specs of {name} must name axes of the mesh, {known}, got {spec}")
        sharding = jax.typeof(x).sharding
        explicit = axes_of_type(sharding.mesh, AxisType.Explicit)
        if _among(explicit, _padded(spec, x.ndim)) != _among(explicit, _spec(x)):
            raise ValueError(
                f"in_specs of {name} must be None or what the Explicit mesh shows, "
                f"{sharding.spec}, got {spec}"
            )
        for size, names in zip(x.shape, spec, strict=False):
            shards = math.prod(mesh.shape[n] for n in _names(names))
            if shards > 1 and size % shards:
                raise ValueError(
                    f"in_specs must cut each axis of {name} into equal shards, got {spec} for "
                    f"shape {x.shape}, whose axis of {size} has {shards} shards"
                )


def _names(names: Any) -> Names:
    """The axes of the mesh that an entry of a PartitionSpec names."""
    if names is None or names is PartitionSpec.UNCONSTRAINED:
        return ()
    return tuple(names) if isinstance(names, tuple) else (names,)


def _padded(spec: Any, ndim: int) -> list[Names]:
    return [*map(_names, spec), *[()] * (ndim - len(spec))]


def _spec(x: Array) -> list[Names]:
    """Over which axes of an Explicit mesh each axis of an array is sharded."""
    return _padded(jax.typeof(x).sharding.spec, x.ndim)


def _among(axes: Names, sharded: Iterable[Names]) -> list[Names]:
    """Of the names that shard each axis of an array, those that are among these axes."""
    return [tuple(name for name in names if name in axes) for names in sharded]


def axes_of_type(mesh: Any, kind: AxisType) -> Names:
    """The axes of a mesh that are of one type."""
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, type_ in pairs if type_ is kind)


def _not_manual(mesh: Any) -> Names:
    """The axes of a mesh except those over which the caller's ``shard_map`` maps already."""
    return tuple(n for n in mesh.axis_names if n not in axes_of_type(mesh, AxisType.Manual))
