"""Measuring the points of a sweep: latents are generated once a model and seed, and reused by every point."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from megjax.codec import SeedCodec
from megjax.configs import require
from megjax.data import scenes
from megjax.data.latents import generate, model_digest, scene_captions
from megjax.diffusion import generation
from megjax.diffusion.layout import locate
from megjax.diffusion.pipeline import StableDiffusion
from megjax.keys import from_seed
from megjax.metrics import Inception, SceneNet
from megjax.sweep.config import Point, SweepConfig
from megjax.sweep.identity import (
    array_digest,
    digest,
    load_object,
    object_digest,
    sampler_identity,
    sweep_fading,
    sweep_policy,
)
from megjax.sweep.receive import PICTURES, Batch, Common, Network, devices_for, receive
from megjax.system import (
    BlockWeights,
    Parts,
    Scheme,
    Simulator,
    Source,
    SourceStatistics,
    SystemConfig,
    make_simulator,
    split_name,
)
from megjax.units import linear_to_db

SHARD = 100
"""Latents in a file of a cache."""
IMAGE_CODEC_SCENES = 400
"""Training pictures that the coded image's quality and rate are chosen on."""
TABLE_KEY, RENDER_KEY = 2**32 - 1, 2**32 - 2
"""Streams of a seed beside those of its images."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is asked for, and what is known of how the pictures should look."""

    texts: list[str]
    labels: np.ndarray | None = None
    stated: np.ndarray | None = None
    """Attributes [n a] of scenes, and which of them the caption states."""


def read_prompts(config: SweepConfig, seed: int) -> Prompts:
    """Held-out captions of scenes, or the first lines of a text file; ValueError if it has too few."""
    if config.prompts == "scenes":
        texts = scene_captions(-(-config.num_images // 100) * 100, seed + 1, "held_out")
        parsed = [scenes.parse_caption(text).labels() for text in texts[: config.num_images]]
        labels, stated = (np.stack(parts) for parts in zip(*parsed, strict=True))
        return Prompts(texts, labels, stated)
    try:
        lines = [line.strip() for line in Path(config.prompts).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text file"
        raise ValueError(f"prompts is {config.prompts!r}, which cannot be read: {reason}") from None
    count = len(lines)
    require(count >= config.num_images, "num_images", config.num_images, f"at most {count}, the prompts of the file")
    return Prompts(lines[: config.num_images])


class Kept:
    """Results of calls that take long, each made once by its arguments."""

    def __init__(self):
        self._made: dict[Any, Any] = {}

    def get(self, make: Callable[[], Any], *arguments: Any) -> Any:
        """The result of `make`, which is called unless one of these arguments is there."""
        if arguments not in self._made:
            self._made[arguments] = make()
        return self._made[arguments]


@dataclasses.dataclass(eq=False)
class Bench:
    """One model and one seed, with everything that its points are measured with."""

    config: SweepConfig
    pipe: StableDiffusion
    codec: Any
    statistics: SourceStatistics
    networks: tuple[Network, ...]
    """Feature networks of the metrics."""
    seed: int
    prompts: Prompts
    cache: Path
    """Folder of the latents."""
    training: Path
    """Folder of the training latents."""
    batch: int
    """Receptions at a time."""
    kept: Kept = dataclasses.field(default_factory=Kept)

    @property
    def key(self):
        """PRNG key of the link, derived from the seed."""
        return from_seed(self.seed)

    @property
    def stated(self) -> np.ndarray | None:
        """Which attributes [n a] each caption states; None for prompts that are no captions of scenes."""
        return self.prompts.stated

    @functools.cached_property
    def ids(self) -> np.ndarray:
        return self.pipe.tokenize(self.prompts.texts[: self.config.num_images])

    @functools.cached_property
    def latents(self) -> np.ndarray:
        """The server's latents, generated or from the cache; ValueError as `megjax.data.latents.generate`."""
        options = {"num_steps": self.config.steps, "guidance_scale": self.config.guidance}
        made = generate(self.pipe, self.prompts.texts, self.cache, seed=self.seed + 1, **options)
        return made[: self.config.num_images]

    @functools.cached_property
    def training_latents(self) -> np.ndarray:
        """Latents of training captions, for what schemes fit; generated or from the cache, the same for all seeds."""
        num = self.config.num_training
        captions = scene_captions(-(-num // SHARD) * SHARD, 0, "train")
        options = {"num_steps": self.config.steps, "guidance_scale": self.config.guidance, "shard_size": SHARD}
        return generate(self.pipe, captions, self.training, seed=0, **options)[:num]

    @functools.cached_property
    def images(self) -> np.ndarray:
        """The server's images."""
        latents, size = jnp.asarray(self.latents), self.batch
        parts = [self.pipe.decode(latents[i : i + size]) for i in range(0, len(latents), size)]
        return np.concatenate([np.asarray(part) for part in parts])

    @functools.cached_property
    def total_variance(self) -> float:
        """tr Cov(z), the denominator of NMSE: over the codec's training latents, else over these."""
        if isinstance(self.codec, SeedCodec) and self.codec.config.transform == "klt":
            scale = nnx.merge(self.codec.graph, self.codec.state).scale[...]
            return self.codec.config.num_tiles * float(np.square(scale).sum())
        return float(self.latents.reshape(len(self.latents), -1).var(0).sum())

    def reference_features(self, network: str) -> np.ndarray:
        """Features of renders of the captions by a network of this name; of the server's images for other prompts."""
        return self.kept.get(lambda: self._reference_features(network), "features", network)

    def _reference_features(self, name: str) -> np.ndarray:
        images = self.images if self.prompts.labels is None else self._renders("held_out", self.config.num_images)
        parts = range(0, len(images), self.batch)
        network = next(network for network in self.networks if network.name == name)
        features = jax.jit(lambda state, x: nnx.merge(network.graph, state).features(x))
        return np.concatenate([np.asarray(features(network.state, images[i : i + self.batch])) for i in parts])

    def _renders(self, split: str, num: int) -> np.ndarray:
        """Pictures of the scenes that the captions of a split describe, [n H W 3]."""
        size = self.pipe.image_size[0]
        key = from_seed(self.seed + 1 if split == "held_out" else 0)
        render_key = jax.random.fold_in(from_seed(self.seed), RENDER_KEY)

        @jax.jit
        def draw(numbers):
            keys = jax.vmap(lambda i: (jax.random.fold_in(key, i), jax.random.fold_in(render_key, i)))(numbers)
            return jax.vmap(lambda a, b: scenes.render(b, scenes.sample_scene(a, split), size))(*keys)

        parts = [np.arange(i, min(i + 100, num)) for i in range(0, num, 100)]
        return np.concatenate([np.asarray(draw(part)) for part in parts])

    def check(self, point: Point) -> None:
        """ValueError if the parts of a point do not fit each other; nothing is measured for it."""
        self._make(point, BlockWeights(jnp.zeros(1, jnp.float32), jnp.ones((1, self.config.num_blocks), jnp.float32)))

    def simulator(self, point: Point) -> Simulator:
        """The simulator of a point; those of points that differ in numbers only share a compiled program."""
        scheme, shapes = point.made(), ((*self.pipe.image_size, 3), self.pipe.latent_shape())
        count, energy = scheme.num_symbols(*shapes), self._settings(point).energy(shapes[1])
        power = 1.0 if energy is None or not count else energy / count
        return self._make(point, [point.snr_db + float(linear_to_db(power))])

    def _make(self, point: Point, weights: BlockWeights | list[float]) -> Simulator:
        """A simulator whose blocks have these weights, or those at an effective SNR where a policy asks."""
        scheme, fading, settings = point.made(), sweep_fading(point.fading), self._settings(point)
        fitted = self.kept.get(lambda: self._fit(scheme, point, settings), "fit", scheme, point.fading, point.mode)
        options = {"fitted": fitted, "weights": weights}
        return make_simulator(self.pipe, self.codec, scheme, fading, sweep_policy(point.policy), settings, **options)

    def _settings(self, point: Point) -> SystemConfig:
        return SystemConfig(
            mode=point.mode,
            num_blocks=self.config.num_blocks,
            peak_power=point.peak_power,
            statistics=self.statistics,
            num_steps=self.config.steps,
            guided=self.config.guidance > 1,
        )

    def _fit(self, scheme: Scheme, point: Point, settings: SystemConfig) -> Any:
        """What the scheme fits on data: the same for all SNRs and policies."""
        parts = Parts(
            self.pipe,
            self.codec,
            self.statistics,
            self.pipe.sampler(None, self.config.steps),
            sweep_fading(point.fading),
            self.config.num_blocks,
            settings.energy(self.pipe.latent_shape()),
            self.config.snr_db,
            jax.random.fold_in(from_seed(self.seed), TABLE_KEY),
            lambda: self._renders("train", IMAGE_CODEC_SCENES),
            lambda: self.training_latents,
        )
        return scheme.fit(parts)

    def measure(self, point: Point, progress: Callable[[int], Any]) -> dict[str, np.ndarray]:
        """What every reception [n r] of the point gives, by name, and features [n r f]; K and energy among them."""
        simulator, found = self.simulator(point), {}
        draws = min(self.config.realisations, self.batch)
        size = max(1, self.batch // draws)
        partial = self.partial_latents(point.server_steps) if point.server_steps else None
        for start in range(0, self.config.num_images, size):
            part = slice(start, min(start + size, self.config.num_images))
            rows: dict[str, list] = {}
            batch = self._batch(simulator, point, part, partial)
            for first in range(0, self.config.realisations, draws):
                numbers = np.arange(first, min(first + draws, self.config.realisations), dtype=np.uint32)
                for name, value in self._receive(simulator, point, batch, numbers).items():
                    rows.setdefault(name, []).append(value)
            for name, values in jax.device_get(rows).items():
                if name == "pictures":
                    missing = PICTURES - sum(len(kept) for kept in found.get(name, ()))
                    found.setdefault(name, []).append(values[0][: max(0, missing)])
                else:
                    found.setdefault(name, []).append(np.concatenate(values, axis=1))
            progress((part.stop - part.start) * self.config.realisations)
        return {name: np.concatenate(parts) for name, parts in found.items()}

    @property
    def shown(self) -> bool:
        """Whether images are made."""
        return self.config.metrics == "image"

    def _batch(self, simulator: Simulator, point: Point, part: slice, partial: np.ndarray | None) -> Batch:
        """Inputs of some of the images."""
        known = self.prompts.labels is not None and self.shown
        captions = (self.prompts.labels[part], self.prompts.stated[part]) if known else None
        latents = self.latents[part]
        shown = self.images[part] if self.shown else None
        source = Source(latents, shown, latents if partial is None else partial[part])
        images, code = np.arange(part.start, part.stop, dtype=np.uint32), None
        if simulator.link.on_host:
            code = simulator.link.code(simulator.params["codec"], source, point.snr_db, simulator.energy)
        return Batch(source, self.ids[part], images, captions, code)

    def _receive(self, simulator: Simulator, point: Point, batch: Batch, numbers: np.ndarray) -> dict:
        mesh = devices_for(len(batch.images), split_name(point.scheme)[0].factorises)
        levels = np.float32(point.snr_db), np.float32(self.config.guidance)
        common = Common((), self.key, simulator.params, *levels, numbers)
        return receive(simulator, self.networks if self.shown else (), self.shown, mesh, common, batch)

    def partial_latents(self, steps: int) -> np.ndarray:
        """Variance-preserving latents after so many of the server's steps."""
        given = self.pipe, self.prompts.texts, self.seed + 1, self.config, steps
        return self.kept.get(lambda: generate_partial(*given), "partial", steps)


def generate_partial(pipe: StableDiffusion, texts: list[str], seed: int, config: SweepConfig, steps: int) -> np.ndarray:
    """Latents [n h w c] after `steps` of the server's steps, with the draws of `megjax.data.latents.generate`."""
    shard, table = 100, pipe.sampler(None, config.steps)
    denoise = jax.jit(
        functools.partial(generation.generate_latents, pipe.graphs, shape=pipe.latent_shape(), stop=steps)
    )
    guided, parts = config.guidance > 1, []
    for index in range(-(-config.num_images // shard)):
        mine = texts[index * shard : (index + 1) * shard]
        mine = [*mine, *[mine[-1]] * (shard - len(mine))]
        negative = np.repeat(pipe.tokenize([""]), shard, axis=0) if guided else None
        key = jax.random.fold_in(from_seed(seed), index)
        options = {"negative_ids": negative, "guidance_scale": jnp.float32(config.guidance)}
        parts.append(np.asarray(denoise(pipe.params, table, key, pipe.tokenize(mine), **options)))
    return np.concatenate(parts)[: config.num_images]


def make_bench(
    config: SweepConfig, model: str, seed: int, latents: Path, batch: int, training: Path | None = None
) -> tuple[Bench, dict[str, Any]]:
    """The bench of one model and seed, and the digests of what its numbers depend on."""
    folder = locate(model)
    pipe = StableDiffusion.from_pretrained(folder)
    codec = find_codec(config, folder, pipe)
    beside = folder / "scenenet"
    scenenet = SceneNet.load(beside) if beside.is_dir() else None
    statistics = SourceStatistics.load(folder, pipe.configs.vae.latent_channels)
    prompts = read_prompts(config, seed)
    sampler = pipe.sampler(None, config.steps)
    inception = None if config.inception is None else Inception.load(config.inception, config.inception_resizing)
    given = {"scenenet": scenenet, "inception": inception}
    caches = latents / f"{folder.name}-{seed}", training or latents / f"{folder.name}-training"
    networks = tuple(Network(name, *nnx.split(one)) for name, one in given.items() if one is not None)
    bench = Bench(config, pipe, codec, statistics, networks, seed, prompts, *caches, batch)
    coded = None if codec is None else codec_digest(codec, config.codec)
    digests = {"model": model_digest(pipe), "codec": coded, "prompts": digest(prompts.texts)}
    digests["sampler"] = sampler_identity(sampler.name)
    if inception is not None:
        digests["inception"] = f"{array_digest(nnx.state(inception))} {config.inception_resizing}"
    return bench, digests


def find_codec(config: SweepConfig, folder: Path, pipe: StableDiffusion) -> Any:
    """The codec asked for, or the one beside the model, None without either; ValueError if it does not fit."""
    if config.codec is not None and ":" in config.codec:
        return load_object(config.codec, "codec", "encode")
    if config.codec is None and not (folder / "codec").is_dir():
        needed = [name for name in config.schemes if split_name(name)[0].needs_codec]
        require(not needed, "codec", None, f"given: the model has none, and {', '.join(needed)} needs it")
        return None
    codec = SeedCodec.from_pretrained(config.codec or folder / "codec")
    fits = codec.latent_shape == pipe.latent_shape()
    require(fits, "codec", config.codec, f"one for latents of shape {pipe.latent_shape()}, not {codec.latent_shape}")
    return codec


def codec_digest(codec: Any, name: str | None) -> str:
    """SHA-256 of a trained codec's configuration and weights; of a user's own, what its import path stands for."""
    if isinstance(codec, SeedCodec):
        return array_digest((repr(codec.config), codec.state))
    return object_digest(name, codec)
