"""What pages of results are made of: tables, intervals, and pictures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eval import plots
from eval.markdown import interval, table


def test_columns_are_aligned_as_asked():
    assert table(["a", "b"], [["x", "1"], ["y", "2"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |\n"
    assert table("ab", [], "rl") == "| a | b |\n| ---: | --- |\n"
    assert interval(1234.5, -1, 2000, "+,.1f") == "+1,234.5 [-1.0, +2,000.0]"


def test_lines_with_intervals_come_sorted_into_a_whole_picture(tmp_path):
    rows = pd.DataFrame({"x": [2.0, 1.0], "y": [4.0, 3.0], "y_low": [3.5, 2.0], "y_high": [5.0, 3.0]})
    figure, ((left, right),) = plots.panels(1, 2, (4, 2))
    plots.line_with_band(left, rows, "x", "y", "--", label="y")
    plots.line_with_bars(right, rows, "x", "y")
    for axis in (left, right):
        np.testing.assert_array_equal(axis.lines[0].get_xydata(), [[1, 3], [2, 4]])
    plots.heat_map(figure, right, np.arange(3), np.arange(2), np.zeros((2, 3)), 1.0, "power")
    plots.legend_below(figure, left)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["y"]
    plots.save(figure, tmp_path / "a.png")
    assert plt.imread(tmp_path / "a.png").shape == (2 * plots.DPI, 4 * plots.DPI, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and not plt.fignum_exists(figure.number)
