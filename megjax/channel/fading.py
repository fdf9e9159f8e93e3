"""Laws of the block-fading gains h_t, all with E|h_t|^2 = 1, that are independent from block to block."""

import math
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Complex, Key

from megjax import units
from megjax.channel.numerics import safe_sqrt
from megjax.channel.parameters import channel_model, check, check_count, scalar
from megjax.channel.random import complex_normal, split, unit_phasor
from megjax.pytrees import static

DEPENDENCES = ("independent", "markov", "other")


@runtime_checkable
class Fading(Protocol):
    """Anything that draws the gains of one transmission.

    `dependence`, one of `DEPENDENCES`, says how the power gains |h_t|^2 of different blocks depend on each other:

    - "independent": not at all.
    - "markov": given |h_t|^2, later ones do not depend on earlier ones.
    - "other": in some other way.
    """

    dependence: ClassVar[str]

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Complex gains [t] of `num_blocks` consecutive blocks, one realisation; the caller vmaps over keys."""


@channel_model
class NoFading:
    """Additive white Gaussian noise only: every gain is 1."""

    dependence: ClassVar[str] = "independent"

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t] of ones; `key` is unused."""
        check_count("num_blocks", num_blocks)
        return jnp.ones(num_blocks, jnp.complex64)


@channel_model
class RayleighFading:
    """Independent Rayleigh fading from block to block: h_t ~ CN(0, 1), so |h_t|^2 is exponential with mean 1."""

    dependence: ClassVar[str] = "independent"

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t], independent and circularly symmetric Gaussian."""
        check_count("num_blocks", num_blocks)
        return complex_normal(key, (num_blocks,))


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
        check_count("num_blocks", num_blocks)
        k_factor, phase = scalar("k_factor", self.k_factor), scalar("los_phase", self.los_phase)
        direction = jax.lax.complex(jnp.cos(phase), jnp.sin(phase))
        if self.random_phase:
            key, phase_key = split(key)
            direction = direction * unit_phasor(phase_key, ())
        line_of_sight = safe_sqrt(k_factor / (1 + k_factor)).astype(jnp.complex64) * direction
        return line_of_sight + jax.lax.rsqrt(1 + k_factor).astype(jnp.complex64) * complex_normal(key, (num_blocks,))


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
        check_count("num_blocks", num_blocks)
        m = scalar("m", self.m)
        gamma_key, phase_key = split(key)
        # The logarithm keeps deep fades, whose power rounds to 0 for small m, and gives them a finite gradient.
        log_power = jax.random.loggamma(gamma_key, m, (num_blocks,), jnp.float32) - jnp.log(m)
        return jnp.exp(log_power / 2).astype(jnp.complex64) * unit_phasor(phase_key, (num_blocks,))


@channel_model
class ShadowedFading:
    """Log-normal shadowing on top of another law: one factor per realisation, the same for all blocks of an image.

    h_t = 10^(X / 20) f_t / sqrt(E 10^(X / 10)) with X ~ N(0, sigma_db^2) in dB and f_t the gains of `fading`, any
    `Fading` that is a pytree. The linear mean E 10^(X / 10) = exp((sigma_db ln 10 / 10)^2 / 2) keeps E|h_t|^2 = 1: the
    median power is then below 0 dB, by sigma_db^2 ln 10 / 20 dB. G. L. Stüber, "Principles of Mobile Communication",
    4th ed., 2017, section 2.4 (log-normal shadowing and its area mean). Raises ValueError for sigma_db < 0 or not
    finite, or when `fading` has no method `sample`.
    """

    dependence: ClassVar[str] = "other"
    fading: Fading
    sigma_db: ArrayLike

    def __post_init__(self):
        if isinstance(self.fading, type) or not callable(getattr(self.fading, "sample", None)):
            raise ValueError(f"fading is {self.fading!r}; it must have a method sample(key, num_blocks)")
        check("sigma_db", self.sigma_db, "finite and 0 or more, in dB", lambda sigma: sigma >= 0)

    @property
    def mean_gain(self) -> float:
        """E|h|^2, that of `fading`."""
        return getattr(self.fading, "mean_gain", 1.0)

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t]: those of `fading` times the shadowing of this realisation."""
        sigma_db = scalar("sigma_db", self.sigma_db)
        fading_key, shadow_key = split(key)
        mean_db = jnp.square(sigma_db) * (math.log(10) / 20)
        shadowing_db = sigma_db * jax.random.normal(shadow_key, (), jnp.float32) - mean_db
        shadowing = units.db_to_linear(shadowing_db / 2).astype(jnp.complex64)
        return shadowing * self.fading.sample(fading_key, num_blocks)
