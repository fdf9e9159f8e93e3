"""Closed forms of fading channels: bit error rates, capacity, outage, LMMSE error, level crossings, gain distributions.

Everything is elementwise float32 and differentiable, but for bit error rates at snr = 0, where their slope is infinite
and gradients mean nothing; array arguments broadcast. `snr` is the linear mean
signal-to-noise ratio per symbol, p E|h|^2 / noise_var; g = |h|^2 has mean 1. Invalid arguments raise ValueError outside
jit. Integrals without a closed form are trapezoidal rules after a logarithmic change of variable, which converge
geometrically whatever the scale. Stated errors are relative, against float64 references, from -30 to +60 dB.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammainc
from jaxtyping import Array, ArrayLike, Float

from megjax.channel.modulation import bits_per_symbol
from megjax.channel.parameters import check
from megjax.channel.special import (
    bessel_j0,
    exp1_ratio,
    gauss_legendre,
    marcum_q1,
    q_function,
    rice_cdf,
    scaled_exp1,
)
from megjax.configs import require_count
from megjax.numerics import safe_sqrt

__all__ = [
    "average_fade_duration_rayleigh",
    "average_fade_duration_rician",
    "ber_awgn",
    "ber_nakagami",
    "ber_rayleigh",
    "ber_rician",
    "bessel_j0",
    "block_crossing_rate_rayleigh",
    "block_fade_duration_rayleigh",
    "capacity_awgn",
    "ergodic_capacity_nakagami",
    "ergodic_capacity_rayleigh",
    "ergodic_capacity_rician",
    "jakes_autocorrelation",
    "level_crossing_rate_rayleigh",
    "level_crossing_rate_rician",
    "marcum_q1",
    "mean_lmmse_error_nakagami",
    "mean_lmmse_error_rayleigh",
    "mean_lmmse_error_rician",
    "nakagami_gain_cdf",
    "outage_capacity_rayleigh",
    "outage_nakagami",
    "outage_rayleigh",
    "outage_rician",
    "q_function",
    "rayleigh_gain_cdf",
    "rician_gain_cdf",
    "scaled_exp1",
]

Values = Float[Array, "*s"]
LogMgf = Callable[[Values], Values]
"""ln E[exp(-s g)] as a function of s >= 0, for a unit-mean gain g."""

_LN2 = np.float32(math.log(2))
_NODES = 257
_TAIL = 17.0
"""exp(-17) = 4e-8: where integrands that fall like exp(-|v|) are cut."""


def ber_awgn(snr: ArrayLike, modulation: str) -> Values:
    """Exact bit error rate of a Gray-labelled modulation on AWGN, hard decisions; error under 3e-5 down to 1e-30.

    K. Cho and D. Yoon, "On the general BER expression of one- and two-dimensional
    amplitude modulations", IEEE Trans. Commun. 50, 2002.
    """
    snr = _non_negative("snr", snr)
    return _sum_q_terms(modulation, lambda scale: q_function(jnp.sqrt(2 * scale * snr)))


def ber_rayleigh(snr: ArrayLike, modulation: str, num_branches: int = 1) -> Values:
    """Exact bit error rate on Rayleigh fading with coherent detection; error under 2e-6.

    With several branches: maximum-ratio combining of `num_branches` (at most 64) independent receptions, each of mean
    SNR `snr`. Each Q function of `ber_awgn` is averaged as in J. G. Proakis, "Digital Communications", chapter on
    fading channels (diversity, binary signals).
    """
    snr = _non_negative("snr", snr)
    require_count("num_branches", num_branches)
    if num_branches > 64:
        raise ValueError(f"num_branches is {num_branches}; it must be at most 64")

    def averaged(scale):
        mean = scale * snr
        # (1 - mu) / 2 with mu = sqrt(mean / (1 + mean)), without the cancellation of mu -> 1.
        error = 0.5 / ((1 + mean) * (1 + jnp.sqrt(mean / (1 + mean))))
        choices = (np.float32(math.comb(num_branches - 1 + k, k)) for k in range(num_branches))
        return error**num_branches * sum(count * (1 - error) ** k for k, count in enumerate(choices))

    return _sum_q_terms(modulation, averaged)


def ber_nakagami(snr: ArrayLike, modulation: str, m: ArrayLike) -> Values:
    """Bit error rate on Nakagami-m fading, m >= 0.5, coherent detection; error under 1e-5 for m up to 30.

    Craig's form of Q averaged over the gain, (1 / pi) int_0^(pi/2) MGF(-a snr / sin^2 theta) dtheta: M. K. Simon and
    M.-S. Alouini, "Digital Communication over Fading Channels", 2005, chapters 5 and 8.
    """
    snr, m = jnp.broadcast_arrays(_non_negative("snr", snr), _shape_parameter(m))
    return _sum_q_terms(modulation, lambda scale: _craig_average(scale * snr, _nakagami_log_mgf(m)))


def ber_rician(snr: ArrayLike, modulation: str, k_factor: ArrayLike) -> Values:
    """Bit error rate on Rician fading of linear K-factor, coherent detection; error under 1e-5 for K up to 30.

    Method and source as in `ber_nakagami`.
    """
    snr, k_factor = jnp.broadcast_arrays(_non_negative("snr", snr), _non_negative("k_factor", k_factor))
    return _sum_q_terms(modulation, lambda scale: _craig_average(scale * snr, _rician_log_mgf(k_factor)))


def capacity_awgn(snr: ArrayLike) -> Values:
    """log2(1 + snr), bits per complex symbol: C. E. Shannon, "A mathematical theory of communication", 1948."""
    return jnp.log1p(_non_negative("snr", snr)) / _LN2


def ergodic_capacity_rayleigh(snr: ArrayLike) -> Values:
    """E[log2(1 + snr g)] = exp(1 / snr) E1(1 / snr) / ln 2, bits per symbol, CSI at the receiver; error under 1e-6.

    M.-S. Alouini and A. J. Goldsmith, "Capacity of Rayleigh fading channels under different adaptive transmission and
    diversity-combining techniques", IEEE Trans. Veh. Technol. 48, 1999.
    """
    snr = _non_negative("snr", snr)
    return snr * exp1_ratio(snr) / _LN2


def ergodic_capacity_nakagami(snr: ArrayLike, m: ArrayLike) -> Values:
    """E[log2(1 + snr g)] on Nakagami-m fading, bits per symbol; error under 1e-6.

    From Frullani's integral, ln(1 + x) = int_0^inf (1 - exp(-x z)) exp(-z) / z dz, averaged over the gain: K. A. Hamdi,
    "Capacity of MRC on correlated Rician fading channels", IEEE Trans. Commun. 56, 2008.
    """
    snr, m = jnp.broadcast_arrays(_non_negative("snr", snr), _shape_parameter(m))
    return _ergodic_capacity(snr, _nakagami_log_mgf(m))


def ergodic_capacity_rician(snr: ArrayLike, k_factor: ArrayLike) -> Values:
    """E[log2(1 + snr g)] on Rician fading of linear K-factor, bits per symbol; method as for Nakagami-m."""
    snr, k_factor = jnp.broadcast_arrays(_non_negative("snr", snr), _non_negative("k_factor", k_factor))
    return _ergodic_capacity(snr, _rician_log_mgf(k_factor))


def mean_lmmse_error_rayleigh(snr: ArrayLike) -> Values:
    """E[1 / (1 + snr g)] = (1 / snr) exp(1 / snr) E1(1 / snr), in (0, 1]; error under 1e-6.

    The mean of `lmmse_error_var` over Rayleigh fading: 1 at snr = 0, with derivative -1.
    """
    return exp1_ratio(_non_negative("snr", snr))


def mean_lmmse_error_nakagami(snr: ArrayLike, m: ArrayLike) -> Values:
    """E[1 / (1 + snr g)] on Nakagami-m fading, as int_0^inf exp(-z) E[exp(-z snr g)] dz; error under 1e-5."""
    snr, m = jnp.broadcast_arrays(_non_negative("snr", snr), _shape_parameter(m))
    return _mean_lmmse_error(snr, _nakagami_log_mgf(m))


def mean_lmmse_error_rician(snr: ArrayLike, k_factor: ArrayLike) -> Values:
    """E[1 / (1 + snr g)] on Rician fading of linear K-factor; method and error as for Nakagami-m."""
    snr, k_factor = jnp.broadcast_arrays(_non_negative("snr", snr), _non_negative("k_factor", k_factor))
    return _mean_lmmse_error(snr, _rician_log_mgf(k_factor))


def rayleigh_gain_cdf(gain: ArrayLike) -> Values:
    """P(|h|^2 <= gain) = 1 - exp(-gain) of Rayleigh fading; the amplitude's CDF at r is that of gain = r^2."""
    return -jnp.expm1(-_non_negative("gain", gain))


def nakagami_gain_cdf(gain: ArrayLike, m: ArrayLike) -> Values:
    """P(|h|^2 <= gain) of Nakagami-m fading, m >= 0.5: the regularised lower incomplete gamma function at m gain.

    M. Nakagami, "The m-distribution: a general formula of intensity distribution of rapid fading", 1960.
    """
    gain, m = jnp.broadcast_arrays(_non_negative("gain", gain), _shape_parameter(m))
    return gammainc(m, m * gain)


def rician_gain_cdf(gain: ArrayLike, k_factor: ArrayLike) -> Values:
    """P(|h|^2 <= gain) = 1 - Q1(sqrt(2 K), sqrt(2 (1 + K) gain)) of Rician fading; error under 1e-5 down to 1e-30.

    At exactly gain = 0 and K = 0 the gradients in them are given as 0. M. K. Simon and M.-S. Alouini, "Digital
    Communication over Fading Channels", 2005, chapters 2 and 4.
    """
    gain, k_factor = _non_negative("gain", gain), _non_negative("k_factor", k_factor)
    return rice_cdf(safe_sqrt(2 * k_factor), safe_sqrt(2 * (1 + k_factor) * gain))


def outage_rayleigh(snr: ArrayLike, rate: ArrayLike) -> Values:
    """P(log2(1 + snr g) < rate) = 1 - exp(-(2^rate - 1) / snr), rate in bits per symbol; snr > 0.

    D. Tse and P. Viswanath, "Fundamentals of Wireless Communication", 2005, section 5.4.
    """
    return rayleigh_gain_cdf(_outage_gain(snr, rate))


def outage_nakagami(snr: ArrayLike, rate: ArrayLike, m: ArrayLike) -> Values:
    """P(log2(1 + snr g) < rate) on Nakagami-m fading, rate in bits per symbol; snr > 0, m >= 0.5."""
    return nakagami_gain_cdf(_outage_gain(snr, rate), m)


def outage_rician(snr: ArrayLike, rate: ArrayLike, k_factor: ArrayLike) -> Values:
    """P(log2(1 + snr g) < rate) on Rician fading of linear K-factor, rate in bits per symbol; snr > 0."""
    return rician_gain_cdf(_outage_gain(snr, rate), k_factor)


def outage_capacity_rayleigh(snr: ArrayLike, outage: ArrayLike) -> Values:
    """Largest rate, in bits per symbol, with outage probability `outage` in [0, 1): log2(1 - snr ln(1 - outage)).

    D. Tse and P. Viswanath, "Fundamentals of Wireless Communication", 2005, section 5.4.
    """
    snr = _non_negative("snr", snr)
    check("outage", outage, "in [0, 1)", lambda value: (value >= 0) & (value < 1))
    return jnp.log1p(-snr * jnp.log1p(-jnp.asarray(outage, jnp.float32))) / _LN2


def jakes_autocorrelation(doppler: ArrayLike, lag: ArrayLike) -> Values:
    """E[h(t + lag) conj(h(t))] = J0(2 pi doppler lag) of Clarke's isotropic scattering.

    `doppler` is the largest shift, in the reciprocal of the unit of `lag` (Hz and s, or cycles per block and blocks).
    R. H. Clarke, "A statistical theory of mobile-radio reception", Bell Syst. Tech. J. 47, 1968.
    """
    doppler = _non_negative("doppler", doppler)
    check("lag", lag, "finite", np.isfinite)
    return bessel_j0(np.float32(2 * np.pi) * doppler * jnp.asarray(lag, jnp.float32))


def level_crossing_rate_rayleigh(threshold: ArrayLike, doppler: ArrayLike) -> Values:
    """Mean number of upward crossings of |h| = threshold per unit of time: sqrt(2 pi) f_D rho exp(-rho^2).

    Clarke's spectrum of largest Doppler shift `doppler`, in crossings per the time unit of 1 / doppler; `threshold` is
    relative to the RMS amplitude. Of a process in continuous time: gains known once a block cross less often
    (`block_crossing_rate_rayleigh`). S. O. Rice, "Statistical properties of a sine wave plus random noise", Bell Syst.
    Tech. J. 27, 1948; W. C. Jakes, "Microwave Mobile Communications", 1974, chapter 1.
    """
    return level_crossing_rate_rician(threshold, doppler, 0.0)


def level_crossing_rate_rician(threshold: ArrayLike, doppler: ArrayLike, k_factor: ArrayLike) -> Values:
    """As `level_crossing_rate_rayleigh`, with a line of sight of K-factor `k_factor` and of constant phase.

    sqrt(2 pi (K + 1)) f_D rho exp(-K - (K + 1) rho^2) I0(2 rho sqrt(K (K + 1))): the line of sight has no Doppler
    shift. G. L. Stuber, "Principles of Mobile Communication", chapter 2.
    """
    threshold, doppler = _non_negative("threshold", threshold), _non_negative("doppler", doppler)
    k_factor = _non_negative("k_factor", k_factor)
    sight, level = safe_sqrt(k_factor), jnp.sqrt(k_factor + 1) * threshold
    # exp(-K - (K + 1) rho^2) I0(2 rho sqrt(K (K + 1))) in factors that neither overflow nor vanish.
    density = jnp.exp(-jnp.square(level - sight)) * jax.lax.bessel_i0e(2 * sight * level)
    return np.float32(math.sqrt(2 * math.pi)) * doppler * level * density


def average_fade_duration_rayleigh(threshold: ArrayLike, doppler: ArrayLike) -> Values:
    """Mean time that |h| stays below threshold once there, (exp(rho^2) - 1) / (sqrt(2 pi) f_D rho).

    `threshold` > 0 is relative to the RMS amplitude, `doppler` > 0 is the largest shift of Clarke's spectrum, and the
    unit of time is that of 1 / doppler. Source as in `level_crossing_rate_rayleigh`.
    """
    threshold, doppler = _positive("threshold", threshold), _positive("doppler", doppler)
    return jnp.expm1(jnp.square(threshold)) / (np.float32(math.sqrt(2 * math.pi)) * doppler * threshold)


def average_fade_duration_rician(threshold: ArrayLike, doppler: ArrayLike, k_factor: ArrayLike) -> Values:
    """As `average_fade_duration_rayleigh`, under the assumptions of `level_crossing_rate_rician`."""
    threshold, doppler = _positive("threshold", threshold), _positive("doppler", doppler)
    rate = level_crossing_rate_rician(threshold, doppler, k_factor)
    return rician_gain_cdf(jnp.square(threshold), k_factor) / rate


def block_crossing_rate_rayleigh(threshold: ArrayLike, doppler: ArrayLike) -> Values:
    """Mean number of upward crossings of |h| = threshold per block by gains that are known once a block only.

    P(|h_t| < threshold <= |h_{t+1}|) of Rayleigh gains with correlation r = J0(2 pi doppler), `doppler` in cycles per
    block: what `JakesFading` draws. It is below `level_crossing_rate_rayleigh`, which also counts what happens between
    two blocks, and comes near it for a small Doppler shift:

        integral from 0 to threshold of 2 u exp(-u^2) Q1(|r| u / s, threshold / s) du,  s^2 = (1 - r^2) / 2,

    with Marcum's Q1, as |h_{t+1}| / s given |h_t| = u is Rice distributed; error under 4e-5 from 0.001 cycles on, 1e-3
    at 0.0001. M. Schwartz, W. R. Bennett and S. Stein, "Communication Systems and Techniques", 1966, appendix A (two
    correlated Rayleigh variables).
    """
    threshold, doppler = _non_negative("threshold", threshold), _non_negative("doppler", doppler)
    x = np.float32(2 * np.pi) * doppler
    correlation, square = jnp.abs(bessel_j0(x)), jnp.square(x)
    short = jnp.where(x < 0.5, square / 4 * (1 - square / 16 * (1 - square / 36)), 1 - correlation)  # 1 - J0(x)
    spread = safe_sqrt(short * (1 + correlation) / 2)
    scale = 1 / jnp.where(spread > 0, spread, 1.0)
    # Blocks that cross lie within a few spreads of the threshold.
    lowest = threshold - jnp.minimum(threshold, 9 * spread)

    def crossing(node, weight):
        u = lowest + node * (threshold - lowest)
        return weight * 2 * u * jnp.exp(-jnp.square(u)) * marcum_q1(correlation * u * scale, threshold * scale)

    return (threshold - lowest) * jnp.sum(jax.vmap(crossing)(*gauss_legendre()), axis=0)


def block_fade_duration_rayleigh(threshold: ArrayLike, doppler: ArrayLike) -> Values:
    """Mean number of consecutive blocks with |h| below threshold, P(|h| < threshold) over their rate of crossings.

    As in `block_crossing_rate_rayleigh`; `threshold` and `doppler` must be more than 0. It is above
    `average_fade_duration_rayleigh`, and at least 1 block.
    """
    threshold, doppler = _positive("threshold", threshold), _positive("doppler", doppler)
    return -jnp.expm1(-jnp.square(threshold)) / block_crossing_rate_rayleigh(threshold, doppler)


@functools.cache
def _q_terms(modulation: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights w [j] and scales a [j] with BER = sum_j w_j Q(sqrt(2 a_j snr)): Cho and Yoon, summed over the bits."""
    size = bits_per_symbol(modulation)
    if size == 1:
        return np.ones(1, np.float32), np.ones(1, np.float32)
    side = 2 ** (size // 2)
    weights = np.zeros(side - 1)
    for k in range(1, size // 2 + 1):
        j = np.arange(side - side // 2**k)
        sign = (-1.0) ** (j * 2 ** (k - 1) // side)
        weights[: j.size] += sign * (2 ** (k - 1) - (2**k * j + side) // (2 * side))
    odd = 2 * np.arange(side - 1) + 1
    weights, scales = weights * 2 / (side * (size // 2)), 1.5 * odd**2 / (side**2 - 1)
    return weights[weights != 0].astype(np.float32), scales[weights != 0].astype(np.float32)


def _sum_q_terms(modulation: str, term: Callable[[Float[Array, ""]], Values]) -> Values:
    """sum_j w_j term(a_j) over the Q functions of the modulation's bit error rate."""
    return jnp.sum(jax.vmap(lambda weight, scale: weight * term(scale))(*_q_terms(modulation)), axis=0)


def _nakagami_log_mgf(m: Values) -> LogMgf:
    return lambda s: -m * jnp.log1p(s / m)


def _rician_log_mgf(k_factor: Values) -> LogMgf:
    return lambda s: -jnp.log1p(s / (1 + k_factor)) - k_factor * (s / (1 + k_factor + s))


def _craig_average(snr: Values, log_mgf: LogMgf) -> Values:
    """E[Q(sqrt(2 snr g))] as Craig's integral over theta with tan(theta) = exp(v)."""
    nodes = np.linspace(-_TAIL, _TAIL, _NODES)
    weights = (nodes[1] - nodes[0]) / (2 * np.pi * np.cosh(nodes))
    squared_cosecants = 1 + np.exp(-2 * nodes)

    def weighted(weight, squared_cosecant):
        return weight * jnp.exp(log_mgf(snr * squared_cosecant))

    return jnp.sum(jax.vmap(weighted)(weights.astype(np.float32), squared_cosecants.astype(np.float32)), axis=0)


def _ergodic_capacity(snr: Values, log_mgf: LogMgf) -> Values:
    return _log_quadrature(snr, lambda z: -jnp.expm1(log_mgf(snr * z)) * jnp.exp(-z)) / _LN2


def _mean_lmmse_error(snr: Values, log_mgf: LogMgf) -> Values:
    return _log_quadrature(snr, lambda z: z * jnp.exp(log_mgf(snr * z) - z))


def _log_quadrature(snr: Values, integrand: Callable[[Values], Values]) -> Values:
    """int integrand(z) dz / z over z > 0, for one that falls like z below 1 / (1 + snr) and like exp(-z) above 1."""
    lowest, highest = -_TAIL - jnp.log1p(snr), np.float32(math.log(25.0))
    values = jax.vmap(lambda node: integrand(jnp.exp(lowest + node * (highest - lowest))))
    step = (highest - lowest) / (_NODES - 1)
    return step * jnp.sum(values(np.linspace(0, 1, _NODES, dtype=np.float32)), axis=0)


def _outage_gain(snr: ArrayLike, rate: ArrayLike) -> Values:
    """The gain (2^rate - 1) / snr at which the capacity is `rate`."""
    return jnp.expm1(_LN2 * _non_negative("rate", rate)) / _positive("snr", snr)


def _non_negative(name: str, value: ArrayLike) -> Values:
    check(name, value, "finite and 0 or more", lambda numbers: numbers >= 0)
    return jnp.asarray(value, jnp.float32)


def _positive(name: str, value: ArrayLike) -> Values:
    check(name, value, "finite and positive", lambda numbers: numbers > 0)
    return jnp.asarray(value, jnp.float32)


def _shape_parameter(m: ArrayLike) -> Values:
    check("m", m, "0.5 or more", lambda numbers: numbers >= 0.5)
    return jnp.asarray(m, jnp.float32)
