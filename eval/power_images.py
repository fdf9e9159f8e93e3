"""Tables of power policies by the PSNR of the images that the seed brings, ordered and interleaved, from a sweep."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from rich.table import Table

from eval.measure import console
from eval.sweep import IMAGE_POLICY
from megjax.configs import require
from megjax.files import write_text
from megjax.metrics import bootstrap_interval
from megjax.runtime import command, prepare_output
from megjax.sweep import read_points
from megjax.system import find_scheme
from megjax.tables import write_parquet

REFERENCES = ("equal", "static", "ppo")
"""Policies that the others are compared with, on the same images and realisations."""
TITLES = {f"ppo:{IMAGE_POLICY}": "ppo on image PSNR"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `eval.power_images`: the sweep, and where the tables go."""

    sweep: Path = Path("outputs/power/images")
    """Folder that `eval.sweep --preset power --output outputs/power` made."""
    output: Path = Path("outputs/power")
    """Folder for images.parquet and images.md."""


def table_of(points: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each mapping, SNR and policy: image PSNR, and paired gains with intervals."""
    rows = []
    places = dict.fromkeys((find_scheme(point["scheme"]).mapping, point["snr_db"]) for point in points)
    for mapping, snr_db in sorted(places, key=lambda place: (place[0] != "ordered", place[1])):
        here = {
            point["policy"]: np.asarray(point["psnr_db_values"], np.float64)
            for point in points
            if (find_scheme(point["scheme"]).mapping, point["snr_db"]) == (mapping, snr_db)
        }
        absent = [name for name in REFERENCES if name not in here]
        require(not absent, "sweep", f"{mapping}, {snr_db:g} dB", f"one with policies {', '.join(REFERENCES)}")
        for policy, values in here.items():
            row = {"mapping": mapping, "snr_db": snr_db, "policy": TITLES.get(policy, policy), "n": len(values)}
            row["psnr_db"] = values.mean()
            for reference in REFERENCES:
                gain = values - here[reference]
                low, high = bootstrap_interval(gain)
                row |= {f"over_{reference}": gain.mean(), f"over_{reference}_low": low, f"over_{reference}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def run(args: Arguments) -> pd.DataFrame:
    """Write and print the tables; returns the rows of images.parquet. ValueError for a folder without a sweep."""
    frame = table_of(read_points(args.sweep))
    prepare_output(args.output)
    write_parquet(frame, args.output / "images.parquet")
    write_text(args.output / "images.md", markdown(frame))
    show(frame)
    return frame


def markdown(frame: pd.DataFrame) -> str:
    """Image PSNR and its paired gains by policy."""
    lines = []
    for (mapping, snr_db), group in frame.groupby(["mapping", "snr_db"], sort=False):
        lines += [f"Image PSNR (dB), {mapping}, {snr_db:g} dB, r = 4, n = {group.n.iloc[0]} [95 % interval]:", ""]
        rows = []
        for row in group.to_dict("records"):
            gains = ([row[f"over_{name}{end}"] for end in ("", "_low", "_high")] for name in REFERENCES)
            rows.append([row["policy"], f"{row['psnr_db']:.2f}", *(interval(*gain, "+.2f") for gain in gains)])
        lines.append(table(["policy", "PSNR", *(f"over {name}" for name in REFERENCES)], rows, "lllll"))
    return "\n".join(lines)


def show(frame: pd.DataFrame) -> None:
    """Print the gains over equal power."""
    screen = Table("mapping", "SNR (dB)", "policy", "PSNR (dB)", "over equal power (dB)")
    for row in frame.itertuples():
        gain = interval(row.over_equal, row.over_equal_low, row.over_equal_high, "+.2f")
        screen.add_row(row.mapping, f"{row.snr_db:g}", row.policy, f"{row.psnr_db:.2f}", gain)
    console().print(screen)


if __name__ == "__main__":
    command("eval.power_images", lambda: run(tyro.cli(Arguments, description=__doc__)))
