"""Process-wide settings that scripts, and only scripts, turn on."""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from megjax.configs import require
from megjax.processes import ProcessFailed, gather, is_first, joint, num_processes
from megjax.sharding import start_processes

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event after a program was compiled, or read from the cache."""

SECONDS_TO_HEAR = 5.0
"""How long a process that failed stays, so that others at a meeting hear why; those in a collective then lose it."""


def enable_compilation_cache() -> Path:
    """Keep compiled programs on disk between runs; JAX_COMPILATION_CACHE_DIR says where, else the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "megjax" / "xla"
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", default))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return_memory_of_compiler()
    return folder


@functools.cache
def return_memory_of_compiler() -> None:
    """From now on give back to the system what XLA's compiler freed, which glibc would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return

    def listen(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds > 1.0:
            for delay in (0.0, 2.0, 5.0):  # JAX itself still holds much of it for seconds
                later = threading.Timer(delay, trim, (0,))
                later.daemon = True
                later.start()

    jax.monitoring.register_event_duration_secs_listener(listen)


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
        probe.unlink(missing_ok=True)  # another process of a job may have been faster
    except OSError as error:
        raise ValueError(f"output folder {str(folder)!r} cannot be written: {error.strerror}") from None


def command(name: str, run: Callable[[], object], *, many: bool = False) -> None:
    """Run a script's body with the compilation cache on; bad input ends it with one line and status 1.

    With `many`, it joins the job of several processes that it finds itself in, of which the first one prints: the body
    must do with any number of them. An error in one ends all of them.
    """
    enable_compilation_cache()
    try:
        if many:
            start_processes()
        with (
            joint(),
            open(os.devnull, "w") as nothing,
            contextlib.redirect_stdout(sys.stdout if is_first() else nothing),
        ):
            run()
        gather()
    except ValueError as error:
        if num_processes() > 1 and "Gloo" in str(error):  # jaxlib raises what collectives of CPUs meet as either error
            _end(_lost(name, error))
        _end(f"{name}: {error}")
    except OSError as error:
        _end(f"{name}: {error.filename or 'file'}: {error.strerror or error}")
    except ProcessFailed as error:
        _end(f"{name}: {error}")
    except jax.errors.JaxRuntimeError as error:
        if num_processes() == 1:
            raise
        _end(_lost(name, error))
    except KeyboardInterrupt:
        sys.exit(130)


def _lost(name: str, error: Exception) -> str:
    """Message of a script whose collective failed."""
    return f"{name}: another process of the job may be lost: {str(error).splitlines()[0]}"


def _end(message: str) -> None:
    """Exit with a message and status 1; in a job without JAX's own end, which waits for all processes."""
    if num_processes() == 1:
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    time.sleep(SECONDS_TO_HEAR)
    os._exit(1)
