"""Multiple antennas in independent Rayleigh fading: beams that reduce a matrix to a scalar gain, and capacity.

A channel matrix H is [r n], r receive by n transmit antennas, with elements CN(0, 1): y = H x + n. A transmit beam v
and a receive beam w of unit norm turn it into the scalar channel w^H y = (w^H H v) s + w^H n, in which neither the
transmit power nor the noise variance has changed. Equations: D. Tse and P. Viswanath, "Fundamentals of Wireless
Communication", 2005, sections 3.3 (diversity combining), 7.1 (SVD), 8.2 (capacity).
"""

import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, Float, Key

from megjax.channel.parameters import channel_model, check
from megjax.channel.random import complex_normal
from megjax.configs import require_count
from megjax.numerics import safe_sqrt, squared_magnitude
from megjax.precision import exact_matmul
from megjax.pytrees import static

COMBINING = ("mrc", "mrt", "svd")
_TINY = np.float32(1e-30)
"""Smallest eigenvalue told from zero; its reciprocal still fits float32."""


@channel_model
class MIMOFading:
    """Independent Rayleigh fading between `num_tx` and `num_rx` antennas, reduced by beams to a scalar gain per block.

    "mrc" combines the receive antennas for one transmit antenna (`num_tx` 1), "mrt" transmits along the channel to one
    receive antenna (`num_rx` 1), "svd" uses the strongest singular vectors. Gains are real and non-negative: the
    beams take the phase away. Unlike the library's other fading laws E|h|^2 is not 1 but the array gain that the
    antennas really give at an unchanged transmit power, `mean_array_gain`: `num_rx` for MRC, `num_tx` for MRT, the mean
    largest eigenvalue of H H^H for SVD. `normalize` divides by it, so that E|h|^2 = 1 and only the diversity is left.
    Raises ValueError for counts below 1, an unknown `combining`, or one that does not fit the antennas.
    """

    dependence: ClassVar[str] = "independent"
    num_tx: int = static(1)
    num_rx: int = static(1)
    combining: str = static("svd")
    normalize: bool = static(False)

    def __post_init__(self):
        require_count("num_tx", self.num_tx)
        require_count("num_rx", self.num_rx)
        if self.combining not in COMBINING:
            raise ValueError(f"combining is {self.combining!r}; it must be one of {', '.join(COMBINING)}")
        single = {"mrc": "num_tx", "mrt": "num_rx"}.get(self.combining)
        if single and getattr(self, single) != 1:
            raise ValueError(f"{single} is {getattr(self, single)}; combining={self.combining!r} takes {single}=1")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize is {self.normalize!r}; it must be True or False")

    @property
    def mean_gain(self) -> float:
        """E|h|^2."""
        return 1.0 if self.normalize else self.mean_array_gain

    @property
    def mean_array_gain(self) -> float:
        """E|h|^2 before normalisation."""
        return mean_largest_eigenvalue(self.num_tx, self.num_rx)

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Effective gains [t] of the matrices that `sample_matrices` draws from the same key."""
        gains = jax.vmap(svd_gain)(self.sample_matrices(key, num_blocks))
        if self.normalize:
            gains = gains / np.float32(math.sqrt(self.mean_array_gain))
        return jax.lax.complex(gains, jnp.zeros_like(gains))

    def sample_matrices(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, "t r n"]:
        """Channel matrices [t r n] with independent CN(0, 1) elements."""
        require_count("num_blocks", num_blocks)
        # Drawn with the blocks last, so that sums over antennas run along the vector units of a CPU, not across them.
        return jnp.moveaxis(complex_normal(key, (self.num_rx, self.num_tx, num_blocks)), -1, 0)


def mrc_gain(channel: Complex[Array, " r"]) -> Float[Array, ""]:
    """Amplitude ||h|| of maximum ratio combining over receive antennas; its square is Gamma(r, 1) distributed."""
    return safe_sqrt(jnp.sum(squared_magnitude(channel)))


def mrt_gain(channel: Complex[Array, " n"]) -> Float[Array, ""]:
    """Amplitude ||h|| of maximum ratio transmission from antennas with the channel row `channel`."""
    return mrc_gain(channel)


def svd_gain(channel: Complex[Array, "r n"]) -> Float[Array, ""]:
    """Largest singular value of the matrix, from the smaller of its two Gram matrices.

    Closed form when either side has one or two antennas. Differentiable where that singular value is simple and not 0.
    """
    return safe_sqrt(_largest_eigenvalue(_wide(channel)))


def mrc_beam(channel: Complex[Array, " r"]) -> Complex[Array, " r"]:
    """Receive beam w = h / ||h||, for which w^H h = ||h||."""
    return channel / jnp.maximum(mrc_gain(channel), _TINY).astype(jnp.complex64)


def mrt_beam(channel: Complex[Array, " n"]) -> Complex[Array, " n"]:
    """Transmit beam v = conj(h) / ||h||, for which the row h gives h v = ||h||."""
    return jnp.conj(mrc_beam(channel))


def svd_beams(
    channel: Complex[Array, "r n"],
) -> tuple[Complex[Array, " n"], Complex[Array, " r"], Float[Array, ""]]:
    """Transmit beam v [n], receive beam w [r] and gain with w^H H v = gain, the largest singular value.

    Both beams have unit norm; the first element of the beam on the side with fewer antennas (the receiver's if equal)
    is real and not negative, which makes them unique. Closed form when either side has one or two antennas.
    Differentiable where the largest singular value is simple and that first element is not 0. A matrix of zeros gives
    gain 0 and the other beam 0.
    """
    wide = _wide(channel)
    short, eigenvalue = _dominant_eigenvector(wide)
    gain = safe_sqrt(eigenvalue)
    long = jnp.sum(jnp.conj(wide) * short[:, None], axis=0) / jnp.maximum(gain, _TINY).astype(jnp.complex64)
    if channel.shape[0] <= channel.shape[1]:
        return long, short, gain
    return short, long, gain


def precode(symbols: Complex[Array, " k"], transmit_beam: Complex[Array, " n"]) -> Complex[Array, "n k"]:
    """Signals x = v s of the transmit antennas; their total power is that of the symbols."""
    return transmit_beam[:, None] * symbols[None]


def combine(received: Complex[Array, "r k"], receive_beam: Complex[Array, " r"]) -> Complex[Array, " k"]:
    """w^H y: the receive antennas' signals as one, with the noise variance of a single antenna."""
    return jnp.sum(jnp.conj(receive_beam)[:, None] * received, axis=0)


def capacity(channel: Complex[Array, "r n"], snr: Float[ArrayLike, ""]) -> Float[Array, ""]:
    """log2 det(I + snr/n H H^H) in bits per channel use: equal power on all transmit antennas, known to the receiver.

    E. Telatar, "Capacity of multi-antenna Gaussian channels", Eur. Trans. Telecommun. 10, 1999, section 4. `snr` is
    the linear ratio of the total transmit power to the noise variance of one antenna; ValueError if it is negative.
    """
    _check_snr(snr)
    rows = _wide(channel)
    count = rows.shape[0]
    # Gram-Schmidt on the rows of [I, H], where the inner product weighs the columns of H by snr/n: the product of the
    # squared lengths is the determinant. None falls below 1, as pivots of the Gram matrix do in float32 at high SNR,
    # and the 1 is left out of the rows, so that log1p keeps low SNRs.
    weights = jnp.full(rows.shape[1], jnp.asarray(snr, jnp.float32) / channel.shape[1])
    weights = jnp.concatenate([jnp.ones(count, jnp.float32), weights])
    rows = jnp.concatenate([jnp.zeros((count, count), jnp.complex64), rows], axis=1)
    bits = jnp.float32(0)
    for i in range(count):
        row, rows = rows[0], rows[1:]
        excess = jnp.sum(weights * squared_magnitude(row))
        bits = bits + jnp.log1p(excess) / np.float32(math.log(2))
        weighted = weights[None].astype(jnp.complex64) * rows
        projection = jnp.sum(weighted * jnp.conj(row)[None], axis=1) / (1 + excess).astype(jnp.complex64)
        rows = rows - projection[:, None] * row.at[i].set(1)[None]
    return bits


def capacity_waterfilling(channel: Complex[Array, "r n"], snr: Float[ArrayLike, ""]) -> Float[Array, ""]:
    """Capacity in bits per channel use when the transmitter knows H too: sum of (log2(mu lambda_i))+ over eigenmodes.

    The water level mu spends the power, sum of (mu - 1/lambda_i)+ = snr. It is exact: of the levels that the 1, 2, ...
    strongest modes would share, the last that covers its weakest mode. Telatar 1999, section 3.1. Differentiable
    except where a mode falls dry; ValueError for a negative `snr`.
    """
    _check_snr(snr)
    eigenvalues = jnp.maximum(_eigenvalues(_wide(channel)), _TINY)
    floors = 1 / eigenvalues
    modes = jnp.arange(1, floors.shape[0] + 1)
    levels = (jnp.asarray(snr, jnp.float32) + jnp.cumsum(floors)) / modes.astype(jnp.float32)
    active = jnp.maximum(jnp.sum(levels > floors), 1)
    on = modes <= active
    # The power of a mode, mu - 1/lambda_i, in differences that keep it at low SNR.
    differences = jnp.where(on[None], floors[None] - floors[:, None], 0.0)
    powers = (jnp.asarray(snr, jnp.float32) + jnp.sum(differences, axis=1)) / active.astype(jnp.float32)
    return jnp.sum(jnp.log1p(jnp.where(on, powers * eigenvalues, 0.0))) / np.float32(math.log(2))


@functools.lru_cache
def mean_largest_eigenvalue(num_tx: int, num_rx: int) -> float:
    """Mean of the largest eigenvalue of H H^H for independent CN(0, 1) elements, computed once on the host in float64.

    The distribution function is Khatri's determinant, P(x) = det of the integrals of phi_i phi_j over [0, x]; M. Kang
    and M.-S. Alouini, IEEE J. Sel. Areas Commun. 21(3), 2003. It is taken here in orthonormal Laguerre functions phi_i,
    where the determinant is well conditioned, and 1 - P is integrated numerically. Raises ValueError for counts below
    1.
    """
    require_count("num_tx", num_tx)
    require_count("num_rx", num_rx)
    smaller, larger = sorted((num_tx, num_rx))
    if smaller == 1:
        return float(larger)
    # The largest eigenvalue concentrates below (sqrt(m) + sqrt(n))^2 with tails no heavier than exp(-x).
    edge = (math.sqrt(smaller) + math.sqrt(larger)) ** 2
    end, panels = 1.5 * edge + 60, 2048
    nodes, weights = np.polynomial.legendre.leggauss(8)
    width = end / panels
    points = width * (np.arange(panels)[:, None] + (nodes + 1) / 2)
    functions = _laguerre_functions(points, smaller, larger - smaller)
    integrals = np.cumsum((functions * (weights * width / 2)[:, None]).swapaxes(1, 2) @ functions, axis=0)
    # The trapezoidal rule is of high order here: odd derivatives vanish at both ends, those below order m n at 0.
    tail = 1 - np.linalg.det(integrals)
    return float(width * (0.5 + tail.sum()))


def _laguerre_functions(points: np.ndarray, count: int, alpha: int) -> np.ndarray:
    """sqrt(i! / (i + alpha)!) x^(alpha/2) exp(-x/2) L_i^alpha(x) for i < count, along a new last axis."""
    previous = np.zeros_like(points)
    current = np.exp((alpha * np.log(points) - points - math.lgamma(alpha + 1)) / 2)
    functions = [current]
    for i in range(1, count):
        following = (2 * i - 1 + alpha - points) * current - math.sqrt((i - 1) * (i - 1 + alpha)) * previous
        previous, current = current, following / math.sqrt(i * (i + alpha))
        functions.append(current)
    return np.stack(functions, axis=-1)


def _wide(channel: Complex[Array, "r n"]) -> Complex[Array, "a b"]:
    """The matrix, or its conjugate transpose, with no more rows than columns; the singular values are the same."""
    return channel if channel.shape[0] <= channel.shape[1] else jnp.conj(channel.T)


def _largest_eigenvalue(wide: Complex[Array, "a b"]) -> Float[Array, ""]:
    count = wide.shape[0]
    if count == 1:
        return jnp.sum(squared_magnitude(wide))
    if count == 2:
        first, second, _, root = _gram_of_two(wide)
        return (first + second) / 2 + root
    return jnp.linalg.eigvalsh(_gram(wide))[-1]


def _eigenvalues(wide: Complex[Array, "a b"]) -> Float[Array, " a"]:
    """Eigenvalues of the Gram matrix, largest first."""
    count = wide.shape[0]
    if count == 2:
        largest = _largest_eigenvalue(wide)
        # The determinant as a sum of squared minors keeps the small eigenvalue that a difference would cancel.
        minors = wide[0, :, None] * wide[1, None, :]
        determinant = jnp.sum(squared_magnitude(minors - minors.T)) / 2
        return jnp.stack([largest, determinant / jnp.maximum(largest, _TINY)])
    if count == 1:
        return _largest_eigenvalue(wide)[None]
    return jnp.linalg.eigvalsh(_gram(wide))[::-1]


def _dominant_eigenvector(wide: Complex[Array, "a b"]) -> tuple[Complex[Array, " a"], Float[Array, ""]]:
    """Unit eigenvector of the largest eigenvalue of the Gram matrix, first element real and >= 0, and that value."""
    count = wide.shape[0]
    if count == 1:
        return jnp.ones(1, jnp.complex64), _largest_eigenvalue(wide)
    if count == 2:
        first, second, cross, root = _gram_of_two(wide)
        half = (first - second) / 2
        # Two forms of the same vector; the one whose real element is a sum of like signs.
        real = jax.lax.complex(root + jnp.abs(half), jnp.zeros_like(root))
        vector = jnp.where(half >= 0, jnp.stack([real, jnp.conj(cross)]), jnp.stack([cross, real]))
        value = (first + second) / 2 + root
        squared = jnp.sum(squared_magnitude(vector))
        distinct = squared > 0
        vector = jnp.where(distinct, vector, jnp.array([1, 0], jnp.complex64))
        vector = vector / jnp.sqrt(jnp.where(distinct, squared, 1.0)).astype(jnp.complex64)
    else:
        values, vectors = jnp.linalg.eigh(_gram(wide))
        vector, value = vectors[:, -1], values[-1]
    return vector * _opposite_phase(vector[0]), value


def _gram(wide: Complex[Array, "a b"]) -> Complex[Array, "a a"]:
    return exact_matmul(wide, jnp.conj(wide.T))


def _gram_of_two(wide: Complex[Array, "2 b"]) -> tuple[Array, Array, Array, Array]:
    """Both diagonal elements, the one above the diagonal, and half the difference of the eigenvalues."""
    first, second = jnp.sum(squared_magnitude(wide[0])), jnp.sum(squared_magnitude(wide[1]))
    cross = jnp.sum(wide[0] * jnp.conj(wide[1]))
    return first, second, cross, safe_sqrt(jnp.square((first - second) / 2) + squared_magnitude(cross))


def _opposite_phase(value: Complex[Array, ""]) -> Complex[Array, ""]:
    """conj(value) / |value|, and 1 for 0."""
    squared = squared_magnitude(value)
    known = squared > 0
    magnitude = jnp.sqrt(jnp.where(known, squared, 1.0)).astype(jnp.complex64)
    return jnp.where(known, jnp.conj(value) / magnitude, jnp.complex64(1))


def _check_snr(snr: ArrayLike) -> None:
    check("snr", snr, "0 or more", lambda value: value >= 0)
