"""Nothing but the prompt is sent: the device generates the image itself."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float, PyTree

from megjax.configs import require_count
from megjax.keys import threefry
from megjax.system.protocol import Code, Link, Noisy, Source
from megjax.system.schemes.base import SCHEMES, Parts, Scheme

_NOISE_STREAM = 1
"""Stream of a transmission's key that the device's noise is from."""


@dataclasses.dataclass(frozen=True)
class PromptLink:
    """Nothing is sent: the device draws its own noise and generates from the prompt alone; without parameters.

    What any scheme must beat to be worth its symbols where the device runs the model too.
    """

    latent_shape: tuple[int, int, int]
    device_steps: int = 5
    num_blocks: int = 16
    num_symbols: ClassVar[int] = 0
    result: ClassVar[str] = "noisy"
    on_host: ClassVar[bool] = False

    def __post_init__(self):
        require_count("device_steps", self.device_steps)

    def code(self, params: Any, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """No values, no symbols, no energy."""
        payload = jnp.zeros((len(source.latents), 0), jnp.float32)
        return Code(payload, (), jnp.float32(0), jnp.float32(1), jnp.ones(self.num_blocks, jnp.float32))

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> Noisy:
        """Noise of the device's own."""
        noise = jax.random.normal(jax.random.fold_in(threefry(key), _NOISE_STREAM), self.latent_shape, jnp.float32)
        return Noisy(noise, jnp.zeros((), jnp.float32))

    def decode(self, params: Any, received: Noisy, shared: PyTree) -> Noisy:
        """The same noise."""
        return received


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class Prompt(Scheme):
    """Nothing is sent: the device generates from the prompt and noise of its own."""

    name: ClassVar[str] = "prompt"
    title: ClassVar[str] = "prompt alone"
    version: ClassVar[int] = 1
    rank: ClassVar[int] = 110
    result: ClassVar[str] = "noisy"
    transmits: ClassVar[bool] = False
    allocates: ClassVar[bool] = False

    device_steps: int = 5
    """Denoising steps of the device."""
    device_sampler: str = "ddim"
    """Sampler of the device, one of `megjax.diffusion.samplers.SAMPLERS` that can start at any noise level."""

    def num_symbols(self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> int:
        """K = 0."""
        return 0

    def build(self, parts: Parts, fitted: Any) -> tuple[Link, Any]:
        """A `PromptLink`, without parameters."""
        return PromptLink(parts.latent_shape, self.device_steps, parts.num_blocks), ()
