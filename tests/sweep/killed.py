"""Runs a sweep's command again and again, each time in a process of its own that is killed somewhere, to the end.

Used by test_kills.py: the library is imported once, and every attempt is a fork that starts JAX itself.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import jax
import pyarrow.parquet as pq

from eval import sweep as script
from megjax.sweep import engine

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

    def written(table, path):
        clock.tick()
        clock.tick(lambda: Path(path).write_bytes(b"PAR1 and then nothing"))
        write(table, path)
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


def attempt(arguments: list[str], last: int | None, devices: int = 1) -> tuple[int, int]:
    """Signal that ended the run, 0 for none, and the moments it had."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        sys.argv = ["eval.sweep", *arguments]
        script.environment = lambda: ENVIRONMENT
        script.use_cpu_devices = lambda num: jax.config.update("jax_num_cpu_devices", devices)
        clock = Clock(last)
        watch(clock)
        code = 1
        try:
            script.main()
            os.write(theirs, str(clock.moments).encode())
            code = 0 if jax.local_device_count() == devices else 3
        except SystemExit as error:
            print(error, file=sys.stderr)
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(theirs)
    status = os.waitpid(child, 0)[1]
    moments = os.read(ours, 100).decode()
    os.close(ours)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"a run of {arguments} failed with status {os.WEXITSTATUS(status)}")
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), int(moments or 0)


def points(folder: Path) -> dict[str, list]:
    """Time and size of every finished point."""
    found = (folder / "points").glob("*.parquet")
    return {path.name: [path.stat().st_mtime_ns, path.stat().st_size] for path in found}


def main(kills: int, folder: Path, arguments: list[str]) -> None:
    """One whole run in folder/whole, then one that is killed so often in folder/killed; prints what happened."""
    _, moments = attempt([*arguments, "--output", str(folder / "whole")], None)
    killed, draw, report = [*arguments, "--output", str(folder / "killed")], random.Random(kills), []
    while len(report) < kills:
        missing = POINTS - len(points(folder / "killed"))
        # Up to the middle of what is left, and what writes the table; so later kills find something to do.
        ended, _ = attempt(killed, draw.randrange(missing * (moments // POINTS) // 2 + TABLE_MOMENTS))
        report.append({"signal": ended, "points": points(folder / "killed")})
    attempt(killed, None)
    for devices in (2, 4):
        attempt([*arguments, "--output", str(folder / f"devices-{devices}")], None, devices)
    print(json.dumps({"moments": moments, "attempts": report, "final": points(folder / "killed")}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
