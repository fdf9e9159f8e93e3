"""Measure power policies on held-out episodes: equal and codec weights, independent and correlated fading."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from rich.table import Table
from tqdm import tqdm

from eval import power_plots
from eval.measure import console
from megjax.channel import Fading, GaussMarkovFading, JakesFading, RayleighFading
from megjax.codec import SeedCodec
from megjax.configs import require, require_positive_integers
from megjax.keys import from_seed
from megjax.numerics import squared_magnitude
from megjax.power import POLICIES, LearnedPower, LoadedPower, make_policy, power_problem, weighted_errors
from megjax.runtime import check_seed, command, prepare_output
from megjax.units import check_snr_db


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of the power-control study: its size, the trained policies and the folder of results."""

    runs: Path = Path("runs")
    """Folder of train.power's runs; those that are absent are left out."""
    codec: str = "scenes"
    """Codec whose block weights and loads are used."""
    rate: float = 4.0
    """Its compression ratio."""
    snr_db: tuple[float, ...] = (-10.0, 0.0, 10.0, 20.0)
    """SNRs, 1 / noise variance, in dB; with codec weights the effective ones."""
    num: int = 100_000
    """Held-out episodes, the same for all policies of a setting."""
    blocks: int = 16
    """Fading blocks."""
    rho: float = 0.9
    """Correlation of the Gauss-Markov setting."""
    doppler: float = 0.05
    """Doppler shift of the Jakes setting."""
    seed: int = 1
    """Seed of the episodes; training uses other keys."""
    output: Path = Path("outputs/power")
    """Folder for results.parquet, tables.md and plots."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One law of fading and one kind of weights; `learned` are globs of the runs that were trained for it."""

    name: str
    fading: Fading
    weights: str
    learned: dict[str, str]
    base: str
    """The open-loop policy that the gap to the optimum starts from."""


def settings(args: Arguments) -> list[Setting]:
    """The four settings."""
    rayleigh, markov = RayleighFading(), GaussMarkovFading(args.rho)
    return [
        Setting("Rayleigh, equal weights", rayleigh, "equal", {"ppo": "power-equal-rayleigh-?"}, "equal"),
        Setting("Rayleigh, codec weights", rayleigh, "codec", {"ppo": "power-scenes-rayleigh-?"}, "static"),
        Setting("Gauss-Markov, equal weights", markov, "equal", {"ppo": "power-equal-gauss-markov-?"}, "static"),
        Setting(
            "Jakes, equal weights",
            JakesFading(args.doppler),
            "equal",
            {"ppo": "power-equal-jakes-?", "ppo_history": "power-equal-jakes-?-history4"},
            "static",
        ),
    ]


def policies(setting: Setting, args: Arguments, load) -> dict[str, Any]:
    """The policies of a setting by name, but for the learned ones."""
    names = [name for name in POLICIES.names if name not in ("codec", "ppo")]
    if isinstance(setting.fading, JakesFading):
        names.remove("dp")
    found = {name: make_policy(name, setting.fading, args.blocks) for name in names}
    return found if load is None else found | {"codec": LoadedPower(load)}


def learned(setting: Setting, args: Arguments) -> dict[str, list[LearnedPower]]:
    """Trained policies by kind, one for each seed."""
    found = {}
    for kind, pattern in setting.learned.items():
        folders = sorted(path / "model" for path in args.runs.glob(pattern) if (path / "model").is_dir())
        found[kind] = [LearnedPower.from_pretrained(folder, args.blocks) for folder in folders]
        if not folders:
            print(f"{setting.name}: no run {args.runs / pattern}; left out")
    return found


@jax.jit
def returns(policy, gains, problem):
    """-sum w_t / (1 + gamma_t) of every episode [n]."""

    def one(row):
        return -jnp.sum(weighted_errors(problem, row, policy.allocate(row, problem)))

    return jax.lax.map(one, gains, batch_size=5000)


def draw_gains(setting: Setting, args: Arguments, index: int):
    """Power gains [n t] of the held-out episodes."""
    keys = jax.random.split(jax.random.fold_in(from_seed(args.seed), index), args.num)
    sample = jax.jit(jax.vmap(lambda key: squared_magnitude(setting.fading.sample(key, args.blocks))))
    return sample(keys)


def measure(setting: Setting, args: Arguments, codec: SeedCodec, index: int, bar) -> list[dict]:
    """One row for each SNR and policy; of learned policies one for each seed."""
    rows, gains, trained = [], draw_gains(setting, args, index), learned(setting, args)
    count = codec.num_symbols(args.rate)
    for snr_db in args.snr_db:
        weights, load = None, None
        if setting.weights == "codec":
            weights = np.asarray(codec.block_weights(count, snr_db, args.blocks))
            load = codec.encode(jnp.asarray(codec.validation[:1]), count, snr_db, args.blocks)[1]
        problem = power_problem(snr_db, args.blocks, weights)
        fixed = policies(setting, args, load)
        values = {name: np.asarray(returns(one, gains, problem), np.float64) for name, one in fixed.items()}
        base, best = values[setting.base], values.get("dp")
        everything = [(name, 0, fixed[name].causal, values[name]) for name in fixed]
        for kind, group in trained.items():
            for seed, one in enumerate(group):
                everything.append((kind, seed, True, np.asarray(returns(one, gains, problem), np.float64)))
        for name, seed, causal, value in everything:
            row = {"setting": setting.name, "snr_db": snr_db, "policy": name, "seed": seed, "causal": causal}
            row |= {"n": args.num, "return": value.mean(), "standard_error": _error(value), "base": setting.base}
            for reference in ("equal", "static", "dp"):
                if reference in values:
                    gain = value - values[reference]
                    row |= {f"over_{reference}": gain.mean(), f"over_{reference}_error": _error(gain)}
            if best is not None:
                row["recovered"] = (value - base).mean() / (best - base).mean()
                row["gap"] = (best - base).mean()
            rows.append(row)
        bar.update()
    return rows


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / np.sqrt(values.size))


def show(frame: pd.DataFrame) -> None:
    """Print a table a setting."""
    screen = console()
    for name, group in frame.groupby("setting", sort=False):
        table = Table("policy", *(f"{snr:g} dB" for snr in sorted(group.snr_db.unique())), title=name)
        for policy, rows in group.groupby("policy", sort=False):
            cells = [f"{r:.4f}" for r in rows.groupby("snr_db")["return"].mean()]
            table.add_row(policy, *cells)
        screen.print(table)


def run(args: Arguments) -> pd.DataFrame:
    """Measure all settings; returns the rows of results.parquet. ValueError on bad arguments, before any work."""
    require_positive_integers(args, "arguments", ("num", "blocks"))
    require(args.num >= 2, "--num", args.num, "at least 2")
    require(check_snr_db(args.snr_db).size > 0, "--snr-db", args.snr_db, "at least one number")
    check_seed(args.seed)
    codec = SeedCodec.from_pretrained(args.codec)
    prepare_output(args.output)
    rows, chosen = [], settings(args)
    with tqdm(total=len(chosen) * len(args.snr_db), desc="power policies", disable=None) as bar:
        for index, setting in enumerate(chosen):
            rows += measure(setting, args, codec, index, bar)
    frame = pd.DataFrame(rows)
    power_plots.write(frame, args)
    show(frame)
    return frame


if __name__ == "__main__":
    command("eval.power", lambda: run(tyro.cli(Arguments, description=__doc__)))
