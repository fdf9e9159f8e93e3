"""What the blocks of a code are worth: the error that erasing each one adds, and how well their sum predicts it.

SNRs are effective, P / sigma^2 in dB: the link is simulated at P = 1. Latents come in batches; K is static.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key

from megjax.channel import Fading
from megjax.codec import link
from megjax.codec.coders import Coder
from megjax.configs import require
from megjax.keys import threefry
from megjax.numerics import squared_magnitude
from megjax.units import db_to_linear

POWERS = ("codec", "equal")
"""Power of the blocks: p_t = P times the load that the coder asks for, or p_t = P."""


def block_power(spending: link.Spending, power: str | Float[Array, " t"]) -> Float[Array, " t"]:
    """p_t / P of the blocks [t] by a rule of `POWERS`, or as given; ValueError for another rule or shape."""
    if isinstance(power, str):
        require(power in POWERS, "power", power, f"one of {POWERS}, or an array")
        return spending.load if power == "codec" else jnp.ones_like(spending.load)
    require(power.shape == spending.load.shape, "power's shape", power.shape, str(spending.load.shape))
    return power


def block_weights(
    coder: Coder,
    key: Key[Array, ""],
    latents: Float[Array, "b h w c"],
    num_symbols: int,
    snr_db: Float[ArrayLike, ""],
    num_blocks: int = 16,
    mapping: str = "ordered",
) -> Float[Array, " t"]:
    """Importance of the blocks, mean 1: how much the latents' MSE grows when block t alone is erased.

    The others are then at their mean SNR, that of their load at |h|^2 = 1. All blocks are compared with the same
    noise, so a few hundred latents do; a growth that comes out negative counts as 0, and blocks that all matter
    nothing get equal weights. Raises ValueError for an unknown mapping or a K that does not fit.
    """
    mean_snr = db_to_linear(snr_db) * coder.spending(snr_db, num_symbols, num_blocks, mapping).load
    error = _latent_error(coder, latents, num_symbols, snr_db, num_blocks, mapping)
    present = 1 - jnp.eye(num_blocks + 1, num_blocks, dtype=jnp.float32)
    errors = jax.lax.map(lambda row: error(jax.random.clone(key), row * mean_snr), present)
    growth = jnp.maximum(errors[:-1] - errors[-1], 0.0)
    mean = growth.mean()
    return jnp.where(mean > 0, growth / jnp.where(mean > 0, mean, 1.0), 1.0)


class AdditiveCheck(NamedTuple):
    """How well sum_t w_t / (1 + gamma_t) stands for the latents' MSE, over r realisations of the gains."""

    measured: Float[Array, " r"]
    """MSE per latent, averaged over the latents."""
    predicted: Float[Array, " r"]
    """Scale and offset, by least squares, applied to the sum."""
    r_squared: Float[Array, ""]
    """Share of the MSE's variance that is predicted; the squared correlation of sum and MSE."""


def additive_prediction(
    coder: Coder,
    key: Key[Array, ""],
    latents: Float[Array, "b h w c"],
    weights: Float[Array, " t"],
    snr_db: Float[ArrayLike, ""],
    fading: Fading,
    *,
    num_symbols: int,
    mapping: str = "ordered",
    power: str | Float[Array, " t"] = "codec",
    num_realisations: int = 200,
) -> AdditiveCheck:
    """Compare the additive model of the error with simulation, all latents being sent over each drawn realisation.

    Only a scale and an offset are fitted, neither of which changes a power policy. A law without fading leaves nothing
    to predict and gives NaN. Raises ValueError for an unknown mapping or power, or a K that does not fit.
    """
    num_blocks = weights.shape[0]
    spending = coder.spending(snr_db, num_symbols, num_blocks, mapping)
    shares = db_to_linear(snr_db) * block_power(spending, power)
    keys = jax.random.split(threefry(key), (2, num_realisations))
    gains = jax.vmap(lambda k: fading.sample(k, num_blocks))(keys[0])
    block_snr = squared_magnitude(gains) * shares[None]
    error = _latent_error(coder, latents, num_symbols, snr_db, num_blocks, mapping)
    measured = jax.lax.map(lambda pair: error(*pair), (keys[1], block_snr))
    total = jnp.sum(weights[None] / (1 + block_snr), axis=1)
    centred, deviation = total - total.mean(), measured - measured.mean()
    scale = jnp.mean(centred * deviation) / jnp.mean(jnp.square(centred))
    predicted = measured.mean() + scale * centred
    share = jnp.mean(jnp.square(scale * centred)) / jnp.mean(jnp.square(deviation))
    return AdditiveCheck(measured, predicted, share)


def _latent_error(coder, latents, num_symbols: int, snr_db, num_blocks: int, mapping: str):
    """`(key, block_snr [t]) -> MSE` per latent when all of them are received at these SNRs."""
    spending = coder.spending(snr_db, num_symbols, num_blocks, mapping)
    values = coder.encode(latents, snr_db, num_symbols)
    block = link.block_of_value(values.shape[1], num_symbols, num_blocks, mapping == "interleaved")

    def error(key, block_snr):
        snr = link.value_snr(spending, block_snr, block)
        keys = jax.random.split(threefry(key), len(values))
        received = jax.vmap(link.receive_values, (0, 0, None))(keys, values, snr)
        return jnp.square(coder.decode(received, snr_db, num_symbols) - latents).sum((1, 2, 3)).mean()

    return error
