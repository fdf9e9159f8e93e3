"""Results on disk: one Parquet file a point, written in one step, and the table of all of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from megjax.configs import read_json, require, write_json
from megjax.sweep.config import Point, digest

FORMAT = "megjax sweep 1"
SETTINGS, POINTS, RESULTS = "sweep.json", "points", "results.parquet"
NEEDED = ("scheme", "n", "energy", "num_symbols")
"""Columns without which a file is no point."""


@dataclasses.dataclass(frozen=True)
class Store:
    """The results folder of one sweep; `identity` is what all of its points share, digests of models included."""

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
            other = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            if other:
                changes = "; ".join(f"{name} {found.get(name)!r} there, {wanted.get(name)!r} here" for name in other)
                raise ValueError(f"{self.folder} holds points of another sweep ({changes}); choose another folder")
        elif any((self.folder / POINTS).glob("*.parquet")):
            raise ValueError(f"{self.folder} holds points but no {SETTINGS}; choose another folder")
        else:
            self._guarded(path, lambda part: write_json(path, wanted))

    def path(self, point: Point, about: dict[str, Any]) -> Path:
        """File of a point, whose name depends on everything that its numbers depend on."""
        mark = digest({"point": dataclasses.asdict(point), **about, **self.identity})[:16]
        return self.folder / POINTS / f"{point.scheme}-{point.snr_db:g}dB-{mark}.parquet"

    def read(self, path: Path) -> dict[str, Any] | None:
        """The row in a file, None if there is none; ValueError if it is damaged."""
        if not path.exists():
            return None
        try:
            (row,) = pq.read_table(path).to_pylist()
            if missing := [name for name in NEEDED if row.get(name) is None]:
                raise ValueError(f"no {', '.join(missing)}")
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is damaged ({reason}); delete it to measure it anew") from None
        return row

    def write(self, path: Path, row: dict[str, Any]) -> None:
        """Write one row in one step; ValueError if the disk does not take it, and nothing is left of it then."""
        self._guarded(path, lambda part: self._replace(pa.Table.from_pylist([row]), part, path))

    def merge(self, rows: list[dict[str, Any]]) -> pd.DataFrame:
        """Write the table of all points, in the order given, in one step; lists of single values stay in the points."""
        frame = pd.DataFrame([{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows])
        path = self.folder / RESULTS
        table = pa.Table.from_pandas(frame, preserve_index=False)
        self._guarded(path, lambda part: self._replace(table, part, path))
        return frame

    @staticmethod
    def _replace(table: pa.Table, part: Path, path: Path) -> None:
        pq.write_table(table, part)
        part.replace(path)

    @staticmethod
    def _guarded(path: Path, write) -> None:
        part = path.with_name(path.name + ".part")
        try:
            write(part)
        except (OSError, pa.ArrowException) as error:
            part.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ValueError(f"{path} cannot be written: {reason}; finished points are kept") from None
