"""Tests of the fading laws against their moments and distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from megjax.channel.correlated import GaussMarkovFading, JakesFading
from megjax.channel.fading import (
    Fading,
    NakagamiFading,
    NoFading,
    RayleighFading,
    RicianFading,
    ShadowedFading,
)
from megjax.channel.numerics import safe_sqrt
from megjax.pytrees import pytree_dataclass

NUM = 20_000
NUM_DISTRIBUTION = 2**20
FOUR_SIGMA = 4.0
SMALLEST_P_VALUE = 1e-4
LAWS = [
    NoFading(),
    RayleighFading(),
    RicianFading(3.0, 0.5),
    RicianFading(3.0, random_phase=True),
    NakagamiFading(1.5),
    ShadowedFading(RicianFading(2.0), 6.0),
]
LN10_OVER_10 = np.log(10) / 10


def within_standard_error(samples, expected):
    samples = np.asarray(samples, np.float64).reshape(-1)
    error = abs(samples.mean() - expected)
    assert error <= FOUR_SIGMA * samples.std(ddof=1) / np.sqrt(samples.size), (samples.mean(), expected)


@functools.partial(jax.jit, static_argnums=(2, 3))
def sample_many(fading, key, num, num_blocks):
    return jax.vmap(lambda key: fading.sample(key, num_blocks))(jax.random.split(key, num))


def realisations(fading, seed, num=NUM, num_blocks=4):
    return np.asarray(sample_many(fading, jax.random.key(seed), num, num_blocks))


@functools.partial(jax.jit, static_argnums=2)
def sample_one(fading, key, num_blocks):
    return fading.sample(key, num_blocks)


def draw(fading, seed, num_blocks):
    return sample_one(fading, jax.random.key(seed), num_blocks)


def check_distribution(samples, cdf):
    assert samples.size >= 10**6
    assert scipy.stats.kstest(np.asarray(samples, np.float64).reshape(-1), cdf).pvalue > SMALLEST_P_VALUE


@pytest.fixture(scope="module")
def gains():
    return realisations(RayleighFading(), 1)


@pytest.mark.parametrize("fading", LAWS)
def test_shapes_and_protocol(fading):
    assert isinstance(fading, Fading)
    sample = draw(fading, 0, 5)
    assert sample.shape == (5,) and sample.dtype == jnp.complex64
    with pytest.raises(ValueError, match="num_blocks is 0"):
        fading.sample(jax.random.key(0), 0)


def test_no_fading_is_one():
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


def test_rayleigh_distribution():
    gains = draw(RayleighFading(), 20, NUM_DISTRIBUTION)
    check_distribution(np.abs(gains), scipy.stats.rayleigh(scale=np.sqrt(0.5)).cdf)
    check_distribution(np.angle(gains), scipy.stats.uniform(-np.pi, 2 * np.pi).cdf)


@pytest.mark.parametrize("k_factor", [0.0, 0.7, 10.0])
def test_rician_distribution(k_factor):
    gains = np.asarray(draw(RicianFading(k_factor, 2.0), 21, NUM_DISTRIBUTION))
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
    fixed = draw(RicianFading(1e12, np.pi / 2), 0, 5)
    np.testing.assert_allclose(fixed, np.full(5, 1j), atol=1e-5)
    random = realisations(RicianFading(1e12, random_phase=True), 22)
    np.testing.assert_allclose(random, np.broadcast_to(random[:, :1], random.shape), atol=1e-5)
    phase = scipy.stats.kstest(np.angle(random[:, 0]), scipy.stats.uniform(-np.pi, 2 * np.pi).cdf)
    assert phase.pvalue > SMALLEST_P_VALUE


def test_rician_blocks_share_only_the_line_of_sight():
    gains = realisations(RicianFading(3.0, random_phase=True), 23)
    within_standard_error((gains[:, 0] * gains[:, 1].conj()).real, 0.75)  # K / (K + 1)
    within_standard_error(gains.real, 0.0)
    power = np.abs(gains) ** 2
    within_standard_error((power[:, 0] - 1) * (power[:, 1] - 1), 0.0)


@pytest.mark.parametrize("m", [0.5, 3.7])
def test_nakagami_distribution(m):
    gains = np.asarray(draw(NakagamiFading(m), 24, NUM_DISTRIBUTION))
    check_distribution(np.abs(gains), scipy.stats.nakagami(m).cdf)
    check_distribution(np.angle(gains), scipy.stats.uniform(-np.pi, 2 * np.pi).cdf)
    power = np.abs(gains) ** 2
    within_standard_error(power, 1.0)
    within_standard_error((power - 1) ** 2, 1 / m)
    within_standard_error((power[::2] - 1) * (power[1::2] - 1), 0.0)
    within_standard_error((gains[::2] * gains[1::2].conj()).real, 0.0)


def test_shadowing_distribution():
    sigma_db = 4.0
    gains = realisations(ShadowedFading(NoFading(), sigma_db), 25, NUM_DISTRIBUTION, num_blocks=1)
    log_std = LN10_OVER_10 * sigma_db
    check_distribution(np.abs(gains) ** 2, scipy.stats.lognorm(s=log_std, scale=np.exp(-(log_std**2) / 2)).cdf)


@pytest.mark.parametrize(
    ("fading", "fourth_moment"),
    [
        (RayleighFading(), 2.0),
        (RicianFading(1.0), 1.75),  # 1 + (1 + 2 K) / (1 + K)^2
        (JakesFading(0.1, 8), 2.0),
        (GaussMarkovFading(0.9), 2.0),
    ],
)
def test_shadowed_moments(fading, fourth_moment):
    sigma_db = 3.0
    power = np.abs(realisations(ShadowedFading(fading, sigma_db), 26)[:, 0]) ** 2
    within_standard_error(power, 1.0)
    # E g^2 of the product is the product of both, exp(s^2) for the shadowing of log-standard deviation s.
    within_standard_error(power**2, fourth_moment * np.exp((LN10_OVER_10 * sigma_db) ** 2))


def test_shadowing_is_constant_over_an_image():
    power = np.abs(realisations(ShadowedFading(NoFading(), 6.0), 27)) ** 2
    np.testing.assert_array_equal(power, np.broadcast_to(power[:, :1], power.shape))
    assert np.unique(power[:, 0]).size > NUM / 2
    np.testing.assert_array_equal(realisations(ShadowedFading(NoFading(), 0.0), 0), np.ones((NUM, 4)))


@pytree_dataclass
class SteppedGain:
    """A law that is not the library's: it meets the protocol and is a pytree."""

    step: jax.Array

    def sample(self, key, num_blocks):
        return (1 + self.step * jnp.arange(num_blocks)).astype(jnp.complex64)


def test_shadowing_of_a_law_from_elsewhere():
    shadowed = ShadowedFading(SteppedGain(jnp.array([0.5, 1.0])), jnp.array([0.0, 5.0]))
    gains = jax.jit(jax.vmap(lambda f, key: f.sample(key, 3)))(shadowed, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(gains[0], [1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(gains[1] / gains[1, 0], [1.0, 2.0, 3.0], rtol=1e-6)


def test_amplitude_at_zero():
    np.testing.assert_array_equal(safe_sqrt(jnp.array([0.0, 4.0])), [0.0, 2.0])
    np.testing.assert_array_equal(jax.grad(lambda p: safe_sqrt(p).sum())(jnp.array([0.0, 4.0])), [0.0, 0.25])


@pytest.mark.parametrize(
    "law",
    [
        lambda x: NoFading(),
        lambda x: RicianFading(x, 0.3),
        lambda x: RicianFading(1.0, x, random_phase=True),
        lambda x: NakagamiFading(1 + x),
        lambda x: ShadowedFading(RicianFading(x), 2 * x),
    ],
)
def test_vmap_over_the_law_agrees_with_the_loop(law):
    values = np.array([0.0, 0.5, 4.0], np.float32)
    keys = jax.random.split(jax.random.key(3), 3)
    mapped = jax.jit(jax.vmap(lambda fading, key: fading.sample(key, 5)))(law(jnp.asarray(values)), keys)
    again = jax.random.split(jax.random.key(3), 3)
    loop = [sample_one(law(float(value)), key, 5) for value, key in zip(values, again, strict=True)]
    np.testing.assert_allclose(mapped, np.stack(loop), rtol=1e-5, atol=1e-6)


def test_jit_agrees_with_plain_calls():
    fading = RicianFading(3.0, 0.5)
    np.testing.assert_allclose(draw(fading, 2, 5), fading.sample(jax.random.key(2), 5), rtol=1e-5)


@jax.jit
@jax.grad
def gradient_of_a_loss(fading):
    gains = fading.sample(jax.random.key(4), 64)
    return jnp.mean(jnp.abs(gains - 0.5))


@pytest.mark.parametrize(
    "fading",
    [
        RicianFading(0.0, 0.3),
        RicianFading(2.0, 0.3),
        NakagamiFading(0.5),
        NakagamiFading(4.0),
        ShadowedFading(RicianFading(1.0, 0.3), 3.0),
    ],
)
def test_gradients_are_finite_and_nonzero(fading):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient_of_a_loss(fading))]
    assert np.all(np.isfinite(leaves))
    if isinstance(fading, RicianFading) and fading.k_factor == 0:
        leaves = leaves[:1]  # without a line of sight its phase does not matter
    assert np.all(np.asarray(leaves) != 0)


@pytest.mark.parametrize(
    ("law", "value", "mean"),
    [
        (RicianFading, 2.0, lambda k: scipy.stats.rice.mean(np.sqrt(2 * k), scale=np.sqrt(0.5 / (1 + k)))),
        (NakagamiFading, 1.5, scipy.stats.nakagami.mean),
        # E 10^(X / 20) / sqrt(E 10^(X / 10)) = exp(-s^2 / 8)
        (lambda s: ShadowedFading(NoFading(), s), 4.0, lambda s: np.exp(-((LN10_OVER_10 * s) ** 2) / 8)),
    ],
)
def test_gradients_of_the_mean_amplitude(law, value, mean):
    def derivative(key, value):
        return jax.jacfwd(lambda v: jnp.abs(law(v).sample(key, 4)))(value)

    samples = jax.jit(jax.vmap(derivative, (0, None)))(jax.random.split(jax.random.key(6), NUM), value)
    step = 1e-4
    # Shadowing is one draw for four blocks: average them first, so that the samples are independent.
    within_standard_error(samples.mean(axis=1), (mean(value + step) - mean(value - step)) / (2 * step))


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
