"""Process-wide settings that scripts, and only scripts, turn on."""

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> Path:
    """Keep compiled programs on disk between runs; JAX_COMPILATION_CACHE_DIR says where, else the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "megjax" / "xla"
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", default))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder
