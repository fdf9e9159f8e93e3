"""Measure power policies by the PSNR of the images that the seed codec brings, ordered and interleaved blocks."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from rich.table import Table
from tqdm import tqdm

from eval.measure import console
from megjax.channel import RayleighFading
from megjax.codec import SeedCodec
from megjax.codec.coders import LearnedCoder
from megjax.configs import require_positive_integers, write_text
from megjax.data.latents import load
from megjax.diffusion.pipeline import StableDiffusion
from megjax.keys import from_seed
from megjax.metrics import bootstrap_interval, psnr
from megjax.numerics import squared_magnitude
from megjax.power import LearnedPower, LoadedPower, make_policy, power_problem
from megjax.runtime import command, prepare_output
from megjax.system import AnalogLink, Source, realisation_keys, realise
from megjax.tables import write_parquet
from megjax.units import check_snr_db, db_to_linear

NAMES = ("equal", "static", "codec", "waterfilling", "dp", "clairvoyant", "ppo")
FADING, BLOCKS = RayleighFading(), 16


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure and where the results go."""

    image_policy: Path = Path("runs/power-scenes-rayleigh-0-image/model")
    """The policy that was trained on image PSNR; left out if absent."""
    held_out: Path = Path("runs/codec-scenes/held_out")
    """Cache of held-out latents, as eval.codec makes it."""
    num: int = 500
    """Images, one realisation each."""
    rate: float = 4.0
    """Compression ratio of the seed."""
    snr_db: tuple[float, ...] = (0.0, 10.0)
    """Effective SNRs, P / noise variance, in dB."""
    batch: int = 100
    """Images at a time."""
    output: Path = Path("outputs/power")
    """Folder for images.parquet and images.md."""


@functools.partial(jax.jit, static_argnames=("num_symbols", "mapping"))
def _send(coder, policy, keys, latents, snr_db, problem, num_symbols: int, mapping: str):
    """Received latents, the blocks' power by `policy` on each image's gains."""
    link, noise_var = AnalogLink(num_symbols, BLOCKS, mapping), 1 / db_to_linear(snr_db)
    code = link.code(coder, Source(latents, None, latents), snr_db, None)

    def one(key, payload):
        def allocate(gains):
            return policy.allocate(squared_magnitude(gains), problem)

        return realise(link, coder, key, code._replace(payload=payload), FADING, noise_var, allocate).received

    return link.decode(coder, jax.vmap(one)(keys, code.payload), code.shared)


def policies(args: Arguments, codec: SeedCodec, snr_db: float, mapping: str) -> dict:
    """The policies by name."""
    found = {name: make_policy(name, FADING, BLOCKS) for name in NAMES if name != "codec"}
    count = codec.num_symbols(args.rate)
    found["codec"] = LoadedPower(codec.encode(jnp.asarray(codec.validation[:1]), count, snr_db, BLOCKS, mapping)[1])
    if args.image_policy.is_dir():
        found["ppo on image PSNR"] = LearnedPower.from_pretrained(args.image_policy, BLOCKS)
    return found


def run(args: Arguments) -> pd.DataFrame:
    """Measure; returns the rows of images.parquet. ValueError on bad arguments, before any work."""
    require_positive_integers(args, "arguments", ("num", "batch"))
    check_snr_db(args.snr_db)
    codec, pipe = SeedCodec.from_pretrained("scenes"), StableDiffusion.from_pretrained("scenes")
    latents = load(args.held_out)[: args.num]
    prepare_output(args.output)
    scheme, count, key = LearnedCoder(codec.graph, codec.state), codec.num_symbols(args.rate), from_seed(0)
    parts = [slice(i, i + args.batch) for i in range(0, len(latents), args.batch)]
    originals = [pipe.decode(jnp.asarray(latents[part])) for part in parts]
    compare, rows = jax.jit(jax.vmap(psnr)), []
    settings = list(itertools.product(("ordered", "interleaved"), args.snr_db))
    for mapping, snr_db in tqdm(settings, desc="image PSNR", disable=None):
        weights = np.asarray(codec.block_weights(count, snr_db, BLOCKS, mapping))
        problem, values = power_problem(snr_db, BLOCKS, weights), {}
        for name, policy in policies(args, codec, snr_db, mapping).items():
            found = []
            for part, images in zip(parts, originals, strict=True):
                keys = realisation_keys(key, jnp.arange(part.start, part.start + len(images)))
                received = _send(scheme, policy, keys, latents[part], snr_db, problem, count, mapping)
                found.append(np.asarray(compare(images, pipe.decode(received))))
            values[name] = np.concatenate(found)
        for name, value in values.items():
            row = {"mapping": mapping, "snr_db": snr_db, "policy": name, "n": len(value), "psnr_db": value.mean()}
            for reference in ("equal", "static", "ppo"):
                gain = value - values[reference]
                low, high = bootstrap_interval(gain)
                row |= {f"over_{reference}": gain.mean(), f"over_{reference}_low": low, f"over_{reference}_high": high}
            rows.append(row)
    frame = pd.DataFrame(rows)
    write_parquet(frame, args.output / "images.parquet")
    write_text(args.output / "images.md", markdown(frame))
    show(frame)
    return frame


def markdown(frame: pd.DataFrame) -> str:
    """Image PSNR and its paired gains by policy."""
    lines = []
    for (mapping, snr_db), group in frame.groupby(["mapping", "snr_db"], sort=False):
        lines += [f"Image PSNR (dB), {mapping}, {snr_db:g} dB, r = 4, n = {group.n.iloc[0]} [95 % interval]:", ""]
        lines += ["| policy | PSNR | over equal | over static | over ppo |", "| --- | --- | --- | --- | --- |"]
        for row in group.itertuples():
            cells = [row.policy, f"{row.psnr_db:.2f}"]
            for reference in ("equal", "static", "ppo"):
                values = [getattr(row, f"over_{reference}{end}") for end in ("", "_low", "_high")]
                cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*values))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def show(frame: pd.DataFrame) -> None:
    """Print the gains over equal power."""
    table = Table("mapping", "SNR (dB)", "policy", "PSNR (dB)", "over equal power (dB)")
    for row in frame.itertuples():
        interval = f"{row.over_equal:+.2f} [{row.over_equal_low:+.2f}, {row.over_equal_high:+.2f}]"
        table.add_row(row.mapping, f"{row.snr_db:g}", row.policy, f"{row.psnr_db:.2f}", interval)
    console().print(table)


if __name__ == "__main__":
    command("eval.power_images", lambda: run(tyro.cli(Arguments, description=__doc__)))
