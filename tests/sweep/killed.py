"""Runs a sweep's command again and again, in processes of their own of which some are killed somewhere, to the end.

Used by test_kills.py: the library is imported once, and every attempt is a fork that starts JAX itself.
"""

import functools
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import pyarrow.parquet as pq

from eval import sweep as script
from megjax import runtime, sharding
from megjax.sweep import engine

ENVIRONMENT = {
    "device": "a processor",
    "commit": "0123456789ab",
    "python": "3",
    "versions": {"jax": "1", "megjax": "1"},
}

POINTS, TABLE_MOMENTS = 6, 5
HEARTBEAT = 5
"""Seconds after which a process of a job counts as lost."""


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


def begin(arguments: list[str], last: int | None, devices: int = 1, job: tuple[str, int] | None = None):
    """Start a run in a process of its own, of two that meet at an address or alone; its id and where it reports to."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        if job is not None:
            os.environ |= {"JAX_COORDINATOR_ADDRESS": job[0], "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(job[1])}
            runtime.start_processes = functools.partial(sharding.start_processes, heartbeat_seconds=HEARTBEAT)
        sys.argv = ["eval.sweep", *arguments]
        script.environment = lambda: ENVIRONMENT
        script.use_cpu_devices = lambda num: jax.config.update("jax_num_cpu_devices", devices)
        clock = Clock(last)
        watch(clock)
        code = 1
        try:
            script.main()
            jax.distributed.shutdown()  # as a process that ends by itself does
            os.write(theirs, str(clock.moments).encode())
            code = 0 if jax.local_device_count() == devices else 3
        except SystemExit as error:
            print(error, file=sys.stderr)
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(theirs)
    return child, ours


def attempt(arguments: list[str], last: int | None, devices: int = 1) -> tuple[int, int]:
    """Signal that ended a run, 0 for none, and the moments it had."""
    child, ours = begin(arguments, last, devices)
    status = os.waitpid(child, 0)[1]
    moments = os.read(ours, 100).decode()
    os.close(ours)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"a run of {arguments} failed with status {os.WEXITSTATUS(status)}")
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), int(moments or 0)


def attempt_together(arguments: list[str], last: int | None = None) -> tuple[list[int], float]:
    """Statuses of two processes of four devices each, the second killed at a moment; and the seconds they took."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    started = time.monotonic()
    children = [begin(arguments, moment, 4, (address, index)) for index, moment in enumerate((None, last))]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
    for _, ours in children:
        os.close(ours)
    return statuses, time.monotonic() - started


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
    for devices in (2, 4, 8):
        attempt([*arguments, "--output", str(folder / f"devices-{devices}")], None, devices)
    together = [*arguments, "--output", str(folder / "together"), "--latents", str(folder / "latents-together")]
    lost = attempt_together(together, 2 * moments // POINTS)
    kept = points(folder / "together")
    jobs = {"lost": lost, "kept": kept, "resumed": attempt_together(together), "together": points(folder / "together")}
    print(json.dumps({"moments": moments, "attempts": report, "final": points(folder / "killed"), **jobs}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
