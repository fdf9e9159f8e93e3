"""Tests of a sweep's results: its rows, its files, what it refuses, and that a broken one loses nothing."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megjax.channel import RayleighFading, symbols_per_block
from megjax.codec import SeedCodec
from megjax.codec.coders import LearnedCoder
from megjax.codec.opta import opta_nmse
from megjax.data.latents import load
from megjax.metrics import bootstrap_interval
from megjax.sweep import read_points
from megjax.system import codec_statistics, realisation_keys
from tests.coders import simulate
from tests.sweep.conftest import ABOUT

pytestmark = pytest.mark.usefixtures("module_unchecked")
IMAGE_SCHEMES = ("seed", "latent", "split", "split-seed", "prompt", "centralized")


def files(folder):
    """Content of every file and when it was written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_rows(result):
    frame, folder = result
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet"), frame)
    assert list(zip(frame.scheme, frame.snr_db, strict=True)) == [
        (scheme, snr_db) for scheme in ("seed", "latent") for snr_db in (0.0, 10.0)
    ]
    assert (frame.n == 12).all() and (frame.images == 6).all()
    assert (frame.commit == ABOUT["commit"]).all() and (frame.device == ABOUT["device"]).all()
    assert ((frame.nmse_low <= frame.nmse) & (frame.nmse <= frame.nmse_high) & (frame.nmse_low < frame.nmse_high)).all()
    assert not {"psnr_db", "frechet", "caption_accuracy"} & set(frame.columns)
    assert frame.num_symbols.tolist() == [8, 8, 32, 32]
    assert {path.name for path in folder.iterdir()} == {"points", "results.parquet", "sweep.json"}
    assert len(list((folder / "points").iterdir())) == 4


def test_power(result, sweep, tmp_path):
    frame = sweep(tmp_path, modes=("equal_energy", "equal_power"), snr_db=(10.0,), rates=(2.0, 4.0))
    assert len(frame) == 6 and len(read_points(tmp_path)) == 5  # the latent is the same in both modes
    # P = K_latent / K, in dB above 1 / sigma^2.
    for row in frame.itertuples():
        power = row.rate if row.scheme == "seed" and row.mode == "equal_energy" else 1.0
        assert row.mean_power == pytest.approx(power, rel=1e-5)
        assert row.energy == pytest.approx(power * row.num_symbols, rel=1e-5)
        assert row.effective_snr_db == pytest.approx(10.0 + 10 * np.log10(power), abs=1e-4)
    latent = frame[frame.scheme == "latent"]
    assert latent.nmse.nunique() == 1 and set(latent["mode"]) == {"equal_energy", "equal_power"}
    pd.testing.assert_series_equal(result[0].nmse[[1, 3]], frame.nmse[[1, 4]], check_index=False)


def test_numbers_are_those_of_the_codec_alone(result, config, latents):
    """The seed's error from `system.send_latents`, on the latents of the cache and the same keys."""
    frame, _ = result
    codec, sent = SeedCodec.from_pretrained(config.codec), jnp.asarray(load(latents / "model-0")[:6])
    scheme, effective_snr_db = LearnedCoder(codec.graph, codec.state), 10.0 + 10 * np.log10(4)

    @jax.jit
    def errors_of(key, realisation):
        keys, law = realisation_keys(key, np.arange(6), realisation), RayleighFading()
        got, _ = simulate(scheme, keys, sent, effective_snr_db, law, num_symbols=8, num_blocks=4)
        return jnp.square(got - sent).sum((1, 2, 3))

    errors = [errors_of(jax.random.key(0), realisation) for realisation in range(2)]
    total = float(codec_statistics(codec).variances.sum())
    row = frame[(frame.scheme == "seed") & (frame.snr_db == 10.0)].iloc[0]
    errors = np.stack(errors, 1) / total
    assert row.nmse == pytest.approx(errors.mean(), rel=1e-4)
    low, high = bootstrap_interval(errors)
    assert (row.nmse_low, row.nmse_high) == (pytest.approx(low, rel=1e-4), pytest.approx(high, rel=1e-4))


def test_points_hold_every_image(result):
    rows = read_points(result[1])
    assert len(rows) == 4
    for row in rows:
        assert len(row["nmse_values"]) == 6 and np.mean(row["nmse_values"]) == pytest.approx(row["nmse"], rel=1e-5)


@pytest.fixture(scope="module")
def pictured(module_unchecked, sweep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictured")
    return sweep(folder, metrics="image", schemes=IMAGE_SCHEMES, snr_db=(10.0,), device_steps=(1,)), folder


def test_images_are_compared(pictured):
    frame, folder = pictured
    assert frame.scheme.tolist() == list(IMAGE_SCHEMES)
    for name in ("psnr_db", "ssim", "frechet", "caption_accuracy"):
        inside = (frame[f"{name}_low"] <= frame[name] + 1e-6) & (frame[name] <= frame[f"{name}_high"] + 1e-6)
        assert inside.all(), name
    assert frame.nmse.notna().tolist() == [True] * 5 + [False]  # pixels have no latents
    assert frame.device_steps.tolist() == [0, 0, 1, 1, 1, 0]
    assert frame.num_symbols.tolist() == [8, 32, 32, 8, 0, 3 * 32 * 32 // 2]
    np.testing.assert_allclose(frame.energy, [32, 32, 32, 32, 0, 32], rtol=1e-5)  # equal energy
    assert frame.effective_snr_db[4] == -np.inf
    assert all(len(row["psnr_db_values"]) == 6 and len(row["pictures"]) == 4 for row in read_points(folder))


@pytest.mark.slow
def test_as_many_pictures_from_small_batches(sweep, pictured, tmp_path):
    sweep(tmp_path, metrics="image", schemes=("latent",), snr_db=(10.0,), batch=2)
    (point,) = read_points(tmp_path)
    (other,) = [row for row in read_points(pictured[1]) if row["scheme"] == "latent"]
    assert len(point["pictures"]) == 4 and point["server_pictures"] == other["server_pictures"]


@pytest.mark.slow
def test_other_prompts_and_a_model_without_scenenet(sweep, config, tmp_path):
    model = shutil.copytree(config.models[0], tmp_path / "bare")
    shutil.rmtree(model / "scenenet")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  a blue square \na green star\n")
    changes = dict(models=(str(model),), schemes=("seed",), snr_db=(10.0,), metrics="image")
    frame = sweep(tmp_path / "results", prompts=str(prompts), num_images=2, **changes)
    assert {"psnr_db", "ssim", "nmse"} <= set(frame.columns)
    assert not {"frechet", "kernel_distance", "caption_accuracy"} & set(frame.columns)
    with pytest.raises(ValueError, match="num_images is 4; it must be at most 3, the prompts of the file"):
        sweep(tmp_path / "other", prompts=str(prompts), num_images=4, **changes)
    with pytest.raises(ValueError, match="prompts is '/nowhere', which cannot be read: No such file"):
        sweep(tmp_path / "other", prompts="/nowhere", **changes)
    prompts.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="prompts.txt', which cannot be read: it is no text file"):
        sweep(tmp_path / "other", prompts=str(prompts), **changes)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 100])
def test_numbers_do_not_depend_on_the_batch(result, sweep, tmp_path, batch):
    frame = sweep(tmp_path, batch=batch, snr_db=(10.0,))
    pd.testing.assert_frame_equal(frame, result[0].iloc[[1, 3]].reset_index(drop=True), rtol=1e-5)


def test_longer_lists_add_points(result, sweep, tmp_path):
    folder = shutil.copytree(result[1], tmp_path / "results")
    before, measured = files(folder / "points"), []
    frame = sweep(folder, snr_db=(-5.0, 0.0, 10.0), seeds=(0, 7), schemes=("latent",), on_point=measured.append)
    assert [(point.seed, point.snr_db) for point in measured] == [(0, -5.0), (7, -5.0), (7, 0.0), (7, 10.0)]
    after = files(folder / "points")
    assert before.items() <= after.items() and len(after) == len(before) + 4
    assert len(frame) == 6
    assert frame[(frame.seed == 0) & (frame.snr_db >= 0)].nmse.tolist() == result[0].nmse[2:].tolist()
    pd.testing.assert_frame_equal(sweep(folder, on_point=measured.append), result[0])
    assert len(measured) == 4  # the first list again measures nothing


def test_a_finished_sweep_needs_no_latents(result, sweep, tmp_path, monkeypatch):
    monkeypatch.setattr("megjax.sweep.bench.generate", None)
    before = files(result[1] / "points")
    pd.testing.assert_frame_equal(sweep(result[1]), result[0])
    assert files(result[1] / "points") == before


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "truncated"])
def test_a_damaged_point_is_named_and_nothing_else_is_touched(result, sweep, tmp_path, content):
    folder = shutil.copytree(result[1], tmp_path / "results")
    damaged = sorted((folder / "points").iterdir())[1]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2] if content is None else content)
    before = files(folder)
    with pytest.raises(ValueError, match=f"{damaged} is damaged .*; delete it to measure it anew") as error:
        sweep(folder)
    assert "\n" not in str(error.value) and files(folder) == before
    with pytest.raises(ValueError, match=f"{damaged} is damaged"):
        read_points(folder)
    damaged.unlink()
    measured = []
    sweep(folder, on_point=measured.append)
    assert len(measured) == 1 and damaged.read_bytes() == whole
    assert (folder / "results.parquet").read_bytes() == (result[1] / "results.parquet").read_bytes()


def test_a_file_that_is_no_point_is_damaged(result, sweep, tmp_path):
    folder = shutil.copytree(result[1], tmp_path / "results")
    path = sorted((folder / "points").iterdir())[0]
    pq.write_table(pa.Table.from_pylist([{"scheme": "seed", "n": 3}]), path)
    with pytest.raises(ValueError, match=r"is damaged \(no energy, num_symbols\)"):
        sweep(folder)


def test_another_sweep_is_refused(result, sweep, config, tmp_path):
    before = files(result[1])
    other_codec = shutil.copytree(config.codec, tmp_path / "codec")
    codec = SeedCodec.from_pretrained(other_codec)
    codec.state = jax.tree.map(lambda leaf: leaf * 1.01, codec.state)
    codec.save_pretrained(other_codec, np.float32)
    for change, message in (
        ({"num_images": 5}, "num_images 6 there, 5 here"),
        ({"num_blocks": 2, "realisations": 1}, "num_blocks 4 there, 2 here; realisations 2 there, 1 here"),
        ({"codec": str(other_codec)}, "codec of .*model-0 '[0-9a-f]{12}' there, '[0-9a-f]{12}' here"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            sweep(result[1], **change)
        assert str(error.value).startswith(f"{result[1]} holds points of another sweep")
        assert str(error.value).endswith("choose another folder") and "\n" not in str(error.value)
    assert files(result[1]) == before


def test_points_without_settings_are_refused(result, sweep, tmp_path):
    folder = shutil.copytree(result[1], tmp_path / "results")
    (folder / "sweep.json").unlink()
    with pytest.raises(ValueError, match="holds points but no sweep.json; choose another folder"):
        sweep(folder)
    (folder / "sweep.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="sweep.json: format is 'other'"):
        sweep(folder)
    (folder / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match="sweep.json is not valid JSON"):
        sweep(folder)


@pytest.mark.parametrize("call", ["write_table", "replace"])
def test_a_full_disk_keeps_finished_points(result, sweep, tmp_path, monkeypatch, call):
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            if call == "write_table":
                args[1].write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*args, **kwargs)

    if call == "write_table":
        plain = pq.write_table
        monkeypatch.setattr(pq, "write_table", full)
    else:
        plain = type(tmp_path).replace
        monkeypatch.setattr(type(tmp_path), "replace", full)
    with pytest.raises(
        ValueError, match="cannot be written: No space left on device; finished points are kept"
    ) as error:
        sweep(tmp_path)
    assert "\n" not in str(error.value) and list(tmp_path.rglob("*.part")) == []
    kept = files(tmp_path / "points")
    # sweep.json is replaced too, so that the third time is the second point's.
    assert len(kept) == (2 if call == "write_table" else 1) and not (tmp_path / "results.parquet").exists()
    monkeypatch.undo()
    sweep(tmp_path)
    assert kept.items() <= files(tmp_path / "points").items()
    assert (tmp_path / "results.parquet").read_bytes() == (result[1] / "results.parquet").read_bytes()


def test_folders_that_cannot_be_used(sweep, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"results folder '{folder}' cannot be made") as error:
            sweep(folder)
        assert "\n" not in str(error.value)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="results folder is .*; it must be one in which a sweep has finished"):
            read_points(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": (0.5,)}, r"rates is \(0.5,\); it must be 1 or more"),
        ({"rates": (16.0,)}, "num_symbols is 2; it must be an integer from 4"),
        ({"models": ("/nowhere",)}, "model '/nowhere' is no folder"),
        ({"codec": "/nowhere"}, "codec is '/nowhere'"),
        ({"codec": None}, "codec is None; it must be given: the model has none, and seed needs it"),
        ({"policies": ("dp",), "fadings": ("jakes:0.1",)}, "fading"),
        ({"policies": ("ppo",)}, "num_blocks|blocks"),
        ({"fadings": ("rician",)}, "fadings is 'rician'"),
        ({"policies": ("greedy",)}, "policies .* is 'greedy'"),
        ({"schemes": ("opta",), "rates": (65.0,)}, "rate is 65.0; it must be a number from 1 to 64"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_measured(result, sweep, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("megjax.sweep.bench.generate", None)
    with pytest.raises(ValueError, match=message) as error:
        sweep(tmp_path / "results", **change)
    assert "\n" not in str(error.value) and list(tmp_path.rglob("*.parquet")) == []


def test_settings_on_disk_are_what_points_share(result, config):
    found = json.loads((result[1] / "sweep.json").read_text())
    assert {name: found[name] for name in config.shared()} == config.shared()
    (name,) = found["sources"]
    assert name == f"{config.models[0]}-0" and set(found["sources"][name]) == {"model", "codec", "prompts", "sampler"}


def test_the_limit_is_that_of_the_codec(sweep, config, tmp_path):
    frame = sweep(tmp_path, schemes=("opta",), fadings=("awgn",))
    variances = codec_statistics(SeedCodec.from_pretrained(config.codec)).variances
    for row in frame.itertuples():
        snr = jnp.full(4, 4 * 10 ** (row.snr_db / 10))  # equal energy: four times the power
        expected = float(opta_nmse(variances, snr, symbols_per_block(8, 4)))
        np.testing.assert_allclose((row.nmse, row.nmse_low, row.nmse_high), expected, rtol=1e-5)
    assert (frame.policy == "equal").all() and (frame.n == 12).all()
