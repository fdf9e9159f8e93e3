"""Processes that tests start: forks of a server that has imported the library, none of which outlives its test."""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

SECONDS = 600.0
"""How long a process may take before its test fails: a guard against hanging, not a measurement."""
PRELOADED = ("jax", "orbax.checkpoint", "tensorboardX", "megjax.ldm.fitting", "eval.generate", "eval.sweep")
"""Imported once by the server: a new interpreter would spend seconds on them for every process."""

_CONTEXT = multiprocessing.get_context("forkserver")
_SERVERS: set[int] = set()


class Child:
    """A process that `Processes` started, and what it has printed."""

    def __init__(self, process: multiprocessing.process.BaseProcess, folder: Path):
        self._process, self._folder = process, folder

    @property
    def out(self) -> str:
        return (self._folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text()

    def wait(self) -> int:
        """Exit status, or minus the signal that ended it."""
        self._process.join(SECONDS)
        assert self._process.exitcode is not None, f"still running after {SECONDS} s: {self.err[-3000:]}"
        return self._process.exitcode

    def finish(self, status: int = 0) -> str:
        """What the process printed; it must end with this status."""
        found = self.wait()
        assert found == status, f"ended with {found}: {self.err[-3000:]}"
        return self.out

    def kill(self) -> None:
        """End the process and all of its process group, if they are still there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # one that has not made its group yet
        self._process.join()


class Processes:
    """Starts processes and, as a context, ends those that are left.

    A process also ends, with all that it started, when the one that started it is gone.
    """

    def __init__(self, folder: Path, preloaded: tuple[str, ...] = PRELOADED):
        self._folder, self._children = folder, []
        _CONTEXT.set_forkserver_preload(list(preloaded))
        before = child_processes()
        forkserver.ensure_running()
        _SERVERS.update(child_processes() - before)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        for child in self._children:
            child.kill()

    def start(
        self,
        target: Callable,
        *arguments,
        devices: int = 1,
        fast_compile: bool = False,
        environ: dict[str, str] | None = None,
    ) -> Child:
        """Call a function of a module, with arguments that can be pickled, in a process with so many CPU devices.

        With `fast_compile` it compiles as `checks.fast_compile` says.
        """
        folder = self._folder / f"process-{len(self._children)}"
        folder.mkdir(parents=True)
        for name in ("out", "err"):
            (folder / name).touch()
        process = _CONTEXT.Process(target=_call, args=(target, arguments, devices, fast_compile, environ or {}, folder))
        process.start()
        self._children.append(Child(process, folder))
        return self._children[-1]

    def start_job(self, target: Callable, *arguments, count: int = 2, **options) -> list[Child]:
        """`start` as many processes as a job has; each finds its number and the others in the environment."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{probe.getsockname()[1]}", "JAX_NUM_PROCESSES": str(count)}
        return [
            self.start(target, *arguments, environ=job | {"JAX_PROCESS_ID": str(index)}, **options)
            for index in range(count)
        ]

    def run(self, target: Callable, *arguments, **options) -> str:
        """What a process of `start` has printed; it must end well."""
        return self.start(target, *arguments, **options).finish()


def run_module(name: str, *words: str) -> None:
    """`python -m name words`, for a process of `Processes.start`."""
    sys.argv = [name, *map(str, words)]
    runpy.run_module(name, run_name="__main__")


def child_processes() -> set[int]:
    """Ids of this process's children but for the servers of `multiprocessing`; none where Linux's list is missing."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/children") as file:
                found.update(map(int, file.read().split()))
    return found - _SERVERS


def adopt_orphans() -> None:
    """Make this process the parent of whatever its descendants leave behind, where the system is Linux."""
    prctl, set_child_subreaper = getattr(ctypes.CDLL(None), "prctl", None), 36
    if prctl is not None:
        prctl(set_child_subreaper, 1, 0, 0, 0)


def end_children_but(known: set[int]) -> set[int]:
    """Kill and collect the children that are not known; their ids."""
    left = child_processes() - known
    for child in left:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return left


def _call(
    target: Callable, arguments: tuple, devices: int, fast_compile: bool, environ: dict[str, str], folder: Path
) -> None:
    """A process's own group and output, then the function, then what an interpreter does at its end."""
    os.setsid()
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        with (folder / name).open("ab") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ |= environ
    import jax

    from tests import checks

    jax.config.update("jax_num_cpu_devices", devices)
    status: int | str | None = 1
    try:
        with checks.fast_compile() if fast_compile else contextlib.nullcontext():
            target(*arguments)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    atexit._run_exitfuncs()  # a fork of multiprocessing leaves them out; JAX says goodbye to its job there
    sys.exit(status)


def _end_with_the_starter() -> None:
    """Wait until the process that started this one is gone, then end this one's group."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)
