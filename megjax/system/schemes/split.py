"""Split inference: the device's last denoising steps remove the channel's noise from a latent."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, Float, PyTree

from megjax.channel import equalize_lmmse, post_equalisation_snr, symbols_per_block, transmit
from megjax.channel.packing import from_blocks, to_blocks
from megjax.configs import require, require_count
from megjax.keys import threefry
from megjax.system.protocol import Code, Link, Noisy, Source, mean_power
from megjax.system.schemes.base import SCHEMES, Parts, Scheme, latent_symbols


class SplitConstants(NamedTuple):
    """Mean [c] of the clean latents by channel and their mean variance about it: the parameters of a `SplitLink`."""

    mean: Float[Array, " c"]
    variance: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class SplitLink:
    """A latent whose channel noise counts as diffusion noise, which the device's own denoising steps remove.

    All symbols are spread over all blocks by a unitary, the DFT of the symbols with random signs. Both ends draw the
    signs from the transmission's key: whatever the latents' correlation, every block then has the same mean power, and
    what the blocks' different SNRs make of the other symbols is noise of zero mean. After LMMSE reception and
    de-spreading the error is eps = mean_t 1 / (1 + gamma_t) everywhere, each block weighted by its symbols, hence the
    SNR gamma = 1 / eps - 1. `level` is the noise level alpha-bar that the server stopped at, 1 when it finished. The
    device starts `device_steps` steps at

      alpha-bar' = alpha-bar / (1 + v / gamma), v = alpha-bar c^2 + 1 - alpha-bar,

    c^2 the variance of clean latents, from the received latent scaled to that level: for c = 1 alpha-bar' =
    alpha-bar gamma / (1 + gamma), and the input is sqrt((1 + gamma) / gamma) times the LMMSE estimate.
    """

    latent_shape: tuple[int, int, int]
    device_steps: int = 5
    level: float = 1.0
    num_blocks: int = 16
    result: ClassVar[str] = "noisy"
    on_host: ClassVar[bool] = False

    def __post_init__(self):
        require_count("device_steps", self.device_steps)
        require(0 < self.level <= 1, "level", self.level, "in (0, 1]")
        symbols_per_block(self.num_symbols, self.num_blocks)

    @property
    def num_symbols(self) -> int:
        """K = hwc / 2, rounded up."""
        return latent_symbols(self.latent_shape)

    def _moments(self, params: SplitConstants) -> tuple[Float[Array, " c"], Float[Array, ""]]:
        """Mean by channel and mean variance of what is sent."""
        return math.sqrt(self.level) * params.mean, self.level * params.variance + 1 - self.level

    def code(self, params: SplitConstants, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """Latents at zero mean and unit variance, not yet spread."""
        mean, variance = self._moments(params)
        values = (source.partial - mean[None, None, None]) / jnp.sqrt(variance)
        power = mean_power(self.num_symbols, energy)
        payload = values.reshape(len(values), -1)
        return Code(payload, (), jnp.float32(self.num_symbols), power, jnp.ones(self.num_blocks, jnp.float32))

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> Noisy:
        """Noisy latent of one image, scaled to the level that the channel's noise makes of it."""
        sign_key, channel_key = jax.random.split(threefry(key))
        # `jax.random.rademacher` would draw 64-bit numbers in 64-bit mode, whatever its result's type.
        heads = jax.random.bernoulli(sign_key, jnp.float32(0.5), (self.num_symbols,))
        signs = jnp.where(heads, jnp.float32(1), jnp.float32(-1))
        received = transmit(channel_key, to_blocks(spread(payload, signs), self.num_blocks), gains, power, noise_var)
        estimate = from_blocks(equalize_lmmse(received, gains, power, noise_var), self.num_symbols)
        shares = jnp.asarray(symbols_per_block(self.num_symbols, self.num_blocks) / self.num_symbols, jnp.float32)
        error = jnp.sum(shares / (1 + post_equalisation_snr(gains, power, noise_var)))
        snr = jnp.maximum(1 / error - 1, 1e-6)
        mean, variance = self._moments(params)
        values = despread(estimate, signs, int(np.prod(self.latent_shape))).reshape(self.latent_shape)
        unbiased = (1 + snr) / snr * values
        noisy = mean[None, None] + jnp.sqrt(variance) * unbiased
        alpha_bar = self.level / (1 + variance / snr)
        return Noisy(jnp.sqrt(alpha_bar / self.level) * noisy, alpha_bar)

    def decode(self, params: SplitConstants, received: Noisy, shared: PyTree) -> Noisy:
        """The same: nothing is left to decode before the device denoises."""
        return received


def spread(values: Float[Array, " n"], signs: Float[Array, " k"]) -> Complex[Array, " k"]:
    """Symbols, two values each, with these signs and then through the unitary DFT; an odd n is padded with a zero."""
    pairs = jnp.pad(values, (0, values.shape[0] % 2)).reshape(-1, 2) / np.float32(np.sqrt(2))
    return jnp.fft.fft(signs.astype(jnp.complex64) * jax.lax.complex(pairs[:, 0], pairs[:, 1]), norm="ortho")


def despread(symbols: Complex[Array, " k"], signs: Float[Array, " k"], num_values: int) -> Float[Array, " n"]:
    """The inverse of `spread`."""
    plain = signs.astype(jnp.complex64) * jnp.fft.ifft(symbols, norm="ortho")
    return (np.float32(np.sqrt(2)) * jnp.stack([plain.real, plain.imag], -1)).reshape(-1)[:num_values]


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class Split(Scheme):
    """The latent, finished or after some of the server's steps, whose channel noise the device's steps remove."""

    name: ClassVar[str] = "split"
    title: ClassVar[str] = "split"
    version: ClassVar[int] = 2
    rank: ClassVar[int] = 90
    result: ClassVar[str] = "noisy"

    device_steps: int = 5
    """Denoising steps of the device."""
    device_sampler: str = "ddim"
    """Sampler of the device, one of `megjax.diffusion.samplers.SAMPLERS` that can start at any noise level."""
    server_steps: int | None = None
    """Steps after which the server sends; None for all of them."""

    def num_symbols(self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> int:
        """K = hwc / 2."""
        return latent_symbols(latent_shape)

    def build(self, parts: Parts, fitted: Any) -> tuple[Link, Any]:
        """A `SplitLink` with the level that the server stops at, and the moments of clean latents."""
        level, most = 1.0, parts.sampler.num_steps
        if self.server_steps is not None:
            require(1 <= self.server_steps <= most, "server_steps", self.server_steps, f"from 1 to {most}, or None")
            level = float(parts.sampler.alpha_bars[self.server_steps])
        mean, std = (jnp.asarray(x) for x in parts.latent_moments())
        link = SplitLink(parts.latent_shape, self.device_steps, level, parts.num_blocks)
        return link, SplitConstants(mean, jnp.mean(jnp.square(std)))
