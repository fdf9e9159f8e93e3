"""The page of results: claims with intervals, tables and pictures, from sweeps."""

from typing import Any

import numpy as np
import pandas as pd

from eval.figure_plots import MODES, image_metrics, modes_of, title_of
from eval.markdown import interval, table
from megjax.metrics import Metric, bootstrap_interval
from megjax.units import linear_to_db

Row = dict[str, Any]


def cell_of(row: Any, metric: Metric) -> str:
    """A metric's value and interval in a point; older points may not have it."""
    if pd.isna(row[metric.name]):
        return "not measured"
    return interval(*(row[f"{metric.name}{end}"] for end in ("", "_low", "_high")), metric.form)


def rivals(points: list[Row]) -> list[str]:
    """Schemes that the seed is compared with."""
    return [scheme for scheme in dict.fromkeys(point["scheme"] for point in points) if scheme != "seed"]


def find(points: list[Row], scheme: str, mode: str, snr_db: float, **more: Any) -> Row | None:
    """The point of a scheme; where equal energy and equal power are the same it is kept under the latter."""
    for point in points:
        same = point["scheme"] == scheme and point["snr_db"] == snr_db
        same = same and mode in modes_of(scheme, point["mode"])
        if same and all(point[name] == value for name, value in more.items()):
            return point
    return None


def difference(a: Row, b: Row, metric: str = "psnr_db") -> tuple[float, float, float]:
    """Mean of a - b over images, paired, and its 95 % bootstrap interval."""
    gain = np.asarray(a[f"{metric}_values"], np.float64) - np.asarray(b[f"{metric}_values"], np.float64)
    return float(gain.mean()), *bootstrap_interval(gain)


def separate(a: Row, b: Row) -> tuple[float, float, float]:
    """Frechet distance of b less that of a, errors taken for independent: the interval is too wide, if anything."""
    gain = b["frechet"] - a["frechet"]
    half = np.hypot(a["frechet_high"] - a["frechet"], b["frechet_high"] - b["frechet"])
    return gain, gain - half, gain + half


def claim(points: list[Row], mode: str, levels: list[float], rival: str, how) -> list[str]:
    """Gains of the seed over a rival by SNR; bold where the interval lies above zero."""
    cells = []
    for level in levels:
        a, b = find(points, "seed", mode, level), find(points, rival, mode, level)
        if a is None or b is None:
            cells.append("-")
            continue
        gain, low, high = how(a, b)
        text = interval(gain, low, high, "+.2f" if how is difference else "+.0f")
        cells.append(f"**{text}**" if low > 0 else text)
    return cells


def quality(frame: pd.DataFrame, points: list[Row]) -> list[str]:
    """Tables of image quality by mode, and the seed's gains over its rivals."""
    levels, lines = sorted(frame.snr_db.unique()), []
    n, images = int(frame.n.iloc[0]), int(frame.images.iloc[0])
    for mode, title in MODES.items():
        lines += [f"### Quality at {title}", ""]
        here = frame[frame["mode"] == mode]
        for metric in image_metrics(here):
            rows = []
            for scheme, group in here.groupby("scheme", sort=False):
                by_level = group.set_index("snr_db")
                values = (cell_of(by_level.loc[level], metric) for level in levels)
                rows.append([title_of(scheme, group.rate.iloc[0]), *values])
            lines += [f"{metric.title}, n = {n:,} ({images:,} images):", ""]
            lines += [table(["scheme", *(f"{level:g} dB" for level in levels)], rows)]
        for label, how in (("PSNR of the seed less that of", difference), ("Frechet distance of", separate)):
            if how is separate and ("frechet" not in here or not here.frechet.notna().any()):
                continue
            rows = [[title_of(rival), *claim(points, mode, levels, rival, how)] for rival in rivals(points)]
            suffix = "a rival (dB, paired)" if how is difference else "a rival less that of the seed"
            lines += [f"{label} {suffix}; bold: the seed is better, beyond the 95 % interval.", ""]
            lines += [table(["rival", *(f"{level:g} dB" for level in levels)], rows)]
    return lines


def verdicts(points: dict[str, list[Row]]) -> list[str]:
    """The paper's claims, each with the SNRs at which the 95 % interval is for it, against it, or neither."""
    images, lines = points["images"], []
    levels = sorted({point["snr_db"] for point in images})
    metrics = [("PSNR", difference)]
    if all("frechet" in point for point in images):
        metrics.append(("Frechet distance", separate))
    for mode, title in MODES.items():
        for rival in rivals(images):
            for metric, how in metrics:
                sides: dict[str, list[str]] = {"better": [], "worse": [], "neither": []}
                for level in levels:
                    a, b = find(images, "seed", mode, level), find(images, rival, mode, level)
                    if a is None or b is None:
                        continue
                    _, low, high = how(a, b)
                    sides["better" if low > 0 else "worse" if high < 0 else "neither"].append(f"{level:g}")
                found = "; ".join(f"{side} at {', '.join(at)} dB" for side, at in sides.items() if at)
                lines.append(f"- Seed against {title_of(rival)}, {title}, {metric}: {found}.")
    policy_points = points["policies"]
    for level in sorted({point["snr_db"] for point in policy_points}):
        by_name = {point["policy"]: point for point in policy_points if point["snr_db"] == level}
        if {"ppo", "equal"} <= by_name.keys():
            gain = interval(*difference(by_name["ppo"], by_name["equal"]), "+.2f")
            lines.append(f"- PPO over equal power, image PSNR at {level:g} dB: {gain} dB.")
    return [*lines, ""]


def symbols(frame: pd.DataFrame) -> str:
    """Symbols, power and energy by scheme and mode."""
    rows = []
    for (scheme, mode), group in frame.groupby(["scheme", "mode"], sort=False):
        low, high = group.num_symbols.min(), group.num_symbols.max()
        count = f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f} to {high:,.0f}"
        rows.append(
            [title_of(scheme), MODES[mode], count, f"{group.mean_power.mean():.4g}", f"{group.energy.mean():,.1f}"]
        )
    return table(["scheme", "mode", "symbols K", "mean power P", "energy per image"], rows)


def costs(frame: pd.DataFrame) -> str:
    """Costs and latency at equal power."""
    rows = []
    for row in frame.itertuples():
        cells = [row.scheme, f"{row.num_symbols:,.0f}", f"{row.bandwidth_ratio:.4f}", f"{1e3 * row.airtime_s:.3f}"]
        cells += [f"{1e6 * row.energy_j:,.1f}", f"{row.server_flops / 1e9:.2f}", f"{row.device_flops / 1e9:.2f}"]
        rows.append([*cells, f"{1e3 * row.latency_s:.2f}"])
    header = [
        "scheme",
        "K",
        "K / 3HW",
        "airtime (ms)",
        "energy (uJ)",
        "server (GFLOP)",
        "device (GFLOP)",
        "latency (ms)",
    ]
    return table(header, rows)


def policies(points: list[Row]) -> str:
    """Image PSNR by policy, and paired gains over equal power and over the codec's own load."""
    rows, levels = [], sorted({point["snr_db"] for point in points})
    names = list(dict.fromkeys(point["policy"] for point in points))
    order = [name for name in ("equal", "static", "codec", "dp", "ppo") if name in names]
    for level in levels:
        by_name = {point["policy"]: point for point in points if point["snr_db"] == level}
        for name in order:
            one = by_name[name]
            cells = [f"{name}, {level:g} dB", interval(one["psnr_db"], one["psnr_db_low"], one["psnr_db_high"], ".2f")]
            cells += [interval(*difference(one, by_name[other]), "+.2f") for other in ("equal", "static", "codec")]
            rows.append(cells)
    return table(["policy", "PSNR (dB)", "over equal", "over static", "over codec"], rows)


def distortion(frame: pd.DataFrame) -> str:
    """NMSE in dB at equal energy by scheme and rate."""
    levels, rows = sorted(frame.snr_db.unique()), []
    for (scheme, rate), group in frame.groupby(["scheme", "rate"], sort=False):
        values = group.set_index("snr_db")
        name = title_of(scheme)
        label = name if scheme == "latent" else f"{name}, r = {rate:g}"
        ends = [[float(linear_to_db(values[c][level])) for c in ("nmse", "nmse_low", "nmse_high")] for level in levels]
        rows.append([label, *(interval(*row, ".2f") for row in ends)])
    return table(["scheme", *(f"{level:g} dB" for level in levels)], rows)


def split(frame: pd.DataFrame) -> str:
    """Quality where the device denoises and of decoding directly."""
    rows = []
    for level in sorted(frame.snr_db.unique()):
        for row in frame[frame.snr_db == level].to_dict("records"):
            name = title_of(row["scheme"]) + ", decoded"
            if row["device_steps"] > 0:
                name = f"{title_of(row['scheme'])}, device {row['device_steps']}"
                name += f" after server {row['server_steps']}" if row["server_steps"] else ""
            cells = [f"{name}, {level:g} dB", interval(row["psnr_db"], row["psnr_db_low"], row["psnr_db_high"], ".2f")]
            for metric, form in (("frechet", ".1f"), ("caption_accuracy", ".3f")):
                known = metric in row and pd.notna(row[metric])
                ends = (row[metric], row[f"{metric}_low"], row[f"{metric}_high"]) if known else ()
                cells.append(interval(*ends, form) if known else "-")
            rows.append(cells)
    return table(["scheme", "PSNR (dB)", "Frechet distance", "caption accuracy"], rows)


def page(results: dict[str, pd.DataFrame], points: dict[str, list[Row]], cost_table: pd.DataFrame) -> str:
    """results.md."""
    images, latents, two = results["images"], results["latents"], cost_table.iloc[0]
    sizes = {
        name: f"{int(f.images.iloc[0]):,} images x {int(f.n.iloc[0] // f.images.iloc[0])}"
        for name, f in results.items()
    }
    notes = images.iloc[-1]
    known = (("device", "Device"), ("jax", "JAX"), ("python", "Python"), ("commit", "commit"))
    about = ", ".join(f"{title} {notes[name]}" for name, title in known if name in notes)
    lines = [
        "# Results",
        "",
        "Made by `make figures`: every number and picture is read from sweeps by `eval/figures.py`. Bundled model",
        "`scenes` (64x64), held-out captions, Rayleigh fading over 16 blocks, SNR is 1 / noise variance. Brackets are",
        "95 % intervals, bootstrapped over images. PSNR is against the server's own image; Frechet distance is to",
        "renders of the same captions in SceneNet features (not FID); caption accuracy is the share of stated",
        "attributes that SceneNet finds. At equal energy every scheme radiates what the raw latent does at P = 1; at",
        "equal power P = 1 for all.",
        "",
        f"{about}. Images x realisations:",
        ", ".join(f"{name} {size}" for name, size in sizes.items()) + ".",
        "",
        "## Schemes",
        "",
        "![Quality over SNR by scheme](results-quality.png)",
        "",
        "![One caption under every scheme and SNR](results-pictures.png)",
        "",
        "### The paper's claims on this model",
        "",
        "The paper expects the seed to need the fewest symbols, to be better than `latent` and `centralized` at low",
        "SNR, and PPO to beat equal power. What is worse below contradicts it. At equal power a scheme with more",
        "symbols radiates more energy: 4 times the seed's for `latent`, some 180 times for coded pixels.",
        "",
        *verdicts(points),
        *quality(images, points["images"]),
        "### Symbols and energy",
        "",
        "Energy in units of one symbol at power 1. The coded image has as many symbols as its file needs.",
        "",
        symbols(images),
        "### Costs and latency",
        "",
        f"One image at P = 1: bandwidth {two.bandwidth_hz / 1e6:g} MHz, {two.transmit_power_w:g} W, server"
        f" {two.server_flops_per_s / 1e12:g} TFLOP/s, device {two.device_flops_per_s / 1e12:g} TFLOP/s, {two.steps}"
        " server steps unless the row says otherwise. Operations are XLA's counts of the compiled stages.",
        "",
        costs(cost_table),
        "## Codec: rate and distortion",
        "",
        f"Latent NMSE (dB) at equal energy, {sizes['latents']} realisations.",
        "",
        "![NMSE over symbols](results-codec.png)",
        "",
        distortion(latents),
        "## Power control",
        "",
        f"Image PSNR of the seed (r = 4, ordered blocks, P = 1), {sizes['policies']} realisation, paired differences.",
        "",
        policies(points["policies"]),
        "![PPO while it learns, with the causal optimum](results-learning.png)",
        "",
        "![Power over gain and energy left](results-power.png)",
        "",
        "## Split: denoising at the device",
        "",
        f"Equal energy, {sizes['split']} realisation. `split` sends the finished latent (K = 128), or the latent after",
        "20 of 25 server steps, and the device denoises it; `split of the seed` (r = 4, K = 32) noises the decoded",
        "latent again and denoises that; `prompt alone` sends nothing and generates from noise of the device's own,",
        "which a device with the model can do anyway. This model's images of one prompt differ little from seed to",
        "seed, so at low SNR much of what `split` shows comes from the prompt: compare with that line first.",
        "",
        "![Quality over device steps](results-split.png)",
        "",
        split(results["split"]),
    ]
    return "\n".join(lines)
