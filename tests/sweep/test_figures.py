"""Tests of the results page: drawn from small sweeps of the tiny model, its costs and a short PPO run."""

import dataclasses
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eval import costs, figures, power_tables
from eval.figure_plots import image_metrics
from eval.figure_tables import difference
from megjax.codec import SeedCodec
from megjax.metrics import METRICS
from megjax.power.recipe import PRESETS, train_power
from megjax.sweep import read_points
from megjax.system import Resources

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_unchecked")]


@pytest.fixture(scope="module")
def sweeps(module_unchecked, sweep, tiny_model, tiny_codec, tmp_path_factory):
    """A folder with everything that the page is made of."""
    folder = tmp_path_factory.mktemp("sweeps")
    shown = {"metrics": "image", "snr_db": (10.0,), "device_steps": (1,)}
    sweep(folder / "images", schemes=("seed", "latent", "centralized-coded"), **shown)
    sweep(folder / "latents", schemes=("seed", "latent", "opta"))
    sweep(folder / "policies", schemes=("seed",), policies=("equal", "static", "codec"), **shown)
    sweep(folder / "split", schemes=("split", "prompt", "latent"), **shown)
    model = shutil.copytree(tiny_model, folder / "model")
    codec = SeedCodec.from_pretrained(tiny_codec)
    codec.validation = codec.validation[:6]
    codec.save_pretrained(model / "codec")
    costs.run(costs.Arguments(model=str(model), rate=2.0, output=folder / "costs"))
    recipe, run = dataclasses.replace(PRESETS["tiny"], num_blocks=4), folder / "power-equal-rayleigh-0"
    train_power(recipe, *recipe.environment(), run).save_pretrained(run / "model")
    power_tables.run(power_tables.Arguments(runs=folder, num=50, snr_db=(0.0,), blocks=4, output=folder / "power"))
    return folder


@pytest.fixture(scope="module")
def page(sweeps, tmp_path_factory):
    """The page and its folder."""
    output = tmp_path_factory.mktemp("docs")
    return figures.run(figures.Arguments(sweeps, output)).read_text(), output


def test_the_page_shows_every_picture(page):
    text, folder = page
    names = re.findall(r"\]\((results-[a-z]+\.png)\)", text)
    assert sorted(names) == sorted(path.name for path in folder.glob("*.png")) and len(names) == 6
    for name in names:
        pixels = np.asarray(Image.open(folder / name).convert("RGB"))
        assert pixels.std() > 10
    assert "nan" not in text


def test_pictures_have_panels_of_the_metrics_that_the_paper_shows():
    measured = pd.DataFrame({metric.name + end: [0.0] for metric in METRICS for end in ("", "_low", "_high")})
    shown = [metric.name for metric in image_metrics(measured) if metric.panel]
    assert {"psnr_db", "frechet", "fid", "caption_accuracy"} <= set(shown)


def test_numbers_on_the_page_are_those_of_the_sweep(page, sweeps):
    text, _ = page
    frame = pd.read_parquet(sweeps / "images" / "results.parquet")
    for row in frame.itertuples():
        assert f"{row.psnr_db:.2f} [{row.psnr_db_low:.2f}, {row.psnr_db_high:.2f}]" in text
    points = read_points(sweeps / "policies")
    equal, static = (next(p for p in points if p["policy"] == name) for name in ("equal", "static"))
    gain, low, high = difference(static, equal)
    assert gain == pytest.approx(static["psnr_db"] - equal["psnr_db"], abs=1e-5) and low <= gain <= high
    assert f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]" in text


def test_costs_add_up(sweeps):
    frame = pd.read_parquet(sweeps / "costs" / "costs.parquet").set_index("scheme")
    resources = Resources()
    np.testing.assert_allclose(frame.airtime_s, frame.num_symbols / resources.bandwidth_hz)
    np.testing.assert_allclose(frame.energy_j, resources.transmit_power_w * frame.airtime_s)  # P = 1
    np.testing.assert_allclose(frame.latency_s, frame.server_s + frame.airtime_s + frame.device_s)
    assert frame.num_symbols["latent"] == 32 and frame.num_symbols["centralized, analog"] == 1536
    steps = frame.device_flops["split, 5 device steps"] - frame.device_flops["split, 1 device step"]
    assert steps > 0 and frame.device_flops["centralized, analog"] < frame.device_flops["latent"]
    fewer = frame.server_flops["split, 20 server and 5 device steps"]
    each = steps / 4
    assert frame.server_flops["split, 1 device step"] - fewer == pytest.approx(5 * each, rel=1e-3)
    with pytest.raises(ValueError, match="bandwidth_hz is 0.0"):
        Resources(bandwidth_hz=0.0)


@pytest.mark.parametrize("missing", ["split/results.parquet", "costs/costs.parquet", "power/map.parquet"])
def test_what_is_missing_is_named(sweeps, tmp_path, missing):
    folder = tmp_path / "copy"
    shutil.copytree(sweeps, folder)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=missing.split("/")[1]) as error:
        figures.run(figures.Arguments(folder, tmp_path / "docs"))
    assert "\n" not in str(error.value) and not (tmp_path / "docs").exists()
