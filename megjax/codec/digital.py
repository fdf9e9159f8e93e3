"""The digital seed: entropy-coded dead-zone quantisation of the KLT coefficients over an ideal channel code.

One step serves all coefficients. The number of bits is the sum of the empirical entropies of the coefficients' indices
over the training latents, as from an ideal entropy coder that knows them; the channel code reaches capacity. Each SNR
has the step of least mean error, outages included: G. J. Sullivan, "Efficient scalar quantization of exponential and
Laplacian random variables", IEEE Trans. Inf. Theory 42, 1996 (dead zones and centroids).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from megjax.codec.linear import LatentStatistics, klt_coefficients, klt_synthesis
from megjax.configs import require

_LEVELS = 8
"""Indices of this magnitude and beyond, each sign apart, share the place of their centroid in the bin."""
_COARSEST = 4.0
"""Largest step, in standard deviations of the first coefficient: next to no bits."""
_FINEST = 1 / 32
"""Smallest step, in standard deviations of the average coefficient: an NMSE of 1 / (12 * 32^2), -41 dB."""
_UNSENT_STEP = np.finfo(np.float32).max
"""The step of the choice to send nothing: every coefficient has index 0."""


class DigitalSeed(NamedTuple):
    """What the digital seed costs and brings at each of s quantiser steps, coarsest first: a pytree of arrays.

    Step 0 sends nothing: 0 bits, NMSE 1.
    """

    steps: Float[Array, " s"]
    bits: Float[Array, " s"]
    """Bits per latent."""
    nmse: Float[Array, " s"]
    """Mean squared quantisation error relative to the latents' total variance."""
    offsets: Float[Array, "s n l"]
    """Distance of the centroid of a bin from index times step, in steps; last axis: index, clipped to +-(l - 1) / 2."""
    rounding: Float[Array, ""]


def fit_digital(
    statistics: LatentStatistics, latents: ArrayLike, num_steps: int = 64, rounding: float = 0.4
) -> DigitalSeed:
    """Tables of the digital seed over `num_steps` steps, log-spaced, and that of sending nothing, computed on the host.

    `latents` [b h w c] are those of the statistics. A coefficient c has the index sign(c) floor(|c| / step + rounding)
    with `rounding` in [0, 0.5]: 0 is the dead zone |c| < step, 0.5 a uniform quantiser. With 0.4, a dead zone a fifth
    wider than the other bins, the NMSE at equal bits was within 0.1 dB of the best of six roundings from 0 to 0.5, and
    0 cost up to 0.8 dB (6,000 Gaussian and as many Laplacian vectors of 64 reals, 1,800 latents of scenes). Bins are
    reconstructed at their centroids. The steps are less than a dB of NMSE apart, lest their spacing hold the scheme
    back. Raises ValueError for latents of another size or not finite, fewer than two steps, or another rounding.
    """
    latents, size = np.asarray(latents), statistics.mean.shape[0]
    fits = latents.ndim == 4 and latents.shape[0] >= 1 and latents[0].size == size
    require(fits, "latents' shape", latents.shape, f"[b h w c] with h w c = {size}")
    require(num_steps >= 2, "num_steps", num_steps, "2 or more")
    require(0 <= rounding <= 0.5, "rounding", rounding, "in [0, 0.5]")
    mean, variances, basis = (np.asarray(array, np.float64) for array in statistics)
    centred = latents.reshape(latents.shape[0], size).astype(np.float64) - mean
    require(bool(np.all(np.isfinite(centred))), "latents", "not finite", "finite")
    columns = np.sort(centred @ basis, axis=0).T
    steps = np.geomspace(_COARSEST * np.sqrt(variances[0]), _FINEST * np.sqrt(variances.mean()), num_steps)
    bits, error = np.zeros(num_steps + 1), np.full(num_steps + 1, np.mean(np.sum(columns**2, axis=0)))
    offsets = np.zeros((num_steps + 1, size, 2 * _LEVELS + 1), np.float32)
    for k, column in enumerate(columns):
        sums, energy = np.concatenate([[0.0], np.cumsum(column)]), np.mean(column**2)
        for i, step in enumerate(steps, start=1):
            entropy, distortion, offsets[i, k] = _quantised(column, sums, step, rounding)
            bits[i] += entropy
            error[i] += distortion - energy
    arrays = np.concatenate([[_UNSENT_STEP], steps]), bits, error / error[0], offsets, rounding
    return DigitalSeed(*(jnp.asarray(array, jnp.float32) for array in arrays))


def _quantised(
    column: Float[np.ndarray, " b"], sums: Float[np.ndarray, " b+1"], step: float, rounding: float
) -> tuple[float, float, Float[np.ndarray, " l"]]:
    """Entropy in bits, mean squared error, and centroids' offsets [l] in steps, of one coefficient at one step.

    `column` holds the coefficient's values in rising order and `sums` their running sums, so that a bin is a slice.
    """
    reach = int(np.floor(np.max(np.abs(column)) / step + rounding))
    indices = np.arange(-reach, reach + 1)
    edges = (np.arange(1, reach + 1) - rounding) * step
    ends = np.searchsorted(column, np.concatenate([-edges[::-1], edges]))
    ends = np.concatenate([[0], ends, [column.size]])
    counts, totals = np.diff(ends), np.diff(sums[ends])
    excess = totals / step - counts * indices
    groups = np.clip(indices, -_LEVELS, _LEVELS) + _LEVELS
    members = np.bincount(groups, counts, 2 * _LEVELS + 1)
    # Bins that no training latent falls into are reconstructed at their middle.
    middles = np.sign(np.arange(-_LEVELS, _LEVELS + 1)) * (0.5 - rounding)
    offsets = np.where(members > 0, np.bincount(groups, excess, 2 * _LEVELS + 1) / np.maximum(members, 1), middles)
    points = step * (indices + offsets[groups])
    error = np.sum(column**2) - 2 * np.sum(points * totals) + np.sum(points**2 * counts)
    shares = counts[counts > 0] / column.size
    return float(-np.sum(shares * np.log2(shares))), float(error / column.size), offsets


def expected_nmse(digital: DigitalSeed, capacities: Float[Array, " r"]) -> Float[Array, " s"]:
    """Mean NMSE of each step over gain realisations that carry `capacities` [r] bits per image.

    (1 - p_out) nmse + p_out, with outage where the capacity is below the step's bits: the latent is then received as
    its mean.
    """
    outage = jnp.mean(capacities[:, None] < digital.bits[None], axis=0)
    return (1 - outage) * digital.nmse + outage


def choose_step(digital: DigitalSeed, capacities: Float[Array, " r"]) -> Int[Array, ""]:
    """Index of the step of least `expected_nmse`; the transmitter knows the law of the gains, not the gains."""
    return jnp.argmin(expected_nmse(digital, capacities))


def quantise(
    digital: DigitalSeed, statistics: LatentStatistics, latent: Float[Array, "*s"], index: Int[ArrayLike, ""]
) -> Float[Array, "*s"]:
    """The latent as decoded from its digital seed at step `index`, without outage, in its own shape.

    In outage, where the link carries fewer than `digital.bits[index]` bits, the receiver has `statistics.mean`. Raises
    ValueError for a latent of another size.
    """
    coefficients = klt_coefficients(statistics, latent)
    step = digital.steps[index]
    indices = jnp.sign(coefficients) * jnp.floor(jnp.abs(coefficients) / step + digital.rounding)
    levels = (digital.offsets.shape[-1] - 1) // 2
    groups = (jnp.clip(indices, -levels, levels) + levels).astype(jnp.int32)
    offsets = jnp.take_along_axis(digital.offsets[index], groups[:, None], axis=1)[:, 0]
    return klt_synthesis(statistics, (indices + offsets) * step, latent.shape)
