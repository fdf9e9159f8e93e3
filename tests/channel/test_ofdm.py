"""Tests of OFDM: gains against closed forms, and the time-domain link against the per-subcarrier one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Complex, Float
from scipy.special import j0

from megjax.channel.ofdm import OFDM
from megjax.channel.parameters import channel_model
from megjax.channel.tdl import TDL, TappedDelayLine
from megjax.channel.tdl_profiles import PROFILES
from tests.channel.draws import draw, normal_symbols, realisations
from tests.checks import within_standard_error

ROUNDING = 1e-6
SPACING_HZ = 15e3
pytestmark = pytest.mark.usefixtures("fast_compile")
SAMPLE_S = 1 / (64 * SPACING_HZ)


@channel_model
class TwoTaps:
    """Taps of 0.8 and 0.6j at 1 and `second` samples of 64 subcarriers of 15 kHz; not random."""

    second: float

    @property
    def delays_s(self) -> Float[Array, " l"]:
        return jnp.array([1.0, self.second]) * SAMPLE_S

    @property
    def max_delay_s(self) -> float:
        return max(1.0, self.second) * SAMPLE_S

    def sample(self, key, n: int) -> Complex[Array, "t l"]:
        return jnp.tile(jnp.array([[0.8, 0.6j]], jnp.complex64), (n, 1))


def make(tdl, **changes):
    sizes = {"num_subcarriers": 64, "subcarrier_spacing_hz": SPACING_HZ, "cyclic_prefix": 16} | changes
    return OFDM(tdl, **sizes)


@jax.jit
def both_routes(ofdm, taps, grid):
    """Impulse response, gains from it, gains from the taps, and what is received through the time domain."""
    impulse_response = ofdm.impulse_response(taps)
    received = ofdm.demodulate(ofdm.convolve(ofdm.modulate(grid), impulse_response))
    return impulse_response, ofdm.sampled_frequency_response(impulse_response), ofdm.frequency_response(taps), received


def test_hand_computed_gains():
    ofdm = make(TwoTaps(3.0), resource_block_size=16)
    frequency = np.arange(-32, 32)

    def response(frequency):  # in units of the spacing; a sample is 1 / 64 of its inverse
        return 0.8 * np.exp(-2j * np.pi * frequency / 64) + 0.6j * np.exp(-2j * np.pi * 3 * frequency / 64)

    gains = jax.jit(lambda ofdm: ofdm.frequency_response(ofdm.tdl.sample(jax.random.key(0), 2)))(ofdm)
    assert gains.shape == (2, 64) and gains.dtype == jnp.complex64
    np.testing.assert_allclose(gains, np.tile(response(frequency), (2, 1)), atol=1e-6)
    # Four blocks of 16 subcarriers with centres -24.5, -8.5, 7.5, 23.5, then the first of the next slot.
    blocks = draw(ofdm, 0, 5)
    assert blocks.shape == (5,) and blocks.dtype == jnp.complex64
    np.testing.assert_allclose(blocks, response(np.array([-24.5, -8.5, 7.5, 23.5, -24.5])), atol=1e-6)
    odd = make(TwoTaps(3.0), resource_block_size=63)
    np.testing.assert_allclose(draw(odd, 0, 1), [response(-1.0)], atol=1e-6)
    np.testing.assert_allclose(ofdm.sample_rate_hz, 960e3)
    np.testing.assert_allclose(ofdm.symbol_duration_s, 80 / 960e3, rtol=1e-6)


@pytest.mark.parametrize("profile", ["D", pytest.param("A", marks=pytest.mark.slow)])
def test_resource_blocks_have_unit_power_and_the_spectrum_of_the_profile(profile):
    ofdm = make(TDL(profile, 1e-6, 20.0, 5e-3))
    assert ofdm.blocks_per_slot == 5
    gains = realisations(ofdm, 1, 2**14, 12)
    within_standard_error(np.abs(gains) ** 2, 1.0, axis=0, rounding=ROUNDING)
    # E[H(f + d) H*(f)] is the Fourier transform of the power-delay profile, here for d of 0 to 4 blocks of 12.
    shift_hz = 12 * SPACING_HZ * np.arange(5)
    correlation = np.exp(-2j * np.pi * 1e-6 * np.outer(shift_hz, PROFILES[profile].delays)) @ PROFILES[profile].powers
    product = gains[:, :5] * gains[:, :1].conj()
    within_standard_error(product.real, correlation.real, axis=0, rounding=ROUNDING)
    within_standard_error(product.imag, correlation.imag, axis=0, rounding=ROUNDING)
    # The same block one and two slots of 5 ms later.
    table, slots = PROFILES[profile], np.arange(3)
    expected = j0(2 * np.pi * 0.1 * slots) * table.rayleigh_powers.sum()
    expected = expected + table.line_of_sight_power * np.exp(2j * np.pi * 0.07 * slots)
    product = gains[:, ::5] * gains[:, :1].conj()
    within_standard_error(product.real, expected.real, axis=0, rounding=ROUNDING)
    within_standard_error(product.imag, expected.imag, axis=0, rounding=ROUNDING)


@pytest.mark.slow
def test_subcarriers_have_unit_power():
    ofdm = make(TDL("C", 1e-6))

    @jax.jit
    def compute(ofdm):
        def every(key):
            return ofdm.frequency_response(ofdm.tdl.sample(key, 1))[0]

        key = jax.random.key(3)
        one = dataclasses.replace(ofdm, resource_block_size=1).sample(jax.random.clone(key), 2)
        return jax.vmap(every)(jax.random.split(jax.random.key(2), 2**12)), every(key), one

    gains, every, one = compute(ofdm)
    within_standard_error(np.abs(gains) ** 2, 1.0, axis=0)
    np.testing.assert_allclose(one, every[:2], atol=1e-5)  # a block of one subcarrier is that subcarrier


def test_modulation_is_unitary_and_inverts():
    ofdm = make(TwoTaps(3.0), num_subcarriers=60, cyclic_prefix=7)
    grid = normal_symbols(4, (3, 60))

    @jax.jit
    def compute(grid):
        samples = ofdm.modulate(grid)
        identity = jnp.zeros((1, 8), jnp.complex64).at[0, ofdm.num_precursors].set(1.0)
        constant = make(TwoTaps(1.0), advance=0).demodulate(jnp.ones(80, jnp.complex64))
        return samples, ofdm.convolve(samples, identity), ofdm.demodulate(samples), constant

    samples, convolved, back, constant = map(np.asarray, compute(grid))
    assert samples.shape == (3 * 67,) and samples.dtype == np.complex64
    frames = samples.reshape(3, 67)
    np.testing.assert_array_equal(frames[:, :7], frames[:, -7:])
    np.testing.assert_allclose(np.sum(np.abs(frames[:, 7:]) ** 2), np.sum(np.abs(grid) ** 2), rtol=1e-5)
    np.testing.assert_allclose(convolved, samples, atol=1e-6)
    np.testing.assert_allclose(constant[0, 32], 8.0)
    np.testing.assert_allclose(back, grid, atol=2e-6)


@pytest.mark.parametrize(
    ("second", "advance"),
    [(3.0, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3.0, 0), (12.0, 4), (16.0, 0)))],
)
def test_convolution_equals_the_gains_for_delays_on_the_grid(second, advance):
    ofdm = make(TwoTaps(second), advance=advance)
    taps, grid = np.complex64([[0.8, 0.6j]]) * normal_symbols(5, (3, 1)), normal_symbols(6, (3, 64))
    impulse_response, sampled, gains, received = both_routes(ofdm, taps, grid)
    assert impulse_response.shape == (3, 17)
    np.testing.assert_allclose(impulse_response[:, advance + 1], taps[:, 0], atol=1e-5)
    np.testing.assert_allclose(sampled, gains, atol=1e-5)
    np.testing.assert_allclose(received, gains * grid, atol=3e-5)


def test_convolution_equals_the_sampled_response_and_numpy():
    ofdm = make(TDL("A", 5e-7, 100.0, 1e-3))
    grid = normal_symbols(8, (4, 64))

    @jax.jit
    def compute(ofdm, grid):
        impulse_response, sampled, _, received = both_routes(ofdm, ofdm.tdl.sample(jax.random.key(7), 4), grid)
        samples = ofdm.modulate(grid)
        repeated = jnp.repeat(impulse_response, ofdm.samples_per_symbol, axis=0)
        one_row = ofdm.convolve(samples, impulse_response[:1])
        return impulse_response, sampled, received, samples, one_row, ofdm.demodulate(ofdm.convolve(samples, repeated))

    impulse_response, sampled, received, samples, one_row, repeated = map(np.asarray, compute(ofdm, grid))
    np.testing.assert_allclose(received, sampled * grid, atol=3e-5)
    # One row: an ordinary linear convolution, shifted by the two precursors.
    expected = np.convolve(samples, impulse_response[0])[2 : 2 + samples.size]
    np.testing.assert_allclose(one_row, expected, atol=1e-5)
    np.testing.assert_allclose(repeated, received, atol=1e-5)


@pytest.mark.slow
def test_truncated_pulses_lose_less_than_the_bound_and_less_with_more_lags():
    @jax.jit
    def responses(ofdm, taps):
        impulse_response = ofdm.impulse_response(taps)
        return impulse_response, ofdm.sampled_frequency_response(impulse_response), ofdm.frequency_response(taps)

    losses = []
    for prefix, advance in ((8, 2), (16, 6), (63, 30)):
        ofdm = make(TwoTaps(2.5), cyclic_prefix=prefix, advance=advance)
        impulse_response, sampled, gains = map(np.asarray, responses(ofdm, np.complex64([[0, 1]])))
        error = np.abs(sampled - gains) ** 2
        # The subcarrier on the edge of the band stays at the mean of both edges, which is 0 for half a sample. By
        # Parseval the others lose the energy of the missing lags, and through their aliasing at most as much again.
        np.testing.assert_allclose(error[0, 0], 1.0, atol=0.05)
        loss = np.mean(error[0, 1:])
        bound = (1 / (advance + 2.5) + 1 / (prefix - advance - 2.5)) / np.pi**2
        missing = 1 - np.sum(np.abs(impulse_response) ** 2)
        assert 0 < missing < bound and loss < 2 * bound
        losses.append(loss)
    assert np.all(np.diff(losses) < 0) and losses[-1] < 0.3 * losses[0]


@pytest.mark.slow
def test_doppler_within_a_symbol_mixes_the_subcarriers():
    # One subcarrier is sent; what reaches the others is, for the Clarke spectrum, 1 - (useful power) with
    # useful power = E|mean_i h_i|^2 = (N + 2 sum_i (N - i) J0(2 pi f_D i / rate)) / N^2 (M. Russell and G. Stueber,
    # "Interchannel interference analysis of OFDM in a mobile environment", VTC 1995).
    turns = 0.2 / 64  # a Doppler of a fifth of the spacing
    ofdm = make(TDL("A", 0.0, turns / SAMPLE_S, SAMPLE_S), cyclic_prefix=4)
    grid = jnp.zeros((1, 64), jnp.complex64).at[0, 40].set(1.0)

    def received_power(key):
        taps = ofdm.tdl.sample(key, ofdm.samples_per_symbol)
        received = ofdm.demodulate(ofdm.convolve(ofdm.modulate(grid), ofdm.impulse_response(taps)))
        return jnp.square(jnp.abs(received[0]))

    powers = np.asarray(jax.jit(jax.vmap(received_power))(jax.random.split(jax.random.key(9), 2**10)))
    steps = np.arange(1, 64)
    useful = (64 + 2 * np.sum((64 - steps) * j0(2 * np.pi * turns * steps))) / 64**2
    within_standard_error(powers[:, 40], useful)
    within_standard_error(powers.sum(axis=1) - powers[:, 40], 1 - useful)
    assert 0.05 < 1 - useful < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("route", ["sample", "convolve"])
def test_gradients_against_finite_differences(route):
    ofdm = make(TDL("A", 8.3e-7, 50.0, 1e-3))
    grid = jnp.asarray(normal_symbols(12, (2, 64)))

    @jax.jit
    @jax.value_and_grad
    def objective(ofdm):
        if route == "sample":
            return jnp.sum(jnp.square(ofdm.sample(jax.random.key(13), 9).real))
        taps = ofdm.tdl.sample(jax.random.key(13), 2)
        received = ofdm.demodulate(ofdm.convolve(ofdm.modulate(grid), ofdm.impulse_response(taps)))
        return jnp.mean(jnp.square(jnp.abs(received - grid)))

    gradient = objective(ofdm)[1].tdl
    for name, step in (("delay_spread_s", 4e-9), ("doppler_hz", 0.5)):
        moved = [dataclasses.replace(ofdm.tdl, **{name: getattr(ofdm.tdl, name) + d}) for d in (step, -step)]
        ends = [objective(dataclasses.replace(ofdm, tdl=tdl))[0] for tdl in moved]
        assert getattr(gradient, name) != 0
        np.testing.assert_allclose(getattr(gradient, name), (ends[0] - ends[1]) / (2 * step), rtol=3e-2)


def test_protocol_and_bad_arguments():
    tdl = TDL("A", 1e-7)

    def zeros(shape):
        return jnp.zeros(shape, jnp.complex64)

    assert isinstance(TwoTaps(2.0), TappedDelayLine)
    for changes, message in (
        ({"num_subcarriers": 0}, "num_subcarriers is 0"),
        ({"cyclic_prefix": -1}, "cyclic_prefix is -1"),
        ({"cyclic_prefix": 64}, "cyclic_prefix is 64.*num_subcarriers=64"),
        ({"resource_block_size": 65}, "resource_block_size is 65.*num_subcarriers=64"),
        ({"advance": 17}, "advance is 17.*cyclic_prefix=16"),
        ({"subcarrier_spacing_hz": 0.0}, "subcarrier_spacing_hz is 0.0"),
        ({"tdl": TwoTaps(14.5)}, "longest delay is 14.50 samples.*16 - 2 = 14"),
        ({"tdl": TDL("A", jnp.array([1e-8, 1e-5]))}, "longest delay is 92.7"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**{"tdl": tdl} | changes)
    arrays = make(TDL("A", jnp.array([1e-8, 1e-7])))  # to be vmapped over
    with pytest.raises(ValueError, match="one realisation takes a scalar: vmap over the model"):
        arrays.frequency_response(zeros((1, 23)))
    ofdm = make(tdl)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        ofdm.sample(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="symbols has shape"):
        ofdm.modulate(zeros((2, 63)))
    with pytest.raises(ValueError, match="samples has 81 entries"):
        ofdm.demodulate(zeros((81,)))
    with pytest.raises(ValueError, match="impulse_response has 3 rows"):
        ofdm.convolve(zeros((80,)), zeros((3, 17)))
    with pytest.raises(ValueError, match="impulse_response has shape"):
        ofdm.convolve(zeros((80,)), zeros((1, 16)))


def test_tracers_pass_the_delay_check():
    gains = jax.eval_shape(lambda spread: make(TDL("A", spread)).sample(jax.random.key(14), 2), 1e-4)
    assert gains.shape == (2,)
