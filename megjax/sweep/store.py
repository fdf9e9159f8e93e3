"""Results on disk: one Parquet file a point, written in one step, and the table of all of them."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from megjax.configs import read_json, require, write_json
from megjax.metrics import METRICS
from megjax.sweep.config import Point
from megjax.sweep.identity import digest
from megjax.tables import read_parquet, write_parquet

FORMAT = "megjax sweep 3"
"""Of the files; the number grows when older ones cannot be read (3: points are filed under versions of parts)."""
SETTINGS, POINTS, RESULTS = "sweep.json", "points", "results.parquet"
VERSIONS = "metric_versions"
"""Column with the versions of a point's metrics, as JSON."""
NEEDED = ("scheme", "n", "energy", "num_symbols")
"""Columns without which a file is no point."""


@dataclasses.dataclass(frozen=True)
class Store:
    """The results folder of one sweep.

    `identity` is what all of its points share; its `sources` are the digests of each model and seed, by
    `source_name`, that points of theirs share.
    """

    folder: Path
    identity: dict[str, Any]

    def open(self) -> None:
        """Make the folder, or check that its points belong here; ValueError naming what differs."""
        path = self.folder / SETTINGS
        try:
            (self.folder / POINTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"results folder {str(self.folder)!r} cannot be made: {error.strerror}") from None
        wanted = json.loads(json.dumps({"format": FORMAT, **self.identity}))
        if path.exists():
            found = read_json(path)
            require(found.get("format") == FORMAT, f"{path}: format", found.get("format"), repr(FORMAT))
            if changes := "; ".join(_changes(found, wanted)):
                raise ValueError(f"{self.folder} holds points of another sweep ({changes}); choose another folder")
            known = found.get("sources", {})
            if wanted.get("sources", {}).keys() - known.keys():
                grown = {**found, "sources": {**known, **wanted["sources"]}}
                with _explained(path):
                    write_json(path, grown)
        elif any((self.folder / POINTS).glob("*.parquet")):
            raise ValueError(f"{self.folder} holds points but no {SETTINGS}; choose another folder")
        else:
            with _explained(path):
                write_json(path, wanted)

    def path(self, point: Point, about: dict[str, Any]) -> Path:
        """File of a point, whose name depends on everything that its numbers depend on."""
        name = source_name(point.model, point.seed)
        shared = {**self.identity, "sources": {name: self.identity["sources"][name]}}
        mark = digest({"point": dataclasses.asdict(point), **about, **shared})[:16]
        scheme = re.sub("[^a-z0-9-]+", "-", point.scheme)
        return self.folder / POINTS / f"{scheme}-{point.snr_db:g}dB-{mark}.parquet"

    def read(self, path: Path) -> dict[str, Any] | None:
        """The row in a file, None if there is none; ValueError if it is damaged."""
        if not path.exists():
            return None
        try:
            (row,) = read_parquet(path).to_pylist()
            if missing := [name for name in NEEDED if row.get(name) is None]:
                raise ValueError(f"no {', '.join(missing)}")
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is damaged ({reason}); delete it to measure it anew") from None
        return _current(row)

    def asked(self) -> list[Path]:
        """Files of the points behind the table; ValueError without a table, or for a damaged one."""
        path = self.folder / RESULTS
        require(path.is_file(), "results folder", str(self.folder), "one in which a sweep has finished")
        try:
            names = read_parquet(path).column("file").to_pylist()
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is damaged ({reason}); run the sweep again") from None
        return [self.folder / POINTS / name for name in dict.fromkeys(names)]

    def write(self, path: Path, row: dict[str, Any]) -> None:
        """Write one row in one step; ValueError if the disk does not take it, and nothing is left of it then."""
        _write(pa.Table.from_pylist([row]), path)

    def merge(self, frame: pd.DataFrame) -> None:
        """Write the table of all points in one step."""
        _write(frame, self.folder / RESULTS)


def _write(table: pa.Table | pd.DataFrame, path: Path) -> None:
    with _explained(path):
        write_parquet(table, path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of writing `path` into one that says what is kept."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be written: {reason}; finished points are kept") from None


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows of points as a table, in the order given; lists of single values stay in the points."""
    return pd.DataFrame([{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows])


def _current(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the columns of metrics that have another version now."""
    known = json.loads(row.get(VERSIONS) or "{}")
    old = [name for name in METRICS.names if name in known and known[name] != METRICS.version_of(name)]
    dropped = {f"{metric}{end}" for metric in old for end in ("", "_low", "_high", "_values", "_error")}
    return {name: value for name, value in row.items() if name not in dropped}


def source_name(model: str, seed: int) -> str:
    """A model and a seed as one name."""
    return f"{model}-{seed}"


def _changes(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words; a model or seed that only one of them has does not count."""
    names = sorted((found.keys() | wanted.keys()) - {"sources"})
    rows = [(name, found.get(name), wanted.get(name)) for name in names]
    old, new = found.get("sources", {}), wanted.get("sources", {})
    for name in sorted(old.keys() & new.keys()):
        parts = sorted(old[name].keys() | new[name].keys())
        rows += [(f"{part} of {name}", _short(old[name].get(part)), _short(new[name].get(part))) for part in parts]
    return [f"{name} {before!r} there, {after!r} here" for name, before, after in rows if before != after]


def _short(mark: str | None) -> str | None:
    return None if mark is None else mark[:12]
