"""Valid arguments for any loss, drawn from the annotations of its signature."""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlosses._typing import ArraySpec

CLASSES = 6
IMPOSSIBLE = {"class id": (-1, CLASSES, -CLASSES, 2**31 - 1)}
NOT_A_NUMBER = (np.nan, np.inf, -np.inf)


@dataclasses.dataclass(eq=False)  # So that it can be a key.
class Case:
    """A loss, the inputs that it takes, and the shape of its losses."""

    loss: Callable[..., Any]
    inputs: dict[str, ArraySpec]
    batch: tuple[int, ...] = (4, 3)
    is_lifted: bool = False
    is_coupled: bool = False  # A loss depends on other rows.

    @property
    def losses_shape(self) -> tuple[int, ...]:
        per_sample = any("elements" in spec.inner for spec in self.inputs.values())
        return self.batch[:1] if per_sample else self.batch

    def shape(self, name: str, batch: tuple[int, ...] | None = None) -> tuple[int, ...]:
        spec = self.inputs[name]
        inner = () if spec.inner == ("elements",) else (CLASSES,) * len(spec.inner)
        return inner if spec.shared else (self.batch if batch is None else batch) + inner

    def draw(self, seed: int = 0, batch: tuple[int, ...] | None = None) -> list[Any]:
        """What all losses share is the same whatever the seed."""
        rng = np.random.default_rng(seed)
        return [
            _draw(np.random.default_rng(9) if h.shared else rng, h.domain, self.shape(name, batch))
            for name, h in self.inputs.items()
        ]

    def of_each(self, function: Callable[[Any], Any], values: list[Any]) -> list[Any]:
        """``function`` of the inputs but those that all losses share."""
        spec = self.inputs.values()
        return [v if h.shared else function(v) for v, h in zip(values, spec, strict=True)]

    def weights(self, seed: int = 0) -> Any:
        """Weights of the losses' shape, with a zero in row 0 and a whole row 1 of zeros."""
        weights = np.random.default_rng(seed + 1).uniform(0.5, 2.0, self.losses_shape)
        weights.flat[0] = 0
        weights[1] = 0
        return jnp.asarray(weights, jnp.float32)

    def hide(self, values: list[Any], weights: Any, rubbish: float, label: int) -> list[Any]:
        """The inputs with rubbish wherever the weight is zero."""
        hidden = []
        for value, spec in zip(values, self.inputs.values(), strict=True):
            if spec.shared:
                hidden.append(value)
                continue
            mask = np.asarray(weights == 0)
            mask = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
            filler = label if spec.domain == "class id" else rubbish
            hidden.append(jnp.asarray(np.where(mask, np.asarray(filler, value.dtype), value)))
        return hidden

    @property
    def computes(self) -> bool:
        """Whether it computes, with what its losses share, more than it reads."""
        return any(spec.shared for spec in self.inputs.values())

    @property
    def floats(self) -> tuple[int, ...]:
        """Positions of the inputs that have derivatives."""
        return tuple(i for i, h in enumerate(self.inputs.values()) if h.domain != "class id")


def cases(package: ModuleType) -> dict[str, Case]:
    """Every public loss of a package: what takes arrays, ``weights`` and ``reduction``."""
    found = {}
    for name, value in vars(package).items():
        if name.startswith("_") or not callable(value) or inspect.isclass(value):
            continue
        hints = typing.get_type_hints(inspect.unwrap(value), include_extras=True)
        spec = {k: h.__metadata__[0] for k, h in hints.items() if hasattr(h, "__metadata__")}
        if spec.pop("weights", None) is not None and "reduction" in hints:
            found[name] = Case(value, spec)
    return found


def gaussian(mean: Any, labels: Any, variance: Any) -> Any:
    return (jnp.log(variance) + jnp.square(labels - mean) / variance) / 2


def centred(predictions: Any, labels: Any) -> Any:
    errors = predictions - labels
    return jnp.square(errors - jnp.mean(errors, 0, keepdims=True))


def root(x: Any, y: Any) -> Any:
    return jnp.sqrt(jnp.square(x - y))


def lifted_cases(package: ModuleType) -> dict[str, Case]:
    """Functions written elsewhere: of three inputs, of other rows, and of a steep derivative."""
    real, probability = ArraySpec("real"), ArraySpec("probability")
    return {
        "weighted(gaussian)": Case(
            package.weighted(gaussian, num_inputs=3),
            {"mean": real, "labels": real, "variance": probability},
            is_lifted=True,
        ),
        "weighted(centred)": Case(
            package.weighted(centred),
            {"predictions": real, "labels": real},
            is_lifted=True,
            is_coupled=True,
        ),
        "weighted(root)": Case(package.weighted(root), {"x": real, "y": real}, is_lifted=True),
    }


def _draw(rng: np.random.Generator, domain: str, shape: tuple[int, ...]) -> Any:
    match domain:
        case "class id":
            return jnp.asarray(rng.integers(0, CLASSES, shape), jnp.int32)
        case "real" | "logit":
            values = rng.normal(0, 3, shape)
        case "probability":
            values = rng.uniform(0.05, 0.95, shape)
        case "unit vector":
            values = rng.normal(size=shape)
            values /= np.linalg.norm(values, axis=-1, keepdims=True)
        case "distribution":
            values = rng.dirichlet(np.ones(shape[-1]), shape[:-1])
        case _:
            raise NotImplementedError(f"say how to draw a {domain}")
    return jnp.asarray(values, jnp.float32)


def certain(value: Any, domain: str) -> Any:
    """The value, or of a label that is a probability or a distribution, the nearest certain one."""
    match domain:
        case "probability":
            return jnp.round(value)
        case "distribution":
            return (value == jnp.max(value, -1, keepdims=True)).astype(value.dtype)
        case _:
            return value


def extremes(domain: str) -> tuple[float, ...]:
    """Values at which a loss has to stay finite."""
    match domain:
        case "class id":
            return (0, CLASSES - 1)
        case "logit":
            return (-1e4, -80.0, 0.0, 80.0, 1e4)
        case "real":
            return (-1e4, 0.0, 1e4)
        case _:
            return (0.0, 1.0)
