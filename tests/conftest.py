"""Strict checks for every test: rank promotion, key reuse and array shapes; slow tests only with --runslow."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

# Held for the whole session: modules of megjax imported from here on check their jaxtyping annotations when called.
SHAPE_CHECKS = install_import_hook("megjax", "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


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
    config.addinivalue_line("markers", "slow: takes minutes; runs only with --runslow")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if hasattr(jax.config, "jax_debug_key_reuse"):  # experimental: not promised by every JAX
        jax.config.update("jax_debug_key_reuse", True)


def pytest_collection_modifyitems(config, items):
    # The longest files are at the top level, the shortest in the first folders: so that processes end together.
    order = {path: i for i, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: -order[item.path])
    if config.getoption("--runslow"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]
