"""The benchmark of the U-Net runs on the bundled model's sizes, with PyTorch beside it doing the same work."""

import json
from types import SimpleNamespace

import pytest

from eval import benchmark
from eval.peers import flax_diffusers
from eval.stages import diffusion
from megjax.diffusion.unet import UNetConfig

SMALL = UNetConfig(
    sample_size=8,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=16,
)


pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")


@pytest.fixture(autouse=True)
def small_and_without_the_old_flax(monkeypatch, tmp_path):
    monkeypatch.setattr(flax_diffusers, "PYTHON", tmp_path / "none")
    configs = SimpleNamespace(unet=SMALL, vae=SimpleNamespace(downsample=8))
    monkeypatch.setattr(diffusion, "model_configs", lambda model, dtype: (configs, 5))
    monkeypatch.setattr(diffusion, "matmul_side", lambda: 256)


@pytest.mark.slow
def test_the_stage_writes_its_rows_and_tables(tmp_path, capsys):
    stage = {"stage": "diffusion", "model": "scenes", "unet_batches": (2,), "rounds": 3, "torch_compile": False}
    benchmark.run(benchmark.Arguments(**stage, folder=tmp_path))
    (path,) = tmp_path.glob("diffusion-*.json")
    result = json.loads(path.read_text())
    rows = {row["implementation"]: row for row in result["rows"]}
    assert set(rows) == {"megjax", "PyTorch, eager", "matmul 256x256"}
    assert rows["PyTorch, eager"]["ratio_to_eager"] == 1 and rows["matmul 256x256"]["share_of_matmul"] == 1
    ours = rows["megjax"]
    assert ours["flops_per_second"] == pytest.approx(ours["flops"] / ours["seconds"])
    assert ours["flops"] == rows["PyTorch, eager"]["flops"] > 1e6
    assert any("not asked for" in note for note in result["notes"])
    assert "U-Net of scenes, 64x64 pixels" in capsys.readouterr().out


@pytest.mark.slow
def test_without_pytorch_the_peer_is_missing(monkeypatch):
    monkeypatch.setattr(diffusion, "peer", lambda name: None)
    rows, missing, _ = diffusion.run("scenes", (2,), 3, True, True)
    assert missing == ["torch_unet", "flax_diffusers"] and len(rows) == 2
