"""Tests of the codec's report: the sweeps behind it at a tiny size, its tables and plots, clear lines for bad input."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from eval import codec_report
from eval.codec_report import Arguments, run
from eval.sweep import PRESETS
from megjax.codec import SeedCodec, SeedCodecConfig
from megjax.codec.fitting import initial_network
from megjax.data.latents import generate, load, scene_captions
from megjax.diffusion.pipeline import StableDiffusion
from megjax.metrics import bootstrap_interval
from megjax.sweep import read_points, run_sweep

PLOTS = ("nmse", "psnr", "additive", "load")
DENOISER = "latent-denoiser"


@pytest.fixture(scope="module")
def measured(tiny_model, tmp_path_factory, module_unchecked, fast_compile):
    """Sweeps of the preset with an untrained codec and denoiser of the tiny model's latents, 4x4x4."""
    folder = tmp_path_factory.mktemp("codec")
    training = folder / "latents" / f"{tiny_model.name}-training"
    options = {"num_steps": 1, "guidance_scale": 3.0, "shard_size": 100}
    captions = scene_captions(1000, 0, "train")  # enough for the covariance of 64 reals
    latents = generate(StableDiffusion.from_pretrained(tiny_model), captions, training, seed=0, **options)
    small = SeedCodecConfig(latent_shape=(4, 4, 4), tile=(4, 4), width=8, hidden=8, snr_steps=3, rate_steps=2)
    raw = dataclasses.replace(small, transform="raw", encoder_blocks=0)
    SeedCodec(initial_network(small, latents)).save_pretrained(folder / "codec", np.float32)
    SeedCodec(initial_network(raw, latents)).save_pretrained(folder / "denoiser", np.float32)
    sizes = {"snr_db": (0.0, 10.0), "num_images": 12, "num_training": 1000, "steps": 1, "num_blocks": 4}
    sweeps = {}
    for name, config in PRESETS["codec"].items():
        schemes = tuple(f"{DENOISER}:folder={folder / 'denoiser'}" if s == DENOISER else s for s in config.schemes)
        rates = tuple(rate for rate in config.rates if rate in (1.0, 4.0))
        small = dataclasses.replace(config, models=(str(tiny_model),), codec=str(folder / "codec"), **sizes)
        sweeps[name] = dataclasses.replace(small, schemes=schemes, rates=rates)
        run_sweep(sweeps[name], folder / name, latents=folder / "latents", batch=12, progress=False)
    cache = folder / "latents" / f"{tiny_model.name}-0"
    return Arguments(folder, str(folder / "codec"), cache, 4, folder / "output"), sweeps


@pytest.fixture(scope="module")
def result(measured):
    args, sweeps = measured
    return run(args, sweeps), args


def select(frame, **values):
    for name, value in values.items():
        frame = frame[frame[name] == value]
    return frame


@pytest.mark.slow
def test_table_covers_every_row(result):
    frame, args = result
    pd.testing.assert_frame_equal(pd.read_parquet(args.output / "results.parquet"), frame)
    # Per fading, SNR: seed, KLT, digital, OPTA and three variants of the seed by rate and mode; three raw by mode.
    assert len(frame) == 2 * 2 * (2 * (2 * 4 + 3) + 2 * 3)
    assert (frame.n == 12).all() and (frame.realisations == 1).all()
    assert ((frame.nmse_low <= frame.nmse) & (frame.nmse <= frame.nmse_high)).all()
    images, energy = frame.psnr_db.notna(), frame["mode"] == "equal_energy"
    plain = (frame.power == "codec") & (frame.mapping == "ordered")
    assert images[(frame.scheme == "seed") & plain & (energy | (frame.fading == "rayleigh"))].all()
    assert images[frame.scheme.str.startswith("latent")].all()  # in both modes these are the same points
    assert not images[frame.scheme == "opta"].any()
    seed = select(frame, scheme="seed", mode="equal_energy", rate=4.0)
    assert (seed.num_symbols == 8).all() and (seed.budget == 4).all()
    np.testing.assert_allclose(seed.effective_snr_db - seed.snr_db, 6.0206, atol=1e-4)
    assert (select(frame, mode="equal_power").budget == 1).all()


@pytest.mark.slow
def test_values_are_plausible(result):
    """Without fading the untrained codec is the KLT but for the law of its loads and their grid."""
    frame = select(result[0], mode="equal_energy", fading="awgn", mapping="ordered")
    seed, klt, opta = (
        select(frame, scheme=name, power=power, rate=4.0).sort_values("snr_db").nmse_db.to_numpy()
        for name, power in (("seed", "codec"), ("seed-klt", "codec"), ("opta", "equal"))
    )
    assert np.all(np.abs(seed - klt) < 0.5) and np.all(opta < klt)
    # Without fading every image has the same bound.
    bound = select(result[0], scheme="opta", fading="awgn")
    assert np.all(np.abs(bound.eval("nmse_high - nmse_low")) < 1e-6)


@pytest.mark.slow
def test_intervals_are_those_of_the_library(result):
    """The resamples that all columns share are those that `bootstrap_interval` draws."""
    frame, args = result
    row = select(frame, scheme="seed-klt", fading="rayleigh", mode="equal_energy", rate=4.0, snr_db=10.0).iloc[0]
    (point,) = (
        point
        for point in read_points(args.sweeps / "images")
        if (point["scheme"], point["rate"], point["snr_db"]) == ("seed-klt", 4.0, 10.0)
    )
    ends = bootstrap_interval(point["psnr_db_values"])
    np.testing.assert_allclose((row.psnr_db_low, row.psnr_db_high), ends, rtol=1e-6)
    np.testing.assert_allclose(row.psnr_db, point["psnr_db"], rtol=1e-6)


@pytest.mark.slow
def test_comparisons_are_differences_of_the_table(result):
    frame, args = result
    comparisons = pd.read_parquet(args.output / "comparisons.parquet")
    assert len(comparisons) == 2 * 2 * 2 * 2 * 5
    for line in comparisons.itertuples():
        place = dict(mode=line.mode, fading=line.fading, snr_db=line.snr_db)
        seed = select(frame, **place, scheme="seed", rate=line.rate, power="codec", mapping="ordered").iloc[0]
        rate = 1.0 if line.rival.startswith("latent") else line.rate
        rival = select(frame, **place, scheme=line.rival, rate=rate).iloc[0]
        np.testing.assert_allclose(line.psnr_gain_db, seed.psnr_db - rival.psnr_db, atol=1e-5)  # NaN without images
        np.testing.assert_allclose(line.nmse_gain_db, rival.nmse_db - seed.nmse_db, atol=1e-5)
    assert comparisons[comparisons.fading == "rayleigh"].query("mode == 'equal_energy'").psnr_gain_db.notna().all()


@pytest.mark.slow
def test_share_of_the_gap(result):
    gap = pd.read_parquet(result[1].output / "gap.parquet")
    assert set(gap.rate) == {4.0} and set(gap.snr_db) == {0.0, 10.0} and len(gap) == 4
    np.testing.assert_allclose(gap.share, (gap["seed-klt_nmse_db"] - gap.seed_nmse_db) / gap.gap_db, rtol=1e-6)


@pytest.mark.slow
def test_block_weights_and_additive_model(result):
    blocks = pd.read_parquet(result[1].output / "blocks.parquet")
    np.testing.assert_allclose(blocks.groupby("snr_db")[["load", "weight"]].mean(), 1.0, rtol=1e-5)
    additive = pd.read_parquet(result[1].output / "additive.parquet")
    assert len(additive) == 2 * codec_report.DRAWS
    # The code is linear, so only the loads inside a block stand between the model and the truth.
    assert (additive.r_squared > 0.8).all()


@pytest.mark.slow
def test_plots_and_markdown(result):
    assert {path.stem for path in result[1].output.glob("*.png")} == set(PLOTS)
    text = (result[1].output / "docs_table.md").read_text()
    assert "| seed, r = 4 |" in text and "| raw + Wiener |" in text and "nan" not in text


@pytest.mark.slow
def test_what_is_missing_is_named(measured, tmp_path):
    args, sweeps = measured
    args = dataclasses.replace(args, output=tmp_path / "output")
    longer = {"images": dataclasses.replace(sweeps["images"], snr_db=(0.0, 10.0, 20.0))}
    for changed, used, message in (
        (args, longer, "sweep is .*one with seed at 20 dB"),
        (dataclasses.replace(args, sweeps=tmp_path), sweeps, "results folder is"),
        (dataclasses.replace(args, codec="/nowhere"), sweeps, "codec is '/nowhere'"),
        (dataclasses.replace(args, latents=tmp_path), sweeps, str(tmp_path)),
        (dataclasses.replace(args, codec="scenes"), sweeps, "--latents is .*latents of the codec"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            run(changed, used)
        assert "\n" not in str(error.value)
    assert not args.output.exists()
    assert len(load(args.latents)) >= 12
