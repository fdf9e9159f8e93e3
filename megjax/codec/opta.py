"""Gaussian OPTA: the least error that any scheme can reach for a Gaussian source over a given link, at any delay.

The optimum performance theoretically attainable joins the source's rate-distortion function to the channel's capacity:
C. E. Shannon, "Coding theorems for a discrete source with a fidelity criterion", IRE Nat. Conv. Rec., 1959; A. N.
Kolmogorov, "On the Shannon theory of information transmission in the case of continuous signals", IRE Trans. Inf.
Theory 2, 1956 (reverse water-filling); T. Berger, "Rate Distortion Theory", 1971. A source with the same covariance
that is not Gaussian can do better, so it bounds no learned codec.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Num

from megjax.channel.parameters import check
from megjax.channel.theory import capacity_awgn

_LN4 = np.float32(np.log(4.0))


def gaussian_distortion(variances: Float[Array, " n"], bits: Float[ArrayLike, ""]) -> Float[Array, ""]:
    """Least mean squared error, summed over n independent Gaussian components, when `bits` describe all of them.

    Reverse water-filling: sum_k min(theta, v_k) at the level theta where sum_k max(0, log2(v_k / theta) / 2) = bits.
    `variances` [n] are 0 or more, in any order; `bits` is the number of bits per vector, 0 or more. Elementwise
    rounding apart it falls with `bits`, from the sum of the variances at 0. Raises ValueError, outside jit, for
    values that are negative or not finite, or for variances that are all 0.
    """
    check("variances", variances, "finite, 0 or more and not all 0", lambda v: (v >= 0) & (v > 0).any())
    check("bits", bits, "finite and 0 or more", lambda value: value >= 0)
    largest = jnp.max(variances)
    relative = jnp.sort(variances / largest, descending=True)
    # The rate at a level is the largest, over j, of sum_{k <= j} ln(v_k / level) / ln 4: terms below 0 only lower the
    # sum. So the level at which it equals `bits` is the largest of those at which one of these sums does.
    counts = jnp.arange(1, relative.shape[0] + 1, dtype=jnp.float32)
    log_level = jnp.max((jnp.cumsum(jnp.log(relative)) - _LN4 * bits) / counts)
    return largest * jnp.sum(jnp.minimum(relative, jnp.exp(log_level)))


def link_bits(snr: Float[Array, " t"], counts: Num[ArrayLike, " t"]) -> Float[Array, ""]:
    """Bits that a link carries at best in one gain realisation, sum_t k_t log2(1 + gamma_t).

    `snr` [t] is the linear gamma_t of the complex symbols of block t, `counts` [t] the number k_t of them, such as
    `channel.symbols_per_block`. Raises ValueError, outside jit, for values that are negative or not finite.
    """
    check("counts", counts, "finite and 0 or more", lambda k: k >= 0)
    return jnp.sum(jnp.asarray(counts, jnp.float32) * capacity_awgn(snr))


def opta_nmse(variances: Float[Array, " n"], snr: Float[Array, " t"], counts: Num[ArrayLike, " t"]) -> Float[Array, ""]:
    """Gaussian OPTA in one gain realisation, relative to the total variance: in (0, 1], and 1 without any SNR.

    `variances` [n] are the eigenvalues of the source's covariance, `snr` [t] and `counts` [t] as in `link_bits`.
    The caller averages over realisations. Raises ValueError as `gaussian_distortion` and `link_bits`.
    """
    return gaussian_distortion(variances, link_bits(snr, counts)) / jnp.sum(variances)
