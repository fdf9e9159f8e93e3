"""Files that appear in one step: whole for every reader, however many processes write them, and gone after an error."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from megjax.configs import in_one_step, read_json, write_json
from megjax.tables import read_parquet, write_parquet


def test_readers_see_whole_files_while_several_write_the_same(tmp_path):
    path, rows = tmp_path / "rows.json", list(range(2000))
    write_json(path, {"writer": -1, "rows": rows})

    def write(writer):
        for _ in range(50):
            write_json(path, {"writer": writer, "rows": rows})

    writers = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in writers:
        thread.start()
    found = set()
    while any(thread.is_alive() for thread in writers):
        values = read_json(path)
        assert values["rows"] == rows
        found.add(values["writer"])
    assert len(found) > 1 and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path):
    path = tmp_path / "a.json"
    write = "import os, signal, sys; from pathlib import Path; from megjax.configs import in_one_step\n"
    write += "with in_one_step(Path(sys.argv[1])) as part: part.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", write, path]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    running = left.with_name(left.name.replace(left.name.split("-")[-2], str(os.getpid())))
    running.touch()
    write_json(path, {})
    assert sorted(tmp_path.iterdir()) == sorted([path, running])


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), in_one_step(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_changed_bit_of_a_table_is_found(tmp_path):
    table = pa.table({"x": np.arange(1000) / 7, "text": ["x" * (i % 50) for i in range(1000)]})
    path = tmp_path / "t.parquet"
    write_parquet(table, path)
    whole, found = path.read_bytes(), 0
    places = range(4, int(0.7 * len(whole)), 211)
    for i in places:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :])
        try:
            assert read_parquet(path).equals(table)
        except (pa.ArrowException, OSError):
            found += 1
    assert found > 0.9 * len(places)


def test_a_data_frame_has_no_index_in_its_file(tmp_path):
    frame = pd.DataFrame({"a": [1, 2]}, index=[5, 6])
    write_parquet(frame, tmp_path / "f.parquet")
    assert read_parquet(tmp_path / "f.parquet").to_pydict() == {"a": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["f.parquet"]
