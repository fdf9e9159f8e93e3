"""What a metric of sweeps is, and the table of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from megjax.configs import require
from megjax.metrics.bootstrap import bootstrap_interval
from megjax.registry import Record, Registry

NEEDS = ("images", "error", "captions", "scenenet", "inception")
"""What metrics can need: received and reference images, the latents' squared error, attributes that the captions state,
and feature networks."""


class Received:
    """What devices have received, for r realisations of each of b images; exists while a program is traced.

    Networks run once however many metrics ask for their features.
    """

    def __init__(
        self,
        images: Float[Array, "b r H W 3"] | None = None,
        references: Float[Array, "b H W 3"] | None = None,
        error: Float[Array, "b r"] | None = None,
        captions: tuple[Int[Array, "b a"], Bool[Array, "b a"]] | None = None,
        networks: dict[str, Any] | None = None,
    ):
        """`error` is the squared error of the latents, `captions` the attributes and which of them are stated.

        `networks` are functions of images [n H W 3] by name.
        """
        self.images, self.references, self.error, self.captions = images, references, error, captions
        self.networks, self._outputs = networks or {}, {}

    def has(self, need: str) -> bool:
        """Whether one of `NEEDS` is there."""
        if need in ("images", "error", "captions"):
            return getattr(self, need) is not None
        return need in self.networks and self.images is not None

    def output(self, network: str) -> Any:
        """A network's output for all received images [b r], flattened to one axis."""
        if network not in self._outputs:
            self._outputs[network] = self.networks[network](self.images.reshape(-1, *self.images.shape[2:]))
        return self._outputs[network]

    @property
    def size(self) -> tuple[int, int]:
        """b and r."""
        return (self.images if self.error is None else self.error).shape[:2]


@runtime_checkable
class References(Protocol):
    """What values of a whole point are reduced with."""

    total_variance: float
    """tr Cov(z) of the latents."""
    stated: Bool[np.ndarray, "n a"] | None
    """Which attributes each caption states."""

    def reference_features(self, network: str) -> Float[np.ndarray, "n f"]:
        """Features of pictures that the received ones are compared with as a set."""


Reduce = Callable[[str, np.ndarray, References], dict[str, Any]]


def mean_over_images(
    name: str, values: Float[np.ndarray, "n r"], references: References, weights: Any = None
) -> dict[str, Any]:
    """Columns of the mean, its 95 % interval over images, and the mean of every image."""
    del references
    values = values.astype(np.float64)
    per_image = values.mean(1)
    low, high = bootstrap_interval(values, weights=weights)
    row = {name: float(np.average(per_image, weights=weights)), f"{name}_low": low, f"{name}_high": high}
    return row | {f"{name}_values": per_image.astype(np.float32).tolist()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric(Record):
    """A metric by the name of its column."""

    compute: Callable[[Received], Float[Array, "b r *f"]]
    """Values of every reception, in a compiled program."""
    needs: tuple[str, ...]
    """Of `NEEDS`; a point that lacks one of them does not have the column."""
    reduce: Reduce = mean_over_images
    """`reduce(name, values [n r ...], references)`: columns of a point."""
    collects: str | None = None
    """Name that the values are collected under where several metrics share them; else its own name."""
    form: str = ".3f"
    """Format of its numbers in tables."""
    log_scale: bool = False
    """Whether its axis is logarithmic in plots."""
    panel: bool = True
    """Whether pictures of sweeps have a panel of it."""

    @property
    def collected(self) -> str:
        """Name that the values are collected under."""
        return self.collects or self.name


def _check(metric: Metric) -> None:
    """ValueError for a metric that could never be measured."""
    unknown = [need for need in metric.needs if need not in NEEDS]
    require(not unknown, f"needs of metric {metric.name!r}", metric.needs, f"of {NEEDS}")


METRICS: Registry[Metric] = Registry("metric", "megjax.metrics", "megjax.metrics", _check)


def measurable(received_has: Callable[[str], bool]) -> tuple[Metric, ...]:
    """The metrics all of whose needs are met."""
    return tuple(metric for metric in METRICS if all(received_has(need) for need in metric.needs))
