"""Tests of the tapped delay lines against the tables and the Clarke model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import j0

from megjax.channel.tdl import TDL, TappedDelayLine
from megjax.channel.tdl_profiles import PROFILES
from tests.channel.draws import realisations
from tests.checks import within_standard_error

pytestmark = pytest.mark.usefixtures("fast_compile")
NUM = 2**13
# From the printed tables: taps, last row's delay and power in dB, first row's Rayleigh power in dB.
TABLE_ENDS = {
    "A": (23, 9.6586, -29.7, -13.4),
    "B": (23, 4.7834, -11.3, 0.0),
    "C": (24, 8.6523, -22.8, -4.4),
    "D": (13, 12.525, -27.7, -13.5),
    "E": (14, 20.6519, -29.2, -22.03),
}


# Snapshots drawn of each profile, and the Doppler in Hz, for an interval of 1 ms.
SNAPSHOTS = {"A": (16, 80.0), "B": (2, 100.0), "C": (2, 30.0), "D": (10, 100.0), "E": (10, 100.0)}
SOME_SLOW = ["A", "D", *(pytest.param(profile, marks=pytest.mark.slow) for profile in "BCE")]


@functools.cache
def taps_of(profile, moving=True):
    """Taps complex64 [NUM snapshots taps]."""
    snapshots, doppler_hz = SNAPSHOTS[profile]
    return realisations(TDL(profile, 1e-7, doppler_hz * moving), 1, NUM, snapshots)


def check_mean(samples, expected):
    within_standard_error(samples, expected, axis=0, rounding=1e-6)


@pytest.mark.parametrize("profile", PROFILES)
def test_tables(profile):
    taps, delay, power_db, first_db = TABLE_ENDS[profile]
    tdl, table = TDL(profile, 2.0), PROFILES[profile]
    assert tdl.delays_s.shape == tdl.powers.shape == (taps,) and table.taps[-1] == (delay, power_db)
    np.testing.assert_allclose(np.asarray(tdl.delays_s)[[0, -1]], [0, 2 * delay], rtol=1e-6)
    np.testing.assert_allclose(tdl.max_delay_s, 2 * delay, rtol=1e-6)
    np.testing.assert_allclose(np.sum(np.asarray(tdl.powers)), 1, rtol=1e-6)
    ratio_db = 10 * np.log10(table.rayleigh_powers[-1] / table.rayleigh_powers[0])
    np.testing.assert_allclose(ratio_db, power_db - first_db, rtol=1e-6)
    # The standard normalises the delays to an RMS spread of 1, before rounding; the powers are rounded to 0.1 dB.
    np.testing.assert_allclose(tdl.rms_delay_spread_s, 2.0, rtol=7e-3)


@pytest.mark.parametrize(("profile", "k_factor_db"), [("D", 13.3), ("E", 22.0)])
def test_k_factor_of_the_tables(profile, k_factor_db):
    table = PROFILES[profile]
    ratio_db = 10 * np.log10(table.line_of_sight_power / table.rayleigh_powers[0])
    np.testing.assert_allclose(ratio_db, k_factor_db, rtol=1e-6)


@pytest.mark.parametrize("profile", SOME_SLOW)
def test_power_delay_profile_and_delay_spread(profile):
    power = np.abs(taps_of(profile)[:, -1]).astype(np.float64) ** 2
    table = PROFILES[profile]
    check_mean(power, table.powers)
    check_mean(power.sum(axis=1), 1.0)
    # Squared distance from the mean delay, weighted by the power drawn: its mean is the squared RMS delay spread.
    squared = np.square(table.delays - table.powers @ table.delays)
    check_mean(power @ squared, table.rms_delay_spread**2)


def test_rayleigh_taps_are_independent_gaussians():
    taps = taps_of("A") / np.sqrt(PROFILES["A"].powers)
    power = np.abs(taps) ** 2
    check_mean(power[:, 2] ** 2, 2.0)
    check_mean((taps[:, 1] ** 2).real, 0.0)
    check_mean((taps[:, 1, :-1] * taps[:, 1, 1:].conj()).real, 0.0)
    check_mean((power[:, 2, :-1] - 1) * (power[:, 2, 1:] - 1), 0.0)


def test_single_snapshot_has_the_same_law():
    taps = realisations(TDL("D", 1e-7), 3, NUM, 1)[:, 0]
    power = np.abs(taps) ** 2
    check_mean(power, PROFILES["D"].powers)
    check_mean((taps[:, 0] ** 2).real, 0.0)
    check_mean(power[:, 1] ** 2, 2 * PROFILES["D"].powers[1] ** 2)


def test_doppler_autocorrelation_is_j0():
    taps = taps_of("A")[..., 1:3] / np.sqrt(PROFILES["A"].powers[1:3])
    expected = np.tile(j0(2 * np.pi * 80.0 * 1e-3 * np.arange(16))[:, None], 2)
    product = taps[:, :1].conj() * taps
    check_mean(product.real, expected)
    check_mean(product.imag, 0.0)
    # Joint moments of independent Gaussian processes, as long as 2 pi doppler tau is within half the paths (7.5 here).
    check_mean(np.abs(product) ** 2, 1 + expected**2)
    check_mean((product[..., 0] * product[..., 1].conj()).real, expected[:, 0] ** 2)


@pytest.mark.slow
def test_autocorrelation_is_j0_over_the_ensemble_beyond_the_paths():
    taps = realisations(TDL("A", 1e-7, 400.0, num_paths=4), 5, NUM, 12)[..., 1] / np.sqrt(PROFILES["A"].powers[1])
    product = taps[:, :1].conj() * taps
    check_mean(product.real, j0(2 * np.pi * 0.4 * np.arange(12)))
    check_mean(product.imag, 0.0)


@pytest.mark.parametrize("profile", ["D", pytest.param("E", marks=pytest.mark.slow)])
def test_line_of_sight(profile):
    first = taps_of(profile)[..., 0]
    table, steps = PROFILES[profile], np.arange(10)
    constant, scattered = table.line_of_sight_power, table.rayleigh_powers[0]
    total, k_factor = constant + scattered, constant / scattered
    expected = constant * np.exp(2j * np.pi * 0.07 * steps) + scattered * j0(2 * np.pi * 0.1 * steps)
    product = first[:, :1].conj() * first
    check_mean(product.real, expected.real)
    check_mean(product.imag, expected.imag)
    check_mean(np.abs(first) ** 4, total**2 * (1 + (2 * k_factor + 1) / (k_factor + 1) ** 2))
    check_mean(first.real, 0.0)  # the phase is uniform
    check_mean((first**2).real, 0.0)


@pytest.mark.parametrize("profile", ["D", pytest.param("A", marks=pytest.mark.slow)])
def test_without_doppler_nothing_moves(profile):
    taps = taps_of(profile, moving=False)[:9]
    assert taps.dtype == jnp.complex64 and taps.shape == (9, SNAPSHOTS[profile][0], len(PROFILES[profile].taps))
    np.testing.assert_array_equal(taps, np.broadcast_to(taps[:, :1], taps.shape))
    assert len(np.unique(taps[0, 0])) == taps.shape[2]


@pytest.mark.slow
def test_gradients_against_finite_differences():
    tdl = TDL("D", 1e-7, 50.0, 1e-3)

    @jax.jit
    @jax.value_and_grad
    def objective(tdl):
        taps = tdl.sample(jax.random.key(9), 6)
        return jnp.sum(taps.real[-1] ** 2) + jnp.sum(1e7 * tdl.delays_s) + tdl.rms_delay_spread_s * 1e7

    gradient = objective(tdl)[1]
    for name, step in (("delay_spread_s", 1e-8), ("doppler_hz", 0.5), ("interval_s", 1e-5)):
        ends = [objective(dataclasses.replace(tdl, **{name: getattr(tdl, name) + d}))[0] for d in (step, -step)]
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
