"""BPSK and Gray-labelled square QAM of unit mean power: bits to symbols, and hard decisions back to bits.

Square QAM is two independent amplitude modulations, whose levels are labelled by a reflected Gray code; even bits of a
symbol choose the in-phase level, odd bits the quadrature level. Labels and levels are those of 3GPP TS 38.211, section
5.1, from QPSK to 1024-QAM; BPSK is on the real axis. One vector a call; the caller vmaps.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Integer

MODULATIONS = ("bpsk", "qpsk", "16qam", "64qam", "256qam", "1024qam")
"""Every modulation, by name; QPSK is 4-QAM."""

_BITS = dict(zip(MODULATIONS, (1, 2, 4, 6, 8, 10), strict=True))


def bits_per_symbol(modulation: str) -> int:
    """Number of bits in a symbol; raises ValueError for a name that is not in `MODULATIONS`."""
    if modulation not in MODULATIONS:
        raise ValueError(f"modulation is {modulation!r}; it must be one of {', '.join(MODULATIONS)}")
    return _BITS[modulation]


def modulate(bits: Bool[Array, " n"] | Integer[Array, " n"], modulation: str) -> Complex[Array, " k"]:
    """Symbols complex64 [k], k = n / bits_per_symbol(modulation), of `bits` [n], which are bool, or integers 0 and 1.

    Equally likely bits give symbols of unit mean power. Raises ValueError for an unknown modulation, for a number of
    bits that is not a multiple of `bits_per_symbol`, and outside jit for integers other than 0 and 1.
    """
    size = bits_per_symbol(modulation)
    if bits.shape[0] % size:
        raise ValueError(f"bits has {bits.shape[0]} entries; {modulation} takes a multiple of {size}")
    if not isinstance(bits, jax.core.Tracer) and not np.all((np.asarray(bits) == 0) | (np.asarray(bits) == 1)):
        raise ValueError(f"bits holds values from {bits.min()} to {bits.max()}; they must be 0 or 1")
    signs = 1 - 2 * bits.astype(jnp.float32)
    if size == 1:
        return jax.lax.complex(signs, jnp.zeros_like(signs))
    axis_bits = size // 2
    signs = signs.reshape(-1, axis_bits, 2)
    level = signs[:, -1]
    for i in reversed(range(axis_bits - 1)):
        level = signs[:, i] * (np.float32(2 ** (axis_bits - 1 - i)) - level)
    level = level * np.float32(_half_distance(size))
    return jax.lax.complex(level[:, 0], level[:, 1])


def demodulate(symbols: Complex[Array, " k"], modulation: str) -> Bool[Array, " n"]:
    """Bits bool [n], n = k bits_per_symbol(modulation), of the constellation points nearest to `symbols` [k].

    The symbols must be unbiased estimates, as from `equalize_zf`: an LMMSE estimate is shrunk towards zero and would
    be sliced wrongly for 16-QAM and beyond. Raises ValueError for an unknown modulation.
    """
    size = bits_per_symbol(modulation)
    if size == 1:
        return symbols.real < 0
    axis_bits = size // 2
    # Each bit is the side of a threshold; folding the axis there puts the thresholds of the next bit on top of each
    # other, which is what the reflected Gray code means.
    rest = jnp.stack([symbols.real, symbols.imag], axis=-1) * np.float32(1 / _half_distance(size))
    bits = [rest < 0]
    for i in range(1, axis_bits):
        rest = np.float32(2 ** (axis_bits - i)) - jnp.abs(rest)
        bits.append(rest < 0)
    return jnp.stack(bits, axis=1).reshape(-1)


def constellation(modulation: str) -> Complex[Array, " m"]:
    """All points complex64 [2^bits_per_symbol]; point i carries the bits of i, most significant first."""
    size = bits_per_symbol(modulation)
    labels = (np.arange(2**size)[:, np.newaxis] >> np.arange(size)[::-1]) & 1
    return modulate(jnp.asarray(labels.reshape(-1) == 1), modulation)


def _half_distance(size: int) -> float:
    """Half the distance of neighbouring levels: the odd levels of 2^size-QAM have mean power 2 (2^size - 1) / 3."""
    return math.sqrt(3 / (2 * (2**size - 1)))
