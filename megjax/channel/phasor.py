"""Unit phasors of phases counted in turns, in plain arithmetic that XLA fuses; exact over any number of steps.

XLA's cosine and sine spend most of their time on reducing the angle. Here a phase is a 32-bit fraction of a turn, which
the overflow of an integer reduces, so that a phase does not lose precision as it grows.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from megjax.channel.random import unit_circle


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rotation(turns_per_step: Float[Array, "*s"], steps: range) -> tuple[Float[Array, "*s n"], Float[Array, "*s n"]]:
    """Cosine and sine [*s n] of 2 pi `turns_per_step` `steps`, for the n integers of `steps`, of either sign.

    The turns of one step, within +-2^22, are cut to 2^-31 of a turn (float32 resolves no more of a number above 2^-8);
    the steps then multiply them without error. Differentiable in `turns_per_step` to any order, forward and reverse.
    """
    numbers = np.asarray(steps, np.int64).astype(np.uint32)
    phase = _fraction_of_turn(turns_per_step)[..., None] * _as_row(numbers, turns_per_step)
    return unit_circle(phase)


@rotation.defjvp
def _rotation_jvp(steps, primals, tangents):
    (turns_per_step,), (tangent,) = primals, tangents
    cosine, sine = rotation(turns_per_step, steps)
    angle = tangent[..., None] * _as_row(2 * math.pi * np.asarray(steps, np.float32), turns_per_step)
    return (cosine, sine), (-sine * angle, cosine * angle)


def _as_row(numbers: np.ndarray, leading: Float[Array, "*s"]) -> np.ndarray:
    """`numbers` [n] with an axis of length 1 for each axis of `leading`."""
    return numbers.reshape((1,) * leading.ndim + (-1,))


def _fraction_of_turn(turns: Float[Array, "*s"]) -> UInt32[Array, "*s"]:
    """The fractional part of `turns` in units of 2^-32; the lowest bit is 0, so that half a turn does not overflow."""
    fraction = turns - jnp.round(turns)
    return jax.lax.bitcast_convert_type((fraction * np.float32(2.0**31)).astype(jnp.int32), jnp.uint32) << np.uint32(1)
