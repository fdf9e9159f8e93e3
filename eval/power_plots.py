"""Tables and plots of the measured power policies."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd

from eval.markdown import table
from eval.plots import heat_map, panels, save
from eval.power_tables import powers
from megjax.channel import RayleighFading
from megjax.files import write_text
from megjax.power import LearnedPower, causal_optimum, power_problem
from megjax.tables import write_parquet

COLOURS = {"equal": "C7", "static": "C5", "dp": "k", "clairvoyant": "C2", "ppo": "C0", "waterfilling": "C1"}
KINDS = ("ppo", "ppo_history")
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % points of Student's t for 1 to 9 degrees of freedom."""


def seed_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over seeds and half of its 95 % interval by Student's t; NaN for one seed."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = STUDENT_T[min(len(values), 10) - 2] * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def write(frame: pd.DataFrame, args) -> None:
    """results.parquet, tables.md, policies.png, map.png and learning.png in the output folder."""
    write_parquet(frame, args.output / "results.parquet")
    write_text(args.output / "tables.md", markdown(frame))
    draw(frame, args)


def markdown(frame: pd.DataFrame) -> str:
    """Returns and gains of every policy, and what PPO recovers of the gap to the causal optimum."""
    lines = []
    for name, group in frame.groupby("setting", sort=False):
        levels = sorted(group.snr_db.unique())
        n, error = int(group.n.iloc[0]), group.standard_error.max()
        lines += [f"**{name}**: return -sum w / (1 + gamma), n = {n:,} episodes, standard errors up to {error:.4f}", ""]
        table_rows = []
        for policy, rows in group.groupby("policy", sort=False):
            means = rows.groupby("snr_db")["return"].mean()
            seeds = rows.seed.nunique()
            label = policy + (f", mean of {seeds} seeds" if policy in KINDS and seeds > 1 else "")
            causal = "yes" if rows.causal.iloc[0] else "no"
            table_rows.append([label, causal, *(f"{means[level]:.4f}" for level in levels)])
        header = ["policy", "causal", *(f"{level:g} dB" for level in levels)]
        lines += [table(header, table_rows, "l" * len(header)), *_learned_table(group, levels)]
    return "\n".join(lines) + "\n"


def _learned_table(group: pd.DataFrame, levels: list[float]) -> list[str]:
    rows = group[group.policy.isin(KINDS)]
    if not len(rows):
        return []
    lines = []
    for kind, mine in rows.groupby("policy", sort=False):
        if "recovered" in mine and mine.recovered.notna().any():
            label = f"{kind}: share of the gap from {mine.base.iloc[0]} to dp{_seeds(mine)}"
            lines.append(_line(label, mine, "recovered", levels, lambda m, h: _interval(100 * m, 100 * h, ".1f", " %")))
            gap = mine.groupby("snr_db").gap.first()
            lines.append(["that gap", *(f"{gap[level]:.4f}" for level in levels)])
        for reference in ("equal", "static"):
            label = f"{kind}: gain over {reference}{_seeds(mine)}"
            lines.append(_line(label, mine, f"over_{reference}", levels, lambda m, h: _interval(m, h, "+.4f")))
    return [table(["", *(f"{level:g} dB" for level in levels)], lines, "l" * (len(levels) + 1))]


def _seeds(rows: pd.DataFrame) -> str:
    count = rows.seed.nunique()
    return f", mean of {count} seeds +- 95 % interval" if count > 1 else ", one seed"


def _interval(mean: float, half: float, form: str, unit: str = "") -> str:
    """Mean and half-width; the mean alone for one seed."""
    width = "" if np.isnan(half) else f" +- {half:{form.replace('+', '')}}"
    return f"{mean:{form}}{width}{unit}"


def _line(label: str, rows: pd.DataFrame, column: str, levels: list[float], text) -> list[str]:
    """A row of the table; a share of a gap that is under a thousandth of the error says so instead."""
    cells = []
    for level in levels:
        here = rows[rows.snr_db == level]
        tiny = column == "recovered" and here.gap.iloc[0] < 1e-3 * abs(here["return"].iloc[0])
        cells.append("no gap" if tiny else text(*seed_interval(here[column].to_numpy())))
    return [label, *cells]


def draw(frame: pd.DataFrame, args) -> None:
    """The three pictures; those that need a trained policy are left out without one."""
    save(_gains(frame), args.output / "policies.png")
    folders = sorted(args.runs.glob("power-equal-rayleigh-?"))
    models = [folder for folder in folders if (folder / "model").is_dir()]
    if models:
        learned = LearnedPower.from_pretrained(models[0] / "model", args.blocks)
        save(_maps(learned, args.blocks), args.output / "map.png")
        save(_curves(models), args.output / "learning.png")


def _gains(frame: pd.DataFrame):
    """Reduction of the error against equal power, in per cent, by policy and SNR."""
    names = list(frame.setting.unique())
    figure, axes = panels(1, len(names), (4.2 * len(names), 3.8))
    for axis, name in zip(axes[0], names, strict=True):
        group = frame[frame.setting == name]
        equal = group[group.policy == "equal"].set_index("snr_db")["return"]
        for i, (policy, rows) in enumerate(group.groupby("policy", sort=False)):
            if policy in ("equal", "waterfilling", "inversion", "waterfilling_clairvoyant"):
                continue
            means = rows.groupby("snr_db")["return"].mean()
            gain = 100 * (1 - means / equal[means.index])
            style = "--" if not rows.causal.iloc[0] else "-"
            axis.plot(
                means.index, gain, style, marker="o", markersize=3, label=policy, color=COLOURS.get(policy, f"C{i}")
            )
        axis.set(title=name, xlabel="SNR (dB)", ylabel="error saved against equal power (%)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def _maps(learned: LearnedPower, num_blocks: int):
    """Power in the middle block over gain and energy left: the optimum's, PPO's."""
    levels, block = (-10.0, 0.0, 10.0), num_blocks // 2
    figure, axes = panels(2, len(levels), (4.0 * len(levels), 6.4))
    gains, energies = np.geomspace(0.02, 6, 60), np.linspace(0.02, 2.5, 60)
    grid = jnp.asarray(gains, jnp.float32), jnp.asarray(energies * (num_blocks - block), jnp.float32)
    optimum = causal_optimum(RayleighFading(), num_blocks)
    for column, level in enumerate(levels):
        problem = power_problem(level, num_blocks)
        shown = {"causal optimum": powers(optimum, *grid, block, problem)}
        shown["PPO"] = powers(learned, *grid, block, problem)
        top = float(np.quantile(shown["causal optimum"], 0.97))
        for row, (name, power) in enumerate(shown.items()):
            axis = axes[row, column]
            heat_map(figure, axis, gains, energies, np.asarray(power), top, f"power of block {block + 1}")
            axis.set(
                xscale="log", xlabel="gain $|h|^2$", ylabel="energy left / blocks left", title=f"{name}, {level:g} dB"
            )
    return figure


def _curves(folders: list[Path]):
    """Mean return of the training episodes over updates, by seed."""
    figure, ((axis,),) = panels(1, 1, (6, 4))
    for i, folder in enumerate(folders):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        axis.plot([r["step"] for r in rows], [r["return"] for r in rows], color=f"C{i}", linewidth=1, label=folder.name)
    axis.set(xlabel="update", ylabel="mean return over all SNRs, exploring")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure
