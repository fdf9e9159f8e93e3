"""Tests of multi-antenna fading against Gamma and Wishart laws, and of capacity against Telatar's integral."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from megjax.channel.mimo import (
    MIMOFading,
    capacity,
    capacity_waterfilling,
    combine,
    mean_largest_eigenvalue,
    mrc_beam,
    mrc_gain,
    mrt_beam,
    mrt_gain,
    precode,
    svd_beams,
    svd_gain,
)
from tests.channel.draws import normal_symbols
from tests.checks import NUM_DISTRIBUTION, check_distribution, within_standard_error

pytestmark = pytest.mark.usefixtures("fast_compile")
NUM = 8
SNRS = np.array([0.0, 0.01, 0.1, 1.0, 10.0, 100.0, 1e4], np.float32)
# (num_rx, num_tx); a matrix and its transpose differ in the beams only.
SHAPES = [
    *((3, 1), (2, 2), (4, 3)),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((1, 1), (1, 3), (2, 4), (4, 2), (3, 3))),
]


class Link(NamedTuple):
    """What the library says of each of several matrices [m r n]; capacities are [m snr]."""

    transmit: np.ndarray
    receive: np.ndarray
    gain: np.ndarray
    largest: np.ndarray
    bits: np.ndarray
    bits_waterfilling: np.ndarray


def link(matrix):
    bits = (jax.vmap(function, (None, 0))(matrix, SNRS) for function in (capacity, capacity_waterfilling))
    return Link(*svd_beams(matrix), svd_gain(matrix), *bits)


LINK, LINKS = jax.jit(link), jax.jit(jax.vmap(link))


@functools.cache
def matrices_and_links(num_rx, num_tx):
    """Random matrices, the last of them 0, and their links."""
    matrices = normal_symbols(6, (NUM, num_rx, num_tx))
    matrices[-1] = 0
    return matrices, Link(*map(np.asarray, LINKS(matrices)))


@functools.partial(jax.jit, static_argnums=2)
def draw(model, key, num_blocks):
    """Gains, gains of the normalised law, and matrices, all of one key."""
    unit = MIMOFading(model.num_tx, model.num_rx, model.combining, normalize=True)
    return tuple(
        sample(jax.random.clone(key), num_blocks) for sample in (model.sample, unit.sample, model.sample_matrices)
    )


def khatri_cdf(x, smaller, larger):
    """det of incomplete gamma functions over that of complete ones: the law of the largest Wishart eigenvalue."""
    order = larger - smaller + 1 + np.add.outer(np.arange(smaller), np.arange(smaller))
    normaliser = np.linalg.det(special.gamma(order.astype(np.float64)))
    x = np.asarray(x, np.float64)[..., None, None]
    return np.linalg.det(special.gammainc(order, x) * special.gamma(order)) / normaliser


def telatar_capacity(num_tx, num_rx, snr):
    """Integral of log2(1 + snr/n lambda) against the density of the eigenvalues (Telatar 1999, theorem 2), bits."""
    smaller, larger = sorted((num_tx, num_rx))
    alpha = larger - smaller

    def integrand(x):
        density = sum(
            special.gamma(k + 1) / special.gamma(k + alpha + 1) * special.eval_genlaguerre(k, alpha, x) ** 2
            for k in range(smaller)
        )
        return np.log2(1 + snr / num_tx * x) * density * x**alpha * np.exp(-x)

    return integrate.quad(integrand, 0, np.inf, epsabs=1e-10)[0]


@pytest.mark.parametrize(
    ("model", "cdf"),
    [
        (MIMOFading(1, 4, "mrc"), stats.gamma(4).cdf),
        pytest.param(MIMOFading(2, 1, "mrt"), stats.gamma(2).cdf, marks=pytest.mark.slow),
        (MIMOFading(2, 2, "svd"), lambda x: khatri_cdf(x, 2, 2)),
        pytest.param(MIMOFading(1, 1, "mrc"), "expon", marks=pytest.mark.slow),
        pytest.param(MIMOFading(4, 2, "svd"), lambda x: khatri_cdf(x, 2, 4), marks=pytest.mark.slow),
        pytest.param(MIMOFading(3, 4, "svd"), lambda x: khatri_cdf(x, 3, 4), marks=pytest.mark.slow),
    ],
)
def test_gains_follow_the_largest_eigenvalue_of_independent_elements(model, cdf):
    gains, normalised, matrices = map(np.asarray, draw(model, jax.random.key(2), NUM_DISTRIBUTION))
    assert gains.shape == (NUM_DISTRIBUTION,) and gains.dtype == np.complex64
    assert matrices.shape == (NUM_DISTRIBUTION, model.num_rx, model.num_tx) and matrices.dtype == np.complex64
    np.testing.assert_array_equal(gains.imag, 0)
    np.testing.assert_allclose(gains[:9].real, np.linalg.svd(matrices[:9])[1][:, 0], rtol=1e-5)
    power, mean = gains.real.astype(np.float64) ** 2, mean_largest_eigenvalue(model.num_tx, model.num_rx)
    check_distribution(power, cdf)
    within_standard_error(power, mean)
    np.testing.assert_allclose(normalised * np.sqrt(model.mean_array_gain), gains, rtol=1e-5)
    assert model.mean_array_gain == mean
    within_standard_error(np.abs(matrices) ** 2, 1.0)
    first = matrices[:, 0, 0]
    others = [matrices[:, r, n] for r, n in ((0, 1), (1, 0)) if r < model.num_rx and n < model.num_tx]
    for other in (*others, np.roll(first, 1)):
        within_standard_error((first * other.conj()).real, 0.0)


def test_mean_largest_eigenvalue():
    # 2 x 2: the trace has mean 4 and the smallest eigenvalue is exponential with mean 1/2.
    np.testing.assert_allclose(mean_largest_eigenvalue(2, 2), 3.5, rtol=1e-10)
    assert mean_largest_eigenvalue(1, 5) == mean_largest_eigenvalue(5, 1) == 5.0
    for smaller, larger in ((2, 4), (3, 3), (4, 6)):
        expected = integrate.fixed_quad(lambda x, m=smaller, n=larger: 1 - khatri_cdf(x, m, n), 0, 80, n=200)[0]
        np.testing.assert_allclose(mean_largest_eigenvalue(smaller, larger), expected, rtol=1e-8)
        assert mean_largest_eigenvalue(larger, smaller) == mean_largest_eigenvalue(smaller, larger)
    # The edge of the Marchenko-Pastur law, with the mean of the Tracy-Widom law beside it: (4 n) - 1.7711 (16 n)^(1/3).
    edge = 4 * 64 - 1.7711 * (16 * 64) ** (1 / 3)
    np.testing.assert_allclose(mean_largest_eigenvalue(64, 64), edge, rtol=1e-2)


def check_beams(matrices, transmit, receive, gain, rtol=1e-5):
    """Unit norms and w^H H v = gain, the largest singular value, for each of the matrices [m r n]."""
    assert transmit.shape == matrices.shape[::2] and receive.shape == matrices.shape[:2]
    for beams in (transmit, receive):
        np.testing.assert_allclose(np.linalg.norm(beams, axis=-1), 1, rtol=rtol)
    largest = np.linalg.svd(matrices)[1][:, 0]
    reduced = np.einsum("mr,mrn,mn->m", np.conj(receive), matrices, transmit)
    np.testing.assert_allclose(reduced, largest, rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(gain, largest, rtol=rtol)


@pytest.mark.parametrize(("num_rx", "num_tx"), SHAPES)
def test_svd_beams(num_rx, num_tx):
    matrices, links = matrices_and_links(num_rx, num_tx)
    check_beams(matrices[:-1], links.transmit[:-1], links.receive[:-1], links.gain[:-1])
    np.testing.assert_allclose(links.largest, links.gain, rtol=1e-6)
    first = (links.receive if num_rx <= num_tx else links.transmit)[:-1, 0]
    assert np.all(first.real >= 0) and np.all(np.abs(first.imag) < 1e-6)


def test_svd_beams_of_special_matrices():
    special_cases = [np.eye(2), np.diag([1, 3]), np.diag([3, 1]), [[0, 2], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 1j]]]
    matrices = np.array([*special_cases, 2 * np.eye(2), np.diag([1j, 1j])], np.complex64)
    assert len(matrices) == NUM
    check_beams(matrices, *map(np.asarray, LINKS(matrices)[:3]))


@pytest.mark.parametrize(("num_rx", "num_tx"), SHAPES)
def test_no_channel_gives_no_gain(num_rx, num_tx):
    links = matrices_and_links(num_rx, num_tx)[1]
    assert links.gain[-1] == links.largest[-1] == 0
    assert np.all(np.isfinite(links.transmit[-1])) and np.all(np.isfinite(links.receive[-1]))
    np.testing.assert_array_equal(links.bits[-1], 0)
    np.testing.assert_allclose(links.bits_waterfilling[-1], 0, atol=1e-6)


def test_mrc_and_mrt():
    @jax.jit
    def compute(h):
        slope = jax.grad(lambda parts: mrc_gain(jax.lax.complex(*parts)))((h.real, h.imag))
        return mrc_gain(h), mrt_gain(h), mrc_beam(h), mrt_beam(h), slope

    h = normal_symbols(7, (4,))
    norm = np.linalg.norm(h)
    mrc, mrt, receive, transmit, _ = compute(h)
    np.testing.assert_allclose([mrc, mrt, np.vdot(receive, h), np.dot(h, transmit)], norm, rtol=1e-6)
    mrc, _, receive, _, slope = compute(np.zeros(4, np.complex64))
    assert mrc == 0 and np.all(np.asarray(receive) == 0) and np.all(np.isfinite(slope))


@pytest.mark.parametrize(("num_rx", "num_tx"), [(4, 1), (3, 4)])
def test_beams_reduce_the_matrix_to_a_scalar_channel(num_rx, num_tx):
    noise_var, num_symbols = 0.3, 2**14

    @jax.jit
    def send(h, symbols, noise):
        transmit, receive, gain = svd_beams(h)
        signals = precode(symbols, transmit)
        received = jnp.matmul(h, signals, precision="highest") + noise
        return signals, combine(received, receive), gain

    symbols = normal_symbols(9, (num_symbols,))
    noise = np.float32(np.sqrt(noise_var)) * normal_symbols(10, (num_rx, num_symbols))
    signals, scalar, gain = map(np.asarray, send(normal_symbols(8, (num_rx, num_tx)), symbols, noise))
    np.testing.assert_allclose(np.sum(np.abs(signals) ** 2, axis=0), np.abs(symbols) ** 2, rtol=1e-5)
    remainder = (scalar - gain * symbols).astype(np.complex128)
    within_standard_error(np.abs(remainder) ** 2, noise_var)
    within_standard_error((remainder**2).real, 0.0)
    within_standard_error((remainder * np.conj(symbols)).real, 0.0)
    within_standard_error(np.abs(scalar) ** 2, float(gain) ** 2 + noise_var)


@pytest.mark.parametrize(("num_rx", "num_tx"), SHAPES)
def test_capacity_is_the_log_determinant(num_rx, num_tx):
    matrices, links = matrices_and_links(num_rx, num_tx)
    wide = matrices.astype(np.complex128)
    gram = (wide @ wide.conj().swapaxes(1, 2))[:, None] * SNRS[:, None, None].astype(np.float64) / num_tx
    determinant = np.linalg.det(np.eye(num_rx) + gram).real
    np.testing.assert_allclose(links.bits, np.log2(determinant), rtol=1e-5, atol=1e-6)


def test_capacity_at_low_snr():
    @jax.jit
    def compute(h, snr):
        return [jax.value_and_grad(lambda snr, f=f: f(h, snr))(snr) for f in (capacity, capacity_waterfilling)]

    h = normal_symbols(16, (2, 3))
    # The slope of log2 det(I + snr/n H H^H) at 0 is tr(H H^H) / (n ln 2), that of the best beam its eigenvalue / ln 2.
    slope = np.sum(np.abs(h) ** 2) / (3 * np.log(2))
    best = np.linalg.svd(h)[1][0] ** 2 / np.log(2)
    for snr in (0.0, 1e-9):
        (bits, derivative), (waterfilling, its_derivative) = compute(h, snr)
        np.testing.assert_allclose([bits, derivative], [snr * slope, slope], rtol=1e-6)
        np.testing.assert_allclose(waterfilling, snr * best, rtol=1e-5, atol=1e-16)
        np.testing.assert_allclose(its_derivative, best, rtol=1e-5)


def test_capacity_of_a_nearly_singular_matrix_at_high_snr():
    h = np.array([[1, 1], [1, 1 + 1e-4]])
    # det(I + a H H^T) = 1 + a (sum of squares) + a^2 det(H)^2 with a = 5e11: the last term counts as 2.5e15.
    expected = np.log2(
        1 + 5e11 * np.sum(np.float32(h).astype(np.float64) ** 2) + 25e22 * (np.float32(1 + 1e-4) - 1.0) ** 2
    )
    np.testing.assert_allclose(jax.jit(capacity)(h.astype(np.complex64), 1e12), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("num_tx", "num_rx"), [(2, 2), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((4, 4), (1, 3)))]
)
def test_ergodic_capacity_against_telatar(num_tx, num_rx):
    snr = 10.0
    # exp(1/snr) E1(1/snr) / ln 2
    np.testing.assert_allclose(telatar_capacity(1, 1, snr), np.exp(0.1) * special.exp1(0.1) / np.log(2), rtol=1e-8)
    matrices = normal_symbols(11, (2**14, num_rx, num_tx))
    bits = jax.jit(jax.vmap(capacity, (0, None)))(matrices, snr)
    within_standard_error(bits, telatar_capacity(num_tx, num_rx, snr))


def waterfilling_by_bisection(h, snr):
    eigenvalues = np.linalg.svd(np.asarray(h, np.complex128))[1] ** 2
    low, high = 0.0, snr + 1 / eigenvalues.min()
    for _ in range(200):
        level = (low + high) / 2
        spent = np.sum(np.maximum(level - 1 / eigenvalues, 0))
        low, high = (level, high) if spent < snr else (low, level)
    return np.sum(np.log2(np.maximum(level * eigenvalues, 1)))


@pytest.mark.parametrize(("num_rx", "num_tx"), SHAPES)
def test_waterfilling_capacity(num_rx, num_tx):
    matrices, links = matrices_and_links(num_rx, num_tx)
    for snr, bits in zip(SNRS[1:], links.bits_waterfilling.T[1:], strict=True):
        expected = [waterfilling_by_bisection(h, float(snr)) for h in matrices[:-1]]
        np.testing.assert_allclose(bits[:-1], expected, rtol=2e-5)
    one_beam = np.log2(1 + SNRS * links.largest[:, None] ** 2)
    assert np.all(links.bits_waterfilling >= np.maximum(links.bits, one_beam) * (1 - 1e-5) - 1e-6)


def test_waterfilling_by_hand():
    waterfilling, h = jax.jit(capacity_waterfilling), np.diag([2, 1]).astype(np.complex64)
    # lambda = 4, 1 and snr = 0.5: the level 0.5 + 1/4 = 0.75 stays below 1/1, so one mode: log2(0.75 * 4) = log2 3.
    np.testing.assert_allclose(waterfilling(h, 0.5), np.log2(3), rtol=1e-6)
    # snr = 2: level (2 + 1/4 + 1) / 2 = 1.625, log2(1.625 * 4) + log2(1.625).
    np.testing.assert_allclose(waterfilling(h, 2.0), np.log2(6.5) + np.log2(1.625), rtol=1e-6)
    np.testing.assert_allclose(waterfilling(h, 0.0), 0.0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("num_rx", "num_tx"), [(2, 2), (3, 4)])
def test_jit_and_vmap_agree_with_the_loop(num_rx, num_tx):
    matrices, links = matrices_and_links(num_rx, num_tx)
    loop = [LINK(h) for h in matrices[:3]]
    for mapped, single in zip(links[3:], zip(*(one[3:] for one in loop), strict=True), strict=True):
        np.testing.assert_allclose(mapped[:3], single, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("num_rx", "num_tx"), [(3, 1), (2, 4), (4, 3)])
def test_gradients_against_finite_differences(num_rx, num_tx):
    h, direction = normal_symbols(15, (2, num_rx, num_tx))
    step = 1e-2

    def along(x):
        moved, snr = h + jnp.asarray(x, jnp.complex64) * direction, 3.0 + x
        transmit, receive, _ = svd_beams(moved)
        beams = jnp.real(transmit[0] + receive[-1])
        return jnp.stack([svd_gain(moved), beams, capacity(moved, snr), capacity_waterfilling(moved, snr)])

    slope, ends = jax.jit(lambda x: (jax.jacrev(along)(0.0), jax.vmap(along)(x)))(np.float32([-step, step]))
    assert np.all(np.isfinite(slope)) and np.all(np.asarray(slope) != 0)
    # What the difference leaves out, step^2 times third derivatives, is some 1e-3 of the scale of the direction.
    expected = (ends[1] - ends[0]) / (2 * step)
    np.testing.assert_allclose(slope, expected, atol=1e-2 * np.linalg.norm(direction))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_tx=0), "num_tx is 0; it must be an integer of at least 1"),
        (dict(num_rx=-1), "num_rx is -1"),
        (dict(combining="zf"), "combining is 'zf'; it must be one of mrc, mrt, svd"),
        (dict(num_tx=2, num_rx=2, combining="mrc"), "num_tx is 2; combining='mrc' takes num_tx=1"),
        (dict(num_rx=2, combining="mrt"), "num_rx is 2; combining='mrt' takes num_rx=1"),
    ],
)
def test_bad_models(arguments, message):
    with pytest.raises(ValueError, match=message):
        MIMOFading(**arguments)


def test_other_bad_arguments():
    h = jnp.ones((2, 2), jnp.complex64)
    for fn in (capacity, capacity_waterfilling):
        with pytest.raises(ValueError, match="snr is -1.0; it must be 0 or more"):
            fn(h, -1.0)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        MIMOFading(2, 2).sample(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="num_tx is 0"):
        mean_largest_eigenvalue(0, 2)
