"""Tests of the fading laws against their moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import Fading, NoFading, RayleighFading

NUM = 20_000
FOUR_SIGMA = 4.0


def within_standard_error(samples, expected):
    samples = np.asarray(samples, np.float64).reshape(-1)
    error = abs(samples.mean() - expected)
    assert error <= FOUR_SIGMA * samples.std(ddof=1) / np.sqrt(samples.size), (samples.mean(), expected)


@pytest.fixture(scope="module")
def gains():
    keys = jax.random.split(jax.random.key(1), NUM)
    return np.asarray(jax.jit(jax.vmap(lambda key: RayleighFading().sample(key, 4)))(keys))


def test_shapes_and_protocol():
    for fading in (NoFading(), RayleighFading()):
        assert isinstance(fading, Fading)
        sample = fading.sample(jax.random.key(0), 5)
        assert sample.shape == (5,) and sample.dtype == jnp.complex64
    np.testing.assert_array_equal(NoFading().sample(jax.random.key(0), 3), np.ones(3, np.complex64))


def test_rayleigh_moments(gains):
    power = np.abs(gains) ** 2
    within_standard_error(power, 1.0)
    within_standard_error(power**2, 2.0)  # E g^2 = 2 for the unit exponential law
    within_standard_error(gains.real, 0.0)
    within_standard_error(gains.imag, 0.0)
    within_standard_error(gains.real * gains.imag, 0.0)
    within_standard_error((gains**2).real, 0.0)  # circular symmetry
    within_standard_error(np.abs(gains), np.sqrt(np.pi) / 2)
    within_standard_error(power < 0.1, 1 - np.exp(-0.1))


def test_rayleigh_blocks_are_independent(gains):
    power = np.abs(gains) ** 2
    within_standard_error((power[:, 0] - 1) * (power[:, 1] - 1), 0.0)
    within_standard_error((gains[:, 1] * gains[:, 2].conj()).real, 0.0)


def test_jit_and_vmap_agree_with_the_loop():
    keys = jax.random.split(jax.random.key(2), 3)
    mapped = jax.jit(jax.vmap(lambda key: RayleighFading().sample(key, 4)))(keys)
    loop = [RayleighFading().sample(key, 4) for key in jax.random.split(jax.random.key(2), 3)]
    np.testing.assert_allclose(mapped, np.stack(loop), rtol=1e-6)


def test_is_a_pytree_argument_of_jit():
    sample = jax.jit(lambda fading, key: fading.sample(key, 2))
    assert sample(RayleighFading(), jax.random.key(0)).shape == (2,)


@pytest.mark.parametrize("fading", [NoFading(), RayleighFading()])
def test_bad_num_blocks(fading):
    with pytest.raises(ValueError, match="num_blocks is 0"):
        fading.sample(jax.random.key(0), 0)
