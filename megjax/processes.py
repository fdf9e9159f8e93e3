"""What the processes of a job tell each other, through JAX's coordination service: no device takes part."""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jax._src import distributed  # no public module has the client of the coordination service

_FAILED, _ALIVE = "megjax/failed/", "megjax/alive/"
_MEETINGS = itertools.count()
SECONDS_UNTIL_SEEN = 90.0
"""How long a file of another process may take to be seen: NFS remembers for up to a minute that it was not there."""


class ProcessFailed(RuntimeError):
    """Another process of the job has reported that it failed."""


def num_processes() -> int:
    """Processes of the job; 1 without one. Does not touch devices."""
    return 1 if _client() is None else distributed.global_state.num_processes


def process_id() -> int:
    """Number of this process in its job; 0 without one."""
    return 0 if _client() is None else distributed.global_state.process_id


def is_first() -> bool:
    """Whether this process is the one that prints and writes what is written once."""
    return process_id() == 0


def gather(text: str = "") -> list[str]:
    """The texts of all processes, in their order, once all have called this: all must do so equally often.

    A process that dies without a word is noticed by `watch_others`, which ends the others. Raises ProcessFailed as
    `check_others`.
    """
    if (client := _client()) is None:
        return [text]
    folder, pause = f"megjax/meeting/{next(_MEETINGS)}/", 0.01
    client.key_value_set(f"{folder}{process_id()}", text)
    while len(found := client.key_value_dir_get(folder)) < num_processes():
        check_others()
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    return [value for _, value in sorted(found, key=lambda item: int(item[0].rpartition("/")[2]))]


def check_others() -> None:
    """ProcessFailed, saying why, if another process has left `joint` by an error."""
    if (client := _client()) is None:
        return
    for name, reason in client.key_value_dir_get(_FAILED):
        raise ProcessFailed(f"process {name.rpartition('/')[2]} failed: {reason}")


@contextlib.contextmanager
def joint() -> Iterator[None]:
    """A context, or decorator, of work that all processes share: an error in one of them reaches the others.

    They raise ProcessFailed at their next `gather` or `check_others`.
    """
    try:
        yield
    except Exception as error:
        if (client := _client()) is not None and not isinstance(error, ProcessFailed):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            with contextlib.suppress(Exception):  # the service may be what was lost
                client.key_value_set(f"{_FAILED}{process_id()}", reason, allow_overwrite=True)
        raise


def wait_for_file(path: Path, seconds: float = SECONDS_UNTIL_SEEN) -> None:
    """Return once a file that another process has written is seen here.

    Raises ValueError after so many seconds: the processes then do not share the folder.
    """
    end = time.monotonic() + seconds
    while num_processes() > 1 and not path.exists():
        if time.monotonic() > end:
            raise ValueError(f"{path} was written by another process but is not seen here; do all share its folder?")
        time.sleep(0.2)


def watch_others(seconds: float) -> None:
    """End this process, saying which one is lost, when another has not been heard of for `seconds`; for a job's start.

    A thread counts up a number of this process's and looks at those of the others, ten times in that while: this one
    ends within 1.2 `seconds` of the other. JAX itself ends the processes at once when the first one is lost, which
    runs the service that they meet in.
    """
    if (client := _client()) is not None:
        threading.Thread(target=_watch, args=(client, seconds), daemon=True).start()


def _watch(client, seconds: float) -> None:
    counts = heard = {}
    for count in itertools.count():
        try:
            client.key_value_set(f"{_ALIVE}{process_id()}", str(count), allow_overwrite=True)
            before, counts = counts, dict(client.key_value_dir_get(_ALIVE))
        except Exception:  # the job's end, or the service's, which is JAX's to tell
            return
        now = time.monotonic()
        heard = {name: now if value != before.get(name) else heard[name] for name, value in counts.items()}
        silent = sorted(int(name.rpartition("/")[2]) for name, at in heard.items() if now - at > seconds)
        if silent and _client() is client:
            lost = " and ".join(map(str, silent))
            told = f"process {lost} of {num_processes()} (from 0) is lost: not heard of for {seconds:g} seconds"
            print(f"{told}. What is finished is kept; start the job again.", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may wait for the other for ever
        time.sleep(seconds / 10)


def _client():
    """The client of the coordination service; None in a lone process."""
    return distributed.global_state.client
