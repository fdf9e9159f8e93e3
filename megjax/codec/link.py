"""From the values of a code to the estimates at the receiver: order, blocks, loads and noise, for any codec.

A code is a vector of real values of unit variance, most important first. The first 2K of them travel as K complex
symbols, two values each, in T fading blocks. What a codec wants to spend on each value is split into the `load` of each
block, which is transmit power, and the `shape` inside the block, whose mean is 1, so that every block of symbols has
unit mean power. Vectors keep the full length n with zeros beyond 2K, so that K may be traced.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Complex, Float, Int, Key

from megjax.channel import MAPPINGS, complex_normal, equalize_lmmse, pack, post_equalisation_snr, transmit, unpack
from megjax.configs import is_integer, require
from megjax.numerics import safe_sqrt


class Spending(NamedTuple):
    """Power of a code: `load` [t] of the blocks, mean 1, and `shape` [n] of the values, mean 1 in every block."""

    load: Float[Array, " t"]
    shape: Float[Array, " n"]


class Received(NamedTuple):
    """Receiver's view of a code: LMMSE `estimate` [n] of each value and its linear `snr` [n]; zeros where none came.

    The estimate of a value x of unit variance is a x + noise with a = snr / (1 + snr) and error variance 1 - a.
    """

    estimate: Float[Array, " n"]
    snr: Float[Array, " n"]


def check_symbols(num_symbols: int, num_values: int, num_blocks: int) -> None:
    """ValueError unless K symbols fill the blocks and carry no more values than the code has."""
    most = num_values // 2
    valid = is_integer(num_symbols) and num_blocks <= num_symbols <= most
    allowed = f"an integer from {num_blocks} (one symbol a block) to {most} (half of the code's {num_values} values)"
    require(valid, "num_symbols", num_symbols, allowed)


def symbols_at_rate(rate: int | float, num_values: int) -> int:
    """K = hwc / (2 r), rounded to the nearest integer; ValueError for a rate that gives no symbol or is below 1."""
    valid = isinstance(rate, int | float) and 1 <= rate <= num_values
    require(valid, "rate", rate, f"a number from 1 to {num_values}, which is one symbol")
    return max(1, round(num_values / (2 * rate)))


def block_of_value(
    num_values: int, num_symbols: Int[ArrayLike, ""], num_blocks: int, interleaved: ArrayLike
) -> Int[Array, " n"]:
    """Block in which each value travels, as `channel.pack` deals symbols out; only the first 2K entries mean anything.

    `num_symbols` and `interleaved` may be traced.
    """
    symbol = jnp.arange(num_values) // 2
    short, longer = num_symbols // num_blocks, num_symbols % num_blocks
    in_longer = longer * (short + 1)
    ordered = jnp.where(
        symbol < in_longer, symbol // (short + 1), longer + (symbol - in_longer) // jnp.maximum(short, 1)
    )
    return jnp.where(interleaved, symbol % num_blocks, jnp.minimum(ordered, num_blocks - 1))


def split_load(
    spend: Float[Array, " n"], num_symbols: Int[ArrayLike, ""], block: Int[Array, " n"], num_blocks: int
) -> Spending:
    """Loads and shapes of a power for each value, which only counts for the first 2K.

    Both depend on what `spend` depends on, rate and SNR, and never on the data.
    """
    sent = (jnp.arange(spend.shape[0]) < 2 * num_symbols).astype(jnp.float32)
    member = (block[:, None] == jnp.arange(num_blocks)[None]).astype(jnp.float32) * sent[:, None]
    mean = jnp.maximum((spend[:, None] * member).sum(0), 1e-30) / member.sum(0)
    return Spending(mean / mean.mean(), sent * spend / mean[block])


def spending(spend: Float[Array, " n"], num_symbols: int, num_blocks: int, mapping: str) -> Spending:
    """`split_load` for a mapping by name."""
    block = block_of_value(spend.shape[0], num_symbols, num_blocks, mapping == "interleaved")
    return split_load(spend, num_symbols, block, num_blocks)


def value_snr(spending: Spending, block_snr: Float[Array, " t"], block: Int[Array, " n"]) -> Float[Array, " n"]:
    """Linear SNR of each value [n] for the post-equalisation SNR of the blocks [t]."""
    return spending.shape * block_snr[block]


def receive_values(key: Key[Array, ""], values: Float[Array, " n"], snr: Float[Array, " n"]) -> Received:
    """What LMMSE reception gives for values at these SNRs, drawn directly: a x + sqrt(a (1 - a)) w, w ~ N(0, 1).

    The same law as `send_code`, since the receiver knows the gains and turns them out of the noise, but with a traced
    number of symbols and without complex numbers: for training.
    """
    noise = complex_normal(key, ((values.shape[0] + 1) // 2,))
    noise = jnp.stack([noise.real, noise.imag], -1).reshape(-1)[: values.shape[0]] * jnp.sqrt(2.0)
    reliability = snr / (1 + snr)
    return Received(reliability * values + safe_sqrt(snr) / (1 + snr) * noise, snr)


def pack_code(
    values: Float[Array, " n"], spending: Spending, num_symbols: int, num_blocks: int, mapping: str
) -> Complex[Array, "t k"]:
    """Symbols [t k] of the first 2K values, of unit mean power in every block."""
    return pack((safe_sqrt(spending.shape) * values)[: 2 * num_symbols], num_blocks, mapping)


def unpack_code(
    symbols: Complex[Array, "t k"],
    block_snr: Float[Array, " t"],
    spending: Spending,
    num_symbols: int,
    mapping: str,
) -> Received:
    """Estimates of the values from LMMSE-equalised symbols of unit variance and the SNR of their blocks."""
    num_values, num_blocks = spending.shape.shape[0], block_snr.shape[0]
    block = block_of_value(num_values, num_symbols, num_blocks, mapping == "interleaved")
    snr = value_snr(spending, block_snr, block)
    flat = jnp.pad(unpack(symbols, 2 * num_symbols, mapping), (0, num_values - 2 * num_symbols))
    # The equaliser took every value's variance for 1; it is `shape`.
    weight = safe_sqrt(spending.shape) * (1 + block_snr[block]) / (1 + snr)
    return Received(weight * flat, snr)


def send_code(
    key: Key[Array, ""],
    values: Float[Array, " n"],
    spending: Spending,
    gains: Complex[Array, " t"],
    power: Float[Array, " t"],
    noise_var: Float[ArrayLike, ""],
    num_symbols: int,
    mapping: str = "ordered",
) -> Received:
    """The first 2K values over one realisation of the fading link, at power p_t, LMMSE-received.

    ValueError for an unknown mapping or more symbols than the code has.
    """
    require(mapping in MAPPINGS, "mapping", mapping, f"one of {MAPPINGS}")
    check_symbols(num_symbols, values.shape[0], gains.shape[0])
    symbols = pack_code(values, spending, num_symbols, gains.shape[0], mapping)
    received = transmit(key, symbols, gains, power, noise_var)
    equalised = equalize_lmmse(received, gains, power, noise_var)
    block_snr = post_equalisation_snr(gains, power, noise_var)
    return unpack_code(equalised, block_snr, spending, num_symbols, mapping)
