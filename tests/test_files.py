"""Files that appear in one step: whole for every reader, however many processes write them, and gone after an error."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from megjax.configs import read_json, write_json
from megjax.files import in_one_step, read_safetensors, read_safetensors_metadata, write_safetensors
from megjax.metrics.scenenet import SceneNetConfig
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
    write = "import os, signal, sys; from pathlib import Path; from megjax.files import in_one_step\n"
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


def test_arrays_come_back_with_their_metadata_and_are_for_all_to_read(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "small": np.asarray(1.5, jnp.float8_e4m3fn)}
    write_safetensors(path, arrays, {"made with": "this"})
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    found = read_safetensors(path, arrays)
    assert found.keys() == arrays.keys() and read_safetensors_metadata(path) == {"made with": "this"}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_all_that_does_not_fit_is_told_in_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.zeros(2), "b": np.full(2, np.nan), "c": np.zeros(3)})
    with pytest.raises(ValueError) as error:
        read_safetensors(path, {"b": np.zeros(2), "c": np.zeros(4), "d": np.zeros(1)})
    problems = "missing d; extra a; c has shape (3,), expected (4,); b has values that are not finite"
    assert str(error.value) == f"{path} does not fit its configuration: {problems}"


@pytest.mark.parametrize(
    "content", [None, b"", b"\x80\x04\x95 a pickle", b"version https://git-lfs.github.com/spec/v1"]
)
def test_what_is_no_safetensors_file_is_named(tmp_path, content):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    reason = "is a Git LFS pointer" if content and content.startswith(b"version") else "is not a whole safetensors file"
    for reader in (read_safetensors, read_safetensors_metadata):
        with pytest.raises(ValueError, match=reason) as error:
            reader(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_counts_of_numpy_are_pythons_in_a_configuration(tmp_path, unchecked):
    config = SceneNetConfig(image_size=np.int64(32), num_classes=(*map(np.int32, (4, 3, 4)),))
    write_json(tmp_path / "config.json", dataclasses.asdict(config))
    assert config == SceneNetConfig(image_size=32, num_classes=(4, 3, 4)) and type(config.image_size) is int
    with pytest.raises(ValueError, match="scenenet: image_size is True; it must be a positive integer"):
        SceneNetConfig(image_size=True)
