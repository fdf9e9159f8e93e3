"""What one codec for all SNRs and rates loses against codecs for a single point, each fine-tuned for its own."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

from eval.markdown import interval
from eval.measure import console
from megjax.channel import NoFading, RayleighFading
from megjax.codec import SeedCodec
from megjax.codec.coders import LearnedCoder
from megjax.codec.recipe import PRESETS, specialist, train_codec
from megjax.configs import require, require_positive_integers, write_json
from megjax.data import latents
from megjax.keys import from_seed
from megjax.metrics import bootstrap_interval
from megjax.runtime import command, prepare_output
from megjax.system import AnalogLink, send_latents
from megjax.units import check_snr_db

FADINGS = {"awgn": NoFading(), "rayleigh": RayleighFading()}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which points, how long, and where."""

    codec: str = "scenes"
    """The codec for all points: "scenes" (bundled) or a folder; each specialist goes on from it."""
    preset: str = "scenes"
    """The recipe that it was trained by."""
    data: Path = Path("runs/codec-scenes")
    """Run folder of train.codec, with its latents `generated` and `encoded`."""
    held_out: Path = Path("runs/latents/scenes-0")
    """Cache of held-out latents, as eval.sweep makes it."""
    snr_db: tuple[float, ...] = (-5.0, 5.0, 15.0)
    """SNRs in dB; each rate's effective SNR is that of equal energy, 10 log10 r more."""
    rates: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Compression ratios."""
    steps: int = 600
    """Steps of each specialist, all of them at its own point."""
    learning_rate: float = 3e-4
    """Peak learning rate of the specialists."""
    num: int = 2000
    """Held-out latents."""
    output: Path = Path("outputs/specialists")
    """Folder of the runs, which continue where they were, and of results.json."""


def errors(codec: SeedCodec, held_out: np.ndarray, snr_db: float, num_symbols: int) -> dict[str, np.ndarray]:
    """Squared error of every held-out latent over one realisation of each fading, the same for all codecs."""
    coder, link = LearnedCoder(codec.graph, codec.state), AnalogLink(num_symbols)

    @jax.jit
    def send(coder, fading, keys, z):
        received, _ = send_latents(link, coder, keys, z, snr_db, fading)
        return jnp.square(received - z).sum((1, 2, 3))

    keys = jax.vmap(lambda i: jax.random.fold_in(from_seed(0), i))(jnp.arange(len(held_out)))
    z = jnp.asarray(held_out)
    return {name: np.asarray(send(coder, law, jax.random.clone(keys), z)) for name, law in FADINGS.items()}


def loss_db(universal: np.ndarray, single: np.ndarray) -> dict[str, float]:
    """10 log10 of the ratio of mean errors, with its 95 % bootstrap interval over images."""
    # The ratio's relative deviation, image by image, makes it a mean that can be bootstrapped.
    ratio = universal.mean() / single.mean()
    influence = ratio * (universal / universal.mean() - single / single.mean()) + ratio
    low, high = bootstrap_interval(influence)
    return {name: float(10 * np.log10(x)) for name, x in (("loss_db", ratio), ("low", low), ("high", high))}


def run(args: Arguments) -> list[dict]:
    """Train and compare; returns the rows of results.json. ValueError on bad arguments, before any work."""
    require(args.preset in PRESETS, "--preset", args.preset, f"one of {tuple(PRESETS)}")
    require_positive_integers(args, "arguments", ("steps", "num"))
    check_snr_db(args.snr_db)
    codec = SeedCodec.from_pretrained(args.codec)
    folders = {"generated": args.data / "generated", "encoded": args.data / "encoded", "held_out": args.held_out}
    sets = {name: latents.load(folder) for name, folder in folders.items()}
    recipe = PRESETS[args.preset]
    generated, encoded = sets["generated"][: recipe.num_generated], sets["encoded"][: recipe.num_encoded]
    held_out = sets["held_out"][: args.num]
    prepare_output(args.output)
    settings = {"num_steps": args.steps, "learning_rate": args.learning_rate, "warmup_steps": args.steps // 20}
    fit = dataclasses.replace(recipe.fit, **settings, ema_decay=0.99)
    rows = []
    for snr_db, rate in itertools.product(args.snr_db, args.rates):
        effective, count = snr_db + float(10 * np.log10(rate)), codec.num_symbols(rate)
        single = specialist(dataclasses.replace(recipe, codec=codec.config, fit=fit), effective, count)
        folder = args.output / f"{snr_db:g}dB-r{rate:g}"
        trained = train_codec(single, generated, encoded, folder, start=codec)
        both = errors(codec, held_out, effective, count), errors(trained, held_out, effective, count)
        for name in FADINGS:
            rows.append({"snr_db": snr_db, "rate": rate, "fading": name, **loss_db(both[0][name], both[1][name])})
        write_json(args.output / "results.json", rows)
    show(rows)
    return rows


def show(rows: list[dict]) -> None:
    """Print the losses, a line each."""
    table = Table("SNR (dB)", "r", "fading", "loss of the one codec (dB), 95 %", title="equal energy")
    for row in rows:
        loss = interval(row["loss_db"], row["low"], row["high"], ".2f")
        table.add_row(f"{row['snr_db']:g}", f"{row['rate']:g}", row["fading"], loss)
    console().print(table)


if __name__ == "__main__":
    command("eval.specialists", lambda: run(tyro.cli(Arguments, description=__doc__)))
