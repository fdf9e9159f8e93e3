"""megjax: mobile edge generation in JAX, from prompt to the image on the far side of a fading radio link."""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "StableDiffusion": "megjax.diffusion.pipeline",
    "FlaxStableDiffusion": "megjax.diffusion.pipeline",
    "SeedCodec": "megjax.codec.seed",
    "LearnedPower": "megjax.power.actor_critic",
    "SystemConfig": "megjax.system",
    "make_simulator": "megjax.system",
    "simulate": "megjax.system",
}
_MODULES = (
    "channel",
    "codec",
    "configs",
    "cost",
    "data",
    "diffusion",
    "ldm",
    "metrics",
    "power",
    "pytrees",
    "sharding",
    "sweep",
    "system",
    "training",
    "units",
)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"megjax.{name}")
    raise AttributeError(f"module 'megjax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS, *_MODULES])
