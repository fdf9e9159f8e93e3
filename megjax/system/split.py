"""Links whose device goes on denoising: from a noisy latent, from a seed's estimate, or from the prompt alone."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, Float, Key, PyTree
from scipy.optimize import nnls

from megjax.channel import Fading, equalize_lmmse, post_equalisation_snr, symbols_per_block, transmit
from megjax.channel.numerics import squared_magnitude
from megjax.codec.schemes import Scheme, realisation_keys
from megjax.configs import require, require_count
from megjax.keys import threefry
from megjax.system.links import AnalogLink, Code, Noisy, Source, from_blocks, mean_power, to_blocks
from megjax.units import db_to_linear

ERROR_DRAWS = 4
"""Realisations of the link for each latent that a `SeedErrors` is fitted on."""
_NOISE_STREAM = 1
"""Of a transmission's key: the spreading's signs, or noise that the device adds; the channel takes the key itself."""


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

    def __post_init__(self):
        check_device_steps(self.device_steps)
        require(0 < self.level <= 1, "level", self.level, "in (0, 1]")
        symbols_per_block(self.num_symbols, self.num_blocks)

    @property
    def num_symbols(self) -> int:
        """K = hwc / 2, rounded up."""
        return -(-int(np.prod(self.latent_shape)) // 2)

    def _moments(self, params: SplitConstants) -> tuple[Float[Array, " c"], Float[Array, ""]]:
        """Mean by channel and mean variance of what is sent."""
        return math.sqrt(self.level) * params.mean, self.level * params.variance + 1 - self.level

    def code(self, params: SplitConstants, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """As in `Link`; the payload are the latents at zero mean and unit variance, not yet spread."""
        mean, variance = self._moments(params)
        values = (source.partial - mean[None, None, None]) / jnp.sqrt(variance)
        power = mean_power(self.num_symbols, energy)
        payload = values.reshape(len(values), -1)
        return Code(payload, (), jnp.float32(self.num_symbols), power, jnp.ones(self.num_blocks, jnp.float32))

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> Noisy:
        """As in `Link`."""
        # `jax.random.rademacher` would draw 64-bit numbers in 64-bit mode, whatever its result's type.
        heads = jax.random.bernoulli(
            jax.random.fold_in(threefry(key), _NOISE_STREAM), jnp.float32(0.5), (self.num_symbols,)
        )
        signs = jnp.where(heads, jnp.float32(1), jnp.float32(-1))
        received = transmit(key, to_blocks(spread(payload, signs), self.num_blocks), gains, power, noise_var)
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
        """As in `Link`: nothing is left to decode before the device denoises."""
        return received


def spread(values: Float[Array, " n"], signs: Float[Array, " k"]) -> Complex[Array, " k"]:
    """Symbols, two values each, with these signs and then through the unitary DFT; an odd n is padded with a zero."""
    pairs = jnp.pad(values, (0, values.shape[0] % 2)).reshape(-1, 2) / np.float32(np.sqrt(2))
    return jnp.fft.fft(signs.astype(jnp.complex64) * jax.lax.complex(pairs[:, 0], pairs[:, 1]), norm="ortho")


def despread(symbols: Complex[Array, " k"], signs: Float[Array, " k"], num_values: int) -> Float[Array, " n"]:
    """The inverse of `spread`."""
    plain = signs.astype(jnp.complex64) * jnp.fft.ifft(symbols, norm="ortho")
    return (np.float32(np.sqrt(2)) * jnp.stack([plain.real, plain.imag], -1)).reshape(-1)[:num_values]


class SeedErrors(NamedTuple):
    """Mean squared error of a latent's values after seed decoding, as the device predicts it from its blocks' SNRs.

    At effective SNRs `snr_db` [g] it is constant + sum_t slopes_t / (1 + gamma_t), linear between them.
    """

    snr_db: Float[Array, " g"]
    coefficients: Float[Array, "g t1"]
    """The constant and T slopes."""

    def at(self, snr_db: Float[ArrayLike, ""], block_snr: Float[Array, " t"]) -> Float[Array, ""]:
        """The error of one reception, for the SNRs gamma_t [t] of its blocks after equalisation."""
        found = jax.vmap(lambda column: jnp.interp(snr_db, self.snr_db, column), in_axes=1)(self.coefficients)
        return found[0] + jnp.sum(found[1:] / (1 + block_snr))


def fit_seed_errors(
    key: Key[Array, ""],
    codec: Scheme,
    way: AnalogLink,
    latents: Float[Array | np.ndarray, "n h w c"],
    fading: Fading,
    snr_db: tuple[float, ...],
) -> SeedErrors:
    """Least squares with coefficients of at least zero, over these latents and draws of the gains, block load as coded.

    `snr_db` are effective SNRs, rising. The additive model is that of the block weights: a lost block costs what it
    costs whatever becomes of the others.
    """
    numbers = np.arange(len(latents), dtype=np.uint32)

    @jax.jit
    def measure(codec, latents, level, draw):
        code = way.code(codec, Source(latents, None, latents), level, None)
        keys = realisation_keys(key, numbers, draw)
        noise_var = 1 / db_to_linear(level)

        def one(key, payload):
            gain_key, noise_key = jax.random.split(key)
            gains = fading.sample(gain_key, way.num_blocks)
            return gains, way.transmit(codec, noise_key, payload, code.shared, gains, code.load, noise_var)

        gains, received = jax.vmap(one)(keys, code.payload)
        error = jnp.square(way.decode(codec, received, code.shared) - latents).mean((1, 2, 3))
        return 1 / (1 + code.load[None] * squared_magnitude(gains) / noise_var), error

    rows = []
    for level in snr_db:
        parts = [measure(codec, latents, jnp.float32(level), draw) for draw in range(ERROR_DRAWS)]
        lost, error = (np.concatenate([np.asarray(p[i], np.float64) for p in parts]) for i in (0, 1))
        rows.append(nnls(np.column_stack([np.ones(len(lost)), lost]), error)[0])
    return SeedErrors(jnp.asarray(snr_db, jnp.float32), jnp.asarray(np.stack(rows), jnp.float32))


class SeedSplit(NamedTuple):
    """The parameters of a `SeedSplitLink`."""

    codec: Any
    """A `megjax.codec.schemes.Scheme`."""
    errors: SeedErrors


@dataclasses.dataclass(frozen=True)
class SeedSplitLink:
    """A seed whose decoded latent is noised again and then denoised by the device.

    What seed decoding leaves is no white noise: weak components are missing. So the device hides it: it predicts the
    mean squared error e of its latent z^ from the blocks' SNRs, draws w ~ N(0, I) and starts `device_steps` steps at

      x = sqrt(alpha-bar) (z^ + sqrt(s) w), alpha-bar = 1 / (1 + s), s = `renoise` e,

    as C. Meng et al., "SDEdit", 2022, sec. 3.2, with the level that fits the error.
    """

    analog: AnalogLink
    latent_shape: tuple[int, int, int]
    device_steps: int = 5
    renoise: float = 2.0
    result: ClassVar[str] = "noisy"

    def __post_init__(self):
        check_device_steps(self.device_steps)
        require(0 < self.renoise < np.inf, "renoise", self.renoise, "positive and finite")

    @property
    def num_symbols(self) -> int:
        """K = hwc / (2r)."""
        return self.analog.num_symbols

    @property
    def num_blocks(self) -> int:
        """T."""
        return self.analog.num_blocks

    def code(self, params: SeedSplit, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """As in `Link`: that of the seed."""
        return self.analog.code(params.codec, source, snr_db, energy)

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> PyTree:
        """As in `Link`: what the seed's receiver has, s, and w."""
        noise = jax.random.normal(jax.random.fold_in(threefry(key), _NOISE_STREAM), self.latent_shape, jnp.float32)
        received = self.analog.transmit(params.codec, key, payload, shared, gains, power, noise_var)
        error = params.errors.at(shared[1], post_equalisation_snr(gains, power, noise_var))
        return received, self.renoise * error, noise

    def decode(self, params: SeedSplit, received: PyTree, shared: PyTree) -> Noisy:
        """As in `Link`: seed decoding, then the noise."""
        code, added, noise = received
        latents = self.analog.decode(params.codec, code, shared)
        alpha_bar, wide = 1 / (1 + added), added[:, None, None, None]
        return Noisy((latents + jnp.sqrt(wide) * noise) / jnp.sqrt(1 + wide), alpha_bar)


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

    def __post_init__(self):
        check_device_steps(self.device_steps)

    def code(self, params: Any, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """As in `Link`: no values, no symbols, no energy."""
        payload = jnp.zeros((len(source.latents), 0), jnp.float32)
        return Code(payload, (), jnp.float32(0), jnp.float32(1), jnp.ones(self.num_blocks, jnp.float32))

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> Noisy:
        """As in `Link`: noise of the device's own."""
        noise = jax.random.normal(jax.random.fold_in(threefry(key), _NOISE_STREAM), self.latent_shape, jnp.float32)
        return Noisy(noise, jnp.zeros((), jnp.float32))

    def decode(self, params: Any, received: Noisy, shared: PyTree) -> Noisy:
        """As in `Link`."""
        return received


def check_device_steps(steps: int) -> None:
    """ValueError unless it is an integer of at least 1."""
    require_count("device_steps", steps)
