"""Process-wide settings that scripts, and only scripts, turn on."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from megjax.configs import require


def enable_compilation_cache() -> Path:
    """Keep compiled programs on disk between runs; JAX_COMPILATION_CACHE_DIR says where, else the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "megjax" / "xla"
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", default))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def use_cpu_devices(num: int) -> None:
    """Let JAX's CPU backend show `num` devices (at most one a core), before any array is made; others ignore it."""
    jax.config.update("jax_num_cpu_devices", max(1, min(num, os.cpu_count() or 1)))


def check_seed(seed: int) -> None:
    """ValueError unless `seed` is one that JAX's keys take on every platform."""
    require(0 <= seed < 2**32, "--seed", seed, "in [0, 2^32)")


def prepare_output(folder: Path) -> None:
    """Make the folder and check that files can be written there; ValueError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output folder {str(folder)!r} cannot be written: {error.strerror}") from None


def command(name: str, run: Callable[[], object]) -> None:
    """Run a script's body with the compilation cache on; bad input ends it with one line and status 1."""
    enable_compilation_cache()
    try:
        run()
    except ValueError as error:
        sys.exit(f"{name}: {error}")
    except OSError as error:
        sys.exit(f"{name}: {error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)
