"""Imperfect channel state information: gains estimated from pilots at the receiver, fed back late to the transmitter.

The receiver holds h^_t with h_t = h^_t + e_t. For Rayleigh fading the error e_t ~ CN(0, v) is independent of h^_t, so
that the part of the signal that e_t carries acts as noise,

    y_t = sqrt(p_t) h^_t s_t + (sqrt(p_t) e_t s_t + n_t),

of variance noise_var + p_t v, uncorrelated with the symbols: an LMMSE receiver takes h^_t for the gain and
`effective_noise_var` for the noise, and its error variance is exactly 1 / (1 + gamma_t), gamma_t = p_t |h^_t|^2 /
(noise_var + p_t v). The rate E log2(1 + gamma_t) is achievable. Sources: M. Médard, "The effect upon channel capacity
in wireless communications of perfect and imperfect knowledge of the channel", IEEE Trans. Inf. Theory 46(3), 2000; B.
Hassibi and B. M. Hochwald, "How much training is needed in multiple-antenna wireless links?", IEEE Trans. Inf. Theory
49(4), 2003.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, Float, Key

from megjax.channel.fading import Fading
from megjax.channel.parameters import channel_model, check, check_noise_var, scalar
from megjax.channel.random import complex_normal, split
from megjax.configs import require_count
from megjax.numerics import safe_sqrt
from megjax.pytrees import static


class ChannelKnowledge(NamedTuple):
    """The gains of one transmission and what each end knows of them, all [t].

    `gains` are the true h_t, that multiply the signal; `transmitter` is what a power policy may see before it sends
    block t; `receiver` is h^_t, the gain an equaliser takes; `error_var` is E|h_t - h^_t|^2, for `effective_noise_var`.
    """

    gains: Complex[Array, " t"]
    transmitter: Complex[Array, " t"]
    receiver: Complex[Array, " t"]
    error_var: Float[Array, " t"]


def estimation_error_var(pilot_power: ArrayLike, num_pilots: ArrayLike, noise_var: ArrayLike) -> Float[Array, "*s"]:
    """E|h - h^|^2 = 1 / (1 + num_pilots pilot_power / noise_var) of the LMMSE estimate, in (0, 1], elementwise.

    Powers are linear, `noise_var` is per complex symbol. S. M. Kay, "Fundamentals of Statistical Signal Processing:
    Estimation Theory", 1993, section 12.5 (Bayesian linear model). Raises ValueError unless pilot_power >= 0,
    num_pilots is whole and >= 0, and noise_var > 0, all finite.
    """
    _check_pilots(pilot_power, num_pilots)
    check_noise_var(noise_var)
    return 1 / (1 + _pilot_snr(pilot_power, num_pilots, noise_var))


def estimate_gains(
    key: Key[Array, ""],
    gains: Complex[Array, " t"],
    pilot_power: ArrayLike,
    num_pilots: ArrayLike,
    noise_var: ArrayLike,
) -> Complex[Array, " t"]:
    """LMMSE estimates h^_t [t] of `gains`, each from its own block's pilots, with the prior mean 0 and variance 1.

    The pilots' matched filter is h_t plus CN(0, 1/G) with G = num_pilots pilot_power / noise_var, and h^_t is that
    times G / (1 + G). The error variance is `estimation_error_var` for every law with E|h|^2 = 1; the error is
    independent of the estimate, and no other estimate is better, for Rayleigh fading without correlation between
    blocks. Without pilots the estimates are 0. Source and errors as in `estimation_error_var`.
    """
    _check_pilots(pilot_power, num_pilots)
    check_noise_var(noise_var)
    pilots = [("pilot_power", pilot_power), ("num_pilots", num_pilots), ("noise_var", noise_var)]
    snr = _pilot_snr(*(scalar(name, value) for name, value in pilots))
    matched = snr.astype(jnp.complex64) * gains
    matched = matched + safe_sqrt(snr).astype(jnp.complex64) * complex_normal(key, gains.shape)
    return matched / (1 + snr).astype(jnp.complex64)


def delayed_gains(gains: Complex[Array, " n"], delay_blocks: int) -> tuple[Complex[Array, " t"], Complex[Array, " t"]]:
    """Current gains [t] and those of `delay_blocks` blocks before [t], from n = t + delay_blocks consecutive ones.

    So that the first block too has an old gain, draw `delay_blocks` more than are sent. Raises ValueError unless
    `delay_blocks` is an integer from 0 to n - 1.
    """
    require_count("delay_blocks", delay_blocks, smallest=0)
    num_gains = gains.shape[0]
    if delay_blocks >= num_gains:
        raise ValueError(f"delay_blocks is {delay_blocks}; it must be less than the {num_gains} gains")
    return gains[delay_blocks:], gains[: num_gains - delay_blocks]


def outdated_gains(key: Key[Array, ""], gains: Complex[Array, " t"], correlation: ArrayLike) -> Complex[Array, " t"]:
    """Old versions [t] of Rayleigh gains: rho h_t + sqrt(1 - rho^2) w_t, w_t ~ CN(0, 1), rho = `correlation`.

    The statistics of one block and its delayed knowledge without a law of the time between, e.g. rho = J0(2 pi doppler
    d) for d blocks. Its converse, E[h | old] = rho old, is the best prediction, with error 1 - rho^2. J. L. Vicario et
    al., "Opportunistic relay selection with outdated CSI: outage probability and diversity analysis", IEEE Trans.
    Wirel. Commun. 8(6), 2009. Raises ValueError for |rho| > 1 or not finite.
    """
    check("correlation", correlation, "a real number from -1 to 1", lambda rho: np.abs(rho) <= 1)
    rho = scalar("correlation", correlation)
    innovation = safe_sqrt((1 - rho) * (1 + rho)).astype(jnp.complex64)
    return rho.astype(jnp.complex64) * gains + innovation * complex_normal(key, gains.shape)


def effective_noise_var(
    noise_var: ArrayLike, power: Float[Array, " t"], error_var: Float[Array, " t"]
) -> Float[Array, " t"]:
    """noise_var + p_t v_t [t], the noise of a receiver that takes its estimates for the gains; see the module."""
    return noise_var + power * error_var


@channel_model
class ImperfectCSI:
    """Each block's gain estimated by the receiver from pilots, and known to the transmitter some blocks later.

    Every block carries `num_pilots` pilots of `pilot_power` (linear, like p_t) besides its data; their num_pilots
    symbols and num_pilots pilot_power energy a block are for the caller to count. The receiver feeds its estimates back
    without error, `delay_blocks` (static) blocks late: at 0 the transmitter knows what the receiver knows. Before the
    first block, max(delay_blocks, history) blocks are drawn, so that the first too has an old estimate; all delays up
    to `history` (static) thus see the same gains under the same key.

    Raises ValueError unless pilot_power >= 0, num_pilots is whole and >= 0, delay_blocks and history are integers >= 0.
    """

    pilot_power: ArrayLike
    num_pilots: ArrayLike
    delay_blocks: int = static(0)
    history: int = static(0)

    def __post_init__(self):
        _check_pilots(self.pilot_power, self.num_pilots)
        require_count("delay_blocks", self.delay_blocks, smallest=0)
        require_count("history", self.history, smallest=0)

    def sample(self, key: Key[Array, ""], fading: Fading, num_blocks: int, noise_var: ArrayLike) -> ChannelKnowledge:
        """Gains of `num_blocks` blocks of `fading` and what both ends know of them, one realisation; the caller vmaps.

        The gains depend on `key`, `fading` and the blocks drawn, not on the pilots or the noise, and are those of
        `fading`. Raises ValueError for noise_var <= 0, or a law that says (`mean_gain`) that its E|h|^2 is not 1.
        """
        require_count("num_blocks", num_blocks)
        if abs((mean_gain := getattr(fading, "mean_gain", 1.0)) - 1) > 1e-6:
            raise ValueError(f"fading is {fading!r} with E|h|^2 = {mean_gain:.4g}; estimates are made for E|h|^2 = 1")
        fading_key, pilot_key = split(key)
        earlier = max(self.delay_blocks, self.history)
        gains = fading.sample(fading_key, earlier + num_blocks)
        estimates = estimate_gains(pilot_key, gains, self.pilot_power, self.num_pilots, noise_var)
        receiver, transmitter = delayed_gains(estimates[earlier - self.delay_blocks :], self.delay_blocks)
        error_var = estimation_error_var(self.pilot_power, self.num_pilots, noise_var)
        return ChannelKnowledge(gains[earlier:], transmitter, receiver, jnp.full(num_blocks, error_var, jnp.float32))


def _pilot_snr(pilot_power: ArrayLike, num_pilots: ArrayLike, noise_var: ArrayLike) -> Float[Array, "*s"]:
    """Energy of a block's pilots over the noise, linear."""
    return jnp.asarray(num_pilots, jnp.float32) * pilot_power / noise_var


def _check_pilots(pilot_power: ArrayLike, num_pilots: ArrayLike) -> None:
    check("pilot_power", pilot_power, "finite and 0 or more", lambda power: power >= 0)
    check("num_pilots", num_pilots, "a whole number of 0 or more", lambda n: (n >= 0) & (n == np.round(n)))
