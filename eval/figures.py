"""Draw every figure and table of the results from finished sweeps; nothing is computed but their presentation."""

import dataclasses
from pathlib import Path

import pandas as pd
import pyarrow as pa
import tyro

from eval import figure_plots as plots
from eval import figure_tables as tables
from megjax.configs import require
from megjax.files import write_text
from megjax.runtime import command, prepare_output
from megjax.sweep import read_points
from megjax.tables import read_parquet

SWEEPS = ("images", "latents", "policies", "split")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Where the sweeps are and where the page goes."""

    sweeps: Path = Path("outputs/sweeps")
    """Folder of eval.sweep --preset results, eval.costs and eval.power_tables."""
    output: Path = Path("docs")
    """Folder for results.md and its pictures, results-*.png."""


def read_table(folder: Path, command_line: str) -> pd.DataFrame:
    """A Parquet table; ValueError naming the command that makes it if it is absent or damaged."""
    try:
        return read_parquet(folder).to_pandas()
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder} cannot be read ({reason}); {command_line} makes it") from None


def run(args: Arguments) -> Path:
    """Draw and write; returns the page. ValueError, before anything is written, if a table is missing or damaged."""
    results, points = {}, {}
    for name in SWEEPS:
        folder = args.sweeps / name
        results[name] = read_table(folder / "results.parquet", "eval.sweep --preset results")
        require(len(results[name]) > 0, "sweep", str(folder), "one with points")
        points[name] = read_points(folder)
    costs = read_table(args.sweeps / "costs" / "costs.parquet", "eval.costs")
    learning = read_table(args.sweeps / "power" / "learning.parquet", "eval.power_tables")
    power = read_table(args.sweeps / "power" / "map.parquet", "eval.power_tables")
    prepare_output(args.output)
    plots.quality(results["images"], args.output / "results-quality.png")
    plots.pictures(points["images"], args.output / "results-pictures.png")
    plots.rate_distortion(results["latents"], args.output / "results-codec.png")
    plots.learning(learning, args.output / "results-learning.png")
    plots.power_map(power, args.output / "results-power.png")
    plots.split(results["split"], args.output / "results-split.png")
    page = tables.page(results, points, costs)
    write_text(args.output / "results.md", page)
    print(f"written: {args.output / 'results.md'} and its pictures")
    return args.output / "results.md"


if __name__ == "__main__":
    command("eval.figures", lambda: run(tyro.cli(Arguments, description=__doc__)))
