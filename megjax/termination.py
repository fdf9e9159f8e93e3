"""Notices that a scheduler is about to end the process, in time to save what it has."""

import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils


class TerminationNotice:
    """Within its context SIGTERM is only noted; `given` says so, in every process of a job if any of them was told.

    Signals are for the main thread: in others, a process notes nothing. JAX's own preemption service is not used, as it
    only ends runs that ask after every single step.
    """

    def __init__(self):
        self.noted, self.previous = False, None

    def __enter__(self) -> "TerminationNotice":
        self.handles = threading.current_thread() is threading.main_thread()
        if self.handles:
            self.previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_) -> None:
        if self.handles:  # None: the handler was not Python's, hence lost
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self.previous is None else self.previous)

    def _note(self, *_) -> None:
        self.noted = True

    def given(self) -> bool:
        """Whether to stop: to be asked by all processes at the same point, which they wait for."""
        if jax.process_count() == 1:
            return self.noted
        return bool(multihost_utils.process_allgather(np.array(self.noted)).any())
