"""What a sweep measures: its settings and the points they make."""

import dataclasses
import itertools
import math
from typing import Any, Literal

from megjax.configs import require, require_positive_integers
from megjax.metrics.inception import RESIZINGS
from megjax.runtime import check_seed
from megjax.system import MODES, Scheme, find_scheme, latent_symbols, split_name
from megjax.units import check_snr_db

AXES = {"rate": 1.0, "device_steps": 0, "server_steps": 0}
"""Options of schemes that a sweep varies, and what a point without that option says."""
_SHAPES = ((64, 64, 3), (8, 8, 4)), ((512, 512, 3), (64, 64, 4))
"""Shapes of images and their latents by which schemes are found to have equally many symbols."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Every combination of the lists is a point, but for what a scheme does not have (a rate, device steps)."""

    schemes: tuple[str, ...] = ("seed", "latent", "latent-wiener", "centralized", "centralized-coded")
    """Names of megjax.system.SCHEMES, with options as in seed:mapping=interleaved."""
    snr_db: tuple[float, ...] = (-10.0, -5.0, 0.0, 5.0, 10.0, 20.0)
    """SNRs of the link in dB, 1 / noise variance."""
    rates: tuple[float, ...] = (4.0,)
    """Compression ratios, of schemes that have one: seeds and their bound."""
    fadings: tuple[str, ...] = ("rayleigh",)
    """Names of megjax.channel.FADINGS, with a parameter as in rician:6 (K in dB); or module:attribute of your own."""
    policies: tuple[str, ...] = ("codec",)
    """Names of megjax.power.POLICIES, ppo:FOLDER, or module:attribute of your own; codec is the code's own load."""
    modes: tuple[str, ...] = ("equal_energy", "equal_power")
    """equal_energy (P = K_latent / K), equal_power (P = 1)."""
    peak_powers: tuple[float, ...] = (math.inf,)
    """Largest powers of a block in units of P, where a policy allocates."""
    device_steps: tuple[int, ...] = (1, 2, 5, 10)
    """Denoising steps of the device, of schemes in which it denoises."""
    server_steps: tuple[int, ...] = (0,)
    """Steps after which the server sends, of schemes that split them; 0 for all."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of captions, images and link."""
    models: tuple[str, ...] = ("scenes",)
    """"scenes" (bundled) or folders in the diffusers layout."""
    codec: str | None = None
    """Codec of the seed: a folder of train.codec, or module:attribute of your own; default: the model's."""
    prompts: str = "scenes"
    """"scenes" (held-out captions) or a text file, one prompt a line."""
    metrics: Literal["image", "latent"] = "image"
    """image: PSNR, SSIM, Frechet distance, caption accuracy and the latents' error; latent: the latter alone."""
    num_training: int = 10_000
    """Training latents, for schemes that are fitted on some."""
    num_images: int = 2000
    """Images, one prompt each."""
    realisations: int = 4
    """Realisations of the link for each image."""
    num_blocks: int = 16
    """Fading blocks per image."""
    steps: int = 25
    """Denoising steps of the server."""
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 turns it off."""
    inception: str | None = None
    """Safetensors file with the Inception weights of FID, for the columns fid and kid; not shipped."""
    inception_resizing: str = "bilinear"
    """How images come to the size of Inception: bilinear (the original FID) or clean (as clean-fid)."""

    def __post_init__(self):
        require_positive_integers(self, "sweep", ("num_images", "num_training", "realisations", "num_blocks", "steps"))
        for name in ("num_images", "num_training"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "2 or more")
        lists = ("schemes", "snr_db", "rates", "fadings", "policies", "modes", "peak_powers", "device_steps")
        for name in (*lists, "server_steps", "seeds", "models"):
            values = getattr(self, name)
            distinct = 0 < len(values) == len(set(values))
            require(distinct, name, values, "one value or more, all different")
        unknown = [mode for mode in self.modes if mode not in MODES]
        require(not unknown, "modes", unknown[0] if unknown else None, f"among {MODES}")
        check_snr_db(self.snr_db)
        require_positive_integers(self, "sweep", ("device_steps",))
        fits = all(isinstance(steps, int) and 0 <= steps <= self.steps for steps in self.server_steps)
        require(fits, "server_steps", self.server_steps, f"from 0 (all) to steps, {self.steps}")
        require(all(rate >= 1 for rate in self.rates), "rates", self.rates, "1 or more")
        require(all(peak > 0 for peak in self.peak_powers), "peak_powers", self.peak_powers, "positive")
        known = self.inception_resizing in RESIZINGS
        require(known, "inception_resizing", self.inception_resizing, f"one of {RESIZINGS}")
        require(math.isfinite(self.guidance), "guidance", self.guidance, "finite")
        require(self.metrics in ("image", "latent"), "metrics", self.metrics, "'image' or 'latent'")
        for seed in self.seeds:
            whole = isinstance(seed, int) and not isinstance(seed, bool)
            require(whole, "seeds", seed, "an integer")
            check_seed(seed)
        for name in self.schemes:
            kind, own = split_name(name, "schemes")
            require(not own.keys() & AXES.keys(), "schemes", name, f"without its {', '.join(AXES)}")
            measured = "ones with latents, for latent metrics" if self.metrics == "latent" else "ones with images"
            require(kind.result != ("images" if self.metrics == "latent" else "error"), "schemes", name, measured)
        first = {"rate": self.rates[0], "device_steps": self.device_steps[0], "server_steps": None}
        made = [find_scheme(name, "schemes", first) for name in self.schemes]
        again = next((one for i, one in enumerate(made) if one in made[:i]), None)
        require(again is None, "schemes", self.schemes, f"all different, unlike two that are {again}")

    def shared(self) -> dict[str, Any]:
        """What all points of a results folder have in common."""
        names = ("prompts", "metrics", "num_images", "num_training", "realisations", "num_blocks", "steps", "guidance")
        return {name: getattr(self, name) for name in names}

    def points(self) -> list["Point"]:
        """All points in the order of the lists, as asked for; several may be the same physics."""
        axes = (self.models, self.seeds, self.schemes, self.fadings, self.modes, self.rates, self.policies)
        rest = (self.peak_powers, self.device_steps, self.server_steps, self.snr_db)
        made = (Point(*values).relevant() for values in itertools.product(*axes, *rest))
        return list(dict.fromkeys(made))


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of the results."""

    model: str
    seed: int
    scheme: str
    fading: str
    mode: str
    rate: float
    policy: str
    peak_power: float
    device_steps: int
    server_steps: int
    snr_db: float

    def made(self) -> Scheme:
        """The scheme with the point's options."""
        return find_scheme(self.scheme, defaults={axis: getattr(self, axis) or None for axis in AXES})

    def relevant(self) -> "Point":
        """The point without settings that its scheme does not have: rate, device steps, a load of its own."""
        scheme = split_name(self.scheme)[0]
        policy = self.policy if scheme.sends_seed or self.policy != "codec" else "equal"
        axes = {axis: getattr(self, axis) if axis in scheme.options() else none for axis, none in AXES.items()}
        return dataclasses.replace(
            self,
            **axes | {"rate": float(axes["rate"])},
            policy=policy if scheme.allocates else "equal",
            peak_power=float(self.peak_power) if scheme.allocates else math.inf,
            snr_db=float(self.snr_db),
        )

    def physics(self) -> "Point":
        """The point that is measured.

        Where K = K_latent, equal energy and equal power are the same; where nothing is sent, fading and SNR too.
        """
        scheme = self.made()
        if not scheme.transmits:
            return dataclasses.replace(self, mode="equal_power", fading="rayleigh", snr_db=0.0)
        same = all(scheme.num_symbols(image, latent) == latent_symbols(latent) for image, latent in _SHAPES)
        return dataclasses.replace(self, mode="equal_power") if same else self
