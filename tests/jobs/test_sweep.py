"""Tests of `python -m eval.sweep` in processes of their own: killed with SIGKILL, and over several devices."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent.parent


def run(kills, folder, config):
    arguments = ["--schemes", "seed", "latent", "--snr-db", "-5", "0", "10", "--modes", "equal_energy"]
    arguments += ["--models", config.models[0], "--codec", config.codec, "--metrics", "latent", "--num-images", "8"]
    arguments += ["--realisations", "2", "--num-blocks", "4", "--steps", "1", "--guidance", "1", "--batch", "8"]
    arguments += ["--latents", str(folder / "latents")]
    settings = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    script = [sys.executable, "-m", "tests.sweep.killed", str(kills), str(folder), *arguments]
    ended = subprocess.run(script, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def check_kills(report, folder, kills):
    attempts = report["attempts"]
    assert len(attempts) == kills and sum(row["signal"] == signal.SIGKILL for row in attempts) == kills
    # What is written once is never measured again: no finished point's file changes.
    states = [*(row["points"] for row in attempts), report["final"]]
    for before, after in zip(states, states[1:], strict=False):
        assert before.items() <= after.items()
    assert len(report["final"]) == 6
    for path in (folder / "whole").rglob("*.*"):
        assert (folder / "killed" / path.relative_to(folder / "whole")).read_bytes() == path.read_bytes()
    assert list(folder.rglob("*.part")) == []


def check_devices(folder):
    """Numbers depend on the devices through rounding only."""
    whole = pd.read_parquet(folder / "whole" / "results.parquet")
    for name in ("devices-2", "devices-4", "devices-8", "together"):
        frame = pd.read_parquet(folder / name / "results.parquet")
        pd.testing.assert_frame_equal(frame, whole, rtol=1e-4)
        for column in ("n", "images", "num_symbols"):
            assert (frame[column] == whole[column]).all()
    assert len(whole) == 6 and (whole.commit == "0123456789ab").all() and np.isfinite(whole.nmse).all()


def check_job(report):
    """Of two processes one is killed; the other ends by itself, and two go on from what both have kept."""
    (survivor, killed), seconds = report["lost"]
    assert killed == -signal.SIGKILL and survivor not in (0, -signal.SIGKILL) and seconds < 60
    assert 0 < len(report["kept"]) < 6 and report["kept"].items() <= report["together"].items()
    assert report["resumed"][0] == [0, 0] and len(report["together"]) == 6


def test_killed_and_spread_runs_end_with_the_same_table(config, tmp_path):
    report = run(3, tmp_path, config)
    check_kills(report, tmp_path, 3)
    check_devices(tmp_path)
    check_job(report)


@pytest.mark.slow
def test_ten_kills(config, tmp_path):
    check_kills(run(10, tmp_path, config), tmp_path, 10)
