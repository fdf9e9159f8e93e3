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
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_FAILURE = re.compile(r"^(?:[\w.]+(?:Error|Exception|Exit|Interrupt|Failed)\b|eval\.\w+: ).*", re.MULTILINE)


class Served:
    """The other process, made by `request`; `about` is what it said of itself.

    RuntimeError if it ends.
    """

    def __init__(self, command: Sequence[str], request: dict[str, Any], environ: Mapping[str, str] | None = None):
        self._command, self._errors = list(command), tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "text": True}
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
            self._end()
            self._errors.seek(0)
            line, code = last_error(self._errors.read()), self._process.returncode
            self._errors.close()
            raise RuntimeError(f"{' '.join(self._command)} ended with code {code}" + (line and f": {line}"))
        return json.loads(answer)

    def close(self) -> None:
        """End the other process."""
        self._end()
        self._errors.close()

    def _end(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # what it was asked last may not have reached it
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def last_error(text: str) -> str:
    """The line that names the error a process ended with, or its last line, at most 200 characters; of its stderr."""
    lines = _FAILURE.findall(text) or text.strip().splitlines() or [""]
    return lines[-1].strip().rstrip(".")[:200]


def serve(make: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[], Any], Callable[[], int] | None]]) -> None:
    """Answer requests for calls to time, line by line on stdin and stdout, in a process of the peer's own.

    `make(request)` returns what the peer says of itself, the call, which returns when all is done, and a function for
    the most bytes that the device held (None: the process's memory is meant).
    """
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
