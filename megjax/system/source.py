"""Constants of the training data that both ends of the link know."""

import dataclasses
import warnings
from pathlib import Path

from megjax.configs import from_mapping, read_json, require, write_json

STATISTICS_NAME = "source_statistics.json"


@dataclasses.dataclass(frozen=True)
class SourceStatistics:
    """Per-channel mean and standard deviation of the training set's pixels (in [0, 1]) and scaled latents.

    Both ends know them: they bring what is sent to zero mean and unit variance, hence symbols to unit mean power over
    the data.
    """

    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.25, 0.25, 0.25)
    latent_mean: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    latent_std: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self):
        for kind in ("pixel", "latent"):
            mean, std = getattr(self, f"{kind}_mean"), getattr(self, f"{kind}_std")
            require(len(mean) == len(std), f"{kind}_std", std, f"as long as {kind}_mean ({len(mean)})")
            require(all(value > 0 for value in std), f"{kind}_std", std, "positive")

    @classmethod
    def load(cls, folder: Path, latent_channels: int = 4) -> "SourceStatistics":
        """Read them from a model folder; a model without them gets nominal ones, with a warning."""
        path = Path(folder) / STATISTICS_NAME
        if not path.is_file():
            warnings.warn(
                f"{folder} has no {STATISTICS_NAME}: pixels are taken as 0.5 +- 0.25 and latents as unit Gaussian, so "
                "transmit power is only nominally 1",
                stacklevel=2,
            )
            return cls(latent_mean=(0.0,) * latent_channels, latent_std=(1.0,) * latent_channels)
        return from_mapping(cls, read_json(path), source=str(path))

    def save(self, folder: Path) -> None:
        """Write them to a model folder."""
        write_json(Path(folder) / STATISTICS_NAME, dataclasses.asdict(self))
