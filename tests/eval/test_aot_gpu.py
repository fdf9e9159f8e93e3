"""Compilation for a GPU without one: what is asked for, the compiler, the table."""

import importlib.util

import pytest

from eval import aot_gpu, aot_tables
from megjax.configs import write_json


def test_what_is_missing_or_unknown_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--jobs is 'paint-sd15'; it must be of"):
        aot_gpu.run(aot_gpu.Arguments(jobs=("paint-sd15",), output=tmp_path))
    monkeypatch.setattr(aot_gpu.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="make aot-gpu"):
        aot_gpu.gpu_mesh()
    plugin = tmp_path / "cuda" / aot_gpu.PLUGIN
    plugin.parent.mkdir(parents=True)
    plugin.touch()
    assert aot_gpu.find_plugin() == plugin


def test_results_are_kept_and_tabulated(tmp_path, monkeypatch):
    result = {"job": "codec", "model": "sd15", "items": 128, "unit": "latents", "products": "XLA", "temporaries": 2**30}
    result |= {"bytes_accessed": 4e9, "memory_seconds": 1e-3, "causes": {"add": 1e9, "dot_general": 2e9}}
    args = aot_gpu.Arguments(("codec-sd15",), tmp_path, table=tmp_path / "tpu.md")
    (tmp_path / "other").mkdir()
    write_json(tmp_path / aot_tables.GPU, {"codec-sd15": result})
    monkeypatch.setattr(aot_gpu, "gpu_mesh", lambda: pytest.fail("nothing is missing"))
    assert aot_gpu.run(args) == {"codec-sd15": result}
    line = "| codec | sd15 | 128 latents | XLA | 1.00 GiB | 4 | 1 ms | dot_general 50%, add 25% |"
    assert line in (tmp_path / "tpu.md").read_text()
