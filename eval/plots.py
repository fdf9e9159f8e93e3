"""Pictures drawn without a screen: panels, lines with intervals, legends, and files written in one step."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megjax.files import in_one_step

DPI = 110


def panels(rows: int, columns: int, size: tuple[float, float], **options) -> tuple[Figure, np.ndarray]:
    """A figure, of this size in inches, and its axes [rows columns]."""
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def save(figure: Figure, path: Path) -> None:
    """Write a picture in one step, and forget the figure."""
    with in_one_step(path) as part:
        figure.savefig(part, dpi=DPI, format="png")
    plt.close(figure)


def line_with_band(axis: Axes, rows: pd.DataFrame, x: str, y: str, *style: str, **options) -> None:
    """A line over column `x` with its 95 % band, between the columns `y`_low and `y`_high."""
    rows = rows.sort_values(x)
    (line,) = axis.plot(rows[x], rows[y], *style, marker="o", markersize=3, **options)
    axis.fill_between(rows[x], rows[f"{y}_low"], rows[f"{y}_high"], color=line.get_color(), alpha=0.2, linewidth=0)


def line_with_bars(axis: Axes, rows: pd.DataFrame, x: str, y: str, **options) -> None:
    """A line over column `x` with its 95 % intervals as bars, between the columns `y`_low and `y`_high."""
    rows = rows.sort_values(x)
    errors = np.stack([rows[y] - rows[f"{y}_low"], rows[f"{y}_high"] - rows[y]])
    axis.errorbar(rows[x], rows[y], np.maximum(errors, 0), marker="o", markersize=3, linewidth=1.2, **options)


def heat_map(figure: Figure, axis: Axes, x: np.ndarray, y: np.ndarray, values: np.ndarray, top: float, label: str):
    """Values [y x] in colours from 0 to `top`, with a bar that says what they are."""
    mesh = axis.pcolormesh(x, y, values, vmin=0, vmax=top, shading="auto")
    figure.colorbar(mesh, ax=axis, label=label)


def legend_below(figure: Figure, axis: Axes) -> None:
    """One legend for all panels, of the lines of one of them, where it hides none."""
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
