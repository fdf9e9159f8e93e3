"""Tests of the phasors against double precision."""

import jax
import jax.numpy as jnp
import numpy as np

from megjax.channel.phasor import rotation

TURNS = np.array([0.0, 0.125, -0.3, 0.5, -0.5, 7.0625, 2e-3], np.float32)
ROTATE = jax.jit(rotation, static_argnums=1)


def phases(steps):
    return 2 * np.pi * TURNS.astype(np.float64)[:, None] * np.array(steps)


def test_cosine_and_sine():
    steps = range(-20, 40, 3)
    cosine, sine = ROTATE(TURNS, steps)
    assert cosine.shape == sine.shape == (7, 20) and cosine.dtype == jnp.float32
    np.testing.assert_allclose(cosine, np.cos(phases(steps)), atol=1e-6)
    np.testing.assert_allclose(sine, np.sin(phases(steps)), atol=1e-6)


def test_large_steps_keep_their_phase():
    # A step is cut to 2^-31 of a turn, so 10^6 steps err by up to 3 mrad; float32 products would err by radians.
    steps = range(999_000, 1_000_001, 500)
    cosine, sine = ROTATE(TURNS, steps)
    np.testing.assert_allclose(cosine, np.cos(phases(steps)), atol=3e-3)
    np.testing.assert_allclose(sine, np.sin(phases(steps)), atol=3e-3)


def test_derivatives():
    steps = range(-2, 3)

    def wave(turns):
        cosine, sine = rotation(turns, steps)
        return jnp.sum(cosine + 2 * sine)

    angle, slope = phases(steps), 2 * np.pi * np.array(steps)
    first = np.sum(slope * (2 * np.cos(angle) - np.sin(angle)), axis=1)
    second = -np.sum(slope**2 * (np.cos(angle) + 2 * np.sin(angle)), axis=1)
    derivatives = jax.jit(lambda turns: (jax.grad(wave)(turns), jax.vmap(jax.grad(jax.grad(wave)))(turns)))(TURNS)
    np.testing.assert_allclose(derivatives[0], first, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(derivatives[1], second, rtol=1e-4, atol=1e-3)
