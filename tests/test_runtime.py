"""Settings of scripts: memory that the compiler leaves behind goes back to the system."""

import ctypes
import sys
import threading
from typing import ClassVar

import jax
import pytest

from megjax import runtime


class Libc:
    def __init__(self):
        self.trimmed = 0

    def malloc_trim(self, pad):
        assert pad == 0
        self.trimmed += 1


@pytest.fixture
def listening(monkeypatch):
    """A C library that counts, and the listeners to JAX's durations that the test adds."""
    libc, listeners = Libc(), []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    runtime.return_memory_of_compiler.cache_clear()
    yield libc, listeners
    runtime.return_memory_of_compiler.cache_clear()


class Timer:
    """Stands in for `threading.Timer`: the time has come at once."""

    waited: ClassVar[list[float]] = []

    def __init__(self, seconds, function, arguments):
        self.waited.append(seconds)
        self.start = lambda: function(*arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_is_returned_after_long_compilations(listening, monkeypatch):
    libc, listeners = listening
    monkeypatch.setattr(threading, "Timer", Timer)
    runtime.return_memory_of_compiler()
    runtime.return_memory_of_compiler()
    (listen,) = listeners
    listen(runtime.COMPILED, 0.1, fun_name="quick")
    listen("/jax/core/compile/jaxpr_trace_duration", 9.0, fun_name="traced")
    assert libc.trimmed == 0
    listen(runtime.COMPILED, 1.5, fun_name="long")
    assert libc.trimmed == len(Timer.waited) == 3 and Timer.waited == sorted(Timer.waited)


def test_jax_tells_of_compilations():
    events = []

    def listen(event, seconds, **_):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 3)(1.0)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert runtime.COMPILED in events


def test_other_allocators_are_left_alone(listening, monkeypatch):
    _, listeners = listening
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    runtime.return_memory_of_compiler()
    assert not listeners
