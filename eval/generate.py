"""Generate images from prompts at the server and receive them over Rayleigh fading, by several schemes and SNRs."""

import dataclasses
import itertools
import math
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from jaxtyping import Array, Float
from rich.table import Table

from eval.measure import console
from megjax.channel import RayleighFading
from megjax.codec import SeedCodec
from megjax.codec.link import check_symbols
from megjax.configs import require, write_json
from megjax.data import scenes
from megjax.diffusion.layout import locate
from megjax.diffusion.pipeline import StableDiffusion
from megjax.diffusion.samplers import SAMPLERS
from megjax.keys import from_seed
from megjax.metrics import SceneNet, psnr, ssim
from megjax.metrics.scenenet import caption_accuracy, predict
from megjax.power import POLICIES
from megjax.runtime import check_seed, command, prepare_output
from megjax.system import NUM_BLOCKS, SCHEMES, SourceStatistics, SystemConfig, find_scheme, make_simulator
from megjax.units import check_snr_db


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `eval.generate`: prompts and model, the link, and the folder of the results."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = scenes.DEFAULT_PROMPTS
    """Prompts, each in quotes."""
    snr_db: tuple[float, ...] = (-5.0, 5.0, 15.0)
    """SNRs of the link in dB, 1 / noise variance."""
    model: str = "scenes"
    """"scenes" (bundled), a folder in the diffusers layout, or a hub id."""
    sampler: str | None = None
    """Default: the model's own."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 turns it off."""
    codec: str | None = None
    """Codec of the seed: "scenes" (bundled) or a folder that train.codec wrote; default: the model's, if it has one."""
    schemes: tuple[str, ...] = ("centralized", "latent", "seed")
    """What is sent, with options as in seed:mapping=interleaved; schemes that need a codec are left out without one."""
    device_steps: int = 5
    """Denoising steps of the device, of schemes in which it denoises."""
    rate: float = 4.0
    """Compression ratio r of the seed, which has 1 / r of the latent's symbols."""
    policy: str = "codec"
    """Power of the blocks: a policy or ppo:FOLDER; codec is the seed's own load, and equal power elsewhere."""
    seed: int = 0
    """Seed of the images and of the channel."""
    output: Path = Path("outputs/demo")
    """Folder for grid.png and metrics.json."""


def find_codec(args: Arguments, folder: Path, latent_shape: tuple[int, ...]) -> SeedCodec | None:
    """The codec asked for, or the one beside the model; None if the model has none. ValueError if it does not fit."""
    if args.codec is None and not (folder / "codec").is_dir():
        return None
    codec = SeedCodec.from_pretrained(args.codec or folder / "codec")
    fits = codec.latent_shape == latent_shape
    require(fits, "--codec", args.codec, f"one for latents of shape {latent_shape}, not {codec.latent_shape}")
    check_symbols(codec.num_symbols(args.rate), codec.config.num_values, NUM_BLOCKS)
    return codec


FADING = RayleighFading()


class Received(NamedTuple):
    """Images that devices show of the prompts, by one scheme at every SNR, and the symbols sent for each."""

    images: Float[Array, "s b H W 3"]
    num_symbols: Float[Array, "s b"]
    """K."""


def receive(sources: dict, params: dict, key, latents, ids, snr_db, guidance: float) -> tuple:
    """The server's images [b H W 3], and what devices have received of them, by scheme.

    Image i sees the same gains under every scheme and SNR.
    """
    numbers, one = jnp.arange(len(latents)), jnp.arange(1)
    levels = jnp.asarray(snr_db, jnp.float32)
    images, received = None, {}
    for name, simulator in sources.items():

        @jax.jit
        def over_snrs(params, key, latents, levels, simulator=simulator):
            source = simulator.source(params, latents)

            def at(level):
                options = {"guidance_scale": guidance}
                found = simulator.deliver(jax.random.clone(key), params, source, ids, level, numbers, one, **options)
                return Received(found.images[:, 0], found.num_symbols)

            return source.images, jax.lax.map(at, levels)

        images, received[name] = over_snrs(params[name], key, latents, levels)
    return images, received


def accuracies(model: SceneNet | None, prompts: tuple[str, ...], images) -> np.ndarray:
    """Share of what each prompt states that its images [s b H W 3] show, [s b]; NaN where there is nothing to check."""
    if model is None:
        return np.full(images.shape[:2], np.nan)
    parsed = [scenes.parse_caption(prompt).labels() for prompt in prompts]
    labels, stated = (jnp.asarray(np.stack(parts)) for parts in zip(*parsed, strict=True))
    over_snrs = jax.jit(jax.vmap(lambda batch: caption_accuracy(predict(model, batch), labels, stated)[0]))
    return np.asarray(over_snrs(images))


def score(model, prompts, snr_db, reference, received: dict[str, Received]) -> list[dict]:
    """One row per prompt, scheme and SNR, against the server's own image."""
    over_images = jax.vmap(lambda a, b: (psnr(a, b), ssim(a, b)))
    compare = jax.jit(jax.vmap(over_images, (None, 0)))
    rows = []
    for scheme, (images, symbols) in received.items():
        quality, likeness = (np.asarray(values) for values in compare(reference, images))
        accuracy = accuracies(model, prompts, images)
        for (s, level), (i, prompt) in itertools.product(enumerate(snr_db), enumerate(prompts)):
            row = {"prompt": prompt, "scheme": scheme, "snr_db": float(level), "num_symbols": int(symbols[s, i])}
            row |= {"psnr_db": float(quality[s, i]), "ssim": float(likeness[s, i])}
            share = float(accuracy[s, i])
            rows.append({**row, "caption_accuracy": None if np.isnan(share) else share})
    return rows


def draw(path: Path, prompts, snr_db, reference, received: dict[str, Received]) -> None:
    """Rows: prompts. Columns: the server's image, then each scheme and SNR."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [("at the server", reference)]
    for scheme, (images, symbols) in received.items():
        titles = (f"{scheme}, {level:g} dB\n{symbols[i].mean():.0f} symbols" for i, level in enumerate(snr_db))
        columns += zip(titles, images, strict=True)
    size = (1.75 * len(columns), 2.0 * len(prompts) + 0.5)
    figure, axes = plt.subplots(len(prompts), len(columns), figsize=size, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.5 / size[1], bottom=0.3 / size[1], wspace=0.04, hspace=0.15)
    for i, prompt in enumerate(prompts):
        for j, (title, images) in enumerate(columns):
            axes[i, j].imshow(np.asarray(images[i]), interpolation="nearest")
            axes[i, j].set_axis_off()
            if i == 0:
                axes[i, j].set_title(title, fontsize=9)
        room = 22 * len(columns)  # letters of this size across the figure
        short = prompt if len(prompt) <= room else prompt[: room - 3] + "..."
        axes[i, 0].text(0, -0.03, short, transform=axes[i, 0].transAxes, fontsize=9, va="top")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(rows: list[dict], folder: Path) -> None:
    """Print the mean over prompts of each scheme and SNR, and where the files are."""
    frame = pd.DataFrame(rows).astype({"caption_accuracy": float})
    title = "means over prompts, one channel realisation each, mean power 1"
    table = Table("scheme", "symbols", "SNR (dB)", "PSNR (dB)", "SSIM", "caption accuracy", title=title)
    means = frame.groupby(["scheme", "snr_db"], sort=False).mean(numeric_only=True).reset_index()
    for row in means.itertuples():
        accuracy = "-" if np.isnan(row.caption_accuracy) else f"{100 * row.caption_accuracy:.0f} %"
        cells = (f"{row.snr_db:g}", f"{row.psnr_db:.1f}", f"{row.ssim:.3f}", accuracy)
        table.add_row(row.scheme, f"{row.num_symbols:.0f}", *cells)
    console().print(table)
    print(f"pictures: {folder / 'grid.png'}\nnumbers:  {folder / 'metrics.json'}")


def run(args: Arguments) -> list[dict]:
    """The whole demo; returns the rows of metrics.json. Raises ValueError on bad arguments, before any work."""
    snr_db = check_snr_db(args.snr_db)
    require(snr_db.size > 0, "--snr-db", args.snr_db, "at least one number")
    require(len(args.prompts) > 0, "prompts", args.prompts, "at least one prompt")
    for prompt in args.prompts:
        require(bool(prompt.strip()), "prompt", prompt, "text that is not blank")
    require(math.isfinite(args.guidance), "--guidance", args.guidance, "a finite number")
    check_seed(args.seed)
    require(len(args.schemes) > 0, "--schemes", args.schemes, f"of {', '.join(SCHEMES.names)}")
    given = {"rate": args.rate, "device_steps": args.device_steps}
    chosen = {name: find_scheme(name, "--schemes", given) for name in args.schemes}
    for name, scheme in chosen.items():
        require(scheme.result != "error", "--schemes", name, "schemes that images come out of")
    folder = locate(args.model)
    prepare_output(args.output)
    pipe = StableDiffusion.from_pretrained(folder)
    pipe.sampler(args.sampler, args.steps)
    codec = find_codec(args, folder, pipe.latent_shape())
    schemes = {name: scheme for name, scheme in chosen.items() if codec is not None or not scheme.needs_codec}
    shapes = (*pipe.image_size, 3), pipe.latent_shape()
    symbols = {name: scheme.num_symbols(*shapes) for name, scheme in schemes.items()}
    fills = all(symbols[name] is None or symbols[name] >= NUM_BLOCKS or not schemes[name].transmits for name in schemes)
    require(fills, "--model", args.model, f"a model whose latent fills {NUM_BLOCKS} fading blocks, not {symbols}")
    config = SystemConfig(
        statistics=SourceStatistics.load(folder, pipe.configs.vae.latent_channels),
        num_steps=args.steps,
        sampler=args.sampler,
        guided=args.guidance > 1,
    )
    made = {name: make_simulator(pipe, codec, one, FADING, args.policy, config) for name, one in schemes.items()}
    scenenet = SceneNet.load(folder / "scenenet") if (folder / "scenenet").is_dir() else None

    image_key, channel_key = jax.random.split(from_seed(args.seed))
    ids = pipe.tokenize(args.prompts)
    started = time.perf_counter()
    latents = pipe.generate_latents(
        image_key, ids, num_steps=args.steps, guidance_scale=args.guidance, sampler=args.sampler
    )
    latents.block_until_ready()
    print(f"latents generated in {time.perf_counter() - started:.1f} s, compilation included")
    params = {name: simulator.params for name, simulator in made.items()}
    reference, received = receive(made, params, channel_key, latents, ids, snr_db, args.guidance)
    rows = score(scenenet, args.prompts, snr_db, reference, received)
    write_json(args.output / "metrics.json", rows)
    draw(args.output / "grid.png", args.prompts, snr_db, reference, received)
    show(rows, args.output)
    return rows


def main() -> None:
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)

    def start() -> None:
        run(tyro.cli(Arguments, description="\n\n".join([__doc__, *map(str, (SCHEMES, POLICIES, SAMPLERS))])))

    command("eval.generate", start)


if __name__ == "__main__":
    main()
