"""Tests of the demo: its files, its table, and one clear line for every bad input."""

import contextlib
import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image

from eval import generate
from eval.generate import Arguments, run

PROMPTS = ("a large red house on the left, in a meadow under a clear night sky", "something else, " * 20 + "the end")
"""The second is longer than the model takes, and says nothing of a scene."""


def call(*words):
    """`python -m eval.generate` with these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["eval.generate", *map(str, words)])
        patch.setattr("megjax.runtime.enable_compilation_cache", lambda: None)
        generate.main()


@pytest.fixture(scope="module")
def demo(tiny_model, tmp_path_factory, module_unchecked, fast_compile):
    """Folder of the results, and what the command said on stderr."""
    output, said = tmp_path_factory.mktemp("out") / "demo", io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(said):
        warnings.simplefilter("always", UserWarning)
        call(*PROMPTS, "--snr-db", 0, 20, "--model", tiny_model, "--steps", 2, "--output", output)
    return output, said.getvalue()


@pytest.fixture(scope="module")
def rows(demo):
    return json.loads((demo[0] / "metrics.json").read_text())


@pytest.mark.slow
def test_metrics_cover_every_prompt_scheme_and_snr(rows):
    assert len(rows) == 2 * 2 * 2
    names = {"prompt", "scheme", "snr_db", "num_symbols", "psnr_db", "ssim", "caption_accuracy"}
    assert all(row.keys() == names for row in rows)
    assert {(row["scheme"], row["num_symbols"]) for row in rows} == {("centralized", 1536), ("latent", 32)}
    assert all(row["caption_accuracy"] is None for row in rows if row["prompt"] == PROMPTS[1])
    assert all(0 <= row["caption_accuracy"] <= 1 for row in rows if row["prompt"] == PROMPTS[0])


@pytest.mark.slow
def test_more_snr_is_a_better_image(rows):
    for scheme in ("centralized", "latent"):
        low, high = (
            np.mean([r["psnr_db"] for r in rows if r["scheme"] == scheme and r["snr_db"] == snr]) for snr in (0, 20)
        )
        assert high > low + 3


@pytest.mark.slow
def test_the_grid_is_a_picture(demo):
    assert np.asarray(Image.open(demo[0] / "grid.png").convert("RGB")).std() > 10


@pytest.mark.slow
def test_an_over_long_prompt_is_cut_with_one_warning(demo):
    (warning,) = (line for line in demo[1].splitlines() if line.startswith("warning"))
    assert "cut at 48" in warning and "the end" in warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "magic"}, "sampler is 'magic'; it must be one of"),
        ({"prompts": ()}, "prompts is .*at least one prompt"),
        ({"prompts": ("a house", "  ")}, "prompt is '  '; it must be text"),
        ({"snr_db": (float("nan"),)}, "snr_db is .*finite"),
        ({"snr_db": ("loud",)}, "snr_db is .*finite"),
        ({"snr_db": ()}, "--snr-db is"),
        ({"steps": 0}, "num_steps is 0"),
        ({"guidance": float("inf")}, "--guidance is inf"),
        ({"seed": -1}, "--seed is -1"),
        ({"snr_db": (-400.0,)}, "snr_db is .*within"),
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


def test_the_command_ends_with_one_line(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    for words, message in (
        (("--snr-db", "-3", "nan", "--output", tmp_path), "snr_db is (-3.0, nan)"),
        (("--output", tmp_path / "file"), "output folder"),
        (("--policy", "magic", "--output", tmp_path), "policy is 'magic'; it must be one of"),
    ):
        with pytest.raises(SystemExit) as ended:
            call("a house", "--model", tiny_model, *words)
        assert str(ended.value.code).startswith(f"eval.generate: {message}") and "\n" not in ended.value.code
