"""The benchmark of the U-Net runs on the bundled model's sizes, with PyTorch beside it doing the same work."""

import json

import pytest

from eval import benchmark
from eval.peers import flax_unet
from eval.stages import diffusion


@pytest.fixture(autouse=True)
def without_the_old_flax(monkeypatch, tmp_path):
    monkeypatch.setattr(flax_unet, "PYTHON", tmp_path / "none")


def test_the_stage_writes_its_rows_and_tables(tmp_path, capsys):
    pytest.importorskip("torch")
    stage = {"stage": "diffusion", "model": "scenes", "unet_batches": (2,), "rounds": 3, "torch_compile": False}
    benchmark.run(benchmark.Arguments(**stage, folder=tmp_path))
    (path,) = tmp_path.glob("diffusion-*.json")
    result = json.loads(path.read_text())
    rows = {row["implementation"]: row for row in result["rows"]}
    assert set(rows) == {"megjax", "PyTorch, eager", "matmul 4096x4096"}
    assert rows["PyTorch, eager"]["ratio_to_eager"] == 1 and rows["matmul 4096x4096"]["share_of_matmul"] == 1
    ours = rows["megjax"]
    assert ours["flops_per_second"] == pytest.approx(ours["flops"] / ours["seconds"])
    assert ours["flops"] == rows["PyTorch, eager"]["flops"] > 1e8
    assert any("not asked for" in note for note in result["notes"])
    assert "U-Net of scenes, 64x64 pixels" in capsys.readouterr().out


def test_without_pytorch_the_peer_is_missing(monkeypatch):
    monkeypatch.setattr(diffusion, "peer", lambda name: None)
    rows, missing, _ = diffusion.run("scenes", (2,), 3, True, True)
    assert missing == ["torch_unet", "flax_unet"] and len(rows) == 2
