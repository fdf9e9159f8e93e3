"""Tables, plots and markdown of the codec's evaluation, from the values of each image at each point."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from eval.markdown import interval, table
from eval.plots import line_with_bars, panels, save
from megjax.configs import require
from megjax.files import write_text
from megjax.sweep import Point as SweepPoint
from megjax.sweep import SweepConfig, read_points
from megjax.tables import write_parquet
from megjax.units import linear_to_db

CONFIDENCE, RESAMPLES = 0.95, 2000
NOTHING = (np.nan,) * 3
"""Estimate and interval of what was not measured."""
RIVALS = {"latent": 1.0, "latent-wiener": 1.0, "latent-denoiser": 1.0, "seed-klt": None, "seed-digital": None}
"""Schemes that the seed is compared with, and their rate; None: the seed's own."""
NAMES = {
    "seed": "seed",
    "seed-klt": "KLT",
    "seed-digital": "digital",
    "opta": "Gaussian OPTA",
    "latent": "raw",
    "latent-wiener": "raw + Wiener",
    "latent-denoiser": "raw + denoiser",
}
FADINGS = {"rayleigh": "Rayleigh", "awgn": "AWGN"}
COLOURS = {name: f"C{i}" for i, name in enumerate(NAMES)}


class Point(NamedTuple):
    """One scheme at one effective SNR, which several rows of the tables may show."""

    scheme: str
    fading: str
    snr_db: float
    num_symbols: int
    power: str
    mapping: str

    @property
    def is_variant(self) -> bool:
        """Whether it is the seed with another mapping or power than its own."""
        return self.scheme == "seed" and (self.power, self.mapping) != ("codec", "ordered")


class Row(NamedTuple):
    """One row of the tables: where the point stands in the comparison."""

    mode: str
    rate: float
    snr_db: float
    budget: float
    """P: 1 at equal power, n / (2 K) at equal energy."""
    point: Point


def rows_of(sweeps: dict[Path, SweepConfig]) -> tuple[list[Row], dict[Point, dict[str, np.ndarray]]]:
    """Rows that sweeps were asked for, and the values [n 1] of every image at their points; ValueError if one lacks."""
    rows, values = [], {}
    for folder, config in sweeps.items():
        found = {_place(row): row for row in read_points(folder)}
        for asked in config.points():
            measured = found.get(_place(dataclasses.asdict(asked.physics())))
            require(measured is not None, "sweep", str(folder), f"one with {asked.scheme} at {asked.snr_db:g} dB")
            scheme, mapping = asked.made().name, getattr(asked.made(), "mapping", "ordered")
            budget = round(measured["energy"] / measured["num_symbols"], 6)
            level = round(asked.snr_db + float(linear_to_db(budget)), 4)
            point = Point(scheme, asked.fading, level, int(measured["num_symbols"]), asked.policy, mapping)
            rows.append(Row(asked.mode, asked.rate, asked.snr_db, budget, point))
            columns = {name: measured.get(f"{name}_values") for name in ("nmse", "psnr_db")}
            mine = {name: np.asarray(column)[:, None] for name, column in columns.items() if column is not None}
            values[point] = values.get(point, {}) | mine
    return list(dict.fromkeys(rows)), values


def _place(row: dict[str, Any]) -> tuple:
    """Values of a point's row in a sweep that no other point of the sweep shares together, for looking it up."""
    names = [field.name for field in dataclasses.fields(SweepPoint) if field.name != "peak_power"]
    return tuple(row[name] for name in names)


class Bootstrap:
    """Means of columns [n c] over images and over resamples of them, the same resamples for all columns."""

    def __init__(self, columns: dict[Any, np.ndarray], seed: int = 0):
        values = np.stack([np.asarray(column, np.float64) for column in columns.values()], axis=1)
        num = len(values)
        counts = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=RESAMPLES)
        self.index = {name: i for i, name in enumerate(columns)}
        self.means, self.resampled = values.mean(0), counts @ values / num

    def __contains__(self, name) -> bool:
        return name in self.index

    def interval(self, fn, *names) -> tuple[float, float, float]:
        """`fn` of the columns' means: estimate, low, high."""
        places = [self.index[name] for name in names]
        estimate = fn(*(self.means[i] for i in places))
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(fn(*(self.resampled[:, i] for i in places)), [tail, 1 - tail])
        return float(estimate), float(low), float(high)


def decibels(value) -> np.ndarray:
    return np.asarray(linear_to_db(value), np.float64)


def spread(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    """Columns of an estimate and its interval."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def bootstrap(files: dict[Any, dict[str, np.ndarray]]) -> Bootstrap:
    """Of every point's NMSE and image PSNR, by (point, name); a resampled image brings all its realisations."""
    return Bootstrap({(point, name): array.mean(1) for point, found in files.items() for name, array in found.items()})


def results_table(rows, files, boot: Bootstrap) -> pd.DataFrame:
    """One line for each row: NMSE and image PSNR with intervals."""
    lines = []
    for row in rows:
        point = row.point
        images, realisations = files[point]["nmse"].shape
        line = {"mode": row.mode, **point._asdict(), "rate": row.rate, "snr_db": row.snr_db}
        line |= {"effective_snr_db": point.snr_db, "budget": row.budget, "n": images, "realisations": realisations}
        line |= spread("nmse", boot.interval(lambda x: x, (point, "nmse")))
        line |= spread("nmse_db", boot.interval(decibels, (point, "nmse")))
        has_images = (point, "psnr_db") in boot
        line |= spread("psnr_db", boot.interval(lambda x: x, (point, "psnr_db")) if has_images else NOTHING)
        lines.append(line)
    return pd.DataFrame(lines)


def comparisons_table(rows, boot: Bootstrap) -> pd.DataFrame:
    """Gains of the seed over each rival, paired over images: PSNR and NMSE in dB, positive where it is better."""
    place = {
        (r.mode, r.point.fading, r.snr_db, r.point.scheme, r.rate): r.point for r in rows if not r.point.is_variant
    }
    lines = []
    for (mode, fading, snr_db, scheme, rate), point in place.items():
        for rival, its_rate in RIVALS.items() if scheme == "seed" else ():
            other = place.get((mode, fading, snr_db, rival, its_rate or rate))
            if other is None:
                continue
            line = {"mode": mode, "fading": fading, "rate": rate, "snr_db": snr_db, "rival": rival}
            images = [(point, "psnr_db"), (other, "psnr_db")]
            both = all(name in boot for name in images)
            line |= spread("psnr_gain_db", boot.interval(np.subtract, *images) if both else NOTHING)
            gain = boot.interval(lambda a, b: decibels(b) - decibels(a), (point, "nmse"), (other, "nmse"))
            lines.append({**line, **spread("nmse_gain_db", gain)})
    return pd.DataFrame(lines)


def gap_table(rows, boot: Bootstrap) -> pd.DataFrame:
    """Share of the NMSE gap in dB from KLT to Gaussian OPTA that the seed closes: AWGN, r = 2 and 4, SNR 0..10 dB."""
    place = {(r.mode, r.rate, r.snr_db, r.point.scheme): r.point for r in rows if _in_gap(r)}
    lines = []
    for mode, rate, snr_db, scheme in place:
        if scheme == "seed":
            points = [(place[mode, rate, snr_db, name], "nmse") for name in ("seed-klt", "seed", "opta")]
            share = boot.interval(lambda k, s, o: _share(*map(decibels, (k, s, o))), *points)
            levels = {f"{p.scheme}_nmse_db": boot.interval(decibels, (p, name))[0] for p, name in points}
            line = {"mode": mode, "rate": rate, "snr_db": snr_db, **levels}
            line["gap_db"] = line["seed-klt_nmse_db"] - line["opta_nmse_db"]
            lines.append({**line, **spread("share", share)})
    return pd.DataFrame(lines)


def _share(klt, seed, opta):
    return (klt - seed) / (klt - opta)


def _in_gap(row) -> bool:
    inside = row.point.fading == "awgn" and row.rate in (2.0, 4.0) and 0 <= row.snr_db <= 10
    return inside and not row.point.is_variant


def studies_tables(studies: dict[float, dict[str, np.ndarray]], rate: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Load and weight of every block; measured and predicted NMSE of every realisation."""
    blocks, additive = [], []
    for snr_db, found in studies.items():
        head = {"mode": "equal_energy", "rate": rate, "snr_db": snr_db}
        for t, (load, weight) in enumerate(zip(found["load"], found["weights"], strict=True)):
            blocks.append({**head, "block": t, "load": float(load), "weight": float(weight)})
        for power in ("codec", "equal"):
            share = {"power": power, "r_squared": float(found[f"r_squared_{power}"][0])}
            pairs = zip(found[f"measured_{power}"], found[f"predicted_{power}"], strict=True)
            additive += [{**head, **share, "measured": float(m), "predicted": float(p)} for m, p in pairs]
    return pd.DataFrame(blocks), pd.DataFrame(additive)


def write(output: Path, rows, files, studies, rate: float) -> pd.DataFrame:
    """Every table and plot into a folder, each in one step; returns the main table."""
    boot = bootstrap(files)
    frames = {"results": results_table(rows, files, boot), "comparisons": comparisons_table(rows, boot)}
    frames["gap"] = gap_table(rows, boot)
    frames["blocks"], frames["additive"] = studies_tables(studies, rate)
    for name, frame in frames.items():
        write_parquet(frame, output / f"{name}.parquet")
    write_text(output / "docs_table.md", markdown(frames))
    draw(output, frames)
    return frames["results"]


def markdown(frames: dict[str, pd.DataFrame]) -> str:
    """Compact tables at equal energy per image."""
    results = frames["results"].query("mode == 'equal_energy'")
    num, lines = int(results.n.iloc[0]), []
    for fading, title in FADINGS.items():
        here = results[results.fading == fading]
        plain = here[(here.scheme != "seed") | ((here.power == "codec") & (here.mapping == "ordered"))]
        for value, unit in (("psnr_db", "Image PSNR (dB)"), ("nmse_db", "Latent NMSE (dB)")):
            shown = plain.dropna(subset=value)
            widest = ((shown[f"{value}_high"] - shown[f"{value}_low"]) / 2).max()
            lines += [f"{unit}, {title}, equal energy, n = {num}, 95 % intervals within +-{widest:.2f}:", ""]
            lines += [_grid({_label(row): None for row in shown.itertuples()}, shown, value)]
    variants = results[results.scheme == "seed"]
    names = {f"{r.fading}, r = {r.rate:g}, {r.mapping}, {r.power} power": None for r in variants.itertuples()}
    lines += [f"Latent NMSE (dB) of the seed by mapping and power, equal energy, n = {num}:", ""]
    label = [f"{r.fading}, r = {r.rate:g}, {r.mapping}, {r.power} power" for r in variants.itertuples()]
    lines += [_grid(names, variants.assign(label=label), "nmse_db")]
    lines += _gains(frames["comparisons"], num)
    if len(frames["gap"]):
        gap = frames["gap"].query("mode == 'equal_energy'")
        lines += [f"Share of the NMSE gap from KLT to Gaussian OPTA closed, AWGN, equal energy, n = {num}:", ""]
        rows = []
        for r in gap.itertuples():
            closed, low, high = (f"{100 * x:.0f} %" for x in (r.share, r.share_low, r.share_high))
            rows.append([f"{r.rate:g}", f"{r.snr_db:g}", f"{r.gap_db:.2f}", closed, f"{low} to {high}"])
        lines += [table(["rate", "SNR (dB)", "gap (dB)", "closed", "95 % interval"], rows, "l" * 5)]
    lines += ["Share of the NMSE's variance over Rayleigh realisations that the additive model predicts:", ""]
    additive = frames["additive"].drop_duplicates(["snr_db", "power"]).itertuples()
    rows = [[f"{r.rate:g}", f"{r.snr_db:g}", r.power, f"{r.r_squared:.4f}"] for r in additive]
    return "\n".join([*lines, table(["rate", "SNR (dB)", "power", "R^2"], rows, "llll")])


def _label(row) -> str:
    return NAMES[row.scheme] + ("" if row.scheme.startswith("latent") else f", r = {row.rate:g}")


def _grid(labels, frame: pd.DataFrame, value: str) -> str:
    """One line for each label, one column for each SNR."""
    if "label" not in frame:
        frame = frame.assign(label=[_label(row) for row in frame.itertuples()])
    cells = {(row.label, row.snr_db): getattr(row, value) for row in frame.itertuples()}
    levels = sorted(frame.snr_db.unique())
    rows = [[name, *(f"{cells[name, level]:.2f}" for level in levels)] for name in labels]
    return table(["SNR (dB)", *(f"{level:g}" for level in levels)], rows, "l" * (len(levels) + 1))


def _gains(comparisons: pd.DataFrame, num: int) -> list[str]:
    """Paired gains in image PSNR over every rival, and in latent NMSE over the best linear code."""
    energy, power = (comparisons[comparisons["mode"] == mode] for mode in ("equal_energy", "equal_power"))
    raw = power.rival.str.startswith("latent")
    kinds = [
        ("psnr_gain_db", "image PSNR", "equal energy", energy),
        ("psnr_gain_db", "image PSNR", "equal power", power[raw]),
    ]
    kinds.append(("nmse_gain_db", "latent NMSE", "equal energy", energy[energy.rival == "seed-klt"]))
    lines = []
    for (value, unit, mode, frame), (fading, title) in itertools.product(kinds, FADINGS.items()):
        here = frame[frame.fading == fading].dropna(subset=value)
        if here.empty:
            continue
        lines += [f"Gain of the seed in {unit} (dB), {title}, {mode}, n = {num} [95 % interval]:", ""]
        header, rows = ["seed", "over", *(f"{level:g} dB" for level in sorted(here.snr_db.unique()))], []
        for (rate, rival), group in here.groupby(["rate", "rival"], sort=False):
            columns = group.sort_values("snr_db")[[value, f"{value}_low", f"{value}_high"]].to_numpy()
            rows.append([f"r = {rate:g}", NAMES[rival], *(interval(*gains, ".2f") for gains in columns)])
        lines.append(table(header, rows, "l" * len(header)))
    return lines


def draw(output: Path, frames: dict[str, pd.DataFrame]) -> None:
    """nmse.png, psnr.png, additive.png and load.png."""
    results = frames["results"].query("mode == 'equal_energy'")
    results = results[(results.scheme != "seed") | ((results.power == "codec") & (results.mapping == "ordered"))]
    save(_draw_nmse(results), output / "nmse.png")
    save(_draw_psnr(results), output / "psnr.png")
    save(_draw_additive(frames["additive"]), output / "additive.png")
    save(_draw_blocks(frames["blocks"]), output / "load.png")


def _draw_nmse(results: pd.DataFrame):
    """Rows: fading. Columns: rates."""
    rates = sorted(results.rate.unique())
    figure, axes = panels(len(FADINGS), len(rates), (3.6 * len(rates), 3.4 * len(FADINGS)))
    for i, (fading, title) in enumerate(FADINGS.items()):
        for j, rate in enumerate(rates):
            here = results[
                (results.fading == fading) & ((results.rate == rate) | results.scheme.str.startswith("latent"))
            ]
            for scheme in NAMES:
                lines = here[here.scheme == scheme]
                if len(lines):
                    dashes = "--" if scheme == "opta" else ":" if scheme.startswith("latent") else "-"
                    style = {"label": NAMES[scheme], "color": COLOURS[scheme], "linestyle": dashes}
                    line_with_bars(axes[i, j], lines, "snr_db", "nmse_db", **style)
            axes[i, j].set(xlabel="SNR (dB), equal energy", ylabel="latent NMSE (dB)", title=f"{title}, r = {rate:g}")
            axes[i, j].grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    return figure


def _draw_psnr(results: pd.DataFrame):
    """One panel for each fading."""
    figure, axes = panels(1, len(FADINGS), (6.0 * len(FADINGS), 4.5))
    middle = 4.0 if 4.0 in set(results.rate) else max(results.rate)
    for axis, (fading, title) in zip(axes[0], FADINGS.items(), strict=True):
        here = results[results.fading == fading]
        for i, rate in enumerate(sorted(results.dropna(subset="psnr_db").rate.unique())):
            lines = here[(here.scheme == "seed") & (here.rate == rate)]
            line_with_bars(axis, lines, "snr_db", "psnr_db", label=f"seed, r = {rate:g}", color=f"C{i}")
        others = {"seed-klt": (f"KLT, r = {middle:g}", "--", "C4"), "latent": ("raw", ":", "C5")}
        others |= {"latent-wiener": ("raw + Wiener", ":", "C6"), "latent-denoiser": ("raw + denoiser", ":", "C7")}
        for scheme, (label, dashes, colour) in others.items():
            lines = here[(here.scheme == scheme) & (here.rate == (middle if scheme == "seed-klt" else 1.0))]
            if len(lines):
                line_with_bars(axis, lines, "snr_db", "psnr_db", label=label, color=colour, linestyle=dashes)
        axis.set(xlabel="SNR (dB), equal energy per image", ylabel="image PSNR (dB)", title=title)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    return figure


def _draw_additive(additive: pd.DataFrame):
    """Columns: SNRs. Points: realisations, by power."""
    levels = list(additive.snr_db.unique())
    figure, axes = panels(1, len(levels), (4.0 * len(levels), 4.0))
    for axis, level in zip(axes[0], levels, strict=True):
        here = additive[additive.snr_db == level]
        for i, (power, group) in enumerate(here.groupby("power", sort=False)):
            label = f"{power} power, $R^2$ = {group.r_squared.iloc[0]:.3f}"
            axis.plot(group.predicted, group.measured, ".", markersize=4, color=f"C{i}", label=label)
        ends = [here[["predicted", "measured"]].min().min(), here[["predicted", "measured"]].max().max()]
        axis.plot(ends, ends, color="grey", linewidth=0.8)
        axis.set(xlabel="NMSE by the additive model", ylabel="NMSE, measured", title=f"SNR {level:g} dB")
        axis.legend(fontsize=8)
    return figure


def _draw_blocks(blocks: pd.DataFrame):
    """Load and weight of every block, a line for each SNR."""
    figure, axes = panels(1, 2, (10.0, 3.8))
    for axis, column, label in zip(axes[0], ("load", "weight"), ("load", "block weight"), strict=True):
        for i, (level, group) in enumerate(blocks.groupby("snr_db")):
            axis.semilogy(
                group.block,
                group[column].clip(lower=1e-4),
                "o-",
                markersize=3,
                color=f"C{i}",
                label=f"SNR {level:g} dB",
            )
        axis.set(
            xlabel="block, most important values first", ylabel=f"{label}, mean 1", title=f"r = {blocks.rate[0]:g}"
        )
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    return figure
