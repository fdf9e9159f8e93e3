"""The stages of the benchmark, one a module: what each measures, and how its table looks."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megjax.registry import Record, Registry

Measured = tuple[list[dict[str, Any]], list[str], list[str]]
"""Rows of the benchmark file, names of the peers that are not installed, and notes.

A row names its `case`, `batch` (0 for none) and `implementation`; each case and batch has a table of its own.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Record):
    """A stage of the benchmark, which `python -m eval.benchmark NAME` measures."""

    run: Callable[[Any, Mapping[str, float]], Measured]
    """Measures with the options (`eval.benchmark.Arguments`) and the machine's ceilings (`eval.measure.ceilings`)."""
    columns: Sequence[str]
    """Heads of its tables."""
    cells: Callable[[Any], Sequence[str]]
    """Texts of one line, from a row with its values as attributes."""
    check: Callable[[Any], None] = lambda args: None
    """Raises ValueError for options of this stage that cannot work."""
    fewest_rounds: int = 3
    """Samples that a figure needs at least."""
    needs_ceilings: bool = False
    splits_cpu: bool = False
    """Whether a CPU becomes one device for each of its cores."""


STAGES: Registry[Stage] = Registry("benchmark stage", "eval.stages", "megjax.benchmark_stages")
