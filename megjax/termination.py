"""Notices that a scheduler is about to end the process, in time to save what it has."""

import os
import signal
import sys
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

SECONDS_TO_AGREE = 60.0
"""How long a process of a job that was told to end waits, at the least, for the others to agree."""
SECONDS_TO_SAVE = 600.0
"""How long it may then take to save together."""


class TerminationNotice:
    """Within its context SIGTERM is only noted; `given` says so, in every process of a job if any of them was told.

    A process of a job that was told ends even if the others are gone or stuck: with status 128 + SIGTERM, unless they
    agree within `SECONDS_TO_AGREE`, or three times the longest that `given` has been asked apart, and the context is
    left within `SECONDS_TO_SAVE` after that. Signals are for the main thread: in others, a process notes nothing. JAX's
    own preemption service is not used, as it only ends runs that ask after every single step.
    """

    def __init__(self):
        self.noted, self.previous = False, None
        self._left, self._agreed = threading.Event(), False
        self._answered, self._longest = time.monotonic(), 0.0

    def __enter__(self) -> "TerminationNotice":
        self._together = jax.process_count() > 1
        self.handles = threading.current_thread() is threading.main_thread()
        if self.handles:
            self.previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_) -> None:
        self._left.set()
        if self.handles:  # None: the handler was not Python's, hence lost
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self.previous is None else self.previous)

    def _note(self, *_) -> None:
        if self._together and not self.noted:
            threading.Thread(target=self._end_without_the_others, args=(time.monotonic(),), daemon=True).start()
        self.noted = True

    def _end_without_the_others(self, told: float) -> None:
        """Wait as long as the class says, in a thread of its own: the main one may be deep in a collective."""
        while not self._left.is_set():
            patience = SECONDS_TO_SAVE if self._agreed else max(SECONDS_TO_AGREE, 3 * self._longest)
            left = max(told, self._answered) + patience - time.monotonic()
            if left <= 0:
                waited = "the checkpoint" if self._agreed else "the other processes"
                print(f"told to end, and waited {patience:.0f} s for {waited} in vain", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)
            self._left.wait(left)

    def given(self) -> bool:
        """Whether to stop: to be asked by all processes at the same point, which they wait for."""
        if not self._together:
            return self.noted
        given = bool(multihost_utils.process_allgather(np.array(self.noted)).any())
        now = time.monotonic()
        self._longest, self._answered, self._agreed = max(self._longest, now - self._answered), now, given
        return given
