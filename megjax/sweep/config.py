"""What a sweep measures: its settings, the points they make, and users' own parts by import path."""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from megjax.channel import (
    GaussMarkovFading,
    JakesFading,
    NakagamiFading,
    NoFading,
    RayleighFading,
    RicianFading,
)
from megjax.configs import require, require_positive_integers
from megjax.metrics.inception import RESIZINGS
from megjax.power import POLICIES
from megjax.runtime import check_seed
from megjax.system import MODES
from megjax.units import check_snr_db, db_to_linear

FADINGS = {
    "rayleigh": (RayleighFading, None),
    "awgn": (NoFading, None),
    "rician": (lambda k_db: RicianFading(float(db_to_linear(k_db))), "K in dB"),
    "nakagami": (NakagamiFading, "m"),
    "jakes": (JakesFading, "Doppler shift in cycles per block"),
    "gauss-markov": (GaussMarkovFading, "correlation"),
}
"""Laws by name, and what the number after a colon means, as in "rician:6"."""
NAMES = {
    "seed": ("seed", "learned"),
    "seed-klt": ("seed", "klt"),
    "latent": ("latent", "symbol"),
    "latent-wiener": ("latent", "wiener"),
    "split": ("split", "latent"),
    "split-seed": ("split", "seed"),
    "prompt": ("prompt", "device"),
    "centralized": ("centralized", "analog"),
    "centralized-qam": ("centralized", "qam"),
    "centralized-coded": ("centralized", "coded"),
    "opta": ("opta", ""),
}
"""Names of schemes in a sweep -> scheme and variant of `megjax.system`; "opta" is the Gaussian limit of the latent."""
LATENT_METRICS = "latent"


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Every combination of the lists is a point, but for what a scheme does not have (a rate, device steps)."""

    schemes: tuple[str, ...] = ("seed", "latent", "latent-wiener", "centralized", "centralized-coded")
    """seed, seed-klt, latent, latent-wiener, split, split-seed, prompt (nothing sent), centralized (analog),
    centralized-qam, centralized-coded, opta."""
    snr_db: tuple[float, ...] = (-10.0, -5.0, 0.0, 5.0, 10.0, 20.0)
    """SNRs of the link in dB, 1 / noise variance."""
    rates: tuple[float, ...] = (4.0,)
    """Compression ratios of the seed (seed, seed-klt, split-seed, opta)."""
    fadings: tuple[str, ...] = ("rayleigh",)
    """rayleigh, awgn, rician:K_DB, nakagami:M, jakes:DOPPLER, gauss-markov:RHO, or module:attribute of your own."""
    policies: tuple[str, ...] = ("codec",)
    """equal, static, codec (the code's own load), inversion, waterfilling, waterfilling_clairvoyant, clairvoyant, dp,
    ppo, or module:attribute of your own."""
    modes: tuple[str, ...] = ("equal_energy", "equal_power")
    """equal_energy (P = K_latent / K), equal_power (P = 1)."""
    peak_powers: tuple[float, ...] = (math.inf,)
    """Largest powers of a block in units of P, where a policy allocates."""
    device_steps: tuple[int, ...] = (1, 2, 5, 10)
    """Denoising steps of the device (split, split-seed, prompt)."""
    server_steps: tuple[int, ...] = (0,)
    """Steps after which the server sends (split); 0 for all."""
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
    modulation: str = "16qam"
    """Of the uncoded pixels."""
    inception: str | None = None
    """Safetensors file with the Inception weights of FID, for the columns fid and kid; not shipped."""
    inception_resizing: str = "bilinear"
    """How images come to the size of Inception: bilinear (the original FID) or clean (as clean-fid)."""

    def __post_init__(self):
        require_positive_integers(self, "sweep", ("num_images", "realisations", "num_blocks", "steps"))
        require(self.num_images >= 2, "num_images", self.num_images, "2 or more")
        lists = ("schemes", "snr_db", "rates", "fadings", "policies", "modes", "peak_powers", "device_steps")
        for name in (*lists, "server_steps", "seeds", "models"):
            values = getattr(self, name)
            distinct = 0 < len(values) == len(set(values))
            require(distinct, name, values, "one value or more, all different")
        for name, allowed in (("schemes", tuple(NAMES)), ("modes", MODES)):
            unknown = [value for value in getattr(self, name) if value not in allowed]
            require(not unknown, name, unknown[0] if unknown else None, f"among {allowed}")
        check_snr_db(self.snr_db)
        require_positive_integers(self, "sweep", ("device_steps",))
        fits = all(isinstance(steps, int) and 0 <= steps <= self.steps for steps in self.server_steps)
        require(fits, "server_steps", self.server_steps, f"from 0 (all) to steps, {self.steps}")
        require(all(peak > 0 for peak in self.peak_powers), "peak_powers", self.peak_powers, "positive")
        known = self.inception_resizing in RESIZINGS
        require(known, "inception_resizing", self.inception_resizing, f"one of {RESIZINGS}")
        require(math.isfinite(self.guidance), "guidance", self.guidance, "finite")
        require(self.metrics in ("image", "latent"), "metrics", self.metrics, "'image' or 'latent'")
        for seed in self.seeds:
            whole = isinstance(seed, int) and not isinstance(seed, bool)
            require(whole, "seeds", seed, "an integer")
            check_seed(seed)
        pixels = [name for name in self.schemes if name.startswith("centralized")]
        require(self.metrics == "image" or not pixels, "schemes", pixels, "ones with latents, for latent metrics")
        opta = "opta" in self.schemes and self.metrics == "image"
        require(not opta, "schemes", "opta", "left out of image metrics: it is a limit of the latents' error")

    def shared(self) -> dict[str, Any]:
        """What all points of a results folder have in common."""
        names = ("prompts", "metrics", "num_images", "realisations", "num_blocks", "steps", "guidance", "modulation")
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

    @property
    def kind(self) -> tuple[str, str]:
        """Scheme and variant of `megjax.system`."""
        return NAMES[self.scheme]

    def relevant(self) -> "Point":
        """The point without settings that its scheme does not have: rate, device steps, a load of its own."""
        scheme, variant = self.kind
        seed = self.sends_seed
        policy = self.policy if seed or self.policy != "codec" else "equal"
        return dataclasses.replace(
            self,
            rate=float(self.rate) if seed or scheme == "opta" else 1.0,
            policy="equal" if scheme in ("opta", "prompt") else policy,
            peak_power=math.inf if scheme == "prompt" else float(self.peak_power),
            device_steps=self.device_steps if scheme in ("split", "prompt") else 0,
            server_steps=self.server_steps if (scheme, variant) == ("split", "latent") else 0,
            snr_db=float(self.snr_db),
        )

    @property
    def sends_seed(self) -> bool:
        """Whether a codec's seed crosses the link."""
        return self.kind[0] == "seed" or self.kind[1] == "seed"

    def physics(self) -> "Point":
        """The point that is measured.

        Where K = K_latent, equal energy and equal power are the same; SNR and fading do not matter to `prompt`.
        """
        if self.kind[0] == "prompt":
            return dataclasses.replace(self, mode="equal_power", fading="rayleigh", snr_db=0.0)
        same = self.kind[0] in ("latent", "split", "seed", "opta") and self.rate == 1.0
        return dataclasses.replace(self, mode="equal_power") if same else self


def digest(values: Any) -> str:
    """SHA-256 of what JSON makes of `values`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def load_object(path: str, setting: str, method: str) -> Any:
    """The object at `module:attribute`, which has `method`; a class or a function is called without arguments first.

    ValueError naming the setting when there is no such module or attribute, or the object lacks the method.
    """
    module, _, attribute = path.partition(":")
    require(bool(module and attribute), setting, path, "a known name or module:attribute")
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{setting} is {path!r}, which cannot be imported: {error}") from None
    if inspect.isclass(value) or (callable(value) and not hasattr(value, method)):
        try:
            value = _made(value)
        except TypeError as error:
            raise ValueError(f"{setting} is {path!r}, which cannot be made without arguments: {error}") from None
    require(callable(getattr(value, method, None)), setting, path, f"an object with a method {method!r}")
    return value


@functools.cache
def _made(factory: Any) -> Any:
    """One object for all points, so that they share a compiled program."""
    return factory()


def find_fading(name: str) -> Any:
    """The law of a name or import path; ValueError naming what is wrong with it."""
    plain, colon, number = name.partition(":")
    if plain not in FADINGS:
        known = ", ".join(f"{key}{':' + what if what else ''}" for key, (_, what) in FADINGS.items())
        require(bool(colon), "fadings", name, f"among {known}, or module:attribute")
        return load_object(name, "fadings", "sample")
    make, meaning = FADINGS[plain]
    if meaning is None:
        require(not colon, "fadings", name, f"{plain} alone, it has no parameter")
        return make()
    try:
        return make(float(number))
    except ValueError as error:
        raise ValueError(f"fadings is {name!r}; after the colon comes the {meaning} ({error})") from None


def find_policy(name: str) -> Any:
    """A name of `megjax.power.POLICIES` as it is, or the policy at an import path."""
    setting = f"policies (of {', '.join(POLICIES.names)}, or module:attribute)"
    return name if name in POLICIES else load_object(name, setting, "allocate")


def part_digest(name: str, value: Any) -> str:
    """What tells a part of this name from another; of a user's own, the text of its module and its attributes too.

    What that module imports from elsewhere is not looked at.
    """
    plain, own, _ = name.partition(":")
    if not own or plain in FADINGS:
        return object_digest(value)
    file = getattr(sys.modules.get(plain), "__file__", None)
    text = "" if file is None else Path(file).read_text()
    return digest([_source(type(value)), text, _state(value, ())])


def _state(value: Any, above: tuple[int, ...]) -> Any:
    """Everything that an object is made of, down to arrays, the same in every process."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        return [str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()]
    if id(value) in above:
        return "above"
    inner = (*above, id(value))
    if isinstance(value, dict):
        return sorted((str(name), digest(_state(item, inner))) for name, item in value.items())
    if isinstance(value, list | tuple):
        return [_state(item, inner) for item in value]
    kind = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
    attributes = {} if kind is value else getattr(value, "__dict__", {})
    return [f"{kind.__module__}.{kind.__qualname__}", _state(attributes, inner)]


def object_digest(value: Any) -> str:
    """What tells one object from another: its class's source and its arrays."""
    found = hashlib.sha256(_source(type(value)).encode())
    for leaf in jax.tree.leaves(value):
        found.update(np.asarray(leaf).tobytes() if isinstance(leaf, np.ndarray | jax.Array) else repr(leaf).encode())
    return found.hexdigest()


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return repr(kind)
