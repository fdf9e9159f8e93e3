"""Linear analog schemes: the raw latent, its full-covariance Wiener receiver, and the KLT with power loading.

A scheme turns a latent into real values of unit variance, two of which make a complex symbol. Decoders take what the
link hands over for the m values that were sent: `estimate` [m], the LMMSE estimates a_k (x_k + noise) with
a_k = snr_k / (1 + snr_k), and `snr` [m], linear, 0 for a value of which nothing was received. Values beyond the first
m were not sent. One latent at a time; the caller vmaps.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, ArrayLike, Float

from megjax.channel.loading import MeanError, static_load
from megjax.configs import require
from megjax.numerics import safe_sqrt
from megjax.precision import exact_matmul

VARIANCE_FLOOR = 1e-7
"""Smallest variance kept, relative to the largest: below it the coefficients drown in the rounding of float32."""


class LatentStatistics(NamedTuple):
    """Second-order statistics of flattened latents of n reals: a pytree of float32 arrays."""

    mean: Float[Array, " n"]
    variances: Float[Array, " n"]
    """Eigenvalues of the covariance, falling, none below `VARIANCE_FLOOR` of the first."""
    basis: Float[Array, "n n"]
    """Eigenvectors of the covariance, the columns, in the order of their eigenvalues."""

    @property
    def total_variance(self) -> Float[Array, ""]:
        """Trace of the covariance: the mean squared error of the mean, the denominator of every NMSE."""
        return jnp.sum(self.variances)


def latent_statistics(latents: ArrayLike) -> LatentStatistics:
    """Statistics of latents [b h w c], b >= 2, computed in float64 on the host.

    The covariance divides by b, so that the whitened coefficients of these very latents have unit power. Raises
    ValueError for another rank, fewer than two latents, values that are not finite, or latents that are all the same.
    """
    latents = np.asarray(latents)
    require(latents.ndim == 4 and latents.shape[0] >= 2, "latents' shape", latents.shape, "[b h w c] with b >= 2")
    values = latents.reshape(latents.shape[0], -1).astype(np.float64)
    bad = int(np.sum(~np.all(np.isfinite(values), axis=1)))
    require(bad == 0, "latents", f"{bad} of {values.shape[0]} not finite", "finite")
    mean = values.mean(axis=0)
    centred = values - mean
    variances, basis = np.linalg.eigh(centred.T @ centred / values.shape[0])
    require(bool(variances[-1] > 0), "latents' largest variance", float(variances[-1]), "positive")
    variances = np.maximum(variances, VARIANCE_FLOOR * variances[-1])
    arrays = mean, variances[::-1], basis[:, ::-1]
    return LatentStatistics(*(jnp.asarray(array, jnp.float32) for array in arrays))


def klt_coefficients(statistics: LatentStatistics, latent: Float[Array, "..."]) -> Float[Array, " n"]:
    """Uncorrelated coefficients [n] of a latent with n reals, of variances `statistics.variances`.

    Raises ValueError for a latent of another size.
    """
    size = statistics.mean.shape[0]
    require(latent.size == size, "latent's shape", latent.shape, f"one with {size} values")
    return exact_matmul(statistics.basis.T, latent.reshape(-1) - statistics.mean)


def klt_synthesis(
    statistics: LatentStatistics, coefficients: Float[Array, " m"], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """The latent of `shape` with these first m coefficients, and the others at their mean, 0.

    Raises ValueError for more coefficients than the latent has values, or for another shape.
    """
    count = _check_received(statistics, coefficients, shape)
    return (statistics.mean + exact_matmul(statistics.basis[:, :count], coefficients)).reshape(shape)


def klt_encode(statistics: LatentStatistics, latent: Float[Array, "..."]) -> Float[Array, " n"]:
    """Values [n] of unit variance, most important first: the coefficients divided by their standard deviations.

    The Karhunen-Loeve transform: H. Hotelling, 1933; optimal among linear codes with `klt_load`. Raises ValueError for
    a latent of another size.
    """
    return klt_coefficients(statistics, latent) / jnp.sqrt(statistics.variances)


def klt_load(
    statistics: LatentStatistics, num_values: int, snr: Float[ArrayLike, ""], mean_error: MeanError
) -> Float[Array, " m"]:
    """Power loads [num_values] of mean 1 of the first values of `klt_encode`, which minimise the mean squared error.

    `snr` and `mean_error` are those of `channel.loading.static_load`: value k then arrives at the SNR load_k snr g.
    Raises ValueError, besides its errors, for a number of values outside 1..n.
    """
    size = statistics.mean.shape[0]
    require(1 <= num_values <= size, "num_values", num_values, f"between 1 and {size}")
    return static_load(statistics.variances[:num_values], snr, mean_error)


def klt_decode(
    statistics: LatentStatistics, estimate: Float[Array, " m"], snr: Float[Array, " m"], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """LMMSE estimate, of `shape`, of a latent sent by `klt_encode`; values that were not sent count as their mean.

    The values are uncorrelated and of unit variance, so the link's estimates of them are optimal as they stand; `snr`
    is there because every decoder takes it. Raises ValueError as `klt_synthesis`.
    """
    del snr
    count = _check_received(statistics, estimate, shape)
    return klt_synthesis(statistics, jnp.sqrt(statistics.variances[:count]) * estimate, shape)


def klt_nmse(
    statistics: LatentStatistics, load: Float[Array, " m"], snr: Float[ArrayLike, ""], mean_error: MeanError
) -> Float[Array, ""]:
    """Mean squared error of the KLT scheme relative to the total variance, averaged over the gain.

    (sum_{k <= m} v_k E[1 / (1 + load_k snr g)] + sum_{k > m} v_k) / sum_k v_k; arguments as for `klt_load`.
    Raises ValueError for more loads than coefficients.
    """
    size, count = statistics.mean.shape[0], load.shape[0]
    require(count <= size, "number of loads", count, f"at most {size}")
    variances = statistics.variances
    received = jnp.sum(variances[:count] * mean_error(load * snr))
    return (received + jnp.sum(variances[count:])) / statistics.total_variance


def raw_encode(mean: Float[Array, " c"], std: Float[Array, " c"], latent: Float[Array, "h w c"]) -> Float[Array, " n"]:
    """Values [n] of the raw latent in their natural order, standardised by the constants of each channel."""
    return ((latent - mean[None, None]) / std[None, None]).reshape(-1)


def raw_decode(
    mean: Float[Array, " c"],
    std: Float[Array, " c"],
    estimate: Float[Array, " m"],
    snr: Float[Array, " m"],
    shape: tuple[int, int, int],
) -> Float[Array, "h w c"]:
    """A raw latent [h w c] received symbol by symbol: the link's estimates, with the standardisation undone.

    `snr` is there because every decoder takes it. Values that were not sent count as `mean`. Raises ValueError for more
    values than the shape has.
    """
    del snr
    size = math.prod(shape)
    require(estimate.shape[0] <= size, "estimate's shape", estimate.shape, f"at most {size} values")
    return jnp.pad(estimate, (0, size - estimate.shape[0])).reshape(shape) * std[None, None] + mean[None, None]


def wiener_decode(
    statistics: LatentStatistics,
    mean: Float[Array, " c"],
    std: Float[Array, " c"],
    estimate: Float[Array, " m"],
    snr: Float[Array, " m"],
    shape: tuple[int, int, int],
) -> Float[Array, "h w c"]:
    """LMMSE estimate [h w c] of a raw latent from all its received values at once, given its covariance.

    With standardised values x = (z - mean) / std and u = S^1/2 x + n, n ~ N(0, I), S = diag(snr), which the link's
    estimates give as u_k = (1 + snr_k) estimate_k / sqrt(snr_k), the conditional mean of z ~ N(m, C) is
    m + C G^T (G C G^T + I)^-1 (u - S^1/2 x(m)), G = S^1/2 / std: S. M. Kay, "Fundamentals of Statistical Signal
    Processing: Estimation Theory", 1993, chapter 12. The matrix solved is no worse than 1 + snr v / std^2 conditioned,
    v the largest variance, and a value of SNR 0 drops out. Raises ValueError for more values than the latent has, or
    for another shape.
    """
    count = _check_received(statistics, estimate, shape)
    prior = raw_encode(mean, std, statistics.mean.reshape(shape))[:count]
    amplitude = safe_sqrt(snr)
    received = snr > 0
    whitened = jnp.where(received, (1 + snr) * estimate / jnp.where(received, amplitude, 1.0), 0.0)
    gain = amplitude / jnp.broadcast_to(std[None, None], shape).reshape(-1)[:count]
    # Neither product depends on the realisation: under vmap over received values it is computed once.
    covariance = exact_matmul(statistics.basis * statistics.variances[None], statistics.basis.T)[:, :count]
    matrix = gain[:, None] * covariance[:count] * gain[None] + jnp.eye(count, dtype=jnp.float32)
    solution = cho_solve(cho_factor(matrix, lower=True), whitened - amplitude * prior)
    return (statistics.mean + exact_matmul(covariance, gain * solution)).reshape(shape)


def _check_received(statistics: LatentStatistics, values: Float[Array, " m"], shape: tuple[int, ...]) -> int:
    """The number m of values; ValueError unless they and `shape` fit the statistics."""
    size, count = statistics.mean.shape[0], values.shape[0]
    require(math.prod(shape) == size, "shape", shape, f"one with {size} values")
    require(count <= size, "number of values", count, f"at most {size}")
    return count
