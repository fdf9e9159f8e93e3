"""Pictures of sweeps: quality over SNR, grids of received images, rate and distortion, policies, split."""

import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eval.plots import heat_map, legend_below, line_with_band, panels, save
from megjax.metrics import METRICS, Metric
from megjax.power import POLICIES
from megjax.system import SCHEMES, find_scheme, latent_symbols
from megjax.units import linear_to_db

MODES = {"equal_energy": "equal energy per image", "equal_power": "equal power per symbol"}


def title_of(scheme: str, rate: float | None = None) -> str:
    """A scheme of a sweep in words, with its compression ratio if that is given, and its options."""
    name, _, options = scheme.partition(":")
    ratio = "" if rate is None or name != "seed" else f", r = {rate:g}"
    return SCHEMES.find(name).title + ratio + (f" ({options.replace(',', ', ')})" if options else "")


def colour_of(scheme: str) -> str:
    """The colour of a scheme, the same in every picture."""
    return f"C{SCHEMES.names.index(scheme.partition(':')[0])}"


def modes_of(scheme: str, mode: str) -> tuple[str, ...]:
    """Modes that a point of this mode stands for: both, where the scheme has as many symbols as the raw latent."""
    shapes = (64, 64, 3), (8, 8, 4)
    same = find_scheme(scheme).num_symbols(*shapes) == latent_symbols(shapes[1])
    return tuple(MODES) if same else (mode,)


def image_metrics(frame: pd.DataFrame) -> list[Metric]:
    """Metrics of images that a table of points has, with intervals."""
    measured = (metric for metric in METRICS if f"{metric.name}_low" in frame and frame[metric.name].notna().any())
    return [metric for metric in measured if "images" in metric.needs]


def quality(frame: pd.DataFrame, path: Path) -> None:
    """Image PSNR, Frechet distance and caption accuracy over SNR, by scheme and mode."""
    columns = [metric for metric in image_metrics(frame) if metric.panel]
    size = (4.4 * len(columns), 7.0)
    figure, axes = panels(2, len(columns), size, sharex=True)
    for row, (mode, title) in enumerate(MODES.items()):
        here = frame[frame["mode"] == mode]
        for column, metric in enumerate(columns):
            axis = axes[row, column]
            for scheme, rows in here.groupby("scheme", sort=False):
                label = title_of(scheme, rows.rate.iloc[0])
                line_with_band(axis, rows, "snr_db", metric.name, label=label, color=colour_of(scheme))
            axis.set(
                ylabel=metric.title, title=title, xlabel="SNR (dB)", yscale="log" if metric.log_scale else "linear"
            )
            axis.grid(alpha=0.3)
    legend_below(figure, axes[0, 0])
    save(figure, path)


def pictures(points: list[dict[str, Any]], path: Path, mode: str = "equal_energy", caption: int = 0) -> None:
    """One caption as every scheme brings it at every SNR; the server's own picture first."""
    kept = {}
    for point in points:
        if mode in modes_of(point["scheme"], point["mode"]) and point.get("pictures"):
            kept[point["scheme"], point["snr_db"]] = point
    if not kept:
        return
    schemes = sorted({scheme for scheme, _ in kept}, key=lambda scheme: SCHEMES.names.index(scheme.partition(":")[0]))
    levels = sorted({level for _, level in kept})
    first = next(iter(kept.values()))
    caption = min(caption, len(first["captions"]) - 1)
    size = (1.45 * (len(levels) + 1) + 1.3, 1.5 * len(schemes) + 0.6)
    figure, axes = panels(len(schemes), len(levels) + 1, size)
    for row, scheme in enumerate(schemes):
        shown = [first["server_pictures"][caption]]
        shown += [kept[scheme, level]["pictures"][caption] if (scheme, level) in kept else None for level in levels]
        for column, (axis, data) in enumerate(zip(axes[row], shown, strict=True)):
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_visible(False)
            if data is not None:
                axis.imshow(plt.imread(io.BytesIO(data)), interpolation="nearest")
            if row == 0:
                axis.set_title("server" if column == 0 else f"{levels[column - 1]:g} dB", fontsize=9)
        axes[row, 0].set_ylabel(title_of(scheme).replace(", ", ",\n"), fontsize=8)
    figure.suptitle(f"{first['captions'][caption]} ({MODES[mode]})", fontsize=8)
    save(figure, path)


def rate_distortion(frame: pd.DataFrame, path: Path) -> None:
    """NMSE of received latents over the number of symbols, by SNR: seed, KLT, raw latent, Gaussian limit."""
    levels = sorted(frame.snr_db.unique())
    shown = [levels[i] for i in sorted({0, len(levels) // 2, len(levels) - 1})]
    size = (4.2 * len(shown), 3.8)
    figure, axes = panels(1, len(shown), size)
    for axis, level in zip(axes[0], shown, strict=True):
        here = frame[(frame.snr_db == level) & (frame["mode"] == "equal_energy")].copy()
        for column in ("nmse", "nmse_low", "nmse_high"):
            here[column] = np.asarray(linear_to_db(here[column].to_numpy()))
        for scheme, rows in here.groupby("scheme", sort=False):
            dashes = "--" if scheme == "opta" else "-"
            line_with_band(axis, rows, "num_symbols", "nmse", dashes, label=title_of(scheme), color=colour_of(scheme))
        axis.set(xscale="log", xlabel="symbols per image", ylabel="latent NMSE (dB)", title=f"{level:g} dB")
        axis.set_xticks(sorted(here.num_symbols.unique()), [f"{x:.0f}" for x in sorted(here.num_symbols.unique())])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save(figure, path)


def learning(frame: pd.DataFrame, path: Path) -> None:
    """Return of PPO's training episodes over updates, with the lines of policies that it stands between."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    lines = frame[frame["update"] == 0]
    for i, (name, rows) in enumerate(frame[frame["update"] > 0].groupby("run", sort=False)):
        smooth = rows["return"].rolling(5, min_periods=1, center=True).mean()
        axis.plot(rows["update"], smooth, color=f"C{i}", linewidth=1, label=f"PPO, {name}")
    for name, style in {"equal": ":", "dp": "-", "clairvoyant": "--"}.items():
        value = lines[lines.run == name]["return"].iloc[0]
        axis.axhline(value, color="k", linestyle=style, linewidth=1, label=name)
    axis.set(xlabel="update", ylabel="return, all training SNRs, exploring")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save(figure, path)


def power_map(frame: pd.DataFrame, path: Path) -> None:
    """Power of the middle block over gain and energy left: causal optimum and PPO."""
    levels, policies = sorted(frame.snr_db.unique()), list(frame.policy.unique())
    size = (4.0 * len(levels), 3.2 * len(policies))
    figure, axes = panels(len(policies), len(levels), size)
    for column, level in enumerate(levels):
        here = frame[frame.snr_db == level]
        top = here[here.policy == policies[0]].power.quantile(0.97)
        for row, policy in enumerate(policies):
            grid = here[here.policy == policy].pivot(index="energy_left", columns="gain", values="power")
            axis = axes[row, column]
            heat_map(figure, axis, grid.columns, grid.index, grid.to_numpy(), top, "power")
            axis.set(xscale="log", xlabel="gain $|h|^2$", ylabel="energy left / blocks left")
            axis.set_title(f"{POLICIES.find(policy).title}, {level:g} dB")
    save(figure, path)


def split(frame: pd.DataFrame, path: Path) -> None:
    """Quality over the device's steps where it denoises, with decoding directly as level lines, by SNR."""
    columns = [metric for metric in image_metrics(frame) if metric.panel]
    levels = sorted(frame.snr_db.unique())
    size = (4.2 * len(columns), 3.3 * len(levels))
    figure, axes = panels(len(levels), len(columns), size)
    for row, level in enumerate(levels):
        for column, metric in enumerate(columns):
            axis, here = axes[row, column], frame[frame.snr_db == level]
            lines, levels_only = here[here.device_steps > 0], here[here.device_steps == 0]
            for i, ((scheme, steps), rows) in enumerate(lines.groupby(["scheme", "server_steps"], sort=False)):
                title = title_of(scheme) + (f", after {steps} server steps" if steps else "")
                dashes = ":" if scheme == "prompt" else "-"
                line_with_band(axis, rows, "device_steps", metric.name, dashes, label=title, color=f"C{i}")
            for i, (scheme, rows) in enumerate(levels_only.groupby("scheme", sort=False)):
                label = f"{title_of(scheme)}, decoded"
                axis.axhline(rows[metric.name].iloc[0], color=f"C{i + 5}", linestyle="--", label=label)
            axis.set(xlabel="denoising steps at the device", ylabel=metric.title, title=f"{level:g} dB")
            axis.grid(alpha=0.3)
    legend_below(figure, axes[0, 0])
    save(figure, path)
