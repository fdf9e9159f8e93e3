"""What holds for every test: strict checks of JAX and of shapes, programs compiled once, no process left behind."""

import os
import signal
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's: there is a test process a core

import jax
import pytest
from jaxtyping import install_import_hook

# Held for the whole session: modules of megjax imported from here on check their jaxtyping annotations when called.
SHAPE_CHECKS = install_import_hook("megjax", "beartype.beartype")
pytest.register_assert_rewrite("tests.checks", "tests.processes")

from tests import checks  # noqa: E402 (rewritten, hence after the line above)
from tests.processes import Processes, adopt_orphans, child_processes, end_children_but  # noqa: E402


def share_compiled_programs(config):
    """Test processes, and those that they start, compile every large program once between them."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="megjax-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    least = float(os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 1.0))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def pytest_configure(config):
    share_compiled_programs(config)
    adopt_orphans()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the tests as Ctrl-C does, what they started first
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if hasattr(jax.config, "jax_debug_key_reuse"):  # experimental: not promised by every JAX
        jax.config.update("jax_debug_key_reuse", True)


def pytest_unconfigure():
    # A test process that takes longer than ten seconds to end is killed, and coverage would be written last of all.
    if "coverage" in sys.modules and (measured := sys.modules["coverage"].Coverage.current()) is not None:
        measured.save()


def pytest_collection_modifyitems(items):
    # The longest files are at the top level, the shortest in the first folders: so that processes end together.
    order = {path: i for i, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: -order[item.path])


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    known = child_processes()
    yield
    assert not end_children_but(known), "the test has left processes, which were ended"


@pytest.fixture
def processes(tmp_path):
    """Starts processes, which end with the test."""
    with Processes(tmp_path / "processes") as started:
        yield started


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of `models.write_model`."""
    from tests import models  # imports the whole library

    return models.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_codec(tmp_path_factory):
    """Folder of `models.write_codec`."""
    from tests import models

    return models.write_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture
def unchecked():
    """`checks.unchecked` for one test: annotations would hide the project's own errors."""
    with checks.unchecked():
        yield


@pytest.fixture(scope="module")
def module_unchecked():
    """`checks.unchecked` for the tests and fixtures of a module whose large programs are only timed or compared."""
    with checks.unchecked():
        yield


@pytest.fixture
def usual_promotion():
    """The promotion of types that users have, for other libraries that mix them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def module_usual_promotion():
    """`usual_promotion` for a module of what users write."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def fast_compile():
    """`checks.fast_compile` for the tests and fixtures of a module."""
    with checks.fast_compile():
        yield
