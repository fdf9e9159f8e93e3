"""Laws of block-fading gains h_t that are correlated in time, all Rayleigh in each block with E|h_t|^2 = 1."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e
from jaxtyping import Array, ArrayLike, Complex, Key

from megjax.channel.fading.base import FADINGS, FadingLaw
from megjax.channel.parameters import channel_model, check, number, scalar
from megjax.channel.phasor import rotation
from megjax.channel.random import complex_normal, split, uniform
from megjax.configs import require_count
from megjax.numerics import safe_sqrt
from megjax.precision import EXACT
from megjax.pytrees import static


@channel_model
class JakesFading:
    """Clarke's isotropic scattering: Rayleigh fading with E[h_{t+k} h_t*] = J0(2 pi doppler k).

    `doppler` >= 0 is the maximum Doppler frequency times the duration of a block, in cycles per block. The gains are
    the sum of M = `num_paths` (static) plane waves,

        h_t = sum_i a_i exp(j 2 pi doppler t cos(theta_i)),  a_i ~ CN(0, 1/M) independent,

    with one angle of arrival theta_i uniform in each of M equal sectors of the half circle [0, pi]. The Doppler shift
    sees only the cosine, so arrivals from both sides of the direction of travel are one and the same, and sectors of
    half the width follow the spectrum more closely. R. H. Clarke, "A statistical theory of mobile-radio reception",
    Bell Syst. Tech. J. 47, 1968 (the model and J0); random angles in sectors after Y. R. Zheng and C. Xiao, "Simulation
    models with correct statistical properties for Rayleigh fading channels", IEEE Trans. Commun. 51(6), 2003.

    What is exact for every M: each h_t is CN(0, 1), and the autocorrelation over the ensemble is J0, since the sectors
    together are the whole circle. What depends on M: given the angles the gains are jointly Gaussian, with
    autocorrelation rho_M(k) = (1/M) sum_i exp(j x cos(theta_i)), x = 2 pi doppler k, which fluctuates around J0(x).
    Hence

        E|h_t|^2 |h_{t+k}|^2 = 1 + E|rho_M(k)|^2 = 1 + J0(x)^2 + v,
        v = Var rho_M(k) = (1 - (1/M) sum_i |mu_i|^2) / M <= min((1 - J0(x)^2) / M, x^2 / (2 M^3)),

    where mu_i is the mean of exp(j x cos(theta)) in sector i; for x << M, v is about pi^2 x^2 / (24 M^3). In general
    E|sum_t c_t h_t|^4 exceeds its Gaussian value by 2 Var(c^H R_M c), R_M the matrix of rho_M. So M bounds how
    independent blocks become that are far apart (power correlation 1/M instead of 0, reached at x of about M), and time
    averages of one long realisation converge to those of its own M lines, not of the ensemble: average over
    realisations.

    The turns made in a block are kept as a 32-bit fraction, which integers multiply by t without error: the phase of
    block t is within 2^-31 t turns (3e-4 radians at t = 10^5) for any Doppler, and the rounding of doppler cos(theta)
    to float32 only moves theta_i, by the same for all t. Lags up to x of about 10^6 are resolved. Differentiable in
    doppler, to any order; the derivative of block t grows as t. Raises ValueError for doppler < 0 or not finite, or
    num_paths < 1.
    """

    dependence: ClassVar[str] = "other"
    doppler: ArrayLike
    num_paths: int = static(32)

    def __post_init__(self):
        check("doppler", self.doppler, "finite and 0 or more, in cycles per block", lambda f: f >= 0)
        require_count("num_paths", self.num_paths)

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t] of consecutive blocks, a stationary and jointly circular process."""
        require_count("num_blocks", num_blocks)
        doppler = scalar("doppler", self.doppler)
        angle_key, path_key = split(key)
        sector = np.arange(self.num_paths, dtype=np.float32)
        angles = np.float32(math.pi / self.num_paths) * (sector + uniform(angle_key, (self.num_paths,)))
        paths = complex_normal(path_key, (self.num_paths,)) * np.complex64(self.num_paths**-0.5)
        # Block t = q r + s turns by q r, then by s: M (T / r + r) rotations and a small matrix product make M T terms.
        stride = math.isqrt(num_blocks - 1) + 1
        turns = doppler * jnp.cos(angles)
        coarse = jax.lax.complex(*rotation(turns, range(0, num_blocks, stride))) * paths[:, None]
        fine = jax.lax.complex(*rotation(turns, range(stride)))
        gains = jnp.einsum("mq,ms->qs", coarse, fine, precision=EXACT)
        return gains.reshape(-1)[:num_blocks]

    def gain_log_density(self, gains: np.ndarray) -> np.ndarray:
        """Of the exponential distribution."""
        return -gains


@channel_model
class GaussMarkovFading:
    """First-order autoregressive Rayleigh fading: E[h_{t+k} h_t*] = rho^k, the blocks a stationary Markov chain.

    h_1 ~ CN(0, 1) and h_{t+1} = rho h_t + sqrt(1 - rho^2) w_t, w_t ~ CN(0, 1): W. Turin and R. van Nobelen, "Hidden
    Markov modeling of flat fading channels", IEEE J. Sel. Areas Commun. 16(9), 1998. `rho` is real, -1 <= rho <= 1: 0
    is `RayleighFading`, 1 one gain for all blocks; J0(2 pi doppler) matches `JakesFading` over one block. At |rho| = 1
    exactly, where the innovation's sqrt has no derivative, the gradient is that of rho h_t alone. Raises ValueError for
    |rho| > 1 or not finite.
    """

    dependence: ClassVar[str] = "markov"
    rho: ArrayLike

    def __post_init__(self):
        check("rho", self.rho, "a real number from -1 to 1", lambda rho: np.abs(rho) <= 1)

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t] of consecutive blocks, stationary from the first."""
        require_count("num_blocks", num_blocks)
        rho = scalar("rho", self.rho)
        innovation = safe_sqrt((1 - rho) * (1 + rho)).astype(jnp.complex64)
        rho = rho.astype(jnp.complex64)
        noise = complex_normal(key, (num_blocks,))

        def advance(gain, noise):
            gain = rho * gain + innovation * noise
            return gain, gain

        later = jax.lax.scan(advance, noise[0], noise[1:])[1]
        return jnp.concatenate([noise[:1], later])

    def gain_log_density(self, gains: np.ndarray) -> np.ndarray:
        """Of the exponential distribution."""
        return -gains

    def transition_log_density(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Of the noncentral chi-squared distribution.

        The density is exp(-(x + r g) / (1 - r)) I0(2 sqrt(r g x) / (1 - r)) / (1 - r), r = rho^2, at x = `after` for
        g = `before`.
        """
        r = number(self, "rho") ** 2
        argument = 2 * np.sqrt(r * before * after) / (1 - r)
        return argument - (after + r * before) / (1 - r) + np.log(np.asarray(i0e(argument), np.float64))


FADINGS.register(
    FadingLaw(
        name="jakes",
        title="Jakes",
        version=1,
        rank=50,
        make=JakesFading,
        parameter="Doppler shift in cycles per block",
    )
)
FADINGS.register(
    FadingLaw(
        name="gauss-markov",
        title="Gauss-Markov",
        version=1,
        rank=60,
        make=GaussMarkovFading,
        parameter="correlation",
    )
)
