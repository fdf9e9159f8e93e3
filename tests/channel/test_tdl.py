"""Tests of the tapped delay lines against the tables and the Clarke model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import j0

from megjax.channel.tdl import TDL, TappedDelayLine
from megjax.channel.tdl_profiles import PROFILES

FOUR_SIGMA = 4.0
# From the printed tables: taps, last row's delay and power in dB, first row's Rayleigh power in dB.
TABLE_ENDS = {
    "A": (23, 9.6586, -29.7, -13.4),
    "B": (23, 4.7834, -11.3, 0.0),
    "C": (24, 8.6523, -22.8, -4.4),
    "D": (13, 12.525, -27.7, -13.5),
    "E": (14, 20.6519, -29.2, -22.03),
}


def within_standard_error(samples, expected):
    """The mean over the first axis of real `samples`."""
    samples = np.asarray(samples, np.float64)
    error = np.abs(samples.mean(axis=0) - expected)
    limit = FOUR_SIGMA * samples.std(axis=0, ddof=1) / np.sqrt(samples.shape[0])
    assert np.all(error <= limit + 1e-6), np.max(error / (limit + 1e-6))


def draw(tdl, n, num, seed, taps=slice(None)):
    keys = jax.random.split(jax.random.key(seed), num)
    return np.asarray(jax.jit(jax.vmap(lambda tdl, key: tdl.sample(key, n)[:, taps], in_axes=(None, 0)))(tdl, keys))


@pytest.mark.parametrize("profile", PROFILES)
def test_tables(profile):
    taps, delay, power_db, first_db = TABLE_ENDS[profile]
    tdl, table = TDL(profile, 2.0), PROFILES[profile]
    assert tdl.delays_s.shape == tdl.powers.shape == (taps,) and table.taps[-1] == (delay, power_db)
    np.testing.assert_allclose(tdl.delays_s[jnp.array([0, -1])], [0, 2 * delay], rtol=1e-6)
    np.testing.assert_allclose(tdl.max_delay_s, 2 * delay, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(tdl.powers), 1, rtol=1e-6)
    ratio_db = 10 * np.log10(table.rayleigh_powers[-1] / table.rayleigh_powers[0])
    np.testing.assert_allclose(ratio_db, power_db - first_db, rtol=1e-6)
    # The standard normalises the delays to an RMS spread of 1, before rounding; the powers are rounded to 0.1 dB.
    np.testing.assert_allclose(tdl.rms_delay_spread_s, 2.0, rtol=7e-3)


@pytest.mark.parametrize(("profile", "k_factor_db"), [("D", 13.3), ("E", 22.0)])
def test_k_factor_of_the_tables(profile, k_factor_db):
    table = PROFILES[profile]
    ratio_db = 10 * np.log10(table.line_of_sight_power / table.rayleigh_powers[0])
    np.testing.assert_allclose(ratio_db, k_factor_db, rtol=1e-6)


@pytest.mark.parametrize("profile", PROFILES)
def test_power_delay_profile_and_delay_spread(profile):
    tdl = TDL(profile, 1.0, doppler_hz=30.0)
    power = np.abs(draw(tdl, 2, 100_000, 1)[:, 1]).astype(np.float64) ** 2
    table = PROFILES[profile]
    within_standard_error(power, table.powers)
    within_standard_error(power.sum(axis=1), 1.0)
    # Squared distance from the mean delay, weighted by the power drawn: its mean is the squared RMS delay spread.
    squared = np.square(table.delays - table.powers @ table.delays)
    within_standard_error(power @ squared, table.rms_delay_spread**2)


def test_rayleigh_taps_are_independent_gaussians():
    tdl = TDL("B", 1e-7, doppler_hz=100.0)
    taps = draw(tdl, 3, 50_000, 2) / np.sqrt(PROFILES["B"].powers)
    power = np.abs(taps) ** 2
    within_standard_error(power[:, 2] ** 2, 2.0)
    within_standard_error((taps[:, 1] ** 2).real, 0.0)
    within_standard_error((taps[:, 1, :-1] * taps[:, 1, 1:].conj()).real, 0.0)
    within_standard_error((power[:, 2, :-1] - 1) * (power[:, 2, 1:] - 1), 0.0)


def test_single_snapshot_has_the_same_law():
    taps = draw(TDL("D", 1e-7), 1, 100_000, 3)[:, 0]
    power = np.abs(taps) ** 2
    within_standard_error(power, PROFILES["D"].powers)
    within_standard_error((taps[:, 0] ** 2).real, 0.0)
    within_standard_error(power[:, 1] ** 2, 2 * PROFILES["D"].powers[1] ** 2)


def test_doppler_autocorrelation_is_j0():
    doppler_hz, interval_s = 80.0, 1e-3
    taps = draw(TDL("A", 1e-7, doppler_hz, interval_s), 16, 100_000, 4, slice(1, 3))
    taps = taps / np.sqrt(PROFILES["A"].powers[1:3])
    expected = np.tile(j0(2 * np.pi * doppler_hz * interval_s * np.arange(16))[:, None], 2)
    product = taps[:, :1].conj() * taps
    within_standard_error(product.real, expected)
    within_standard_error(product.imag, 0.0)
    # Joint moments of independent Gaussian processes, as long as 2 pi doppler tau is within half the paths (7.5 here).
    within_standard_error(np.abs(product) ** 2, 1 + expected**2)
    within_standard_error((product[..., 0] * product[..., 1].conj()).real, expected[:, 0] ** 2)


def test_autocorrelation_is_j0_over_the_ensemble_beyond_the_paths():
    product = draw(TDL("A", 1e-7, 400.0, num_paths=4), 12, 100_000, 5, slice(1, 2))[..., 0] / np.sqrt(
        PROFILES["A"].powers[1]
    )
    product = product[:, :1].conj() * product
    within_standard_error(product.real, j0(2 * np.pi * 0.4 * np.arange(12)))
    within_standard_error(product.imag, 0.0)


@pytest.mark.parametrize("profile", ["D", "E"])
def test_line_of_sight(profile):
    first = draw(TDL(profile, 1e-7, 100.0), 10, 100_000, 10, slice(1))[..., 0]
    table, steps = PROFILES[profile], np.arange(10)
    constant, scattered = table.line_of_sight_power, table.rayleigh_powers[0]
    total, k_factor = constant + scattered, constant / scattered
    expected = constant * np.exp(2j * np.pi * 0.07 * steps) + scattered * j0(2 * np.pi * 0.1 * steps)
    product = first[:, :1].conj() * first
    within_standard_error(product.real, expected.real)
    within_standard_error(product.imag, expected.imag)
    within_standard_error(np.abs(first) ** 4, total**2 * (1 + (2 * k_factor + 1) / (k_factor + 1) ** 2))
    within_standard_error(first.real, 0.0)  # the phase is uniform
    within_standard_error((first**2).real, 0.0)


@pytest.mark.parametrize("profile", ["A", "E"])
def test_without_doppler_nothing_moves(profile):
    taps = draw(TDL(profile, 1e-7), 5, 1, 7)[0]
    assert taps.dtype == jnp.complex64 and taps.shape == (5, len(PROFILES[profile].taps))
    np.testing.assert_array_equal(taps, np.tile(taps[:1], (5, 1)))
    assert len(np.unique(taps[0])) == taps.shape[1]


def test_jit_and_vmap_over_keys_and_leaves_agree_with_the_loop():
    spreads, dopplers = jnp.array([1e-8, 1e-7, 1e-6]), jnp.array([0.0, 10.0, 300.0])
    keys = jax.random.split(jax.random.key(8), 3)

    @jax.jit
    def taps_and_delays(tdl, key):
        return tdl.sample(key, 4), tdl.delays_s

    mapped = jax.vmap(taps_and_delays)(TDL("E", spreads, dopplers, jnp.full(3, 1e-3)), keys)
    for i, key in enumerate(jax.random.split(jax.random.key(8), 3)):
        taps, delays = taps_and_delays(TDL("E", float(spreads[i]), float(dopplers[i])), key)
        np.testing.assert_allclose(mapped[0][i], taps, atol=2e-6)
        np.testing.assert_allclose(mapped[1][i], delays, rtol=1e-6)


def test_gradients_against_finite_differences():
    tdl = TDL("D", 1e-7, 50.0, 1e-3)

    @jax.jit
    def objective(tdl):
        taps = tdl.sample(jax.random.key(9), 6)
        return jnp.sum(taps.real[-1] ** 2) + jnp.sum(1e7 * tdl.delays_s) + tdl.rms_delay_spread_s * 1e7

    gradient = jax.grad(objective)(tdl)
    for name, step in (("delay_spread_s", 1e-8), ("doppler_hz", 0.5), ("interval_s", 1e-5)):
        ends = [objective(dataclasses.replace(tdl, **{name: getattr(tdl, name) + d})) for d in (step, -step)]
        np.testing.assert_allclose(getattr(gradient, name), (ends[0] - ends[1]) / (2 * step), rtol=2e-2)
        assert getattr(gradient, name) != 0


def test_protocol_and_bad_arguments():
    assert isinstance(TDL("A", 1e-7), TappedDelayLine)
    with pytest.raises(ValueError, match="profile is 'F'.*A, B, C, D, E"):
        TDL("F", 1e-7)
    for name, value in (("delay_spread_s", -1e-9), ("doppler_hz", -1.0), ("interval_s", 0.0), ("doppler_hz", np.nan)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            TDL(**{"profile": "A", "delay_spread_s": 1e-7, name: value})
    for num_paths in (0, 7, -2):
        with pytest.raises(ValueError, match=f"num_paths is {num_paths}"):
            TDL("A", 1e-7, num_paths=num_paths)
    with pytest.raises(ValueError, match="n is 0"):
        TDL("A", 1e-7).sample(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="doppler_hz has shape.*vmap"):
        TDL("A", 1e-7, jnp.ones(2)).sample(jax.random.key(0), 2)
