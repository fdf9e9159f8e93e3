"""Tests of the demo: its files, its table, and one clear line for every bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.generate import Arguments, run

ROOT = Path(__file__).parent.parent.parent
PROMPTS = ("a large red house on the left, in a meadow under a clear night sky", "something else entirely")


def run_command(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    command = [sys.executable, "-m", "eval.generate", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rows_and_folder(tiny_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "demo"
    args = Arguments(PROMPTS, snr_db=("0", "20"), model=str(tiny_model), steps=2, output=output)
    return run(args), output


def test_metrics_cover_every_prompt_scheme_and_snr(rows_and_folder):
    rows, folder = rows_and_folder
    assert json.loads((folder / "metrics.json").read_text()) == rows
    assert len(rows) == 2 * 2 * 2
    names = {"prompt", "scheme", "snr_db", "num_symbols", "psnr_db", "ssim", "caption_accuracy"}
    assert all(row.keys() == names for row in rows)
    assert {(row["scheme"], row["num_symbols"]) for row in rows} == {("centralized", 1536), ("latent", 32)}
    assert all(row["caption_accuracy"] is None for row in rows if row["prompt"] == PROMPTS[1])
    assert all(0 <= row["caption_accuracy"] <= 1 for row in rows if row["prompt"] == PROMPTS[0])


def test_more_snr_is_a_better_image(rows_and_folder):
    rows, _ = rows_and_folder
    for scheme in ("centralized", "latent"):
        low, high = (
            np.mean([r["psnr_db"] for r in rows if r["scheme"] == scheme and r["snr_db"] == snr]) for snr in (0, 20)
        )
        assert high > low + 3


def test_the_grid_is_a_picture(rows_and_folder):
    pixels = np.asarray(Image.open(rows_and_folder[1] / "grid.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and pixels.std() > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "magic"}, "sampler is 'magic'; it must be one of"),
        ({"prompts": ()}, "prompts is .*at least one prompt"),
        ({"prompts": ("a house", "  ")}, "prompt is '  '; it must be text"),
        ({"snr_db": ("nan",)}, "snr_db is .*finite"),
        ({"snr_db": ("loud",)}, "snr_db is .*finite"),
        ({"snr_db": ()}, "--snr-db is"),
        ({"steps": 0}, "num_steps is 0"),
        ({"guidance": float("inf")}, "--guidance is inf"),
        ({"seed": -1}, "--seed is -1"),
        ({"snr_db": ("-400",)}, "snr_db is .*within"),
        ({"model": "/nowhere/at/all"}, "model '/nowhere/at/all' is no folder"),
    ],
)
def test_bad_input_is_one_clear_line(tiny_model, tmp_path, change, message):
    values = {"prompts": PROMPTS, "model": str(tiny_model), "steps": 2, "output": tmp_path / "out", **change}
    with pytest.raises(ValueError, match=message) as error:
        run(Arguments(**values))
    assert "\n" not in str(error.value)


def test_an_output_folder_that_cannot_be_written(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output folder .* cannot be written"):
        run(Arguments(PROMPTS, model=str(tiny_model), output=tmp_path / "file" / "demo"))


def test_the_command_ends_with_one_line_and_a_nonzero_status(tmp_path):
    (tmp_path / "file").write_text("")
    for options, message in (
        (["--snr-db", "-3", "nan", "--output", str(tmp_path)], "snr_db is ('-3', 'nan')"),
        (["--output", str(tmp_path / "file")], "output folder"),
    ):
        result = run_command("a house", *options)
        assert result.returncode == 1
        assert result.stderr.strip().startswith(f"eval.generate: {message}")
        assert result.stderr.strip().count("\n") == 0


def test_an_over_long_prompt_is_cut_with_one_warning(tiny_model, tmp_path):
    prompt = "a large red house on the left, " * 12 + "by night"
    result = run_command(prompt, "--model", str(tiny_model), "--steps", "1", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert "cut at 48" in result.stderr and "by night" in result.stderr
