"""Tests of the closed forms against float64 references, simulation, and each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from megjax.channel import theory
from megjax.channel.fading import RayleighFading
from megjax.channel.modulation import MODULATIONS, bits_per_symbol, constellation
from megjax.channel.random import complex_normal
from megjax.channel.special import exp1_ratio, rice_cdf
from megjax.channel.transmission import lmmse_error_var

FOUR_SIGMA = 4.0
SNR = np.logspace(-3, 6, 46).astype(np.float32)
SNR64 = SNR.astype(np.float64)
TINY = 1e-30
"""References below it are not compared: float32 has no relative accuracy there."""
BER_AWGN = jax.jit(theory.ber_awgn, static_argnums=1)
BER_RAYLEIGH = jax.jit(theory.ber_rayleigh, static_argnums=(1, 2))
BER_NAKAGAMI = jax.jit(theory.ber_nakagami, static_argnums=1)
BER_RICIAN = jax.jit(theory.ber_rician, static_argnums=1)


def assert_close(value, reference, rtol):
    value, reference = np.asarray(value), np.asarray(reference)
    assert value.dtype == np.float32 and value.shape == reference.shape
    compared = reference > TINY
    assert compared.any()
    np.testing.assert_allclose(value[compared], reference[compared], rtol=rtol)


def scaled_exp1_reference(x):
    """Float64 exp(x) E1(x): SciPy's up to 500, beyond which exp overflows, then the asymptotic series."""
    near = np.minimum(x, 500.0)
    series = (1 - 1 / x + 2 / x**2 - 6 / x**3 + 24 / x**4) / x
    return np.where(x < 500, np.exp(near) * special.exp1(near), series)


def ber_awgn_reference(modulation):
    """Bit error rates at `SNR64` by summing over sent and decided levels of one axis of the constellation."""
    if modulation == "bpsk":
        return special.erfc(np.sqrt(SNR64)) / 2
    size = bits_per_symbol(modulation)
    points = np.asarray(constellation(modulation), np.complex128)
    bits = (np.arange(2**size)[:, np.newaxis] >> np.arange(size)[::-1]) & 1
    row = np.isclose(points.imag, points.imag.min(), atol=1e-4)
    order = np.argsort(points.real[row])
    levels, bits = points.real[row][order], bits[row][order]
    scale = np.sqrt(SNR64)
    ber = np.zeros_like(SNR64)
    for sent, decided in itertools.permutations(range(len(levels)), 2):
        # Distances to the edges of the decision region, near and far: both probabilities are then small tails.
        edges = [abs(levels[decided] - levels[sent]) + shift * (levels[1] - levels[0]) / 2 for shift in (-1, 1)]
        outermost = decided in (0, len(levels) - 1)
        tails = [special.erfc(edge * scale) / 2 for edge in edges]
        probability = tails[0] - (0 if outermost else tails[1])
        ber += probability * np.sum(bits[sent] != bits[decided])
    return ber / len(levels) / (size // 2)


def average_over_gain(function, density):
    """Float64 E[function(g)] by the trapezoidal rule in ln g; `density` is that of g."""
    log_gain, step = np.linspace(-48, 5.2, 2000, retstep=True)
    gain = np.exp(log_gain)
    return step * np.sum(density(gain) * gain * function(gain), axis=-1)


def rician_density(k_factor):
    def density(gain):
        amplitude = np.sqrt((1 + k_factor) * gain)
        bessel = special.i0e(2 * np.sqrt(k_factor) * amplitude)
        return (1 + k_factor) * np.exp(-((np.sqrt(k_factor) - amplitude) ** 2)) * bessel

    return density


def nakagami_density(m):
    return lambda gain: stats.gamma.pdf(gain, m, scale=1 / m)


def ber_fading_reference(modulation, density):
    """The AWGN formula, with its own terms in float64, averaged over the gain."""
    weights, scales = (terms.astype(np.float64) for terms in theory._q_terms(modulation))

    def ber(gain):
        arguments = np.multiply.outer(SNR64[::5], gain)
        return sum(w * special.erfc(np.sqrt(a * arguments)) / 2 for w, a in zip(weights, scales, strict=True))

    return average_over_gain(ber, density)


def test_gaussian_tail():
    x = np.linspace(-8, 12, 401, dtype=np.float32)
    assert_close(theory.q_function(x), special.erfc(x.astype(np.float64) / np.sqrt(2)) / 2, 2e-5)
    np.testing.assert_allclose(theory.q_function(0.0), 0.5)


def test_scaled_exponential_integral():
    x = np.concatenate([np.logspace(-8, 8, 321), np.linspace(0.9, 1.1, 41)]).astype(np.float32)
    reference = scaled_exp1_reference(x.astype(np.float64))
    assert_close(jax.jit(theory.scaled_exp1)(x), reference, 1e-6)
    # (exp(x) E1(x))' = exp(x) E1(x) - 1 / x; written out for large x, where that cancels even in float64.
    inverse = 1 / x.astype(np.float64)
    slope = np.where(x < 500, inverse - reference, inverse**2 * (1 - 2 * inverse + 6 * inverse**2 - 24 * inverse**3))
    assert_close(-jax.jit(jax.vmap(jax.grad(theory.scaled_exp1)))(x), slope, 3e-6)


def test_bessel_j0_and_its_derivatives():
    x = np.concatenate([np.linspace(-500, 500, 40_001), [11.999, 12.0, 12.001, 1e4, 1e6]]).astype(np.float32)
    x64 = x.astype(np.float64)
    first = jax.jit(jax.vmap(jax.grad(theory.bessel_j0)))
    second = jax.jit(jax.vmap(jax.grad(jax.grad(theory.bessel_j0))))
    np.testing.assert_allclose(jax.jit(theory.bessel_j0)(x), special.j0(x64), rtol=0, atol=5e-7)
    np.testing.assert_allclose(first(x), -special.j1(x64), rtol=0, atol=5e-7)
    np.testing.assert_allclose(second(x), -special.jvp(1, x64), rtol=0, atol=5e-7)
    np.testing.assert_allclose(theory.bessel_j0(0.0), 1, rtol=1e-7)
    # One cycle per 10 blocks, 5 blocks apart: J0(pi) = -0.304242
    np.testing.assert_allclose(theory.jakes_autocorrelation(0.1, 5.0), -0.304242, atol=1e-6)


@pytest.mark.parametrize("a", [0.1, 1.0, 4.5, 14.0])
def test_marcum_q(a):
    b = np.linspace(0.01, 30, 300, dtype=np.float32)
    law = stats.ncx2(2, np.float64(np.float32(a)) ** 2)
    squares = b.astype(np.float64) ** 2
    assert_close(jax.jit(theory.marcum_q1)(a, b), law.sf(squares), 1e-5)
    assert_close(jax.jit(rice_cdf)(a, b), law.cdf(squares), 1e-5)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_awgn_bit_error_rate(modulation):
    assert_close(BER_AWGN(SNR, modulation), ber_awgn_reference(modulation), 3e-5)
    np.testing.assert_allclose(BER_AWGN(0.0, modulation), 0.5, rtol=1e-6)


def test_hand_computed_error_rates():
    # Q(sqrt(2)) = 0.0786496; Rayleigh: (1 - sqrt(1 / 2)) / 2; two branches: p^2 (1 + 2 (1 - p)) with that p
    np.testing.assert_allclose(BER_AWGN(1.0, "bpsk"), 0.0786496, rtol=1e-5)
    p = (1 - np.sqrt(0.5)) / 2
    np.testing.assert_allclose(BER_RAYLEIGH(1.0, "bpsk"), p, rtol=1e-6)
    np.testing.assert_allclose(BER_RAYLEIGH(1.0, "bpsk", 2), p**2 * (3 - 2 * p), rtol=1e-6)
    # Gray 16-QAM on AWGN: (3 Q(x) + 2 Q(3 x) - Q(5 x)) / 4, x = sqrt(snr / 5)
    q1, q3, q5 = (theory.q_function(k * np.sqrt(10 / 5)) for k in (1, 3, 5))
    np.testing.assert_allclose(BER_AWGN(10.0, "16qam"), (3 * q1 + 2 * q3 - q5) / 4, rtol=1e-5)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_error_rates_on_fading(modulation):
    snr = SNR[::5]
    rayleigh = ber_fading_reference(modulation, nakagami_density(1.0))
    assert_close(BER_RAYLEIGH(snr, modulation), rayleigh, 2e-6)
    # Maximum-ratio combining of N Rayleigh branches is one Nakagami branch of m = N and N times the SNR.
    for branches in (2, 4):
        combined = BER_NAKAGAMI(branches * snr, modulation, float(branches))
        assert_close(BER_RAYLEIGH(snr, modulation, branches), np.asarray(combined, np.float64), 1e-5)
    for m in (0.5, 3.7):
        reference = ber_fading_reference(modulation, nakagami_density(m))
        assert_close(BER_NAKAGAMI(snr, modulation, m), reference, 1e-5)
    for k_factor in (0.0, 1.0, 10.0):
        reference = ber_fading_reference(modulation, rician_density(k_factor))
        assert_close(BER_RICIAN(snr, modulation, k_factor), reference, 1e-5)


def test_capacity():
    capacity = jax.jit(theory.ergodic_capacity_rayleigh)
    np.testing.assert_allclose(theory.capacity_awgn(3.0), 2, rtol=1e-6)
    assert_close(theory.capacity_awgn(SNR), np.log1p(SNR64) / np.log(2), 1e-6)
    assert_close(capacity(SNR), scaled_exp1_reference(1 / SNR64) / np.log(2), 1e-6)
    np.testing.assert_array_equal(capacity(0.0), 0)
    # exp(1) E1(1) / ln 2 = 0.596347 / 0.693147
    np.testing.assert_allclose(capacity(1.0), 0.860347, rtol=1e-5)


def test_mean_lmmse_error():
    error = jax.jit(theory.mean_lmmse_error_rayleigh)
    reference = scaled_exp1_reference(1 / SNR64) / SNR64
    assert_close(error(SNR), reference, 1e-6)
    np.testing.assert_array_equal(error(0.0), 1)
    np.testing.assert_allclose(jax.jit(jax.grad(error))(0.0), -1, rtol=1e-6)
    slope = jax.jit(jax.vmap(jax.grad(exp1_ratio)))
    slopes = [slope(jnp.array(s)) for s in ([1e-30, 1e-6, 1.0, 1e6], [0.999999, 1.000001])]
    assert np.all(np.isfinite(slopes[0])) and np.all(np.asarray(slopes[0]) < 0)
    np.testing.assert_allclose(slopes[1][0], slopes[1][1], rtol=1e-5)


@pytest.mark.parametrize("law", ["nakagami", "rician"])
@pytest.mark.parametrize("parameter", [0.5, 1.0, 3.7, 30.0])
def test_means_over_nakagami_and_rician_gains(law, parameter):
    density = nakagami_density(parameter) if law == "nakagami" else rician_density(parameter)
    capacity = average_over_gain(lambda gain: np.log1p(np.multiply.outer(SNR64, gain)) / np.log(2), density)
    error = average_over_gain(lambda gain: 1 / (1 + np.multiply.outer(SNR64, gain)), density)
    assert_close(jax.jit(getattr(theory, f"ergodic_capacity_{law}"))(SNR, parameter), capacity, 1e-6)
    assert_close(jax.jit(getattr(theory, f"mean_lmmse_error_{law}"))(SNR, parameter), error, 1e-5)


def test_gain_distributions():
    gain = np.logspace(-6, 2, 81).astype(np.float32)
    nakagami, rician = jax.jit(theory.nakagami_gain_cdf), jax.jit(theory.rician_gain_cdf)
    gain64 = gain.astype(np.float64)
    assert_close(theory.rayleigh_gain_cdf(gain), -np.expm1(-gain64), 1e-6)
    for m in (0.5, 1.0, 3.5):
        assert_close(nakagami(gain, m), special.gammainc(m, m * gain64), 1e-5)
    for k in (1.0, 10.0, 100.0):
        assert_close(rician(gain, k), stats.ncx2.cdf(2 * (1 + k) * gain64, 2, 2 * k), 1e-5)
    assert_close(rician(gain, 0.0), -np.expm1(-gain64), 1e-6)


def test_outage():
    # P(g < (2^2 - 1) / 6) = 1 - exp(-1/2)
    np.testing.assert_allclose(theory.outage_rayleigh(6.0, 2.0), 1 - np.exp(-0.5), rtol=1e-6)
    np.testing.assert_allclose(theory.outage_nakagami(6.0, 2.0, 1.0), 1 - np.exp(-0.5), rtol=1e-6)
    np.testing.assert_allclose(theory.outage_rician(6.0, 2.0, 0.0), 1 - np.exp(-0.5), rtol=1e-6)
    assert_close(theory.outage_rayleigh(SNR, 1.0), -np.expm1(-1 / SNR64), 1e-6)
    rate = theory.outage_capacity_rayleigh(SNR, 0.01)
    np.testing.assert_allclose(theory.outage_rayleigh(SNR, rate), 0.01, rtol=1e-5)


def test_ergodic_values_against_simulation():
    num = 200_000
    gains = jax.jit(lambda key: RayleighFading().sample(key, num))(jax.random.key(0))
    for snr in (0.1, 1.0, 30.0):
        rates = np.log2(1 + snr * np.abs(np.asarray(gains, np.complex128)) ** 2)
        for samples, expected in (
            (rates, theory.ergodic_capacity_rayleigh(snr)),
            (rates < 0.8, theory.outage_rayleigh(snr, 0.8)),
            (lmmse_error_var(gains, jnp.full(num, snr), 1.0), theory.mean_lmmse_error_rayleigh(snr)),
        ):
            samples = np.asarray(samples, np.float64)
            assert abs(samples.mean() - expected) <= FOUR_SIGMA * samples.std() / np.sqrt(num)


def test_level_crossings_of_a_simulated_clarke_process():
    """Crossings per realisation of a spectral sum, with and without a line of sight of constant phase.

    256 arrival angles, one in each equal sector, follow Clarke's spectrum closely; at 100 samples a Doppler cycle
    crossings lost between samples are fewer than the standard error.
    """
    num, length, step, paths = 400, 300, 0.01, 256

    @jax.jit
    def diffuse(key):
        angle_key, amplitude_key = jax.random.split(key)
        angles = 2 * jnp.pi * (jnp.arange(paths) + jax.random.uniform(angle_key, (paths,))) / paths
        phases = 2 * jnp.pi * step * jnp.arange(length)[:, None] * jnp.cos(angles)[None]
        return jnp.exp(1j * phases) @ (complex_normal(amplitude_key, (paths,)) / np.sqrt(paths))

    scattered = np.asarray(jax.lax.map(diffuse, jax.random.split(jax.random.key(1), num)))
    for k_factor, threshold in ((0.0, 0.3), (0.0, 1.0), (3.0, 0.7)):
        envelope = np.abs(np.sqrt(k_factor / (1 + k_factor)) + scattered / np.sqrt(1 + k_factor))
        upward = (envelope[:, :-1] < threshold) & (envelope[:, 1:] >= threshold)
        rates = upward.sum(axis=1) / ((length - 1) * step)
        expected = theory.level_crossing_rate_rician(threshold, 1.0, k_factor)
        assert abs(rates.mean() - expected) <= FOUR_SIGMA * rates.std() / np.sqrt(num), (k_factor, threshold)


def test_level_crossing_formulas():
    rho, doppler = np.array([0.1, 0.5, 1.0, 2.0], np.float32), 50.0
    rate = theory.level_crossing_rate_rayleigh(rho, doppler)
    assert_close(rate, np.sqrt(2 * np.pi) * doppler * rho * np.exp(-np.square(rho, dtype=np.float64)), 1e-6)
    duration = theory.average_fade_duration_rayleigh(rho, doppler)
    np.testing.assert_allclose(duration * rate, theory.rayleigh_gain_cdf(rho**2), rtol=1e-6)
    np.testing.assert_allclose(theory.average_fade_duration_rician(rho, doppler, 0.0), duration, rtol=1e-5)
    # Rice: the density of the envelope times the mean positive slope, s / sqrt(2 pi), where the slope has variance
    # s^2 = (pi f_D)^2 / (1 + K).
    k_factor = 4.0
    slope = np.pi * doppler / np.sqrt(1 + k_factor) / np.sqrt(2 * np.pi)
    density = 2 * rho * rician_density(k_factor)(np.square(rho, dtype=np.float64))
    assert_close(theory.level_crossing_rate_rician(rho, doppler, k_factor), slope * density, 1e-5)


FUNCTIONS = {
    "ber_awgn": (lambda snr: theory.ber_awgn(snr, "16qam"), 10.0),
    "ber_rayleigh": (lambda snr: theory.ber_rayleigh(snr, "64qam", 2), 10.0),
    "ber_nakagami": (lambda snr, m: theory.ber_nakagami(snr, "qpsk", m), 10.0, 2.0),
    "ber_rician": (lambda snr, k: theory.ber_rician(snr, "qpsk", k), 10.0, 2.0),
    "capacity_awgn": (theory.capacity_awgn, 3.0),
    "ergodic_capacity_rayleigh": (theory.ergodic_capacity_rayleigh, 3.0),
    "ergodic_capacity_nakagami": (theory.ergodic_capacity_nakagami, 3.0, 2.0),
    "ergodic_capacity_rician": (theory.ergodic_capacity_rician, 3.0, 2.0),
    "mean_lmmse_error_rayleigh": (theory.mean_lmmse_error_rayleigh, 3.0),
    "mean_lmmse_error_nakagami": (theory.mean_lmmse_error_nakagami, 3.0, 2.0),
    "mean_lmmse_error_rician": (theory.mean_lmmse_error_rician, 3.0, 2.0),
    "outage_rayleigh": (theory.outage_rayleigh, 3.0, 1.0),
    "outage_nakagami": (theory.outage_nakagami, 3.0, 1.0, 2.0),
    "outage_rician": (theory.outage_rician, 3.0, 1.0, 2.0),
    "outage_capacity_rayleigh": (theory.outage_capacity_rayleigh, 3.0, 0.1),
    "jakes_autocorrelation": (theory.jakes_autocorrelation, 0.1, 3.0),
    "level_crossing_rate_rician": (theory.level_crossing_rate_rician, 0.6, 20.0, 2.0),
    "average_fade_duration_rayleigh": (theory.average_fade_duration_rayleigh, 0.6, 20.0),
    "average_fade_duration_rician": (theory.average_fade_duration_rician, 0.6, 20.0, 2.0),
    "marcum_q1": (theory.marcum_q1, 1.0, 2.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_and_vmap(name):
    """Gradients in every argument match central differences; jit and vmap agree with the loop, and with arrays."""
    function, *arguments = FUNCTIONS[name]
    arguments = jnp.array(arguments, jnp.float32)
    compiled = jax.jit(lambda values: function(*values))
    gradient = np.asarray(jax.jit(jax.grad(lambda values: function(*values)))(arguments))
    for i, argument in enumerate(np.asarray(arguments)):
        step = np.zeros(len(arguments), np.float32)
        step[i] = 0.02 * argument
        difference = (compiled(arguments + step) - compiled(arguments - step)) / (2 * step[i])
        # A step of 2 % leaves a third-order term of some 1e-3 and, in flat directions, float32 rounding.
        np.testing.assert_allclose(gradient[i], difference, rtol=1e-2, atol=1e-5 * abs(compiled(arguments)) / argument)
    assert np.all(np.isfinite(gradient)) and np.all(gradient != 0)
    batch = jnp.outer(jnp.array([0.9, 1.0, 1.1]), arguments)
    mapped = jax.jit(jax.vmap(lambda values: function(*values)))(batch)
    np.testing.assert_allclose(mapped, np.stack([compiled(values) for values in batch]), rtol=1e-5)
    np.testing.assert_allclose(compiled(batch.T), mapped, rtol=1e-5)


def test_parameters_may_be_arrays_while_the_snr_is_not():
    k_factors, ms = jnp.array([0.0, 1.0, 5.0]), jnp.array([0.5, 1.0, 4.0])
    for function, parameters in (
        (lambda k: theory.ber_rician(10.0, "qpsk", k), k_factors),
        (lambda m: theory.ber_nakagami(10.0, "qpsk", m), ms),
        (lambda k: theory.ergodic_capacity_rician(10.0, k), k_factors),
        (lambda m: theory.mean_lmmse_error_nakagami(10.0, m), ms),
        (lambda k: theory.outage_rician(10.0, 1.0, k), k_factors),
        (lambda m: theory.nakagami_gain_cdf(0.3, m), ms),
    ):
        function = jax.jit(function)
        together = function(parameters)
        np.testing.assert_allclose(together, [function(value) for value in parameters], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.ber_awgn(-1.0, "qpsk"), "snr is -1.0; it must be finite and 0 or more"),
        (lambda: theory.ber_awgn(float("nan"), "qpsk"), "snr is nan"),
        (lambda: theory.ber_rayleigh(1.0, "8qam"), "modulation is '8qam'.*16qam"),
        (lambda: theory.ber_rayleigh(1.0, "qpsk", 0), "num_branches is 0"),
        (lambda: theory.ber_rayleigh(1.0, "qpsk", 65), "num_branches is 65; it must be at most 64"),
        (lambda: theory.ber_nakagami(1.0, "qpsk", 0.4), "m is 0.4; it must be 0.5 or more"),
        (lambda: theory.ber_rician(1.0, "qpsk", -0.1), "k_factor is -0.1"),
        (lambda: theory.outage_rayleigh(0.0, 1.0), "snr is 0.0; it must be finite and positive"),
        (lambda: theory.outage_rayleigh(1.0, -1.0), "rate is -1.0"),
        (lambda: theory.outage_capacity_rayleigh(1.0, 1.0), r"outage is 1.0; it must be in \[0, 1\)"),
        (lambda: theory.scaled_exp1(0.0), "x is 0.0; it must be positive and finite"),
        (lambda: theory.bessel_j0(float("inf")), "x is inf; it must be finite"),
        (lambda: theory.marcum_q1(-1.0, 1.0), "a is -1.0"),
        (lambda: theory.average_fade_duration_rayleigh(0.0, 1.0), "threshold is 0.0"),
        (lambda: theory.level_crossing_rate_rayleigh(1.0, -1.0), "doppler is -1.0"),
        (lambda: theory.jakes_autocorrelation(1.0, float("nan")), "lag is nan"),
        (lambda: theory.rayleigh_gain_cdf(-0.5), "gain is -0.5"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
