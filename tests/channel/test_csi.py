"""Tests of pilot-based estimation, feedback delay and the receiver that knows its estimation error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from megjax.channel.csi import (
    ChannelKnowledge,
    ImperfectCSI,
    delayed_gains,
    effective_noise_var,
    estimate_gains,
    estimation_error_var,
    outdated_gains,
)
from megjax.channel.fading import GaussMarkovFading, JakesFading, NoFading, RayleighFading, RicianFading, ShadowedFading
from megjax.channel.mimo import MIMOFading
from megjax.channel.random import complex_normal
from megjax.channel.transmission import equalize_lmmse, post_equalisation_snr, transmit
from tests.channel.draws import normal_symbols
from tests.checks import NUM_DISTRIBUTION, STANDARD_ERRORS, check_distribution, within_standard_error

pytestmark = pytest.mark.usefixtures("fast_compile")
NUM = 2**14
ESTIMATE, OUTDATE = jax.jit(estimate_gains), jax.jit(outdated_gains)


@functools.partial(jax.jit, static_argnums=(3, 5))
def observe_many(csi, key, fading, num_blocks, noise_var, num):
    return jax.vmap(lambda key: csi.sample(key, fading, num_blocks, noise_var))(jax.random.split(key, num))


def observations(csi, fading, num_blocks, noise_var, seed=0, num=NUM):
    return jax.tree.map(np.asarray, observe_many(csi, jax.random.key(seed), fading, num_blocks, noise_var, num))


@functools.partial(jax.jit, static_argnums=3)
def observe(csi, key, fading, num_blocks, noise_var):
    return csi.sample(key, fading, num_blocks, noise_var)


@functools.partial(jax.jit, static_argnums=1)
def gaussian(seed, num):
    return complex_normal(jax.random.key(seed), (num,))


def test_hand_computed_error_variance():
    np.testing.assert_allclose(estimation_error_var(2.0, 3, 0.5), 1 / 13, rtol=1e-6)
    np.testing.assert_allclose(estimation_error_var(1.0, np.array([0, 1, 4]), 1.0), [1, 0.5, 0.2], rtol=1e-6)
    assert estimation_error_var(1.0, 2, 1.0).dtype == jnp.float32
    noise_var = effective_noise_var(0.4, jnp.array([0.5, 2.0]), jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(noise_var, [0.45, 0.8], rtol=1e-6)


@pytest.mark.parametrize(("pilot_power", "num_pilots", "noise_var"), [(1.0, 1, 1.0), (2.0, 4, 0.3), (0.2, 1, 3.0)])
def test_estimation_error_is_independent_of_the_estimate(pilot_power, num_pilots, noise_var):
    gains = gaussian(1, NUM_DISTRIBUTION)
    estimates = ESTIMATE(jax.random.key(2), gains, pilot_power, num_pilots, noise_var)
    assert estimates.shape == gains.shape and estimates.dtype == jnp.complex64
    error_var = float(estimation_error_var(pilot_power, num_pilots, noise_var))
    estimates = np.asarray(estimates)
    error = np.asarray(gains) - estimates
    within_standard_error(np.abs(error) ** 2, error_var)
    within_standard_error(np.abs(estimates) ** 2, 1 - error_var)
    within_standard_error((error * estimates.conj()).real, 0.0)
    within_standard_error((error * estimates.conj()).imag, 0.0)
    within_standard_error((error * estimates).real, 0.0)
    within_standard_error((np.abs(error) ** 2 - error_var) * np.abs(estimates) ** 2, 0.0)
    for samples, power in ((estimates, 1 - error_var), (error, error_var)):
        check_distribution(np.abs(samples), scipy.stats.rayleigh(scale=np.sqrt(power / 2)).cdf)


@pytest.mark.parametrize("num_pilots", [1, 3])
def test_estimates_are_those_of_simulated_pilots(num_pilots):
    # Draw the pilots one by one and regress on their mean: same error variance as the closed form.
    gains = normal_symbols(3, (NUM,))
    noise = np.sqrt(0.4) * normal_symbols(16, (num_pilots, NUM))
    matched = np.mean(np.sqrt(0.8) * gains + noise, axis=0)
    weight = np.vdot(matched, gains) / np.vdot(matched, matched)
    within_standard_error(np.abs(gains - weight * matched) ** 2, float(estimation_error_var(0.8, num_pilots, 0.4)))


@pytest.mark.parametrize("fading", [NoFading(), pytest.param(RicianFading(3.0, 1.0), marks=pytest.mark.slow)])
def test_error_variance_of_other_laws(fading):
    known = observations(ImperfectCSI(1.0, 2), fading, 2, 0.5, seed=4)
    error = np.abs(known.gains - known.receiver) ** 2
    within_standard_error(error.mean(axis=1), 0.2)  # 1 / (1 + 2 / 0.5)
    np.testing.assert_allclose(known.error_var, np.full((NUM, 2), 0.2), rtol=1e-6)


def test_no_pilots_and_very_good_pilots():
    gains = gaussian(5, NUM_DISTRIBUTION)
    np.testing.assert_array_equal(ESTIMATE(jax.random.key(6), gains, 1.0, 0, 1.0), np.zeros(gains.shape))
    np.testing.assert_allclose(ESTIMATE(jax.random.key(6), gains, 1e12, 4, 1.0), gains, atol=1e-5)


def test_delayed_gains():
    gains = jnp.asarray(np.arange(5, dtype=np.complex64))
    current, old = delayed_gains(gains, 2)
    np.testing.assert_array_equal(current, [2, 3, 4])
    np.testing.assert_array_equal(old, [0, 1, 2])
    current, old = delayed_gains(gains, 0)
    np.testing.assert_array_equal(current, old)


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.9])
def test_outdated_gains(correlation):
    gains = gaussian(7, NUM_DISTRIBUTION)
    old = np.asarray(OUTDATE(jax.random.key(8), gains, correlation))
    gains = np.asarray(gains)
    within_standard_error(np.abs(old) ** 2, 1.0)
    within_standard_error((old * gains.conj()).real, correlation)
    within_standard_error((old * gains.conj()).imag, 0.0)
    within_standard_error(np.abs(gains - correlation * old) ** 2, 1 - correlation**2)
    within_standard_error(np.abs(gains) ** 2 * np.abs(old) ** 2, 1 + correlation**2)


def test_transmitter_sees_the_estimates_of_earlier_blocks():
    known = observe(ImperfectCSI(2.0, 4, delay_blocks=2), jax.random.key(9), GaussMarkovFading(0.9), 6, 0.1)
    assert isinstance(known, ChannelKnowledge)
    for field, dtype in zip(known, 3 * [jnp.complex64] + [jnp.float32], strict=True):
        assert field.shape == (6,) and field.dtype == dtype
    np.testing.assert_array_equal(known.transmitter[2:], known.receiver[:-2])
    # With as much history the gains and the receiver are the same for a transmitter that learns without delay.
    at_once = observe(ImperfectCSI(2.0, 4, history=2), jax.random.key(9), GaussMarkovFading(0.9), 6, 0.1)
    np.testing.assert_array_equal(at_once.transmitter, at_once.receiver)
    np.testing.assert_array_equal(at_once.gains, known.gains)
    np.testing.assert_array_equal(at_once.receiver, known.receiver)


@pytest.mark.slow
@pytest.mark.parametrize("fading", [JakesFading(0.06), GaussMarkovFading(0.8)])
def test_correlation_of_delayed_knowledge(fading):
    delay = 3
    known = observations(ImperfectCSI(1.0, 1, delay), fading, 4, 0.25, seed=10)
    expected = scipy.special.j0(2 * np.pi * 0.06 * delay) if isinstance(fading, JakesFading) else 0.8**delay
    # The estimate is 0.8 (h + noise), 0.8 = 4 / (1 + 4); the first block's knowledge is as old as the others'.
    for block in (0, 3):
        within_standard_error((known.transmitter[:, block] * known.gains[:, block].conj()).real, 0.8 * expected)


@pytest.mark.slow
def test_receiver_with_the_effective_noise():
    csi, noise_var, power = ImperfectCSI(1.0, 2, delay_blocks=1), 0.4, jnp.array([0.5, 2.0])

    def link(key):
        csi_key, symbol_key, noise_key = jax.random.split(key, 3)
        known = csi.sample(csi_key, RayleighFading(), 2, noise_var)
        symbols = complex_normal(symbol_key, (2, 4))
        received = transmit(noise_key, symbols, known.gains, power, noise_var)
        noise = effective_noise_var(noise_var, power, known.error_var)
        estimate = equalize_lmmse(received, known.receiver, power, noise)
        predicted = 1 / (1 + post_equalisation_snr(known.receiver, power, noise))
        error = estimate - symbols
        mistaken = equalize_lmmse(received, known.receiver, power, noise_var) - symbols
        square = jnp.mean(jnp.abs(error) ** 2, axis=1)
        return square, predicted, square - jnp.mean(jnp.abs(mistaken) ** 2, axis=1)

    square, predicted, advantage = jax.jit(jax.vmap(link))(jax.random.split(jax.random.key(12), NUM))
    for block in range(2):
        within_standard_error(np.asarray(square - predicted)[:, block], 0.0)
        # Taking the estimate for the truth costs.
        gap = np.asarray(advantage, np.float64)[:, block]
        assert gap.mean() < -STANDARD_ERRORS * gap.std() / np.sqrt(NUM)


@pytest.mark.slow
def test_vmap_over_the_model_agrees_with_the_loop():
    pilot_powers, counts, noise_vars = np.array([0.0, 0.5, 3.0]), np.array([1, 0, 4]), np.array([0.1, 1.0, 2.0])

    def sample(csi, key, noise_var):
        return csi.sample(key, GaussMarkovFading(0.9), 5, noise_var)

    stacked = ImperfectCSI(jnp.asarray(pilot_powers, jnp.float32), jnp.asarray(counts), 2)
    assert ImperfectCSI(jnp.ones(3), 2).num_pilots.shape == (3,)  # a scalar beside an array gets its axis
    keys = jax.random.split(jax.random.key(13), 3)
    mapped = jax.jit(jax.vmap(sample))(stacked, keys, jnp.asarray(noise_vars, jnp.float32))
    again = jax.random.split(jax.random.key(13), 3)
    for i in range(3):
        single = observe(
            ImperfectCSI(pilot_powers[i], counts[i], 2), again[i], GaussMarkovFading(0.9), 5, noise_vars[i]
        )
        for left, right in zip(mapped, single, strict=True):
            np.testing.assert_allclose(left[i], right, atol=1e-6)


@pytest.mark.slow
def test_gradients_are_finite_and_nonzero():
    def loss(pilot_power, noise_var, rho, correlation):
        known_key, old_key = jax.random.split(jax.random.key(14))
        known = ImperfectCSI(pilot_power, 2, 1).sample(known_key, GaussMarkovFading(rho), 6, noise_var)
        old = outdated_gains(old_key, known.gains, correlation)
        return jnp.sum(jnp.abs(known.receiver - known.transmitter) ** 2 + known.error_var + jnp.abs(old - 1) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    for arguments in ((1.0, 0.5, 0.8, 0.9), (0.0, 0.5, 1.0, 1.0)):
        assert np.all(np.isfinite(gradient(*arguments)))
    assert np.all(np.asarray(gradient(1.0, 0.5, 0.8, 0.9)) != 0)


def test_bad_arguments():
    gains, key = jnp.ones(3, jnp.complex64), jax.random.key(0)
    with pytest.raises(ValueError, match="pilot_power is -1.0"):
        ImperfectCSI(-1.0, 2)
    for bad in (-1, 1.5, np.nan):
        with pytest.raises(ValueError, match="num_pilots is .*whole number"):
            ImperfectCSI(1.0, bad)
        with pytest.raises(ValueError, match="num_pilots is .*whole number"):
            estimation_error_var(1.0, bad, 1.0)
    for bad in (-1, True):
        with pytest.raises(ValueError, match="delay_blocks is .*at least 0"):
            ImperfectCSI(1.0, 2, bad)
        with pytest.raises(ValueError, match="history is .*at least 0"):
            ImperfectCSI(1.0, 2, 1, bad)
    for bad in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="noise_var is .*more than 0"):
            estimate_gains(key, gains, 1.0, 1, bad)
    with pytest.raises(ValueError, match="noise_var is 0.0"):
        jax.eval_shape(lambda key: ImperfectCSI(1.0, 2).sample(key, RayleighFading(), 2, 0.0), key)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        ImperfectCSI(1.0, 2, 1).sample(jax.random.key(1), RayleighFading(), 0, 1.0)
    with pytest.raises(ValueError, match="pilot_power has shape"):
        estimate_gains(key, gains, np.ones(3), 1, 1.0)
    for bad in (3, -1):
        with pytest.raises(ValueError, match=f"delay_blocks is {bad}"):
            delayed_gains(gains, bad)
    for bad in (1.1, np.nan):
        with pytest.raises(ValueError, match="correlation is .*from -1 to 1"):
            outdated_gains(key, gains, bad)


@pytest.mark.parametrize("wrap", [lambda law: law, lambda law: ShadowedFading(law, 3.0)])
def test_laws_of_another_mean_gain_are_refused(wrap):
    csi = ImperfectCSI(1.0, 1)
    with pytest.raises(ValueError, match=r"fading is .*MIMOFading.* with E\|h\|\^2 = 2; estimates are made for"):
        csi.sample(jax.random.key(0), wrap(MIMOFading(1, 2)), 4, 0.5)
    known = jax.eval_shape(
        lambda key: csi.sample(key, wrap(MIMOFading(1, 2, normalize=True)), 4, 0.5), jax.random.key(0)
    )
    assert known.gains.shape == (4,)
