"""Benchmarks of the tests do not measure the machine; what they would start as a process runs in this one."""

import importlib
import sys
import time

import jax
import pytest

from eval import benchmark
from eval.peers import lines

CEILINGS = {"matmul_float32": 1e12, "matmul_bfloat16": 2e12, "copy_bytes": 1e10}


@pytest.fixture(scope="module", autouse=True)
def quick_measurements():
    """One call a sample, and ceilings that are given: a machine's take minutes on a slow one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.measure.MIN_SAMPLE_S", 0.0)
        patch.setattr(benchmark, "ceilings", lambda: CEILINGS)
        yield


@pytest.fixture(autouse=True)
def kept_programs():
    """Scripts that count what they compile turn JAX's cache of programs off."""
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


class Here:
    """Stands in for `lines.Served`: this process makes the implementation and calls it."""

    def __init__(self, command, request, environ=None):
        python, option, module = command
        assert (python, option) == (sys.executable, "-m")
        self.about, self._call, _ = importlib.import_module(module)._make(request)

    def __call__(self):
        started = time.perf_counter()
        self._call()
        return {"seconds": time.perf_counter() - started, "peak_bytes": lines.peak_bytes()}

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    """`Here`, for a stage that takes it in place of `lines.Served`."""
    monkeypatch.setattr("megjax.runtime.enable_compilation_cache", lambda: None)
    return Here
