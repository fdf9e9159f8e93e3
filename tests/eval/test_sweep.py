"""Tests of the sweep's command: options, presets, folders, what it prints; tests/sweep has the sweep itself."""

import dataclasses

import pandas as pd
import pytest
import tyro

from eval import sweep as script
from eval.sweep import PRESETS, QUICK, Arguments, selected
from megjax.sweep import Point, SweepConfig


def arguments(*words):
    return tyro.cli(Arguments, args=words)


def test_options_are_those_of_the_configuration():
    args = arguments("--schemes", "seed", "opta", "--snr-db", "-5", "0.5", "--metrics", "latent", "--seeds", "3", "4")
    assert args.config == SweepConfig(schemes=("seed", "opta"), snr_db=(-5.0, 0.5), metrics="latent", seeds=(3, 4))
    assert selected(args) == {args.output: args.config}


@pytest.mark.parametrize("name", PRESETS["results"])
def test_quick_sweeps_are_smaller(tmp_path, name):
    words = ("--preset", "results", "--output", str(tmp_path))
    whole, quick = (selected(arguments(*words, *more))[tmp_path / name] for more in ((), ("--quick",)))
    assert whole == PRESETS["results"][name] and quick != whole
    work = [len(config.points()) * config.num_images * config.realisations for config in (whole, quick)]
    assert work[1] < work[0] / 5
    assert set(QUICK[name]) <= {field.name for field in dataclasses.fields(SweepConfig)}


@pytest.mark.parametrize("preset", PRESETS)
def test_sweeps_of_a_preset_have_folders_of_their_own(tmp_path, preset):
    sweeps = selected(arguments("--preset", preset, "--output", str(tmp_path)))
    assert {folder.relative_to(tmp_path).name for folder in sweeps} == set(PRESETS[preset])
    assert all(config.points() for config in sweeps.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--quick",), "--quick is True; it must be used with --preset results"),
        (("--preset", "codec", "--quick"), "--quick is True; it must be used with --preset results"),
        (("--preset", "results", "--steps", "3"), "--preset is 'results'; it must be used without options"),
        (("--batch", "0"), "--batch is 0; it must be at least 1"),
        (("--snr-db", "nan"), "snr_db is"),
        (("--schemes", "pigeon"), "schemes is 'pigeon'"),
        (("--models", "/nowhere"), "model '/nowhere' is no folder"),
    ],
)
def test_bad_input_ends_the_command_with_one_line(monkeypatch, tmp_path, words, message):
    monkeypatch.setattr("sys.argv", ["eval.sweep", *words, "--output", str(tmp_path)])
    monkeypatch.setattr(script, "use_cpu_devices", lambda num: None)  # devices exist by now
    monkeypatch.setattr("megjax.runtime.enable_compilation_cache", lambda: None)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert str(ended.value.code).startswith("eval.sweep: ") and message in str(ended.value.code)
    assert "\n" not in ended.value.code


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output folder .* cannot be written"):
        script.run(arguments("--output", str(tmp_path / "file")))


def test_run_passes_everything_on_and_prints_the_table(monkeypatch, tmp_path, capsys):
    calls = []

    def run_sweep(config, folder, **options):
        calls.append((config, folder, options))
        rows = [{"scheme": scheme, "mode": "equal_power", "snr_db": 5.0, "nmse": nmse, "num_symbols": 1024.0}
                for scheme, nmse in (("seed", 0.25), ("latent", None))]  # fmt: skip
        lists = {field.name: 1 for field in dataclasses.fields(Point)}
        return pd.DataFrame([lists | row for row in rows])

    monkeypatch.setattr(script, "run_sweep", run_sweep)
    words = ("--output", str(tmp_path / "out"), "--batch", "7", "--latents", str(tmp_path), "--num-images", "9")
    (frame,) = script.run(arguments(*words))
    ((config, folder, options),) = calls
    assert config == SweepConfig(num_images=9) and folder == tmp_path / "out" and len(frame) == 2
    assert (options["batch"], options["latents"]) == (7, tmp_path)
    assert set(options["about"]) == {"device", "commit", "jax", "megjax", "python"}
    printed = capsys.readouterr().out
    assert "0.250" in printed and "1,024" in printed and "2 points: " in printed and "PSNR" not in printed
