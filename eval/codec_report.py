"""Tables and plots of the seed codec beside its rivals and its limit, from sweeps, and a study of its blocks."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

from eval import codec_tables
from eval.sweep import PRESETS
from megjax.channel import RayleighFading
from megjax.codec import SeedCodec, link
from megjax.codec.coders import LearnedCoder
from megjax.codec.importance import POWERS, additive_prediction, block_weights
from megjax.configs import require
from megjax.data.latents import load
from megjax.keys import from_seed
from megjax.runtime import command, prepare_output
from megjax.system import codec_statistics
from megjax.units import linear_to_db

RATE, LATENTS, DRAWS = 4.0, 256, 200
"""Rate, latents and realisations of the study."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `eval.codec_report`: the sweeps, the latents of the study, and the folder of tables and plots."""

    sweeps: Path = Path("outputs/codec")
    """Folder of `eval.sweep --preset codec`."""
    codec: str = "scenes"
    """"scenes" (bundled) or a folder that SeedCodec.save_pretrained wrote: the codec of the sweeps."""
    latents: Path = Path("runs/latents/scenes-0")
    """Cache of held-out latents, which the sweeps made."""
    blocks: int = 16
    """Fading blocks an image, as in the sweeps."""
    output: Path = Path("outputs/codec")
    """Folder for Parquet tables, docs_table.md and plots."""


def study(codec: SeedCodec, latents: np.ndarray, snr_db: float, num_symbols: int, blocks: int) -> dict[str, np.ndarray]:
    """Load and weights of the codec's ordered blocks at an effective SNR, and how well the additive model does."""
    coder, size = LearnedCoder(codec.graph, codec.state), {"num_symbols": num_symbols}
    weight_key, check_key = jax.random.split(jax.random.fold_in(from_seed(0), 2**32 - 2))
    level, latents = jnp.float32(snr_db), jnp.asarray(latents[:LATENTS])
    total = codec_statistics(codec).total_variance
    load = coder.spending(level, num_symbols, blocks, "ordered").load
    weigh = jax.jit(block_weights, static_argnames=("num_symbols", "num_blocks"))
    predict = functools.partial(additive_prediction, num_realisations=DRAWS, fading=RayleighFading())
    predict = jax.jit(predict, static_argnames="num_symbols")
    found = {"load": load, "weights": weigh(coder, weight_key, latents, snr_db=level, num_blocks=blocks, **size)}
    for power in POWERS:
        shares = load if power == "codec" else jnp.ones(blocks, jnp.float32)
        key = jax.random.clone(check_key)
        check = predict(coder, key, latents, found["weights"], level, power=shares, **size)
        found |= {f"measured_{power}": check.measured / total, f"predicted_{power}": check.predicted / total}
        found[f"r_squared_{power}"] = check.r_squared[None]
    return {name: np.asarray(value) for name, value in found.items()}


def run(args: Arguments, sweeps: dict | None = None) -> pd.DataFrame:
    """Write tables and plots of the preset's sweeps, or of others by name; returns the main table.

    ValueError, before anything is written, for a missing or damaged point, codec or cache.
    """
    sweeps = PRESETS["codec"] if sweeps is None else sweeps
    rows, values = codec_tables.rows_of({args.sweeps / name: config for name, config in sweeps.items()})
    codec, latents = SeedCodec.from_pretrained(args.codec), load(args.latents)
    size = codec.config.num_values
    require(latents[0].size == size, "--latents", str(args.latents), f"latents of the codec, of {size} numbers")
    prepare_output(args.output)
    rates, levels = sorted({row.rate for row in rows}), sorted({row.snr_db for row in rows})
    rate = RATE if RATE in rates else rates[-1]
    symbols = link.symbols_at_rate(rate, size)
    gain = float(linear_to_db(size / (2 * symbols)))
    studies = {}
    for snr_db in tqdm(levels[1::2][:3] or levels[:1], desc="block weights", disable=None):
        studies[snr_db] = study(codec, latents, snr_db + gain, symbols, args.blocks)
    frame = codec_tables.write(args.output, rows, values, studies, rate)
    print(f"{len(values)} points; tables and plots in {args.output}")
    return frame


if __name__ == "__main__":
    command("eval.codec_report", lambda: run(tyro.cli(Arguments, description=__doc__)))
