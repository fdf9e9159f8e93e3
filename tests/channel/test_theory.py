"""Tests of the closed forms against float64 references, simulation, and each other."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from megjax.channel import JakesFading, theory
from megjax.channel.modulation import MODULATIONS, bits_per_symbol, constellation
from megjax.channel.special import rice_cdf
from megjax.channel.transmission import lmmse_error_var
from tests.channel.draws import normal_symbols
from tests.checks import within_standard_error

SNR = np.logspace(-3, 6, 46).astype(np.float32)
SNR64 = SNR.astype(np.float64)
TINY = 1e-30
"""References below it are not compared: float32 has no relative accuracy there."""


@functools.partial(jax.jit, static_argnums=1)
def error_rates(snr, modulation):
    """Bit error rates of each law at every SNR; a parameter of the law is a first axis."""
    branches, ms, k_factors = (1, 2, 4), jnp.array([[0.5], [2.0], [3.7], [4.0]]), jnp.array([[0.0], [1.0], [10.0]])
    return {
        "awgn": theory.ber_awgn(snr, modulation),
        "rayleigh": jnp.stack([theory.ber_rayleigh(snr, modulation, n) for n in branches]),
        # Maximum-ratio combining of N Rayleigh branches is one Nakagami branch of m = N and N times the SNR.
        "combined": theory.ber_nakagami(ms[1::2] * snr[None], modulation, ms[1::2]),
        "nakagami": theory.ber_nakagami(snr[None], modulation, ms[::2]),
        "rician": theory.ber_rician(snr[None], modulation, k_factors),
    }


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
    value, derivative = jax.jit(jax.vmap(jax.value_and_grad(theory.scaled_exp1)))(x)
    reference = scaled_exp1_reference(x.astype(np.float64))
    assert_close(value, reference, 1e-6)
    # (exp(x) E1(x))' = exp(x) E1(x) - 1 / x; written out for large x, where that cancels even in float64.
    inverse = 1 / x.astype(np.float64)
    slope = np.where(x < 500, inverse - reference, inverse**2 * (1 - 2 * inverse + 6 * inverse**2 - 24 * inverse**3))
    assert_close(-derivative, slope, 3e-6)


def test_bessel_j0_and_its_derivatives():
    x = np.concatenate([np.linspace(-500, 500, 10_001), [11.999, 12.0, 12.001, 1e4, 1e6, 0.0]]).astype(np.float32)
    x64 = x.astype(np.float64)

    def value_and_slope(x):
        return jax.value_and_grad(theory.bessel_j0)(x)

    (value, first), (_, second) = jax.jit(jax.vmap(lambda x: jax.jvp(value_and_slope, (x,), (jnp.ones_like(x),))))(x)
    np.testing.assert_allclose(value, special.j0(x64), rtol=0, atol=5e-7)
    np.testing.assert_allclose(first, -special.j1(x64), rtol=0, atol=5e-7)
    np.testing.assert_allclose(second, -special.jvp(1, x64), rtol=0, atol=5e-7)
    np.testing.assert_allclose(value[-1], 1, rtol=1e-7)
    # One cycle per 10 blocks, 5 blocks apart: J0(pi) = -0.304242
    np.testing.assert_allclose(jax.jit(theory.jakes_autocorrelation)(0.1, 5.0), -0.304242, atol=1e-6)


def test_marcum_q():
    b = np.linspace(0.01, 30, 300, dtype=np.float32)
    squares = b.astype(np.float64) ** 2
    both = jax.jit(lambda a, b: (theory.marcum_q1(a, b), rice_cdf(a, b)))
    for a in (0.1, 1.0, 4.5, 14.0):
        above, below = both(a, b)
        law = stats.ncx2(2, np.float64(np.float32(a)) ** 2)
        assert_close(above, law.sf(squares), 1e-5)
        assert_close(below, law.cdf(squares), 1e-5)


@pytest.mark.parametrize(
    "modulation",
    [pytest.param(each, marks=() if each == "64qam" else pytest.mark.slow) for each in MODULATIONS],
)
def test_bit_error_rates(modulation):
    rates = error_rates(np.concatenate([SNR, np.float32([0])]), modulation)
    np.testing.assert_allclose(rates["awgn"][-1], 0.5, rtol=1e-6)
    assert_close(rates["awgn"][:-1], ber_awgn_reference(modulation), 3e-5)
    rates = {law: np.asarray(rate)[..., :-1:5] for law, rate in rates.items()}
    assert_close(rates["rayleigh"][0], ber_fading_reference(modulation, nakagami_density(1.0)), 2e-6)
    assert_close(rates["rayleigh"][1:], rates["combined"].astype(np.float64), 1e-5)
    for found, m in zip(rates["nakagami"], (0.5, 3.7), strict=True):
        assert_close(found, ber_fading_reference(modulation, nakagami_density(m)), 1e-5)
    for found, k_factor in zip(rates["rician"], (0.0, 1.0, 10.0), strict=True):
        assert_close(found, ber_fading_reference(modulation, rician_density(k_factor)), 1e-5)


def test_hand_computed_error_rates():
    @jax.jit
    def compute(low, high):
        bpsk = theory.ber_awgn(low, "bpsk"), theory.ber_rayleigh(low, "bpsk"), theory.ber_rayleigh(low, "bpsk", 2)
        return *bpsk, theory.ber_awgn(high, "16qam")

    # Q(sqrt(2)) = 0.0786496; Rayleigh: (1 - sqrt(1 / 2)) / 2; two branches: p^2 (1 + 2 (1 - p)) with that p
    p = (1 - np.sqrt(0.5)) / 2
    awgn, rayleigh, two_branches, qam = compute(1.0, 10.0)
    np.testing.assert_allclose(awgn, 0.0786496, rtol=1e-5)
    np.testing.assert_allclose([rayleigh, two_branches], [p, p**2 * (3 - 2 * p)], rtol=1e-6)
    # Gray 16-QAM on AWGN: (3 Q(x) + 2 Q(3 x) - Q(5 x)) / 4, x = sqrt(snr / 5)
    q1, q3, q5 = (stats.norm.sf(k * np.sqrt(10 / 5)) for k in (1, 3, 5))
    np.testing.assert_allclose(qam, (3 * q1 + 2 * q3 - q5) / 4, rtol=1e-5)


def test_capacity():
    capacity = jax.jit(theory.ergodic_capacity_rayleigh)
    np.testing.assert_allclose(theory.capacity_awgn(3.0), 2, rtol=1e-6)
    assert_close(theory.capacity_awgn(SNR), np.log1p(SNR64) / np.log(2), 1e-6)
    assert_close(capacity(SNR), scaled_exp1_reference(1 / SNR64) / np.log(2), 1e-6)
    # exp(1) E1(1) / ln 2 = 0.596347 / 0.693147
    np.testing.assert_allclose([capacity(0.0), capacity(1.0)], [0, 0.860347], rtol=1e-5)


def test_mean_lmmse_error():
    snr = np.concatenate([SNR, np.float32([0, 1e-30, 1e-6, 1.0, 1e6, 0.999999, 1.000001])])
    values, slopes = map(np.asarray, jax.jit(jax.vmap(jax.value_and_grad(theory.mean_lmmse_error_rayleigh)))(snr))
    assert_close(values[: SNR.size], scaled_exp1_reference(1 / SNR64) / SNR64, 1e-6)
    assert values[SNR.size] == 1
    np.testing.assert_allclose(slopes[SNR.size], -1, rtol=1e-6)
    assert np.all(np.isfinite(slopes)) and np.all(slopes < 0)
    np.testing.assert_allclose(slopes[-2], slopes[-1], rtol=1e-5)


@pytest.mark.parametrize("law", ["nakagami", "rician"])
def test_means_over_nakagami_and_rician_gains(law):
    functions = [getattr(theory, f"{name}_{law}") for name in ("ergodic_capacity", "mean_lmmse_error")]
    both = jax.jit(lambda snr, parameter: [function(snr, parameter) for function in functions])
    for parameter in (0.5, 1.0, 3.7, 30.0):
        density = nakagami_density(parameter) if law == "nakagami" else rician_density(parameter)
        capacity = average_over_gain(lambda gain: np.log1p(np.multiply.outer(SNR64, gain)) / np.log(2), density)
        error = average_over_gain(lambda gain: 1 / (1 + np.multiply.outer(SNR64, gain)), density)
        found = both(SNR, parameter)
        assert_close(found[0], capacity, 1e-6)
        assert_close(found[1], error, 1e-5)


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
    @jax.jit
    def compute(snr, snrs, rate, m, k_factor):
        laws = theory.outage_rayleigh(snr, rate), theory.outage_nakagami(snr, rate, m)
        at_the_capacity = theory.outage_rayleigh(snrs, theory.outage_capacity_rayleigh(snrs, 0.01))
        return *laws, theory.outage_rician(snr, rate, k_factor), theory.outage_rayleigh(snrs, rate), at_the_capacity

    *laws, outage, at_the_capacity = compute(6.0, SNR, 2.0, 1.0, 0.0)
    # P(g < (2^2 - 1) / 6) = 1 - exp(-1/2)
    np.testing.assert_allclose(laws, 1 - np.exp(-0.5), rtol=1e-6)
    assert_close(outage, -np.expm1(-3 / SNR64), 1e-6)
    np.testing.assert_allclose(at_the_capacity, 0.01, rtol=1e-5)


def test_ergodic_values_against_simulation():
    gains = normal_symbols(0, (2**16,))

    @jax.jit
    def compute(gains, snr):
        means = theory.ergodic_capacity_rayleigh(snr), theory.outage_rayleigh(snr, 0.8)
        errors = lmmse_error_var(gains, jnp.full(gains.shape, snr), 1.0)
        return *means, errors, theory.mean_lmmse_error_rayleigh(snr)

    for snr in (0.1, 1.0, 30.0):
        capacity, outage, errors, mean_error = compute(gains, snr)
        rates = np.log2(1 + snr * np.abs(gains.astype(np.complex128)) ** 2)
        within_standard_error(rates, capacity)
        within_standard_error(rates < 0.8, outage)
        within_standard_error(errors, mean_error)


@pytest.mark.slow
def test_level_crossings_of_a_simulated_clarke_process():
    """Crossings per realisation of a spectral sum, with and without a line of sight of constant phase.

    64 arrival angles, one in each equal sector, follow Clarke's spectrum closely; at 100 samples a Doppler cycle
    crossings lost between samples are fewer than the standard error.
    """
    num, length, step, paths = 300, 200, 0.01, 64
    angles = 2 * np.pi * (np.arange(paths) + np.random.default_rng(0).random((num, paths))) / paths
    amplitudes = normal_symbols(1, (num, paths)) / np.sqrt(paths)
    # A step turns each path by a constant phasor.
    waves = np.exp(2j * np.pi * step * np.cos(angles))[:, None] ** np.arange(length)[:, None]
    scattered = np.einsum("ntp,np->nt", waves, amplitudes)
    for k_factor, threshold in ((0.0, 0.3), (0.0, 1.0), (3.0, 0.7)):
        envelope = np.abs(np.sqrt(k_factor / (1 + k_factor)) + scattered / np.sqrt(1 + k_factor))
        upward = (envelope[:, :-1] < threshold) & (envelope[:, 1:] >= threshold)
        rates = upward.sum(axis=1) / ((length - 1) * step)
        within_standard_error(rates, theory.level_crossing_rate_rician(threshold, 1.0, k_factor))


@pytest.mark.parametrize("doppler", [0.001, 0.1, 0.4, 2.0])
@pytest.mark.parametrize("threshold", [0.1, 1.0])
def test_crossings_between_blocks(threshold, doppler):
    """Against SciPy's noncentral chi-squared distribution of the next gain, integrated over this one."""
    r = special.j0(2 * np.pi * doppler) ** 2

    def above(g):
        return np.exp(-g) * stats.ncx2.sf(2 * threshold**2 / (1 - r), 2, 2 * r * g / (1 - r))

    lowest = max(threshold - 12 * np.sqrt((1 - r) / 2), 0) ** 2
    expected = integrate.quad(above, lowest, threshold**2, epsabs=0, epsrel=1e-9, limit=400)[0]
    rate = float(theory.block_crossing_rate_rayleigh(threshold, doppler))
    assert rate == pytest.approx(expected, rel=4e-5)
    assert rate <= float(theory.level_crossing_rate_rayleigh(threshold, doppler)) * (1 + 1e-4)
    duration = float(theory.block_fade_duration_rayleigh(threshold, doppler))
    assert duration == pytest.approx(-np.expm1(-(threshold**2)) / rate, rel=1e-5) and duration >= 1


def test_crossings_of_simulated_blocks():
    doppler, threshold, num = 0.1, 0.5, 64
    draw = jax.vmap(lambda key: jnp.abs(JakesFading(doppler).sample(key, num)) < threshold)
    below = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(3), 4000)))
    crossings = (below[:, :-1] & ~below[:, 1:]).mean(1)
    within_standard_error(crossings, theory.block_crossing_rate_rayleigh(threshold, doppler))


def test_level_crossing_formulas():
    rho, doppler, k_factor = np.array([0.1, 0.5, 1.0, 2.0], np.float32), 50.0, 4.0

    @jax.jit
    def compute(rho, doppler, k_factor):
        rate, duration = theory.level_crossing_rate_rayleigh, theory.average_fade_duration_rayleigh
        degenerate = theory.average_fade_duration_rician(rho, doppler, 0.0)
        rician = theory.level_crossing_rate_rician(rho, doppler, k_factor)
        return rate(rho, doppler), duration(rho, doppler), degenerate, rician

    rate, duration, degenerate, rician_rate = map(np.asarray, compute(rho, doppler, k_factor))
    squared = np.square(rho, dtype=np.float64)
    assert_close(rate, np.sqrt(2 * np.pi) * doppler * rho * np.exp(-squared), 1e-6)
    np.testing.assert_allclose(duration * rate, -np.expm1(-squared), rtol=1e-6)
    np.testing.assert_allclose(degenerate, duration, rtol=1e-5)
    # Rice: the density of the envelope times the mean positive slope, s / sqrt(2 pi), where the slope has variance
    # s^2 = (pi f_D)^2 / (1 + K).
    slope = np.pi * doppler / np.sqrt(1 + k_factor) / np.sqrt(2 * np.pi)
    assert_close(rician_rate, slope * 2 * rho * rician_density(k_factor)(squared), 1e-5)


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
