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

from megjax.channel import symbols_per_block
from megjax.channel.numerics import squared_magnitude
from megjax.codec import SeedCodec
from megjax.codec.opta import opta_nmse
from megjax.codec.schemes import draw_gains, realisation_keys
from megjax.configs import require
from megjax.data import scenes
from megjax.data.latents import generate, model_digest, scene_captions
from megjax.diffusion import generation
from megjax.diffusion.layout import locate
from megjax.diffusion.pipeline import StableDiffusion
from megjax.keys import from_seed
from megjax.metrics import Inception, SceneNet
from megjax.sweep.config import (
    LATENT_METRICS,
    Point,
    SweepConfig,
    find_fading,
    find_policy,
    load_object,
    object_digest,
    part_digest,
)
from megjax.sweep.receive import PICTURES, devices_for, receive
from megjax.system import (
    BlockWeights,
    Code,
    SeedErrors,
    Simulator,
    Source,
    SourceStatistics,
    codec_statistics,
    fit_image_codec,
    make_simulator,
    measured_weights,
    num_symbols,
)
from megjax.system.image_codec import OPTIONS, compress
from megjax.units import db_to_linear, linear_to_db

CODED = ("seed", "seed-klt", "latent-wiener", "split-seed", "opta")
"""Schemes of a sweep that take a trained codec."""
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


@dataclasses.dataclass(eq=False)
class Bench:
    """One model and one seed, with everything that its points are measured with."""

    config: SweepConfig
    pipe: StableDiffusion
    codec: Any
    statistics: SourceStatistics
    scenenet: SceneNet | None
    inception: Inception | None
    seed: int
    prompts: Prompts
    cache: Path
    """Folder of the latents."""
    batch: int
    """Receptions at a time."""

    @property
    def key(self):
        """Of the link: it depends on the seed only."""
        return from_seed(self.seed)

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

    @functools.cached_property
    def looks(self) -> list[tuple]:
        """SceneNet and Inception as graph and parameters, two times None where there is none."""
        return [(None, None) if one is None else nnx.split(one) for one in (self.scenenet, self.inception)]

    @functools.cache  # noqa: B019
    def reference_features(self, kind: str) -> np.ndarray:
        """ "scenenet" or "inception" features of renders of the captions; of the server's images for other prompts."""
        images = self.images if self.prompts.labels is None else self._renders("held_out", self.config.num_images)
        parts = range(0, len(images), self.batch)
        graph, state = self.looks[0 if kind == "scenenet" else 1]
        features = jax.jit(lambda state, x: nnx.merge(graph, state).features(x))
        return np.concatenate([np.asarray(features(state, images[i : i + self.batch])) for i in parts])

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

    @functools.cache  # noqa: B019 (as long-lived as the sweep)
    def image_codec(self, fading: str, mode: str):
        """The coded image's choices at every SNR, on training pictures."""
        training = self._renders("train", IMAGE_CODEC_SCENES)
        shape = self.pipe.latent_shape()
        budget = float(num_symbols("latent", (), shape)) if mode == "equal_energy" else None
        key = jax.random.fold_in(from_seed(self.seed), TABLE_KEY)
        return fit_image_codec(key, training, find_fading(fading), self.config.snr_db, budget, self.config.num_blocks)

    def check(self, point: Point) -> None:
        """ValueError if the parts of a point do not fit each other; nothing is measured for it."""
        if point.scheme == "opta":
            require(isinstance(self.codec, SeedCodec), "codec", self.config.codec, "a SeedCodec, for opta")
            codec_statistics(self.codec)
            num_symbols("seed", (), self.pipe.latent_shape(), point.rate)
            return
        plain = dataclasses.replace(point, scheme="centralized") if point.scheme == "centralized-coded" else point
        self._make(plain, BlockWeights(jnp.zeros(1, jnp.float32), jnp.ones((1, self.config.num_blocks), jnp.float32)))

    @functools.cache  # noqa: B019
    def simulator(self, point: Point) -> Simulator:
        """The simulator of a point; those of points that differ in numbers only share a compiled program."""
        return self._make(point, self._weights(point))

    def _make(self, point: Point, weights: BlockWeights | None) -> Simulator:
        scheme, variant = point.kind
        options: dict[str, Any] = {"num_steps": self.config.steps, "guided": self.config.guidance > 1}
        if point.device_steps:
            options |= {"device_steps": point.device_steps, "server_steps": point.server_steps or None}
        if (scheme, variant) == ("split", "seed"):
            options |= {"seed_errors": self.seed_errors(point.fading, point.rate)}
        if variant == "coded":
            options |= {"image_codec": self.image_codec(point.fading, point.mode)}
        return make_simulator(
            self.pipe,
            self.codec,
            scheme,
            find_fading(point.fading),
            find_policy(point.policy),
            variant=variant,
            rate=point.rate,
            mode=point.mode,
            num_blocks=self.config.num_blocks,
            modulation=self.config.modulation,
            statistics=self.statistics,
            weights=weights,
            peak_power=point.peak_power,
            decode_batch=None,
            **options,
        )

    @functools.cache  # noqa: B019
    def seed_errors(self, fading: str, rate: float) -> SeedErrors:
        """The prediction of a seed's error at this rate, for `split-seed`."""
        options = {"variant": "seed", "rate": rate, "num_blocks": self.config.num_blocks}
        made = make_simulator(self.pipe, self.codec, "split", find_fading(fading), **options)
        return made.params["codec"].errors

    def _weights(self, point: Point):
        """Of a seed's blocks at the point's own effective SNR, where a policy asks."""
        unasked = not point.sends_seed or point.policy in ("codec", "equal")
        if unasked or not isinstance(self.codec, SeedCodec):
            return None
        plain = dataclasses.replace(point, scheme="seed", policy="codec", device_steps=0)
        way = self.simulator(plain).link
        shape = self.pipe.latent_shape()
        power = num_symbols("latent", (), shape) / way.num_symbols if point.mode == "equal_energy" else 1.0
        return measured_weights(self.codec, way, [point.snr_db + float(linear_to_db(power))])

    def measure(self, point: Point, progress: Callable[[int], Any]) -> dict[str, np.ndarray]:
        """What every reception [n r] of the point gives, by name, and features [n r f]; K and energy among them."""
        if point.scheme == "opta":
            return self._opta(point, progress)
        simulator, found = self.simulator(point), {}
        draws = min(self.config.realisations, self.batch)
        size = max(1, self.batch // draws)
        partial = self.partial_latents(point.server_steps) if point.server_steps else None
        for start in range(0, self.config.num_images, size):
            part = slice(start, min(start + size, self.config.num_images))
            rows: dict[str, list] = {}
            for first in range(0, self.config.realisations, draws):
                numbers = np.arange(first, min(first + draws, self.config.realisations), dtype=np.uint32)
                for name, value in self._receive(simulator, point, part, numbers, partial).items():
                    rows.setdefault(name, []).append(value)
            for name, values in jax.device_get(rows).items():
                if name == "pictures":
                    missing = PICTURES - sum(len(kept) for kept in found.get(name, ()))
                    found.setdefault(name, []).append(values[0][: max(0, missing)])
                else:
                    found.setdefault(name, []).append(np.concatenate(values, axis=1))
            progress((part.stop - part.start) * self.config.realisations)
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def _receive(self, simulator: Simulator, point: Point, part: slice, numbers: np.ndarray, partial) -> dict:
        shown = self.config.metrics != LATENT_METRICS
        truth = None if self.prompts.labels is None else (self.prompts.labels[part], self.prompts.stated[part])
        latents = self.latents[part]
        source = Source(latents, self.images[part] if shown else None, latents if partial is None else partial[part])
        images = np.arange(part.start, part.stop, dtype=np.uint32)
        graphs, states = zip(*self.looks, strict=True)
        mesh = devices_for(len(images), point.scheme == "latent-wiener")
        levels = np.float32(point.snr_db), np.float32(self.config.guidance)
        common = (states, self.key, simulator.params, *levels, numbers)
        code = self._coded(simulator, point, part) if point.scheme == "centralized-coded" else None
        return receive(simulator, graphs, shown, mesh, *common, source, self.ids[part], images, truth, code)

    def _coded(self, simulator: Simulator, point: Point, part: slice) -> Code:
        """The coded images of a batch: the host compresses them once for each quality, outside of compiled programs."""
        table = simulator.params["codec"]
        choice = int(table.choice[int(np.argmin(np.abs(np.asarray(table.snr_db) - point.snr_db)))])
        sizes, decoded = self.compressed(choice)
        return simulator.link.from_compressed(table, sizes[part], decoded[part], point.snr_db, simulator.energy)

    @functools.cache  # noqa: B019
    def compressed(self, choice: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [n] and decoded images of the server's images by one of `megjax.system.image_codec.OPTIONS`."""
        return compress(self.images, *OPTIONS[choice])

    @functools.cache  # noqa: B019
    def partial_latents(self, steps: int) -> np.ndarray:
        """Variance-preserving latents after so many of the server's steps."""
        return generate_partial(self.pipe, self.prompts.texts, self.seed + 1, self.config, steps)

    def _opta(self, point: Point, progress) -> dict[str, np.ndarray]:
        """The Gaussian limit's error for the gains that the schemes see, every block at equal power."""
        shape, blocks = self.pipe.latent_shape(), self.config.num_blocks
        count = num_symbols("seed", (), shape, point.rate)
        power = num_symbols("latent", (), shape) / count if point.mode == "equal_energy" else 1.0
        statistics, fading = codec_statistics(self.codec), find_fading(point.fading)
        counts = symbols_per_block(count, blocks)

        @jax.jit
        def limit(key, numbers, draw):
            gains = draw_gains(realisation_keys(key, numbers, draw), fading, blocks)
            snr = power * db_to_linear(point.snr_db) * squared_magnitude(gains)
            return jax.vmap(lambda row: opta_nmse(statistics.variances, row, counts))(snr)

        numbers = np.arange(self.config.num_images, dtype=np.uint32)
        columns = []
        for draw in range(self.config.realisations):
            columns.append(np.asarray(limit(self.key, numbers, draw)))
            progress(len(numbers))
        nmse = np.stack(columns, axis=1)
        return {"nmse": nmse, "num_symbols": np.full_like(nmse, count), "energy": np.full_like(nmse, power * count)}


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


def make_bench(config: SweepConfig, model: str, seed: int, latents: Path, batch: int) -> tuple[Bench, dict[str, Any]]:
    """The bench of one model and seed, and the digests of what its numbers depend on."""
    folder = locate(model)
    pipe = StableDiffusion.from_pretrained(folder)
    codec = find_codec(config, folder, pipe)
    beside = folder / "scenenet"
    scenenet = SceneNet.load(beside) if beside.is_dir() else None
    statistics = SourceStatistics.load(folder, pipe.configs.vae.latent_channels)
    prompts = read_prompts(config, seed)
    pipe.sampler(None, config.steps)
    inception = None if config.inception is None else Inception.load(config.inception, config.inception_resizing)
    looks = scenenet, inception
    bench = Bench(config, pipe, codec, statistics, *looks, seed, prompts, latents / f"{folder.name}-{seed}", batch)
    coded = None if codec is None else codec_digest(codec, config.codec)
    digests = {"model": model_digest(pipe), "codec": coded, "prompts": object_digest(prompts.texts)}
    if inception is not None:
        digests["inception"] = f"{object_digest(nnx.state(inception))} {config.inception_resizing}"
    return bench, digests


def find_codec(config: SweepConfig, folder: Path, pipe: StableDiffusion) -> Any:
    """The codec asked for, or the one beside the model, None without either; ValueError if it does not fit."""
    if config.codec is not None and ":" in config.codec:
        return load_object(config.codec, "codec", "encode")
    if config.codec is None and not (folder / "codec").is_dir():
        needed = [name for name in config.schemes if name in CODED]
        require(not needed, "codec", None, f"given: the model has none, and {', '.join(needed)} needs it")
        return None
    codec = SeedCodec.from_pretrained(config.codec or folder / "codec")
    fits = codec.latent_shape == pipe.latent_shape()
    require(fits, "codec", config.codec, f"one for latents of shape {pipe.latent_shape()}, not {codec.latent_shape}")
    return codec


def codec_digest(codec: Any, name: str | None) -> str:
    """SHA-256 of a trained codec's configuration and weights; of a user's own, what its import path stands for."""
    trained = isinstance(codec, SeedCodec)
    return object_digest((repr(codec.config), codec.state)) if trained else part_digest(name, codec)
