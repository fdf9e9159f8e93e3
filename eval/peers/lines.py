"""Implementations in processes of their own, asked by lines of JSON: for other environments, and to see their memory.

The first line makes the implementation, every further line calls it once; each is answered by a line. This file imports
nothing that another environment may lack.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Served:
    """The other process, made by `request`; `about` is what it said of itself.

    RuntimeError if it ends.
    """

    def __init__(self, command: Sequence[str], request: dict[str, Any], environ: Mapping[str, str] | None = None):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self._command = list(command)
        self._process = subprocess.Popen(self._command, cwd=ROOT, env={**os.environ, **(environ or {})}, **pipes)
        self.about = self._ask(request)

    def __call__(self) -> dict[str, Any]:
        """Call once: `seconds` of the call and `peak_bytes`, the most memory that the process held meanwhile."""
        return self._ask({})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.close()
            raise RuntimeError(f"{' '.join(self._command)} ended with code {self._process.returncode}")
        return json.loads(answer)

    def close(self) -> None:
        """End the other process."""
        with contextlib.suppress(BrokenPipeError):  # what it was asked last may not have reached it
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(make: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[], Any], Callable[[], int] | None]]) -> None:
    """What the other process runs. `make(request)` gives what it says of itself, the call, which returns when all is
    done, and how to read the most bytes that the device held (None: the process's memory is meant)."""
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    about, call, device_peak = make(json.loads(sys.stdin.readline()))
    answer(about)
    for _ in sys.stdin:
        reset_peak()
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
        answer({"seconds": seconds, "peak_bytes": peak_bytes() if device_peak is None else device_peak()})


def reset_peak() -> None:
    """Count this process's largest resident memory from now on, where Linux lets it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The largest resident memory of this process since `reset_peak`; 0 where it cannot be told."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0
