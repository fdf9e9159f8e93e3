"""Tests of the codec's evaluation: its tables, its plots, resuming after a kill, and one clear line for bad input."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save

from eval import codec as evaluation
from eval.codec import Arguments, Bench, run
from megjax.codec import SeedCodec, SeedCodecConfig
from megjax.codec.fitting import initial_network
from megjax.diffusion.pipeline import StableDiffusion
from megjax.metrics import bootstrap_interval

TABLES = ("results", "comparisons", "gap", "blocks", "additive")
PLOTS = ("nmse", "psnr", "additive", "load")


@pytest.fixture(scope="module")
def arguments(tiny_model, tmp_path_factory, module_unchecked, fast_compile):
    """Untrained codec and denoiser of the tiny model's latents, 4x4x4."""
    folder = tmp_path_factory.mktemp("codec")
    args = Arguments(
        codec=str(folder / "codec"),
        denoiser=folder / "denoiser",
        model=str(tiny_model),
        held_out=folder / "held_out",
        training=folder / "training",
        num=24,
        num_training=1000,  # enough for the covariance of 64 reals
        steps=1,
        snr_db=(0.0, 10.0),
        rates=(1.0, 4.0),
        blocks=4,
        batch=12,
        output=folder / "output",
    )
    pipe = StableDiffusion.from_pretrained(args.model)
    training, _ = (evaluation.cached_latents(pipe, args, held_out) for held_out in (False, True))
    small = SeedCodecConfig(latent_shape=(4, 4, 4), tile=(4, 4), width=8, hidden=8, snr_steps=3, rate_steps=2)
    raw = dataclasses.replace(small, transform="raw", encoder_blocks=0)
    SeedCodec(initial_network(small, training)).save_pretrained(args.codec, np.float32)
    SeedCodec(initial_network(raw, training)).save_pretrained(args.denoiser, np.float32)
    return args


@pytest.fixture(scope="module")
def result(arguments):
    return run(arguments), arguments.output


def select(frame, **values):
    for name, value in values.items():
        frame = frame[frame[name] == value]
    return frame


@pytest.mark.slow
def test_table_covers_every_row(result):
    frame, folder = result
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet"), frame)
    # Per fading, SNR: seed, KLT, digital, OPTA and three variants of the seed by rate and mode; three raw by mode.
    assert len(frame) == 2 * 2 * (2 * (2 * 4 + 3) + 2 * 3)
    assert (frame.n == 24).all() and (frame.realisations == 1).all()
    assert ((frame.nmse_low <= frame.nmse) & (frame.nmse <= frame.nmse_high)).all()
    images = frame.psnr_db.notna()
    rayleigh, plain = frame.fading == "rayleigh", (frame.power == "codec") & (frame.mapping == "ordered")
    energy = frame["mode"] == "equal_energy"
    assert images[(frame.scheme == "seed") & plain & (energy | rayleigh)].all()
    assert images[frame.scheme.str.startswith("raw")].all()  # without fading both modes show the same points
    assert images[frame.scheme.isin(["klt", "digital"])].equals(
        (energy & rayleigh | (frame.rate == 1) & rayleigh)[frame.scheme.isin(["klt", "digital"])]
    )
    assert not images[frame.scheme == "opta"].any() and not images[(frame.scheme == "seed") & ~plain].any()
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
        for name, power in (("seed", "codec"), ("klt", "codec"), ("opta", "equal"))
    )
    assert np.all(np.abs(seed - klt) < 0.5) and np.all(opta < klt)
    raw, wiener = (select(result[0], scheme=name).nmse.to_numpy() for name in ("raw", "raw_wiener"))
    assert np.all(wiener < raw)
    # Without fading every image has the same bound.
    assert np.all(np.abs(select(frame, scheme="opta").eval("nmse_high - nmse_low")) < 1e-6)


@pytest.mark.slow
def test_intervals_are_those_of_the_library(result):
    """The resamples that all columns share are those that `bootstrap_interval` draws."""
    frame, folder = result
    row = select(frame, scheme="klt", fading="rayleigh").iloc[0]
    name = f"klt-rayleigh-codec-ordered-{row.num_symbols}-{row.effective_snr_db:.4f}dB.safetensors"
    values = evaluation.kept(folder / "points" / name, None)["psnr_db"]
    np.testing.assert_allclose((row.psnr_db_low, row.psnr_db_high), bootstrap_interval(values), rtol=1e-6)
    np.testing.assert_allclose(row.psnr_db, values.mean(), rtol=1e-6)


@pytest.mark.slow
def test_comparisons_are_differences_of_the_table(result):
    frame, folder = result
    comparisons = pd.read_parquet(folder / "comparisons.parquet")
    assert len(comparisons) == 2 * 2 * 2 * 2 * 5
    for line in comparisons.itertuples():
        place = dict(mode=line.mode, fading=line.fading, snr_db=line.snr_db)
        seed = select(frame, **place, scheme="seed", rate=line.rate, power="codec", mapping="ordered").iloc[0]
        rate = 1.0 if line.rival.startswith("raw") else line.rate
        rival = select(frame, **place, scheme=line.rival, rate=rate).iloc[0]
        np.testing.assert_allclose(line.psnr_gain_db, seed.psnr_db - rival.psnr_db, atol=1e-5)  # NaN without images
        np.testing.assert_allclose(line.nmse_gain_db, rival.nmse_db - seed.nmse_db, atol=1e-5)
        assert np.isnan(line.psnr_gain_db) or line.psnr_gain_db_low <= line.psnr_gain_db <= line.psnr_gain_db_high
    assert comparisons[comparisons.fading == "rayleigh"].query("mode == 'equal_energy'").psnr_gain_db.notna().all()


@pytest.mark.slow
def test_share_of_the_gap(result):
    gap = pd.read_parquet(result[1] / "gap.parquet")
    assert set(gap.rate) == {4.0} and set(gap.snr_db) == {0.0, 10.0} and len(gap) == 4
    np.testing.assert_allclose(gap.share, (gap.klt_nmse_db - gap.seed_nmse_db) / gap.gap_db, rtol=1e-6)


@pytest.mark.slow
def test_block_weights_and_additive_model(result):
    blocks = pd.read_parquet(result[1] / "blocks.parquet")
    np.testing.assert_allclose(blocks.groupby("snr_db")[["load", "weight"]].mean(), 1.0, rtol=1e-5)
    additive = pd.read_parquet(result[1] / "additive.parquet")
    assert len(additive) == 2 * evaluation.STUDY_DRAWS
    # The code is linear, so only the loads inside a block stand between the model and the truth.
    assert (additive.r_squared > 0.8).all()


@pytest.mark.slow
def test_plots_and_markdown(result):
    assert {path.stem for path in result[1].glob("*.png")} == set(PLOTS)
    text = (result[1] / "docs_table.md").read_text()
    assert "| seed, r = 4 |" in text and "| raw + Wiener |" in text and "nan" not in text


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_files(result, arguments, tmp_path, monkeypatch):
    folder = shutil.copytree(result[1], tmp_path / "output")
    written = [f"{name}.parquet" for name in TABLES] + [f"{name}.png" for name in PLOTS] + ["docs_table.md"]
    lost = sorted((folder / "points").glob("*-rayleigh-*"))[::8]
    for path in (*lost, *(folder / name for name in written)):
        path.unlink()
    args, measure, done = dataclasses.replace(arguments, output=folder), Bench.measure, []

    def stopped(bench, point, names):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(point.name)
        return measure(bench, point, names)

    monkeypatch.setattr(Bench, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(args)
    assert sum(path.exists() for path in lost) == 2 < len(lost) and not (folder / "results.parquet").exists()
    monkeypatch.setattr(Bench, "measure", lambda bench, *point: (done.append(point[0].name), measure(bench, *point))[1])
    run(args)
    assert sorted(done) == [path.stem for path in lost]
    for name in [*written, *(f"points/{path.name}" for path in lost)]:
        assert (folder / name).read_bytes() == (result[1] / name).read_bytes(), name
    assert list(folder.rglob("*.part")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": 0}, "arguments: num is 0"),
        ({"num_training": 1}, "--num, --num-training is .*2 or more"),
        ({"rates": (64.0,)}, "num_symbols is"),
        ({"rates": (0.5,)}, "rate is 0.5"),
        ({"rates": ()}, "--rates is"),
        ({"snr_db": (0.0, 0.0)}, "--snr-db is"),
        ({"snr_db": (float("nan"),)}, "snr_db is .*finite"),
        ({"seed": -1}, "--seed is -1"),
        ({"codec": "/nowhere"}, "codec is '/nowhere'"),
        ({"codec": "scenes"}, "--codec is .*; it must be a codec for the model's latents"),
        ({"model": "/nowhere"}, "model '/nowhere' is no folder"),
    ],
)
def test_bad_input_is_one_clear_line(tiny_model, tiny_codec, tmp_path, change, message):
    args = Arguments(codec=str(tiny_codec), model=str(tiny_model), denoiser=tmp_path / "none", output=tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        run(dataclasses.replace(args, **change))
    assert "\n" not in str(error.value)


def test_points_of_other_settings_are_refused(tmp_path):
    """A denoiser may join them, and stays when it is left out."""
    config = {"codec": "a", "denoiser": None, "num": 24, "seed": 0, "steps": 1}
    for _ in range(2):
        evaluation.claim(tmp_path, dict(config))
    assert (tmp_path / "points").is_dir()
    evaluation.claim(tmp_path, config | {"denoiser": "b"})
    evaluation.claim(tmp_path, dict(config))
    for change, names in (
        ({"num": 12}, "num"),
        ({"seed": 1, "steps": 2}, "seed, steps"),
        ({"denoiser": "c", "codec": "b"}, "codec, denoiser"),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path} holds points made with another {names}; choose another"):
            evaluation.claim(tmp_path, config | change)


@pytest.mark.slow
def test_another_codec_is_refused_and_a_denoiser_has_to_be_one(result, arguments):
    other = dataclasses.replace(arguments, codec=str(arguments.denoiser))
    with pytest.raises(ValueError, match=f"{arguments.output} holds points made with another codec"):
        run(other)
    with pytest.raises(ValueError, match="--denoiser is .* not 'klt'"):
        run(dataclasses.replace(arguments, denoiser=arguments.denoiser.parent / "codec"))


@pytest.mark.slow
def test_without_a_denoiser_its_rows_are_left_out_and_its_points_kept(result, arguments, capsys, monkeypatch):
    files = set((result[1] / "points").iterdir())
    monkeypatch.setattr(evaluation.codec_plots, "write", lambda output, rows, files, *_, **__: rows)
    rows = run(dataclasses.replace(arguments, denoiser=arguments.output / "none"))
    assert "is left out" in capsys.readouterr().out
    assert "raw_denoiser" not in {row.point.scheme for row in rows}
    assert set((result[1] / "points").iterdir()) == files


@pytest.mark.slow
def test_images_of_another_rate_are_measured_when_asked_for(result, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.codec_plots, "draw", lambda *_: None)
    folder = shutil.copytree(arguments.output, tmp_path / "output")
    for path in (folder / "points").glob("seed-rayleigh-codec-*-8-*.safetensors"):
        path.write_bytes(save({"nmse": load_file(path)["nmse"]}))
    few = run(dataclasses.replace(arguments, output=folder, image_rates=(1.0,)))
    assert set(few[few.psnr_db.notna()].rate) == {1.0}
    pd.testing.assert_frame_equal(run(dataclasses.replace(arguments, output=folder)), result[0])
