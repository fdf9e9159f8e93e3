"""Measure the seed codec, its rivals and Gaussian OPTA on held-out generated latents, over SNRs, rates and fading."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array

from megjax.codec.coders import KLTCoder, LearnedCoder, RawCoder
from megjax.codec.importance import POWERS, additive_prediction, block_weights
from megjax.configs import in_one_step, read_json, require, require_positive_integers, write_json
from megjax.data.latents import generate, model_digest, scene_captions
from megjax.diffusion.pipeline import StableDiffusion
from megjax.keys import from_seed
from megjax.metrics import psnr
from megjax.runtime import check_seed, command, prepare_output
from megjax.system import AnalogLink, draw_gains, realisation_keys, send_latents
from megjax.units import check_snr_db, db_to_linear, linear_to_db

MEAN_ERRORS = {"rayleigh": mean_lmmse_error_rayleigh, "awgn": mean_lmmse_error_awgn}
SHARD = 100
"""Latents in a shard of the caches."""
LAW_DRAWS = 20_000
"""Realisations that stand for the law of the gains when the digital seed chooses its step."""
STUDY_RATE, STUDY_LATENTS, STUDY_DRAWS = 4.0, 256, 200
"""Rate, latents and realisations of the block weights and of the additive model."""
IMAGE_BATCH = 20
"""Latents decoded at a time: more no longer fit a CPU's cache."""
POINTS, CONFIG = "points", "config.json"


class Link(NamedTuple):
    """Rayleigh fading or none, by a traced switch: both run in the same compiled programs."""

    fades: Array

    def sample(self, key, num_blocks: int):
        """Gains [t] of one realisation."""
        return jnp.where(self.fades, RayleighFading().sample(key, num_blocks), 1)


FADINGS = {"rayleigh": Link(np.array(True)), "awgn": Link(np.array(False))}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `eval.codec`: codecs and rivals to measure, the latents, and the folder of the results."""

    codec: str = "scenes"
    """"scenes" (bundled) or a folder that SeedCodec.save_pretrained wrote."""
    denoiser: Path = Path("runs/codec-scenes/denoiser/model")
    """Folder of a codec with transform "raw", the learned receiver of the raw latent; skipped if absent."""
    model: str = "scenes"
    """Model that the latents are from and that decodes the images: "scenes" (bundled) or a folder."""
    held_out: Path = Path("runs/codec-scenes/held_out")
    """Cache of held-out latents; what is missing is generated."""
    training: Path = Path("runs/codec-scenes/generated")
    """Cache of training latents, for the statistics of the rivals; what is missing is generated."""
    num: int = 2000
    """Held-out latents."""
    num_training: int = 10_000
    """Training latents."""
    steps: int = 25
    """Denoising steps of both."""
    guidance: float = 3.0
    """Classifier-free guidance scale of both."""
    snr_db: tuple[float, ...] = (-10.0, -5.0, 0.0, 5.0, 10.0, 15.0, 20.0)
    """SNRs of the link in dB, 1 / noise variance."""
    rates: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Compression ratios."""
    image_rates: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Compression ratios whose images are decoded, nearly all of the work; the others have latent NMSE only."""
    blocks: int = 16
    """Fading blocks an image."""
    realisations: int = 1
    """Realisations of the link for each image."""
    batch: int = 100
    """Images at a time."""
    seed: int = 0
    """Seed of the link."""
    table: bool = True
    """Also write docs_table.md."""
    output: Path = Path("outputs/codec")
    """Folder for tables and plots, and for the finished points; a run that was stopped goes on where it was."""


@dataclasses.dataclass
class Bench:
    """Everything that points are measured with."""

    args: Arguments
    pipe: StableDiffusion
    latents: np.ndarray
    schemes: dict[tuple[str, str], Any]
    """By scheme and fading."""
    statistics: LatentStatistics
    digital: DigitalSeed

    @functools.cached_property
    def key(self):
        return from_seed(self.args.seed)

    @functools.cached_property
    def references(self) -> list[np.ndarray]:
        """The server's images, by batch."""
        return [np.asarray(self._decode(jnp.asarray(self.latents[part]))) for part in self.batches]

    @property
    def batches(self) -> list[slice]:
        return [slice(i, i + self.args.batch) for i in range(0, len(self.latents), self.args.batch)]

    def measure(self, point: Point, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """`nmse` [n r], the squared error over the total variance, and, if it is among `names`, images' `psnr_db`."""
        receive = self._receiver(point)
        found: dict[str, list] = {name: [] for name in names}
        for i, part in enumerate(self.batches):
            images = jnp.arange(part.start, min(part.stop, len(self.latents)), dtype=jnp.uint32)
            columns = []
            for realisation in range(self.args.realisations):
                keys = realisation_keys(self.key, images, realisation)
                nmse, decoded = receive(keys, jnp.asarray(self.latents[part]))
                columns.append([nmse])
                if "psnr_db" in names:
                    columns[-1].append(_psnr(self.references[i], self._decode(decoded)))
            for name, parts in zip(found, zip(*columns, strict=True), strict=True):
                found[name].append(np.stack(jax.device_get(parts), axis=1))
        return {name: np.concatenate(parts).astype(np.float32) for name, parts in found.items()}

    def _decode(self, latents):
        """Images of a batch of latents."""
        parts = range(0, len(latents), IMAGE_BATCH)
        return jnp.concatenate([self.pipe.decode(latents[i : i + IMAGE_BATCH]) for i in parts])

    def _receiver(self, point: Point):
        """`(keys [b], latents) -> (nmse [b], received latents)` at a point."""
        fading, snr_db = FADINGS[point.fading], jnp.float32(point.snr_db)
        size = {"num_symbols": point.num_symbols, "num_blocks": self.args.blocks}
        if point.scheme == "opta":
            return lambda keys, _: (_opta(keys, self.statistics, fading, snr_db, **size), None)
        if point.scheme == "digital":
            law = jax.random.split(jax.random.fold_in(self.key, 2**32 - 1), LAW_DRAWS)
            index = choose_step(self.digital, _capacities(law, fading, snr_db, **size))
            return lambda keys, latents: _receive_digital(
                self.digital, self.statistics, keys, latents, index, fading, snr_db, **size
            )
        scheme = self.schemes[point.scheme, point.fading]
        link, total = AnalogLink(**size, mapping=point.mapping), self.statistics.total_variance
        return lambda keys, latents: _receive(scheme, keys, latents, total, fading, snr_db, link, point.power)

    def study(self, snr_db: float, num_symbols: int) -> dict[str, np.ndarray]:
        """Load and weights of the codec's ordered blocks at an effective SNR, and how well the additive model does."""
        scheme, fading = self.schemes["seed", "rayleigh"], FADINGS["rayleigh"]
        latents, size = jnp.asarray(self.latents[:STUDY_LATENTS]), {"num_symbols": num_symbols}
        weight_key, check_key = jax.random.split(jax.random.fold_in(self.key, 2**32 - 2))
        level = jnp.float32(snr_db)
        found = {
            "load": _spending(scheme, level, **size, num_blocks=self.args.blocks, mapping="ordered").load,
            "weights": _weights(scheme, weight_key, latents, snr_db=level, num_blocks=self.args.blocks, **size),
        }
        for power in POWERS:
            shares = found["load"] if power == "codec" else jnp.ones(self.args.blocks)
            key = jax.random.clone(check_key)
            check = _additive(scheme, key, latents, found["weights"], level, fading, power=shares, **size)
            total = self.statistics.total_variance
            found |= {f"measured_{power}": check.measured / total, f"predicted_{power}": check.predicted / total}
            found[f"r_squared_{power}"] = check.r_squared[None]
        return {name: np.asarray(value) for name, value in found.items()}


_size = ("num_symbols", "num_blocks", "mapping")
_spending = jax.jit(
    lambda scheme, snr_db, num_symbols, num_blocks, mapping: scheme.spending(snr_db, num_symbols, num_blocks, mapping),
    static_argnames=_size,
)
_weights = jax.jit(block_weights, static_argnames=_size)
_additive = jax.jit(functools.partial(additive_prediction, num_realisations=STUDY_DRAWS), static_argnames="num_symbols")
_psnr = jax.jit(jax.vmap(psnr))


@functools.partial(jax.jit, static_argnames=("link", "power"))
def _receive(scheme, keys, latents, total, fading, snr_db, link, power):
    received, _ = send_latents(link, scheme, keys, latents, snr_db, fading, power)
    return jnp.square(received - latents).sum((1, 2, 3)) / total, received


def _block_snr(keys, fading, snr_db, num_blocks: int):
    """Linear SNRs [b t] at equal power, of the gains that `simulate` draws from these keys."""
    return db_to_linear(snr_db) * squared_magnitude(draw_gains(keys, fading, num_blocks))


@functools.partial(jax.jit, static_argnames=_size[:2])
def _opta(keys, statistics, fading, snr_db, num_symbols, num_blocks):
    counts, snr = symbols_per_block(num_symbols, num_blocks), _block_snr(keys, fading, snr_db, num_blocks)
    return jax.vmap(lambda row: opta_nmse(statistics.variances, row, counts))(snr)


@functools.partial(jax.jit, static_argnames=_size[:2])
def _capacities(keys, fading, snr_db, num_symbols, num_blocks):
    counts, snr = symbols_per_block(num_symbols, num_blocks), _block_snr(keys, fading, snr_db, num_blocks)
    return jax.vmap(lambda row: link_bits(row, counts))(snr)


@functools.partial(jax.jit, static_argnames=_size[:2])
def _receive_digital(digital, statistics, keys, latents, index, fading, snr_db, **size):
    arrived = _capacities(keys, fading, snr_db, **size) >= digital.bits[index]
    quantised = jax.vmap(lambda z: quantise(digital, statistics, z, index))(latents)
    mean = statistics.mean.reshape(1, *latents.shape[1:])
    received = jnp.where(arrived[:, None, None, None], quantised, mean)
    return jnp.square(received - latents).sum((1, 2, 3)) / statistics.total_variance, received


def codec_digest(codec: SeedCodec) -> str:
    """SHA-256 of a codec's configuration and weights."""
    digest = hashlib.sha256(repr(codec.config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(codec.state):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def load_codec(args: Arguments, pipe: StableDiffusion) -> tuple[SeedCodec, SeedCodec | None]:
    """Codec and denoiser, None if there is none; ValueError unless both fit the model and each other's parts."""
    codec, denoiser = SeedCodec.from_pretrained(args.codec), None
    if args.denoiser.is_dir():
        denoiser = SeedCodec.from_pretrained(args.denoiser)
        kind = denoiser.config.transform
        require(kind == "raw", "--denoiser", str(args.denoiser), f"a codec with transform 'raw', not {kind!r}")
    else:
        print(f"no denoiser in {args.denoiser}: raw latent + learned denoiser is left out")
    for name, one in (("--codec", codec), ("--denoiser", denoiser)):
        fits = one is None or one.latent_shape == pipe.latent_shape()
        require(fits, name, one and one.latent_shape, f"a codec for the model's latents, {pipe.latent_shape()}")
    return codec, denoiser


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Write the config of a new output folder; ValueError if its points were made with another.

    A denoiser may join later, and its points stay when it is left out.
    """
    path = folder / CONFIG
    found = read_json(path) if path.exists() else {}
    if config["denoiser"] is None or found.get("denoiser", "") is None:
        found["denoiser"] = config["denoiser"] = config["denoiser"] or found.get("denoiser")
    other = sorted(name for name in config if path.exists() and found.get(name) != config[name])
    if other:
        raise ValueError(f"{folder} holds points made with another {', '.join(other)}; choose another --output")
    write_json(path, config)
    (folder / POINTS).mkdir(exist_ok=True)


def kept(path: Path, make, names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays of a file, made and written in one step if there is none, or none with these `names`.

    ValueError if it is damaged.
    """
    try:
        found = load_file(path) if path.exists() else None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to measure it anew") from None
    if found is None or not set(names) <= set(found):
        found = {name: np.ascontiguousarray(array) for name, array in make().items()}
        with in_one_step(path) as part:
            part.write_bytes(save(found))
    return {name: found[name] for name in names or found}


def cached_latents(pipe: StableDiffusion, args: Arguments, held_out: bool) -> np.ndarray:
    """Held-out or training latents; whole shards are generated, so that any number can be asked for."""
    num, seed, split, folder = args.num_training, 0, "train", args.training
    if held_out:
        num, seed, split, folder = args.num, 1, "held_out", args.held_out
    captions = scene_captions(-(-num // SHARD) * SHARD, seed, split)
    options = {"num_steps": args.steps, "guidance_scale": args.guidance, "shard_size": SHARD}
    return generate(pipe, captions, folder, seed=seed, **options)[:num]


def make_bench(args: Arguments, pipe: StableDiffusion, codec: SeedCodec, denoiser: SeedCodec | None) -> Bench:
    """Latents and the schemes fitted to the training latents."""
    training, latents = (cached_latents(pipe, args, held_out) for held_out in (False, True))
    statistics, shape = latent_statistics(training), tuple(training.shape[1:])
    raw = RawCoder.of(training)
    schemes = {}
    for fading, mean_error in MEAN_ERRORS.items():
        schemes["seed", fading] = LearnedCoder(codec.graph, codec.state)
        schemes["klt", fading] = KLTCoder(statistics, shape, mean_error)
        schemes["raw", fading] = raw
        schemes["raw_wiener", fading] = dataclasses.replace(raw, statistics=statistics)
        if denoiser is not None:
            schemes["raw_denoiser", fading] = LearnedCoder(denoiser.graph, denoiser.state)
    return Bench(args, pipe, latents, schemes, statistics, fit_digital(statistics, training))


def check(args: Arguments) -> None:
    """ValueError for bad arguments, before any work."""
    names = ("num", "num_training", "steps", "blocks", "realisations", "batch")
    require_positive_integers(args, "arguments", names)
    require(min(args.num, args.num_training) >= 2, "--num, --num-training", (args.num, args.num_training), "2 or more")
    for name in ("snr_db", "rates"):
        values = getattr(args, name)
        distinct = 0 < len(values) == len(set(values))
        require(distinct, f"--{name.replace('_', '-')}", values, "one number or more, all different")
    check_snr_db(args.snr_db)
    check_seed(args.seed)


def run(args: Arguments):
    """Measure what is missing, write tables and plots; returns the main table."""
    check(args)
    prepare_output(args.output)
    pipe = StableDiffusion.from_pretrained(args.model)
    codec, denoiser = load_codec(args, pipe)
    for rate in args.rates:
        symbols = link.symbols_at_rate(float(rate), codec.config.num_values)
        link.check_symbols(symbols, codec.config.num_values, args.blocks)
    settings = ("num", "num_training", "steps", "guidance", "blocks", "realisations", "batch", "seed")
    digests = {"codec": codec_digest(codec), "denoiser": denoiser and codec_digest(denoiser)}
    claim(args.output, {**digests, "model": model_digest(pipe), **{name: getattr(args, name) for name in settings}})
    bench = make_bench(args, pipe, codec, denoiser)

    rows = table_rows(args.snr_db, args.rates, codec.config.num_values, denoiser is not None)
    pictured = {row.point for row in rows if shows_images(row, args.image_rates)}
    files = {}
    points = sorted(dict.fromkeys(row.point for row in rows), key=pictured.__contains__)
    for point in tqdm(points, desc="points", unit="point", disable=None):
        names = ("nmse", "psnr_db") if point in pictured else ("nmse",)
        path = args.output / POINTS / f"{point.name}.safetensors"
        files[point] = kept(path, lambda point=point, names=names: bench.measure(point, names), names)
    rate = STUDY_RATE if STUDY_RATE in args.rates else float(args.rates[-1])
    symbols, studies = codec.num_symbols(rate), {}
    for snr_db in tqdm(args.snr_db[1::2][:3] or args.snr_db[:1], desc="block weights", disable=None):
        level = round(float(snr_db + linear_to_db(codec.config.num_values / (2 * symbols))), 4)
        path = args.output / POINTS / f"blocks-{symbols}-{level:.4f}dB.safetensors"
        studies[snr_db] = kept(path, lambda level=level: bench.study(level, symbols))
    frame = codec_plots.write(args.output, rows, files, studies, rate, table=args.table)
    print(f"{len(files)} points of {args.num} images; tables and plots in {args.output}")
    return frame


def main() -> None:
    command("eval.codec", lambda: run(tyro.cli(Arguments, description=__doc__)))


if __name__ == "__main__":
    main()
