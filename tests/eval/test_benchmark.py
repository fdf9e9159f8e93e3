"""Tests of the benchmark harness and its tables, at sizes that say nothing about speed."""

import json
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import j0

from eval import benchmark
from eval.measure import Contender, Timing, environment, measure
from eval.peers import flax_diffusers
from eval.stages import channel, diffusion
from megjax.diffusion.unet import UNetConfig
from tests.checks import within_standard_error


def test_contenders_take_turns(monkeypatch):
    """By a clock that only the calls move."""
    calls, clock = [], [0.0]

    def contender(name, duration_s):
        def call():
            calls.append(name)
            clock[0] += duration_s

        return Contender(name, call)

    monkeypatch.setattr("eval.measure.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr("eval.measure.MIN_SAMPLE_S", 0.2)
    timings = measure([contender("a", 0.05), contender("b", 0.25)], rounds=3, title="turns")
    assert calls[:4] == ["a", "a", "b", "b"]  # first call and warm-up of each
    assert calls[4:] == 3 * ["a", "a", "a", "a", "b"]  # 0.2 s of calls in a sample
    assert timings["a"].samples_s == pytest.approx([0.05] * 3) and timings["b"].median_s == pytest.approx(0.25)


def test_timing():
    timing = Timing(2.0, (0.3, 0.1, 0.2, 0.5, 0.4))
    assert timing.median_s == 0.3
    assert timing.quartiles_s == pytest.approx((0.2, 0.4))


def test_environment_names_device_versions_and_commit():
    about = environment()
    assert about["platform"] == "cpu" and about["versions"]["jax"] and about["commit"]


@pytest.fixture(scope="module")
def result(tmp_path_factory, module_unchecked, fast_compile):
    folder = tmp_path_factory.mktemp("benchmarks")
    benchmark.run(benchmark.Arguments("channel", batches=(4, 6), rounds=3, folder=folder))
    (path,) = folder.glob("channel-*.json")
    return folder, json.loads(path.read_text())


@pytest.mark.slow
def test_channel_benchmark(result):
    rows = result[1]["rows"]
    names = {row["implementation"] for row in rows}
    assert {"megjax", "copy", "NumPy, a thread a core"} <= names
    assert {(row["case"].partition(",")[0], row["batch"]) for row in rows} >= {("Rayleigh", 4), ("Jakes", 6)}
    for row in rows:
        low, high = row["per_second_quartiles"]
        assert 0 < low <= row["per_second"] <= high
        alike = [r for r in rows if r["case"] == row["case"] and r["batch"] == row["batch"]]
        copy = next(r for r in alike if r["implementation"] == "copy")
        assert row["share_of_copy"] == pytest.approx(row["per_second"] / copy["per_second"])


@pytest.mark.slow
def test_tables_come_from_the_files(result, tmp_path):
    folder, data = result
    benchmark.write_tables(folder, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert all(f"{peer}: not installed" in text for peer in data["missing_peers"])
    row = next(r for r in data["rows"] if r["implementation"] == "megjax" and r["batch"] == 6)
    assert f"batch {row['batch']}" in text and f"{row['per_second'] / 1e3:,.1f} [" in text
    with pytest.raises(ValueError, match="--folder"):
        benchmark.write_tables(tmp_path, tmp_path / "benchmarks.md")


def test_a_missing_peer_is_a_line(monkeypatch):
    monkeypatch.setattr(channel, "PEERS", ("numpy_channel", "sionna_channel", "no_such_peer"))
    monkeypatch.setattr(channel, "cases", lambda batches, installed, with_gaussians: [])
    rows, missing, _ = channel.run((4,), 3, with_peers=True)
    assert rows == [] and "no_such_peer" in missing and "numpy_channel" not in missing
    assert channel.run((4,), 3, with_peers=False)[1] == []


@pytest.mark.parametrize(
    ("device", "compiler", "notes"),
    [
        (None, None, [channel.NO_DEVICE]),
        ("cuda", "no C compiler", ["torch.compile was not measured: no C compiler."]),
        ("cuda", None, []),
    ],
)
def test_pytorch_on_a_gpu_is_left_out_with_a_note(monkeypatch, device, compiler, notes):
    """Where it has no GPU beside JAX's, and torch.compile where its compiler is missing."""
    module, given = SimpleNamespace(NAME="PyTorch, eager"), []
    monkeypatch.setattr(channel, "peers", lambda: {"torch_channel": module, "numpy_channel": None})
    monkeypatch.setattr(channel, "cases", lambda batches, installed, with_gaussians: given.append(installed) or [])
    monkeypatch.setattr(channel, "prepare_torch", lambda: device)
    monkeypatch.setattr(channel, "compiler_problem", lambda on_cpu: compiler)
    monkeypatch.setattr(channel.jax, "default_backend", lambda: "gpu")
    assert channel.run((4,), 3, with_peers=True) == ([], ["numpy_channel"], notes)
    assert given[0]["torch_channel"] is (module if device else None)


@pytest.mark.parametrize("peer", [*channel.PEERS, "torch_channel, for its compiler"])
def test_peers_draw_the_same_law(peer, monkeypatch):
    peer, _, compiled = peer.partition(",")
    module = channel.peers()[peer]
    if module is None:
        pytest.skip(f"{peer} is not installed")
    symbols = np.ones((4000, 2, 3), np.complex64)
    if compiled:
        monkeypatch.setattr(module.torch, "compile", lambda link, dynamic: link)
        received = np.asarray(module.block_fading(symbols, 0.5, compiled=True)()) @ np.array([1, 1j])
    else:
        received = np.asarray(module.block_fading(symbols, 0.5)())
    samples = np.abs(received) ** 2  # mean 1 + 0.5; the three symbols of a block share its gain
    within_standard_error(samples.mean(2), 1.5)
    within_standard_error((received[:, 0, 0] * received[:, 0, 1].conj()).real, 1)
    if peer != "sionna_channel":
        processes = [(np.asarray(module.jakes(4000, 5, 0.1, 20)()), 1.0)]
        if peer == "numpy_channel":
            taps = module.tdl(4000, 5, 0.1, np.array([0.75, 0.25]), 20)()
            processes += [(taps[:, :, 0], 0.75), (taps[:, :, 1], 0.25)]
        for process, power in processes:
            product = (process[:, 0] * process[:, 3].conj()).real / power
            within_standard_error(product, j0(2 * np.pi * 0.1 * 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batches=()), "batches"),
        (dict(batches=(0,)), "batches"),
        (dict(rounds=2), "--rounds is 2; it must be 3 or more"),
        (dict(folder=None), "cannot be made"),
    ],
)
def test_bad_arguments(options, message, tmp_path):
    (tmp_path / "file").touch()
    options = {"folder": tmp_path} | options
    options["folder"] = options["folder"] or tmp_path / "file" / "folder"
    with pytest.raises(ValueError, match=message):
        benchmark.run(benchmark.Arguments("channel", **options))


SMALL_UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=16,
)


@pytest.mark.slow
def test_the_old_flax_in_an_environment_without_it(monkeypatch, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without installed packages
    bare.chmod(0o755)
    monkeypatch.setattr(flax_diffusers, "PYTHON", bare)
    old, note = diffusion.old_flax(SMALL_UNET, 5, 2, jnp.float32)
    assert old is None and "flax_diffusers ended with code 1" in note


@pytest.mark.slow
def test_the_old_flax():
    if not flax_diffusers.PYTHON.exists():
        pytest.skip("make peer-flax was not run")
    old, note = diffusion.old_flax(SMALL_UNET, 5, 2, jnp.float32)
    assert old.about["platform"] == "cpu" and "diffusers 0.39" in note
    old()
    old.close()


@pytest.mark.slow
def test_the_unet_counts_what_its_layers_are_defined_as():
    call = diffusion.UNetCall(SMALL_UNET, 5, 2)
    assert call().shape == (2, 8, 8, 4)
    # So few channels are not computed in another way.
    assert call.nominal_flops == pytest.approx(call.cost.flops, rel=0.1)
