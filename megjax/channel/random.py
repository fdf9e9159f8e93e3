"""Fast complex Gaussian numbers: counter-based bits and a polar transform that fuse into one kernel.

`jax.random.normal(key, shape, complex64)` spends a Threefry block and an inverse error function on each real. Here one
block of two words makes one complex number, magnitude from the first word and phase from the second, in plain
arithmetic that XLA fuses with whatever consumes the numbers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Key, UInt32

from megjax.keys import THREEFRY, threefry
from megjax.numerics import polynomial

# Fitted by Chebyshev interpolation; relative errors of the functions below are under 3e-8 before rounding.
_LOG1P = (-0.0810163641, 0.1271241, -0.129722556, 0.14202163, -0.166422455, 0.200014689, -0.250002966, 0.333333286)
_SIN = (-0.000195875404, 0.00833274548, -0.166666646)
_COS = (2.45438903e-05, -0.00138882716, 0.0416666642)
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_SQRT_HALF = 0xB504F333
"""sqrt(1/2) in units of 2^-32."""


def complex_normal(key: Key[Array, ""], shape: tuple[int, ...]) -> Complex[Array, "*s"]:
    """Independent CN(0, 1) numbers, complex64 of this shape: real and imaginary parts N(0, 1/2).

    |z|^2 is resolved to a relative 2^-24 from 2^-33 (-99 dB) to 22.9, beyond which an exponential variable falls with
    probability 2^-33 on either side. The polar method is that of G. E. P. Box and M. E. Muller, "A note on the
    generation of random normal deviates", Ann. Math. Statist. 29, 1958. Raises ValueError for shapes of 2^32 or more.
    """
    first, second = _random_words(key, shape)
    magnitude = jnp.sqrt(_unit_exponential(first))
    cosine, sine = unit_circle(second)
    return jax.lax.complex(magnitude * cosine, magnitude * sine)


def unit_phasor(key: Key[Array, ""], shape: tuple[int, ...]) -> Complex[Array, "*s"]:
    """exp(j phi) with independent phases uniform on the circle, complex64 of this shape."""
    return jax.lax.complex(*unit_circle(_random_words(key, shape)[0]))


def fold_in_each(key: Key[Array, ""], data: UInt32[Array, "*s"]) -> Key[Array, "*s"]:
    """`jax.random.fold_in(key, x)` for every x in `data`, in one kernel; the keys are Threefry's (`keys.threefry`)."""
    key_words = jax.random.key_data(threefry(key))
    words = _threefry2x32(key_words[0], key_words[1], jnp.zeros_like(data), data)
    return jax.random.wrap_key_data(jnp.stack(words, axis=-1), impl=THREEFRY)


def split(key: Key[Array, ""], num: int = 2) -> Key[Array, " n"]:
    """`jax.random.split(key, num)` of partitionable Threefry, in the kernel that uses the keys."""
    return fold_in_each(key, jnp.arange(num, dtype=jnp.uint32))


def uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "*s"]:
    """Numbers uniform on [0, 1), multiples of 2^-24, float32 of this shape."""
    return (_random_words(key, shape)[0] >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)


def _random_words(key: Key[Array, ""], shape: tuple[int, ...]) -> tuple[UInt32[Array, "*s"], UInt32[Array, "*s"]]:
    """Two independent arrays of random words: the Threefry-2x32 blocks of counters 0, 1, 2, ... under `key`.

    They are the words that `jax.random.split(key, n)` makes, but in elementwise arithmetic instead of JAX's primitive,
    which no backend fuses.
    """
    size = math.prod(shape)
    if size >= 2**32:
        raise ValueError(f"shape is {shape}; it must hold fewer than 2^32 numbers")
    key_words = jax.random.key_data(threefry(key))
    counter = jax.lax.iota(jnp.uint32, size).reshape(shape)
    return _threefry2x32(key_words[0], key_words[1], jnp.zeros_like(counter), counter)


def _threefry2x32(key0, key1, x0, x1) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, 3.3."""
    schedule = (key0, key1, key0 ^ key1 ^ np.uint32(0x1BD11BDA))
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))) ^ x0
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return x0, x1


def _unit_exponential(word: UInt32[Array, "*s"]) -> Float[Array, "*s"]:
    """-ln u with u = (word + 1/2) / 2^32, accurate to float32 at both ends of (0, 1)."""
    value = word.astype(jnp.float32) + np.float32(0.5)
    # Split off the exponent so that the mantissa lies in [sqrt(1/2), sqrt(2)).
    bits = jax.lax.bitcast_convert_type(value, jnp.int32) - np.int32(0x3F3504F3)
    exponent = (bits >> 23) - np.int32(32)
    mantissa = jax.lax.bitcast_convert_type((bits & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3), jnp.float32)
    # Close to 1, u - 1 is taken from the integer, before rounding.
    near_one = word >= np.uint32(_SQRT_HALF)
    short_of_one = ((~word).astype(jnp.float32) + np.float32(0.5)) * np.float32(-(2.0**-32))
    f = jnp.where(near_one, short_of_one, mantissa - 1)
    exponent = jnp.where(near_one, np.int32(0), exponent)
    log1p = f - f * f * (np.float32(0.5) - f * polynomial(f, _LOG1P))
    return exponent.astype(jnp.float32) * np.float32(-math.log(2)) - log1p


def unit_circle(word: UInt32[Array, "*s"]) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """Cosine and sine of `word` 2^-32 turns, within 2e-7."""
    # The nearest quarter turn, and what is left of it: the low 30 bits as a signed number.
    quadrant = (word + np.uint32(2**29)) >> np.uint32(30)
    signed = jax.lax.bitcast_convert_type(word << np.uint32(2), jnp.int32)
    angle = signed.astype(jnp.float32) * np.float32(math.pi / 4 * 2.0**-31)
    square = angle * angle
    sine = angle + angle * square * polynomial(square, _SIN)
    cosine = 1 - square * (np.float32(0.5) - square * polynomial(square, _COS))
    swap = (quadrant & np.uint32(1)) == 1
    # Quarter turns: (c, s), (-s, c), (-c, -s), (s, -c); the sign is the highest bit of a float.
    sign_x = ((quadrant + np.uint32(1)) & np.uint32(2)) << np.uint32(30)
    sign_y = (quadrant & np.uint32(2)) << np.uint32(30)
    return _flip(jnp.where(swap, sine, cosine), sign_x), _flip(jnp.where(swap, cosine, sine), sign_y)


def _flip(value: Float[Array, "*s"], sign: UInt32[Array, "*s"]) -> Float[Array, "*s"]:
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(value, jnp.uint32) ^ sign, jnp.float32)
