"""Tests of the independent fading laws and of shadowing against their moments and distributions."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from megjax.channel.fading import JakesFading, NakagamiFading, NoFading, RayleighFading, RicianFading, ShadowedFading
from megjax.numerics import safe_sqrt
from megjax.pytrees import pytree_dataclass
from tests.channel.draws import draw, realisations
from tests.checks import NUM_DISTRIBUTION, check_distribution, within_standard_error

pytestmark = pytest.mark.usefixtures("fast_compile")
NUM = 2**13
LN10_OVER_10 = np.log(10) / 10
UNIFORM_ANGLE = scipy.stats.uniform(-np.pi, 2 * np.pi).cdf


def test_no_fading_is_one():
    np.testing.assert_array_equal(NoFading().sample(jax.random.key(0), 3), np.ones(3, np.complex64))


def test_rayleigh():
    gains = realisations(RayleighFading(), 1, NUM_DISTRIBUTION // 4, 4)
    check_distribution(np.abs(gains), scipy.stats.rayleigh(scale=np.sqrt(0.5)).cdf)
    check_distribution(np.angle(gains), UNIFORM_ANGLE)
    power = np.abs(gains) ** 2
    within_standard_error(power, 1.0)
    within_standard_error(power**2, 2.0)  # E g^2 = 2 for the unit exponential law
    within_standard_error(gains.real, 0.0)
    within_standard_error(gains.imag, 0.0)
    within_standard_error(gains.real * gains.imag, 0.0)
    within_standard_error((gains**2).real, 0.0)  # circular symmetry
    within_standard_error(np.abs(gains), np.sqrt(np.pi) / 2)
    within_standard_error(power < 0.1, 1 - np.exp(-0.1))
    # Blocks are independent.
    within_standard_error((power[:, 0] - 1) * (power[:, 1] - 1), 0.0)
    within_standard_error((gains[:, 1] * gains[:, 2].conj()).real, 0.0)


@pytest.mark.parametrize("k_factor", [0.0, 0.7, 10.0])
def test_rician_distribution(k_factor):
    gains = draw(RicianFading(k_factor, 2.0), 21, NUM_DISTRIBUTION)
    spread = np.sqrt(0.5 / (1 + k_factor))
    check_distribution(np.abs(gains), scipy.stats.rice(b=np.sqrt(2 * k_factor), scale=spread).cdf)
    power = np.abs(gains) ** 2
    within_standard_error(power, 1.0)
    within_standard_error((power - 1) ** 2, (1 + 2 * k_factor) / (1 + k_factor) ** 2)
    line_of_sight = np.sqrt(k_factor / (1 + k_factor))
    within_standard_error(gains.real, line_of_sight * np.cos(2.0))
    within_standard_error(gains.imag, line_of_sight * np.sin(2.0))


def test_rician_phase_of_a_realisation():
    # Scattering 1e-12 below the line of sight: sqrt(K / (K + 1)) = 1 and the phase is that of the line of sight alone.
    fixed = draw(RicianFading(1e12, np.pi / 2), 0, NUM_DISTRIBUTION)[:5]
    np.testing.assert_allclose(fixed, np.full(5, 1j), atol=1e-5)
    random = realisations(RicianFading(1e12, random_phase=True), 22, NUM_DISTRIBUTION, 2)
    np.testing.assert_allclose(random, np.broadcast_to(random[:, :1], random.shape), atol=1e-5)
    check_distribution(np.angle(random[:, 0]), UNIFORM_ANGLE)


def test_rician_blocks_share_only_the_line_of_sight():
    gains = realisations(RicianFading(3.0, random_phase=True), 23, NUM_DISTRIBUTION, 2)
    within_standard_error((gains[:, 0] * gains[:, 1].conj()).real, 0.75)  # K / (K + 1)
    within_standard_error(gains.real, 0.0)
    power = np.abs(gains) ** 2
    within_standard_error((power[:, 0] - 1) * (power[:, 1] - 1), 0.0)


@pytest.mark.parametrize("m", [0.5, 3.7])
def test_nakagami_distribution(m):
    gains = draw(NakagamiFading(m), 24, NUM_DISTRIBUTION)
    check_distribution(np.abs(gains), scipy.stats.nakagami(m).cdf)
    check_distribution(np.angle(gains), UNIFORM_ANGLE)
    power = np.abs(gains) ** 2
    within_standard_error(power, 1.0)
    within_standard_error((power - 1) ** 2, 1 / m)
    within_standard_error((power[::2] - 1) * (power[1::2] - 1), 0.0)
    within_standard_error((gains[::2] * gains[1::2].conj()).real, 0.0)


def test_shadowing_is_log_normal_and_constant_over_an_image():
    sigma_db = 4.0
    power = np.abs(realisations(ShadowedFading(NoFading(), sigma_db), 25, NUM_DISTRIBUTION, 3)) ** 2
    log_std = LN10_OVER_10 * sigma_db
    check_distribution(power[:, 0], scipy.stats.lognorm(s=log_std, scale=np.exp(-(log_std**2) / 2)).cdf)
    np.testing.assert_array_equal(power, np.broadcast_to(power[:, :1], power.shape))
    none = realisations(ShadowedFading(NoFading(), 0.0), 0, NUM_DISTRIBUTION, 3)
    np.testing.assert_array_equal(none, np.ones_like(none))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fading", "fourth_moment"),
    [
        (RicianFading(1.0), 1.75),  # 1 + (1 + 2 K) / (1 + K)^2
        (JakesFading(0.1, 8), 2.0),
    ],
)
def test_shadowed_moments(fading, fourth_moment):
    sigma_db = 3.0
    power = np.abs(realisations(ShadowedFading(fading, sigma_db), 26, NUM, 1)) ** 2
    within_standard_error(power, 1.0)
    # E g^2 of the product is the product of both, exp(s^2) for the shadowing of log-standard deviation s.
    within_standard_error(power**2, fourth_moment * np.exp((LN10_OVER_10 * sigma_db) ** 2))


@pytree_dataclass
class SteppedGain:
    """A law that is not the library's: it meets the protocol and is a pytree."""

    dependence: ClassVar[str] = "independent"
    step: jax.Array

    def sample(self, key, num_blocks):
        return (1 + self.step * jnp.arange(num_blocks, dtype=jnp.float32)).astype(jnp.complex64)


def test_shadowing_of_a_law_from_elsewhere():
    shadowed = ShadowedFading(SteppedGain(jnp.array([0.5, 1.0])), jnp.array([0.0, 5.0]))
    gains = jax.jit(jax.vmap(lambda f, key: f.sample(key, 3)))(shadowed, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(gains[0], [1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(gains[1] / gains[1, 0], [1.0, 2.0, 3.0], rtol=1e-6)


def test_amplitude_at_zero():
    np.testing.assert_array_equal(safe_sqrt(jnp.array([0.0, 4.0])), [0.0, 2.0])
    np.testing.assert_array_equal(jax.grad(lambda p: safe_sqrt(p).sum())(jnp.array([0.0, 4.0])), [0.0, 0.25])


@pytest.mark.slow
def test_jit_agrees_with_plain_calls():
    fading = RicianFading(3.0, 0.5)
    np.testing.assert_allclose(draw(fading, 2, 5), fading.sample(jax.random.key(2), 5), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "value", "mean"),
    [
        (RicianFading, 2.0, lambda k: scipy.stats.rice.mean(np.sqrt(2 * k), scale=np.sqrt(0.5 / (1 + k)))),
        (NakagamiFading, 1.5, scipy.stats.nakagami.mean),
        # E 10^(X / 20) / sqrt(E 10^(X / 10)) = exp(-s^2 / 8)
        (functools.partial(ShadowedFading, NoFading()), 4.0, lambda s: np.exp(-((LN10_OVER_10 * s) ** 2) / 8)),
    ],
)
def test_gradients_of_the_mean_amplitude(law, value, mean):
    def derivative(key, value):
        return jax.jacfwd(lambda v: jnp.abs(law(v).sample(key, 1)[0]))(value)

    samples = jax.jit(jax.vmap(derivative, (0, None)))(jax.random.split(jax.random.key(6), NUM), value)
    step = 1e-4
    within_standard_error(samples, (mean(value + step) - mean(value - step)) / (2 * step))


def test_bad_arguments():
    for bad in (-0.1, np.inf, np.nan, np.array([1.0, -1.0])):
        with pytest.raises(ValueError, match="k_factor is .*0 or more"):
            RicianFading(bad)
    with pytest.raises(ValueError, match="los_phase is nan"):
        RicianFading(1.0, np.nan)
    with pytest.raises(ValueError, match=r"leaves of shapes k_factor \(3,\), los_phase \(2,\)"):
        RicianFading(np.ones(3), np.ones(2))
    for bad in (0.49, np.inf):
        with pytest.raises(ValueError, match="m is .*0.5 or more"):
            NakagamiFading(bad)
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="sigma_db is .*0 or more"):
            ShadowedFading(RayleighFading(), bad)
    with pytest.raises(ValueError, match="k_factor has shape"):
        RicianFading(np.ones(3)).sample(jax.random.key(0), 3)
