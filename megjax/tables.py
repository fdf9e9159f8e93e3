"""Parquet files with checksums, written in one step."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from megjax.files import in_one_step


def write_parquet(table: pa.Table | pd.DataFrame, path: Path | str) -> None:
    """Write a table, of a data frame without its index, with a checksum in every page: whole or not at all."""
    if isinstance(table, pd.DataFrame):
        table = pa.Table.from_pandas(table, preserve_index=False)
    with in_one_step(Path(path)) as part:
        pq.write_table(table, part, write_page_checksum=True)


def read_parquet(path: Path | str) -> pa.Table:
    """The table in a file; OSError or pyarrow's ArrowException if it is absent, damaged, or not what was written."""
    return pq.read_table(path, page_checksum_verification=True)
