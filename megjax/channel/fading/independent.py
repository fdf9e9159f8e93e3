"""Laws of the block-fading gains h_t, all with E|h_t|^2 = 1, that are independent from block to block."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e
from jaxtyping import Array, ArrayLike, Complex, Key

from megjax.channel.fading.base import FADINGS, FadingLaw
from megjax.channel.loading import mean_lmmse_error_awgn
from megjax.channel.parameters import channel_model, check, number, scalar
from megjax.channel.random import complex_normal, split, unit_phasor
from megjax.configs import require_count
from megjax.numerics import safe_sqrt
from megjax.pytrees import static
from megjax.units import db_to_linear


@channel_model
class NoFading:
    """Additive white Gaussian noise only: every gain is 1."""

    dependence: ClassVar[str] = "independent"
    mean_lmmse_error = staticmethod(mean_lmmse_error_awgn)

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t] of ones; `key` is unused."""
        require_count("num_blocks", num_blocks)
        return jnp.ones(num_blocks, jnp.complex64)


@channel_model
class RayleighFading:
    """Independent Rayleigh fading from block to block: h_t ~ CN(0, 1), so |h_t|^2 is exponential with mean 1."""

    dependence: ClassVar[str] = "independent"

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t], independent and circularly symmetric Gaussian."""
        require_count("num_blocks", num_blocks)
        return complex_normal(key, (num_blocks,))

    def gain_log_density(self, gains: np.ndarray) -> np.ndarray:
        """Of the exponential distribution."""
        return -gains


@channel_model
class RicianFading:
    """A line of sight, the same in all blocks, plus independent scattering in each.

    h_t = sqrt(K / (K + 1)) exp(j phi) + sqrt(1 / (K + 1)) w_t, w_t ~ CN(0, 1): D. Tse and P. Viswanath, "Fundamentals
    of Wireless Communication", 2005, section 2.4.2. `k_factor` is K >= 0, the linear power ratio of line of sight to
    scattering; `los_phase` is phi in radians. With `random_phase` (static) a phase uniform on the circle is added,
    drawn once per realisation. At K = 0 exactly, where sqrt(K) has no derivative, the gradient with respect to
    `k_factor` is that of the scattering alone. Raises ValueError for K < 0 or values that are not finite.
    """

    dependence: ClassVar[str] = "independent"
    k_factor: ArrayLike
    los_phase: ArrayLike = 0.0
    random_phase: bool = static(False)

    def __post_init__(self):
        check("k_factor", self.k_factor, "finite and 0 or more (linear, not dB)", lambda k: k >= 0)
        check("los_phase", self.los_phase, "a finite angle in radians", lambda phase: True)
        if not isinstance(self.random_phase, bool):
            raise ValueError(f"random_phase is {self.random_phase!r}; it must be True or False")

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t], independent given the phase of the line of sight."""
        require_count("num_blocks", num_blocks)
        k_factor, phase = scalar("k_factor", self.k_factor), scalar("los_phase", self.los_phase)
        direction = jax.lax.complex(jnp.cos(phase), jnp.sin(phase))
        if self.random_phase:
            key, phase_key = split(key)
            direction = direction * unit_phasor(phase_key, ())
        line_of_sight = safe_sqrt(k_factor / (1 + k_factor)).astype(jnp.complex64) * direction
        return line_of_sight + jax.lax.rsqrt(1 + k_factor).astype(jnp.complex64) * complex_normal(key, (num_blocks,))

    def gain_log_density(self, gains: np.ndarray) -> np.ndarray:
        """Of the noncentral chi-squared distribution with two degrees of freedom."""
        k = number(self, "k_factor")
        argument = 2 * np.sqrt(k * (1 + k) * gains)
        return argument - (1 + k) * gains + np.log(np.asarray(i0e(argument), np.float64))


@channel_model
class NakagamiFading:
    """Independent Nakagami-m fading from block to block: |h_t|^2 ~ Gamma(shape m, scale 1/m), uniform phase.

    `m` >= 0.5; 1 is Rayleigh fading, and larger is milder: the variance of |h_t|^2 is 1/m. M. Nakagami, "The
    m-distribution: a general formula of intensity distribution of rapid fading", 1960, eq. 3. Differentiable in m,
    through the implicit gradient of `jax.random.loggamma`. Raises ValueError for m < 0.5 or not finite.
    """

    dependence: ClassVar[str] = "independent"
    m: ArrayLike

    def __post_init__(self):
        check("m", self.m, "finite and 0.5 or more", lambda m: m >= 0.5)

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t], independent and circularly symmetric."""
        require_count("num_blocks", num_blocks)
        m = scalar("m", self.m)
        gamma_key, phase_key = split(key)
        # The logarithm keeps deep fades, whose power rounds to 0 for small m, and gives them a finite gradient.
        log_power = jax.random.loggamma(gamma_key, m, (num_blocks,), jnp.float32) - jnp.log(m)
        return jnp.exp(log_power / 2).astype(jnp.complex64) * unit_phasor(phase_key, (num_blocks,))

    def gain_log_density(self, gains: np.ndarray) -> np.ndarray:
        """Of the gamma distribution."""
        m = number(self, "m")
        return (m - 1) * np.log(gains) - m * gains


FADINGS.register(FadingLaw(name="rayleigh", title="Rayleigh", version=1, rank=10, make=RayleighFading))
FADINGS.register(FadingLaw(name="awgn", title="AWGN", version=1, rank=20, make=NoFading))
FADINGS.register(
    FadingLaw(
        name="rician",
        title="Rician",
        version=1,
        rank=30,
        make=lambda k_db: RicianFading(float(db_to_linear(k_db))),
        parameter="K in dB",
    )
)
FADINGS.register(FadingLaw(name="nakagami", title="Nakagami", version=1, rank=40, make=NakagamiFading, parameter="m"))
