"""Tapped-delay-line channels of 3GPP TR 38.901: fading taps on the delays of TDL-A to TDL-E."""

import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, Float, Key

from megjax.channel.parameters import channel_model, check, scalar
from megjax.channel.phasor import rotation
from megjax.channel.random import complex_normal, split, uniform, unit_phasor
from megjax.channel.tdl_profiles import PROFILES, TDLProfile
from megjax.configs import require_count
from megjax.precision import exact_matmul
from megjax.pytrees import static

LINE_OF_SIGHT_DOPPLER = 0.7
"""Doppler of the line of sight over the maximum Doppler (TR 38.901 section 7.7.2)."""


@runtime_checkable
class TappedDelayLine(Protocol):
    """Anything that draws successive snapshots of a few taps at fixed delays, sum_l E|tap_l|^2 = 1."""

    @property
    def delays_s(self) -> Float[Array, "*s l"]:
        """Delays of the taps in seconds [l], after the axes of the leaves that set them."""

    @property
    def max_delay_s(self) -> ArrayLike:
        """The longest delay in seconds, of the shape of the leaves that set it."""

    def sample(self, key: Key[Array, ""], n: int) -> Complex[Array, "t l"]:
        """Taps complex64 [n l] of n successive snapshots, one realisation; the caller vmaps over keys."""


@channel_model
class TDL:
    """Tapped delay line `profile` ("A" to "E") of 3GPP TR 38.901, tables 7.7.2-1 to 7.7.2-5.

    The tables' delays, normalised to an RMS delay spread of 1, are multiplied by `delay_spread_s` (equation 7.7-1; 0 is
    flat fading). Snapshots are `interval_s` apart. Every Rayleigh tap has the classical spectrum of maximum Doppler
    `doppler_hz`, that is the autocorrelation J0(2 pi doppler_hz tau) of R. H. Clarke, "A statistical theory of
    mobile-radio reception", Bell Syst. Tech. J. 47, 1968; TDL-D and TDL-E add to the first tap a line of sight of
    constant modulus, uniform phase and Doppler 0.7 `doppler_hz` (K = 13.3 dB and 22 dB).

    The spectrum is sampled at `num_paths` (even) angles of arrival, evenly spaced and turned by one random angle, which
    the taps of a realisation share. At any one time the taps are independent and exactly complex Gaussian; over the
    ensemble the autocorrelation is exactly J0. Given the turn the taps are independent Gaussian processes whose
    autocorrelation is J0(x) within about 2 |J_M(x)|, x = 2 pi doppler_hz tau, M paths. With 16 paths that is below 2e-4
    up to x = 8, so over 1.27 / doppler_hz seconds all joint moments are those of independent Clarke processes. Over
    longer times fourth moments across time are off by the order of 1 / M.

    Raises ValueError for an unknown profile, a negative delay spread or Doppler, an interval that is not positive, or
    an odd number of paths.
    """

    profile: str = static()
    delay_spread_s: ArrayLike
    doppler_hz: ArrayLike = 0.0
    interval_s: ArrayLike = 1e-3
    num_paths: int = static(16)

    def __post_init__(self):
        if self.profile not in tuple(PROFILES):
            raise ValueError(f"profile is {self.profile!r}; it must be one of {', '.join(PROFILES)}")
        check("delay_spread_s", self.delay_spread_s, "0 or more seconds", lambda value: value >= 0)
        check("doppler_hz", self.doppler_hz, "0 Hz or more", lambda value: value >= 0)
        check("interval_s", self.interval_s, "more than 0 seconds", lambda value: value > 0)
        require_count("num_paths", self.num_paths, 2)
        if self.num_paths % 2:
            raise ValueError(f"num_paths is {self.num_paths}; it must be even")

    @property
    def delays_s(self) -> Float[Array, "*s l"]:
        """Delays of the taps in seconds [l], in the order of the table, after the axes of `delay_spread_s`."""
        spread = jnp.asarray(self.delay_spread_s, jnp.float32)[..., None]
        return spread * self._table.delays.astype(np.float32).reshape((1,) * (spread.ndim - 1) + (-1,))

    @property
    def max_delay_s(self) -> ArrayLike:
        """The longest delay in seconds, of the shape of `delay_spread_s`."""
        return self.delay_spread_s * float(self._table.delays.max())

    @property
    def powers(self) -> Float[Array, " l"]:
        """Mean powers E|tap_l|^2 [l], linear, line of sight included, sum 1."""
        return jnp.asarray(self._table.powers, jnp.float32)

    @property
    def rms_delay_spread_s(self) -> ArrayLike:
        """RMS delay spread of the taps in seconds: `delay_spread_s` but for the rounding of the tables (0.6 % in D)."""
        return self.delay_spread_s * self._table.rms_delay_spread

    @property
    def _table(self) -> TDLProfile:
        return PROFILES[self.profile]

    def sample(self, key: Key[Array, ""], n: int) -> Complex[Array, "t l"]:
        """Taps complex64 [n l] at n successive snapshots, one realisation; with doppler_hz = 0 all rows are equal."""
        require_count("n", n)
        turns = scalar("doppler_hz", self.doppler_hz) * scalar("interval_s", self.interval_s)
        rayleigh_key, phase_key = split(key)
        taps = _clarke(rayleigh_key, turns, n, np.sqrt(self._table.rayleigh_powers), self.num_paths)
        if self._table.line_of_sight_db is None:
            return taps
        cosine, sine = rotation(LINE_OF_SIGHT_DOPPLER * turns, range(n))
        phasors = unit_phasor(phase_key, ()) * jax.lax.complex(cosine, sine)
        return taps.at[:, 0].add(math.sqrt(self._table.line_of_sight_power) * phasors)


def _clarke(
    key: Key[Array, ""], turns: Float[Array, ""], n: int, amplitudes: Float[np.ndarray, " l"], num_paths: int
) -> Complex[Array, "t l"]:
    """n steps of Clarke processes of RMS `amplitudes` [l], `turns` being the maximum Doppler times the step.

    Opposite paths, of Dopplers +-f, are taken together: a exp(jx) + b exp(-jx) = (a + b) cos x + j (a - b) sin x, where
    a + b and j (a - b) are independent CN(0, 2 / M) again. That leaves a real matrix of phases, half the arithmetic of
    a complex one.
    """
    if n == 1:
        return complex_normal(key, (1, amplitudes.size)) * amplitudes.astype(np.complex64)[None]
    turn_key, path_key = split(key)
    pairs = np.arange(num_paths // 2, dtype=np.float32)
    angles = (2 * math.pi / num_paths) * (pairs + uniform(turn_key, ()))
    waves = jnp.concatenate(rotation(turns * jnp.cos(angles), range(n)))
    scale = (math.sqrt(2 / num_paths) * amplitudes).astype(np.complex64)
    paths = complex_normal(path_key, (amplitudes.size, num_paths)) * scale[:, None]
    real, imag = (exact_matmul(part, waves) for part in (paths.real, paths.imag))
    return jax.lax.complex(real, imag).T
