"""OFDM over a tapped delay line: gains of resource blocks and subcarriers, and the same link in the time domain.

A tap a_l at delay tau_l answers the frequency f with a_l exp(-2 pi j f tau_l). Subcarriers are in ascending order of
frequency, k = 0 ... N - 1 at f_k = (k - floor(N / 2)) times the spacing. Equations: A. Goldsmith, "Wireless
Communications", 2005, section 12.4, and D. Tse and P. Viswanath, "Fundamentals of Wireless Communication", 2005,
sections 2.2.3 (the sampled baseband channel) and 3.4.4.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, Float, Key

from megjax.channel.parameters import channel_model, check, scalar
from megjax.channel.phasor import rotation
from megjax.channel.tdl import TappedDelayLine
from megjax.configs import require_count
from megjax.precision import exact_matmul
from megjax.pytrees import static


@channel_model
class OFDM:
    """OFDM of N = `num_subcarriers` on the taps of `tdl`, sampled at N times `subcarrier_spacing_hz`.

    Each OFDM symbol is N samples after a prefix of `cyclic_prefix` < N samples that repeats its end. The time-domain
    channel has one lag more than the prefix has samples, from `-advance` (a band-limited pulse begins before its delay)
    to `cyclic_prefix - advance`; the receiver opens its window `advance` samples early, inside the prefix. By default
    `advance` is an eighth of the prefix.

    `sample` makes it a fading law: block t is resource block t mod B of slot t div B, where a slot is one snapshot of
    `tdl` and its B resource blocks are `resource_block_size` adjacent subcarriers each, lowest frequency first.
    Subcarriers beyond the last whole resource block carry none.

    Raises ValueError for sizes below 1 (prefix and advance: 0), a resource block larger than the band, an advance
    beyond the prefix, a prefix as long as the symbol, a spacing that is not positive, or a longest delay that does not
    fit into the prefix.
    """

    dependence: ClassVar[str] = "other"
    tdl: TappedDelayLine
    num_subcarriers: int = static()
    subcarrier_spacing_hz: ArrayLike
    cyclic_prefix: int = static()
    resource_block_size: int = static(12)
    advance: int | None = static(None)

    def __post_init__(self):
        if isinstance(self.tdl, type) or not hasattr(self.tdl, "max_delay_s"):
            raise ValueError(f"tdl is {self.tdl!r}; it must be a tapped delay line such as TDL('A', 100e-9)")
        require_count("num_subcarriers", self.num_subcarriers)
        require_count("cyclic_prefix", self.cyclic_prefix, 0)
        require_count("resource_block_size", self.resource_block_size)
        if self.resource_block_size > self.num_subcarriers:
            raise ValueError(
                f"resource_block_size is {self.resource_block_size}; it must be at most num_subcarriers="
                f"{self.num_subcarriers}"
            )
        if self.cyclic_prefix >= self.num_subcarriers:
            raise ValueError(
                f"cyclic_prefix is {self.cyclic_prefix}; it must be below num_subcarriers={self.num_subcarriers}"
            )
        if self.advance is not None:
            require_count("advance", self.advance, 0)
            if self.advance > self.cyclic_prefix:
                raise ValueError(
                    f"advance is {self.advance}; it must be at most cyclic_prefix={self.cyclic_prefix} samples"
                )
        check("subcarrier_spacing_hz", self.subcarrier_spacing_hz, "more than 0 Hz", lambda value: value > 0)
        self._check_delays()

    def _check_delays(self) -> None:
        """ValueError where the longest delay is sure to leave the prefix; tracers have no values to check."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            return
        # The smallest spacing, so that arrays which a vmap pairs elementwise are not refused for pairs it never makes.
        rate = self.num_subcarriers * np.min(self.subcarrier_spacing_hz)
        longest = float(np.max(self.tdl.max_delay_s)) * rate
        room = self.cyclic_prefix - self.num_precursors
        if longest > room * (1 + 1e-6):  # float32 leaves
            raise ValueError(
                f"the longest delay is {longest:.2f} samples; it must be at most cyclic_prefix - advance = "
                f"{self.cyclic_prefix} - {self.num_precursors} = {room}"
            )

    @property
    def num_precursors(self) -> int:
        """Lags of the impulse response before lag 0, equal to the advance of the receiver's window in samples."""
        return self.cyclic_prefix // 8 if self.advance is None else self.advance

    @property
    def blocks_per_slot(self) -> int:
        """Number of whole resource blocks in the band."""
        return self.num_subcarriers // self.resource_block_size

    @property
    def samples_per_symbol(self) -> int:
        """Samples of one OFDM symbol, cyclic prefix included."""
        return self.num_subcarriers + self.cyclic_prefix

    @property
    def sample_rate_hz(self) -> Float[Array, ""]:
        """Samples per second; its inverse is the interval of a `tdl` that changes from sample to sample."""
        return self.num_subcarriers * scalar("subcarrier_spacing_hz", self.subcarrier_spacing_hz)

    @property
    def symbol_duration_s(self) -> Float[Array, ""]:
        """Duration of one OFDM symbol with its prefix: the interval of a `tdl` that changes from symbol to symbol."""
        return self.samples_per_symbol / self.sample_rate_hz

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t] of the first `num_blocks` resource blocks, each the response at its centre; E|h_t|^2 = 1."""
        require_count("num_blocks", num_blocks)
        slots = -(-num_blocks // self.blocks_per_slot)
        width, blocks = self.resource_block_size, min(num_blocks, self.blocks_per_slot)
        # In half spacings, because the centre of an even number of subcarriers lies between two of them.
        first = width - 1 - 2 * (self.num_subcarriers // 2)
        centres = range(first, first + 2 * width * blocks, 2 * width)
        response = exact_matmul(self.tdl.sample(key, slots), self._steering(0.5, centres))
        return response.reshape(-1)[:num_blocks]

    def frequency_response(self, taps: Complex[Array, "t l"]) -> Complex[Array, "t n"]:
        """Gains [t n] of the subcarriers, in ascending frequency, for snapshots `taps` [t l] at the delays of `tdl`."""
        first = -(self.num_subcarriers // 2)
        return exact_matmul(taps, self._steering(1.0, range(first, first + self.num_subcarriers)))

    @property
    def _delays_s(self) -> Float[Array, " l"]:
        delays = self.tdl.delays_s
        if delays.ndim != 1:
            raise ValueError(f"the delays have shape {delays.shape}; one realisation takes [l]: vmap over the model")
        return delays

    def _steering(self, spacings: float, steps: range) -> Complex[Array, "l n"]:
        """exp(-2 pi j f tau_l) [l n] at the frequencies f = `spacings` `steps` subcarrier spacings."""
        spacing_hz = scalar("subcarrier_spacing_hz", self.subcarrier_spacing_hz)
        cosine, sine = rotation(spacings * spacing_hz * self._delays_s, steps)
        return jax.lax.complex(cosine, -sine)

    def impulse_response(self, taps: Complex[Array, "t l"]) -> Complex[Array, "t k"]:
        """Sampled channel [t k], k = cyclic_prefix + 1: sum_l a_l sinc(lag - tau_l rate), lags from `-num_precursors`.

        Delays on the sampling grid give one lag each and the response of `frequency_response` exactly. A delay between
        two samples spreads over all lags; of its unit energy the lags from -p to q, a distance d_1 and d_2 from the
        delay, leave out less than (1 / d_1 + 1 / d_2) / pi^2, which falls with `advance` and `cyclic_prefix`. The error
        gathers at the edges of the band; on the very edge (the lowest subcarrier, N even) the series gives the mean of
        both edges, however many lags it has.
        """
        lags = np.arange(-self.num_precursors, self.cyclic_prefix - self.num_precursors + 1, dtype=np.float32)
        delays = self._delays_s * self.sample_rate_hz
        pulses = jnp.sinc(lags[None] - delays[:, None])
        return jax.lax.complex(exact_matmul(taps.real, pulses), exact_matmul(taps.imag, pulses))

    def sampled_frequency_response(self, impulse_response: Complex[Array, "t k"]) -> Complex[Array, "t n"]:
        """Gains [t n] of the subcarriers under an `impulse_response` [t k]: what `demodulate` sees, without noise."""
        self._check_lags(impulse_response)
        padding = self.num_subcarriers - impulse_response.shape[1]
        causal = jnp.roll(jnp.pad(impulse_response, ((0, 0), (0, padding))), -self.num_precursors, axis=1)
        return jnp.fft.fftshift(jnp.fft.fft(causal), axes=1)

    def modulate(self, symbols: Complex[Array, "t n"]) -> Complex[Array, " s"]:
        """Samples [s], s = t `samples_per_symbol`, of t OFDM symbols [t n]; unit-power symbols give unit-power samples.

        The transform is unitary; the prefix radiates at the same power as the rest.
        """
        _check_width("symbols", symbols, self.num_subcarriers)
        body = jnp.fft.ifft(jnp.fft.ifftshift(symbols, axes=1), norm="ortho")
        return jnp.concatenate([body[:, self.num_subcarriers - self.cyclic_prefix :], body], axis=1).reshape(-1)

    def demodulate(self, samples: Complex[Array, " s"]) -> Complex[Array, "t n"]:
        """Symbols [t n] from samples [s], a whole number of OFDM symbols: gain times symbol if the channel fits."""
        if samples.size % self.samples_per_symbol:
            raise ValueError(
                f"samples has {samples.size} entries; it must be a multiple of samples_per_symbol="
                f"{self.samples_per_symbol}"
            )
        start = self.cyclic_prefix - self.num_precursors
        window = samples.reshape(-1, self.samples_per_symbol)[:, start : start + self.num_subcarriers]
        body = jnp.roll(window, -self.num_precursors, axis=1)
        return jnp.fft.fftshift(jnp.fft.fft(body, norm="ortho"), axes=1)

    def convolve(self, samples: Complex[Array, " s"], impulse_response: Complex[Array, "u k"]) -> Complex[Array, " s"]:
        """Received samples y_i = sum_lag g_lag(i) x_(i - lag), [s], with silence before and after the s samples.

        Each of the u rows of `impulse_response`, u a divisor of s, holds for s / u samples: one row is a static
        channel, one a symbol is constant over each OFDM symbol, one a sample changes within them, which mixes the
        subcarriers. Raises ValueError for other numbers of rows or lags.
        """
        self._check_lags(impulse_response)
        size, rows = samples.size, impulse_response.shape[0]
        if size % rows:
            raise ValueError(f"impulse_response has {rows} rows; their number must divide the {size} samples")
        padded = jnp.pad(samples, (self.cyclic_prefix - self.num_precursors, self.num_precursors))

        def add_lag(received, lag):
            start, gains = lag
            delayed = jax.lax.dynamic_slice(padded, (start,), (size,)).reshape(rows, -1)
            return received + gains[:, None] * delayed, None

        # A scan and not one product: the delayed copies of the signal would take k times its memory.
        starts = self.cyclic_prefix - jnp.arange(self.cyclic_prefix + 1)
        silence = jnp.zeros((rows, size // rows), samples.dtype)
        return jax.lax.scan(add_lag, silence, (starts, impulse_response.T))[0].reshape(-1)

    def _check_lags(self, impulse_response: Complex[Array, "t k"]) -> None:
        _check_width("impulse_response", impulse_response, self.cyclic_prefix + 1)


def _check_width(name: str, value: Complex[Array, "t n"], width: int) -> None:
    if value.shape[1] != width:
        raise ValueError(f"{name} has shape {value.shape}; its rows must have {width} entries")
