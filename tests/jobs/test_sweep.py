"""`python -m eval.sweep` killed again and again, over several devices, and by two processes of which one is lost."""

import functools
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from eval import sweep as script
from megjax import runtime, sharding
from megjax.sweep import engine

pytestmark = pytest.mark.slow
ENVIRONMENT = {
    "device": "a processor",
    "commit": "0123456789ab",
    "python": "3",
    "versions": {"jax": "1", "megjax": "1"},
}
POINTS, TABLE_MOMENTS = 6, 5


class Clock:
    """Counts the moments of a run, and kills the process at one of them with SIGKILL."""

    def __init__(self, last: int | None):
        self.moments, self.last = 0, last

    def tick(self, before=lambda: None) -> None:
        if self.moments == self.last:
            before()
            os.kill(os.getpid(), signal.SIGKILL)
        self.moments += 1


def watch(clock: Clock) -> None:
    """Ticks around every write and rename, in the middle of writes, after every batch and every point."""
    write, replace, bar = pq.write_table, Path.replace, engine.tqdm.update

    def written(table, path, **options):
        clock.tick()
        clock.tick(lambda: Path(path).write_bytes(b"PAR1 and then nothing"))
        write(table, path, **options)
        clock.tick()

    def replaced(path, target):
        clock.tick()
        found = replace(path, target)
        clock.tick()
        return found

    def updated(self, count=1):
        clock.tick()
        return bar(self, count)

    pq.write_table, Path.replace, engine.tqdm.update = written, replaced, updated


def sweep(arguments, last=None, devices=1):
    """Run the command with these arguments, killed at a moment, and write how many moments it had."""
    if last is not None:  # the other process is to miss this one soon
        runtime.start_processes = functools.partial(sharding.start_processes, heartbeat_seconds=5)
    script.environment = lambda: ENVIRONMENT
    script.use_cpu_devices = lambda num: None  # the test's number is set already
    sys.argv = ["eval.sweep", *map(str, arguments)]
    found = sharding.find_processes()
    clock = Clock(last if found is None or found.process_id == 1 else None)
    watch(clock)
    script.main()
    assert jax.local_device_count() == devices
    print("moments", clock.moments)


@pytest.fixture
def arguments(tiny_model, tiny_codec, tmp_path):
    """Words of a sweep of six points, but for its folder."""
    words = ["--schemes", "seed", "latent", "--snr-db", "-5", "0", "10", "--modes", "equal_energy"]
    words += ["--models", tiny_model, "--codec", tiny_codec, "--metrics", "latent", "--num-images", "8"]
    words += ["--realisations", "2", "--num-blocks", "4", "--steps", "1", "--guidance", "1", "--batch", "8"]
    return [*words, "--latents", tmp_path / "latents"]


@pytest.fixture
def start(processes, arguments, tmp_path):
    """`start(folder, last)`: the sweep into a folder, by a process or by a list of `job` of them."""

    def started(folder, last=None, *, devices=1, job=0):
        launch = functools.partial(processes.start_job, count=job) if job else processes.start
        return launch(sweep, [*arguments, "--output", folder], last, devices, devices=devices, fast_compile=True)

    return started


def points(folder):
    """Time and size of every finished point."""
    found = (folder / "points").glob("*.parquet")
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def assert_equal_tables(folder, whole):
    """Numbers depend on the devices through rounding only."""
    frame, expected = (pd.read_parquet(path / "results.parquet") for path in (folder, whole))
    pd.testing.assert_frame_equal(frame, expected, rtol=1e-4)
    for column in ("n", "images", "num_symbols"):
        assert (frame[column] == expected[column]).all()
    assert len(frame) == POINTS and (frame.commit == "0123456789ab").all() and np.isfinite(frame.nmse).all()


def test_killed_and_spread_runs_end_with_the_same_table(start, tmp_path):
    whole, killed, spread, together = (tmp_path / name for name in ("whole", "killed", "spread", "together"))
    moments = int(start(whole).finish().split()[-1])
    kept, draw = {}, random.Random(3)
    for _ in range(3):
        missing = POINTS - len(kept)
        # Up to the middle of what is left, and what writes the table; so later kills find something to do.
        last = draw.randrange(missing * (moments // POINTS) // 2 + TABLE_MOMENTS)
        start(killed, last).finish(-signal.SIGKILL)
        # What is written once is never measured again: no finished point's file changes.
        assert kept.items() <= points(killed).items()
        kept = points(killed)
    start(killed).finish()
    assert kept.items() <= points(killed).items() and len(points(killed)) == POINTS
    for path in whole.rglob("*.*"):
        assert (killed / path.relative_to(whole)).read_bytes() == path.read_bytes()
    start(spread, devices=8).finish()
    assert_equal_tables(spread, whole)
    # Of two processes one is killed; the other ends by itself, and one, two or three go on from what both have kept.
    survivor, lost = start(together, 2 * moments // POINTS, devices=4, job=2)
    lost.finish(-signal.SIGKILL)
    assert survivor.wait() not in (0, -signal.SIGKILL)
    assert "process 1 of 2 (from 0) is lost: not heard of for 5 seconds" in survivor.err, survivor.err[-2000:]
    kept = points(together)
    assert 0 < len(kept) < POINTS
    for count in (1, 2, 3):
        folder = shutil.copytree(together, tmp_path / f"again-{count}")
        for process in start(folder, devices=4, job=count):
            process.finish()
        assert kept.items() <= points(folder).items() and len(points(folder)) == POINTS
        assert_equal_tables(folder, whole)
    assert [path for path in tmp_path.rglob("*.part") if together not in path.parents] == []
