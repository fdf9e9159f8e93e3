"""Write the tables behind two figures of power control: learning curves with their references, and power maps."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from megjax.channel import RayleighFading
from megjax.configs import require, require_positive_integers
from megjax.keys import from_seed
from megjax.numerics import squared_magnitude
from megjax.power import LearnedPower, causal_optimum, make_policy, power_problem, weighted_errors
from megjax.power.recipe import PRESETS
from megjax.runtime import command, prepare_output
from megjax.tables import write_parquet

FADING = RayleighFading()
REFERENCES = ("equal", "dp", "clairvoyant")
LEVELS = 17
"""SNRs, evenly spaced, that stand for the uniform law of training."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which trained policies to tabulate, and where the tables go."""

    runs: Path = Path("runs")
    """Folder of train.power's runs with equal weights over Rayleigh fading."""
    snr_db: tuple[float, ...] = (-10.0, 0.0, 10.0)
    """SNRs of the maps in dB."""
    num: int = 5_000
    """Episodes at each SNR behind the reference lines."""
    blocks: int = 16
    """Fading blocks."""
    output: Path = Path("outputs/sweeps/power")
    """Folder for learning.parquet and map.parquet."""


def references(args: Arguments) -> dict[str, float]:
    """Mean return of policies over the SNRs of training, by the midpoint rule over equal steps in dB."""
    recipe, key = PRESETS["default"], from_seed(2)
    edges = np.linspace(recipe.min_snr_db, recipe.max_snr_db, LEVELS + 1)
    keys = jax.random.split(key, args.num)
    gains = jax.jit(jax.vmap(lambda k: squared_magnitude(FADING.sample(k, args.blocks))))(keys)

    @jax.jit
    def total(policy, gains, problem):
        def one(row):
            return -jnp.sum(weighted_errors(problem, row, policy.allocate(row, problem)))

        return jnp.mean(jax.vmap(one)(gains))

    found = {}
    for name in REFERENCES:
        policy = make_policy(name, FADING, args.blocks)
        values = [total(policy, gains, power_problem(level, args.blocks)) for level in (edges[1:] + edges[:-1]) / 2]
        found[name] = float(np.mean(values))
    return found


@partial(jax.jit, static_argnames="block")
def powers(policy, gains, energies, block: int, problem):
    """Power [e g] that a policy gives a block."""

    def one(gain, energy):
        return policy.power_at(gain, energy, block, problem)

    return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(gains, energies)


def power_map(args: Arguments, learned: LearnedPower) -> pd.DataFrame:
    """Power of the middle block over gain and energy left for each block left, of the optimum and of PPO."""
    block, frames = args.blocks // 2, []
    most = args.blocks / (args.blocks - block)  # nothing spent before
    gains, energies = np.geomspace(0.02, 6, 40), np.linspace(0.05, most, 40)
    grid = jnp.asarray(gains, jnp.float32), jnp.asarray(energies * (args.blocks - block), jnp.float32)
    for name, policy in (("dp", causal_optimum(FADING, args.blocks)), ("ppo", learned)):
        for level in args.snr_db:
            power = np.asarray(powers(policy, *grid, block, power_problem(level, args.blocks)))
            columns = {"gain": np.tile(gains, len(energies)), "energy_left": np.repeat(energies, len(gains))}
            frames.append(pd.DataFrame({"policy": name, "snr_db": level, **columns, "power": power.reshape(-1)}))
    return pd.concat(frames, ignore_index=True)


def run(args: Arguments) -> None:
    """Tabulate; ValueError on bad arguments or where no run is finished."""
    require_positive_integers(args, "arguments", ("num", "blocks"))
    folders = sorted(path for path in args.runs.glob("power-equal-rayleigh-?") if (path / "model").is_dir())
    require(bool(folders), "--runs", str(args.runs), "a folder with a finished run of train.power --weights equal")
    prepare_output(args.output)
    rows = []
    for folder in folders:
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.append({"run": folder.name, "update": row["step"], "return": row["return"]})
    rows += [{"run": name, "update": 0, "return": value} for name, value in references(args).items()]
    learned = LearnedPower.from_pretrained(folders[0] / "model", args.blocks)
    for name, frame in (("learning", pd.DataFrame(rows)), ("map", power_map(args, learned))):
        write_parquet(frame, args.output / f"{name}.parquet")
        print(f"written: {args.output / name}.parquet")


if __name__ == "__main__":
    command("eval.power_tables", lambda: run(tyro.cli(Arguments, description=__doc__)))
