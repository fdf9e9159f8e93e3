"""Write the costs of one image under every scheme: symbols, airtime, energy, operations at both ends, latency."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pandas as pd
import tyro
from rich.table import Table

from eval.measure import console
from megjax.channel import RayleighFading
from megjax.codec import SeedCodec
from megjax.configs import require
from megjax.diffusion.layout import locate
from megjax.diffusion.pipeline import StableDiffusion
from megjax.keys import from_seed
from megjax.runtime import command, prepare_output
from megjax.system import (
    Resources,
    SystemConfig,
    find_scheme,
    fit_image_codec,
    make_simulator,
    measure_work,
    scheme_cost,
)
from megjax.tables import write_parquet
from megjax.units import check_snr_db

SCHEMES = (
    ("centralized", ""),
    ("centralized-qam", ""),
    ("centralized-coded", ""),
    ("latent", ""),
    ("latent-wiener", ""),
    ("seed", ""),
    ("split:device_steps=1", ", 1 device step"),
    ("split:device_steps=5", ", 5 device steps"),
    ("split:device_steps=5,server_steps=20", ", 20 server and 5 device steps"),
    ("split-seed:device_steps=5", ", 5 device steps"),
    ("prompt:device_steps=5", ", 5 device steps"),
)
"""Schemes with their options, and how titles say the options."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The link and the machines at its ends, and where the table goes."""

    resources: Resources = Resources()
    """Bandwidth, transmit power and sustained speeds."""
    model: str = "scenes"
    """"scenes" (bundled) or a folder in the diffusers layout with a codec."""
    rate: float = 4.0
    """Compression ratio of the seed."""
    snr_db: float = 10.0
    """SNR at which the coded image chooses its quality."""
    steps: int = 25
    """Denoising steps of the server where it takes them all."""
    output: Path = Path("outputs/sweeps/costs")
    """Folder for costs.parquet."""


def run(args: Arguments) -> pd.DataFrame:
    """Count, print, save. ValueError on bad arguments, before any work."""
    require(check_snr_db(args.snr_db).ndim == 0, "--snr-db", args.snr_db, "one number in dB")
    prepare_output(args.output)
    require(args.steps >= 20, "--steps", args.steps, "at least 20, of which split takes 20 at the server")
    folder = locate(args.model)
    require((folder / "codec").is_dir(), "--model", args.model, "a model with a codec")
    pipe, codec = StableDiffusion.from_pretrained(folder), SeedCodec.from_pretrained(folder / "codec")
    latents = codec.validation
    require(latents is not None, "--model", args.model, "a model whose codec has validation latents")
    latents = jnp.asarray(latents[:200])
    pictures = pipe.decode(latents, 20)
    config = SystemConfig(num_steps=args.steps)
    table = fit_image_codec(from_seed(0), pictures, RayleighFading(), [args.snr_db])
    rows, ids, work = [], pipe.tokenize(["a house"]), None
    for spec, ending in SCHEMES:
        scheme = find_scheme(spec, defaults={"rate": args.rate})
        name = scheme.title + (f", r = {args.rate:g}" if scheme.name == "seed" else "") + ending
        fitted = table if scheme.name == "centralized-coded" else None
        made = make_simulator(pipe, codec, scheme, policy="equal", config=config, fitted=fitted)
        count = _mean_symbols(made, latents, pictures, args) if made.link.num_symbols is None else None
        work = measure_work(made, ids, work)
        cost = scheme_cost(made, work, args.resources, count)
        rows.append({"scheme": name, **dataclasses.asdict(cost), "latency_s": cost.latency_s})
    frame = pd.DataFrame(rows).assign(**dataclasses.asdict(args.resources), steps=args.steps, coded_snr_db=args.snr_db)
    write_parquet(frame, args.output / "costs.parquet")
    show(frame)
    return frame


def _mean_symbols(made, latents, pictures, args: Arguments) -> float:
    """Mean K of the coded image over validation pictures."""
    source = made.source(made.params, latents)._replace(images=pictures)
    return float(made.link.code(made.params["codec"], source, args.snr_db, None).num_symbols.mean())


def show(frame: pd.DataFrame) -> None:
    """Print the table."""
    table = Table("scheme", "symbols", "K / 3HW", "airtime", "energy", "server", "device", "latency")
    for row in frame.itertuples():
        cells = [row.scheme, f"{row.num_symbols:,.0f}", f"{row.bandwidth_ratio:.4f}", f"{1e3 * row.airtime_s:.2f} ms"]
        cells += [f"{1e6 * row.energy_j:.1f} uJ", f"{row.server_flops / 1e9:.2f} G", f"{row.device_flops / 1e9:.2f} G"]
        table.add_row(*cells, f"{1e3 * row.latency_s:.2f} ms")
    console().print(table)


if __name__ == "__main__":
    command("eval.costs", lambda: run(tyro.cli(Arguments, description=__doc__)))
