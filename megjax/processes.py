"""What the processes of a job tell each other, through JAX's coordination service: no device takes part."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from jax._src import distributed  # no public module has the client of the coordination service

_FAILED = "megjax/failed/"
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

    A process that dies without a word is the coordination service's to notice, within its heartbeat timeout: JAX then
    ends the others. Raises ProcessFailed as `check_others`.
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


def _client():
    """The client of the coordination service; None in a lone process."""
    return distributed.global_state.client
