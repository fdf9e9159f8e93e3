"""Tests of multi-antenna fading against Gamma and Wishart laws, and of capacity against Telatar's integral."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from megjax.channel import Fading
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

FOUR_SIGMA = 4.0
FOUR_SIGMA_PROBABILITY = 2 * stats.norm.sf(FOUR_SIGMA)
SHAPES = [(1, 1), (1, 3), (3, 1), (2, 2), (2, 4), (4, 2), (3, 3), (4, 3)]
SOME_SHAPES = [(3, 1), (2, 4), (4, 3)]


def within_standard_error(samples, expected):
    samples = np.asarray(samples, np.float64).reshape(-1)
    error = abs(samples.mean() - expected)
    assert error <= FOUR_SIGMA * samples.std(ddof=1) / np.sqrt(samples.size), (samples.mean(), expected)


def draw(seed, model, num, num_blocks=16):
    keys = jax.random.split(jax.random.key(seed), num // num_blocks)
    return np.asarray(jax.jit(jax.vmap(lambda key: model.sample(key, num_blocks)))(keys)).reshape(-1)


def draw_matrices(seed, num_tx, num_rx, num):
    draw_jitted = jax.jit(MIMOFading(num_tx, num_rx).sample_matrices, static_argnums=1)
    return draw_jitted(jax.random.key(seed), num)


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


def test_shapes_and_protocol():
    for num_tx, num_rx, combining in ((1, 2, "mrc"), (3, 1, "mrt"), (2, 3, "svd")):
        model = MIMOFading(num_tx, num_rx, combining)
        assert isinstance(model, Fading)
        gains = jax.jit(model.sample, static_argnums=1)(jax.random.key(0), 5)
        matrices = draw_matrices(0, num_tx, num_rx, 5)
        assert gains.shape == (5,) and gains.dtype == jnp.complex64
        assert matrices.shape == (5, num_rx, num_tx) and matrices.dtype == jnp.complex64
        np.testing.assert_allclose(gains.real, [np.linalg.svd(h)[1][0] for h in np.asarray(matrices)], rtol=1e-5)
        np.testing.assert_array_equal(gains.imag, 0)


def test_elements_have_unit_power_and_are_independent():
    h = np.asarray(draw_matrices(1, 2, 3, 50_000))
    within_standard_error(np.abs(h) ** 2, 1.0)
    within_standard_error((h[:, 0, 0] * h[:, 0, 1].conj()).real, 0.0)
    within_standard_error((h[:, 0, 0] * h[:, 1, 0].conj()).real, 0.0)
    within_standard_error((h[1:, 0, 0] * h[:-1, 0, 0].conj()).real, 0.0)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_mrc_and_mrt_gains_are_gamma_distributed(count):
    mrc = np.abs(draw(2, MIMOFading(1, count, "mrc"), 1_024_000)) ** 2
    mrt = np.abs(draw(3, MIMOFading(count, 1, "mrt"), 128_000)) ** 2
    for gains in (mrc, mrt):
        assert stats.kstest(gains, stats.gamma(count).cdf).pvalue > FOUR_SIGMA_PROBABILITY
        within_standard_error(gains, count)


@pytest.mark.parametrize(("num_tx", "num_rx", "num"), [(2, 2, 1_024_000), (4, 2, 128_000), (3, 4, 128_000)])
def test_svd_gain_follows_the_largest_wishart_eigenvalue(num_tx, num_rx, num):
    gains = np.abs(draw(4, MIMOFading(num_tx, num_rx, "svd"), num)) ** 2
    smaller, larger = sorted((num_tx, num_rx))
    assert stats.kstest(gains, lambda x: khatri_cdf(x, smaller, larger)).pvalue > FOUR_SIGMA_PROBABILITY
    within_standard_error(gains, mean_largest_eigenvalue(num_tx, num_rx))


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


@pytest.mark.parametrize("model", [MIMOFading(1, 4, "mrc"), MIMOFading(3, 1, "mrt"), MIMOFading(4, 3)])
def test_normalised_gains_have_unit_power(model):
    unit = MIMOFading(model.num_tx, model.num_rx, model.combining, normalize=True)
    gains = draw(5, unit, 64_000)
    within_standard_error(np.abs(gains) ** 2, 1.0)
    np.testing.assert_allclose(gains * np.sqrt(model.mean_array_gain), draw(5, model, 64_000), rtol=1e-5)


def assert_beams(matrices, rtol=1e-5):
    """Unit norms and w^H H v = gain, the largest singular value, for each of the matrices [m r n]."""
    transmit, receive, gain = jax.jit(jax.vmap(svd_beams))(matrices)
    assert transmit.shape == matrices.shape[::2] and receive.shape == matrices.shape[:2]
    for beams in (transmit, receive):
        np.testing.assert_allclose(np.linalg.norm(beams, axis=-1), 1, rtol=rtol)
    largest = np.linalg.svd(np.asarray(matrices))[1][:, 0]
    reduced = np.einsum("mr,mrn,mn->m", np.conj(receive), matrices, transmit)
    np.testing.assert_allclose(reduced, largest, rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(gain, largest, rtol=rtol)
    return transmit, receive


@pytest.mark.parametrize(("num_rx", "num_tx"), SHAPES)
def test_svd_beams(num_rx, num_tx):
    transmit, receive = assert_beams(draw_matrices(6, num_tx, num_rx, 8))
    first = (receive if num_rx <= num_tx else transmit)[:, 0]
    assert np.all(first.real >= 0) and np.all(np.abs(first.imag) < 1e-6)


def test_svd_beams_of_special_matrices():
    special_cases = [np.eye(2), np.diag([1, 3]), np.diag([3, 1]), [[0, 2], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 1j]]]
    assert_beams(jnp.asarray(np.array(special_cases), jnp.complex64))


def test_no_channel_gives_no_gain():
    @jax.jit
    def compute(h):
        return svd_beams(h), capacity(h, 10.0), capacity_waterfilling(h, 10.0)

    for shape in ((2, 2), (1, 3)):
        (transmit, receive, gain), bits, bits_waterfilling = compute(jnp.zeros(shape, jnp.complex64))
        assert gain == 0 and np.all(np.isfinite(transmit)) and np.all(np.isfinite(receive))
        assert bits == 0 and abs(bits_waterfilling) < 1e-6
    zero = jnp.zeros(3, jnp.complex64)
    assert mrc_gain(zero) == 0 and np.all(mrc_beam(zero) == 0)
    assert np.all(np.isfinite(jax.grad(lambda x: mrc_gain(x + 0j))(jnp.zeros(3))))


def test_mrc_and_mrt_agree_with_svd():
    h = draw_matrices(7, 1, 4, 1)[0, :, 0]
    for gain in (mrc_gain(h), mrt_gain(h), svd_gain(h[:, None]), svd_gain(h[None])):
        np.testing.assert_allclose(gain, np.linalg.norm(h), rtol=1e-6)
    np.testing.assert_allclose(np.vdot(mrc_beam(h), h), np.linalg.norm(h), rtol=1e-6)
    np.testing.assert_allclose(np.dot(h, mrt_beam(h)), np.linalg.norm(h), rtol=1e-6)


@pytest.mark.parametrize(("num_rx", "num_tx"), [(4, 1), (1, 4), (2, 2), (3, 4)])
def test_beams_reduce_the_matrix_to_a_scalar_channel(num_rx, num_tx):
    noise_var, num_symbols = 0.3, 40_000
    h = draw_matrices(8, num_tx, num_rx, 1)[0]
    symbol_key, noise_key = jax.random.split(jax.random.key(9))
    symbols = jax.random.normal(symbol_key, (num_symbols,), jnp.complex64)
    noise = np.sqrt(noise_var) * np.asarray(jax.random.normal(noise_key, (num_rx, num_symbols), jnp.complex64))
    transmit, receive, gain = svd_beams(h)
    signals = precode(symbols, transmit)
    np.testing.assert_allclose(np.sum(np.abs(signals) ** 2, axis=0), np.abs(symbols) ** 2, rtol=1e-5)
    scalar = combine(jnp.asarray(np.asarray(h) @ np.asarray(signals) + noise, jnp.complex64), receive)
    remainder = np.asarray(scalar - gain * symbols, np.complex128)
    within_standard_error(np.abs(remainder) ** 2, noise_var)
    within_standard_error((remainder**2).real, 0.0)
    within_standard_error((remainder * np.conj(symbols)).real, 0.0)
    within_standard_error(np.abs(scalar) ** 2, float(gain) ** 2 + noise_var)


@pytest.mark.parametrize(("num_rx", "num_tx"), [(2, 2), *SOME_SHAPES])
def test_capacity_is_the_log_determinant(num_rx, num_tx):
    matrices = draw_matrices(10, num_tx, num_rx, 4)
    wide = np.asarray(matrices, np.complex128)
    gram = wide @ wide.conj().swapaxes(1, 2)
    bits = jax.jit(jax.vmap(capacity, (0, None)))
    for snr in (0.0, 0.1, 10.0, 1e4):
        determinant = np.linalg.det(np.eye(num_rx) + snr / num_tx * gram).real
        np.testing.assert_allclose(bits(matrices, jnp.float32(snr)), np.log2(determinant), rtol=1e-5, atol=1e-6)


def test_capacity_at_low_snr():
    h = draw_matrices(16, 3, 2, 1)[0]
    # The slope of log2 det(I + snr/n H H^H) at 0 is tr(H H^H) / (n ln 2).
    slope = np.sum(np.abs(h) ** 2) / (3 * np.log(2))
    bits, derivative = jax.jit(jax.vmap(jax.value_and_grad(lambda snr: capacity(h, snr))))(jnp.array([0.0, 1e-9]))
    np.testing.assert_allclose(bits, [0, 1e-9 * slope], rtol=1e-6)
    np.testing.assert_allclose(derivative, slope, rtol=1e-6)
    best = float(svd_gain(h)) ** 2 / np.log(2)
    np.testing.assert_allclose(capacity_waterfilling(h, 1e-9), 1e-9 * best, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda snr: capacity_waterfilling(h, snr))(0.0), best, rtol=1e-5)


def test_capacity_of_a_nearly_singular_matrix_at_high_snr():
    h = np.array([[1, 1], [1, 1 + 1e-4]])
    # det(I + a H H^T) = 1 + a (sum of squares) + a^2 det(H)^2 with a = 5e11: the last term counts as 2.5e15.
    expected = np.log2(
        1 + 5e11 * np.sum(np.float32(h).astype(np.float64) ** 2) + 25e22 * (np.float32(1 + 1e-4) - 1.0) ** 2
    )
    np.testing.assert_allclose(capacity(jnp.asarray(h, jnp.complex64), 1e12), expected, rtol=1e-4)


@pytest.mark.parametrize(("num_tx", "num_rx"), [(1, 1), (2, 2), (4, 4), (4, 2), (1, 3)])
def test_ergodic_capacity_against_telatar(num_tx, num_rx):
    snr = 10.0
    expected = telatar_capacity(num_tx, num_rx, snr)
    if num_tx == num_rx == 1:
        # exp(1/snr) E1(1/snr) / ln 2
        np.testing.assert_allclose(expected, np.exp(0.1) * special.exp1(0.1) / np.log(2), rtol=1e-8)
    bits = jax.jit(jax.vmap(lambda h: capacity(h, snr)))(draw_matrices(11, num_tx, num_rx, 200_000))
    within_standard_error(bits, expected)


def waterfilling_by_bisection(h, snr):
    eigenvalues = np.linalg.svd(np.asarray(h, np.complex128))[1] ** 2
    low, high = 0.0, snr + 1 / eigenvalues.min()
    for _ in range(200):
        level = (low + high) / 2
        spent = np.sum(np.maximum(level - 1 / eigenvalues, 0))
        low, high = (level, high) if spent < snr else (low, level)
    return np.sum(np.log2(np.maximum(level * eigenvalues, 1)))


@pytest.mark.parametrize(("num_rx", "num_tx"), [(2, 2), *SOME_SHAPES])
def test_waterfilling_capacity(num_rx, num_tx):
    matrices = draw_matrices(12, num_tx, num_rx, 4)

    @jax.jit
    def compute(snr):
        def one(h):
            return capacity_waterfilling(h, snr), capacity(h, snr), jnp.log2(1 + snr * jnp.square(svd_gain(h)))

        return jax.vmap(one)(matrices)

    for snr in (0.01, 1.0, 100.0):
        bits, equal_power, one_beam = (np.asarray(values) for values in compute(jnp.float32(snr)))
        np.testing.assert_allclose(bits, [waterfilling_by_bisection(h, snr) for h in matrices], rtol=2e-5)
        assert np.all(bits >= np.maximum(equal_power, one_beam) * (1 - 1e-5))


def test_waterfilling_by_hand():
    # lambda = 4, 1 and snr = 0.5: the level 0.5 + 1/4 = 0.75 stays below 1/1, so one mode: log2(0.75 * 4) = log2 3.
    h = jnp.diag(jnp.array([2, 1], jnp.complex64))
    np.testing.assert_allclose(capacity_waterfilling(h, 0.5), np.log2(3), rtol=1e-6)
    # snr = 2: level (2 + 1/4 + 1) / 2 = 1.625, log2(1.625 * 4) + log2(1.625).
    np.testing.assert_allclose(capacity_waterfilling(h, 2.0), np.log2(6.5) + np.log2(1.625), rtol=1e-6)
    np.testing.assert_allclose(capacity_waterfilling(h, 0.0), 0.0, atol=1e-6)


@pytest.mark.parametrize("model", [MIMOFading(2, 2), MIMOFading(4, 3)])
def test_jit_and_vmap_agree_with_the_loop(model):
    one = jax.jit(model.sample, static_argnums=1)
    keys = jax.random.split(jax.random.key(13), 3)
    mapped = jax.jit(jax.vmap(lambda key: model.sample(key, 4)))(keys)
    loop = [one(key, 4) for key in jax.random.split(jax.random.key(13), 3)]
    np.testing.assert_allclose(mapped, np.stack(loop), rtol=1e-5)
    matrices = draw_matrices(14, model.num_tx, model.num_rx, 3)

    def gain_and_capacities(h):
        return jnp.stack([svd_gain(h), capacity(h, 3.0), capacity_waterfilling(h, 3.0)])

    mapped = jax.jit(jax.vmap(gain_and_capacities))(matrices)
    one = jax.jit(gain_and_capacities)
    np.testing.assert_allclose(mapped, [one(h) for h in matrices], rtol=1e-5)


@pytest.mark.parametrize(("num_rx", "num_tx"), SOME_SHAPES)
def test_gradients_against_finite_differences(num_rx, num_tx):
    h, direction = draw_matrices(15, num_tx, num_rx, 2)
    step = 1e-2

    def along(x):
        moved, snr = h + x * direction, 3.0 + x
        transmit, receive, _ = svd_beams(moved)
        beams = jnp.real(transmit[0] + receive[-1])
        return jnp.stack([svd_gain(moved), beams, capacity(moved, snr), capacity_waterfilling(moved, snr)])

    slope = np.asarray(jax.jit(jax.jacrev(along))(0.0))
    low, high = (np.asarray(jax.jit(along)(x)) for x in (-step, step))
    assert np.all(np.isfinite(slope)) and np.all(slope != 0)
    # What the difference leaves out, step^2 times third derivatives, is some 1e-3 of the scale of the direction.
    np.testing.assert_allclose(slope, (high - low) / (2 * step), atol=1e-2 * np.linalg.norm(direction))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_tx=0), "num_tx is 0; it must be an integer of 1 or more"),
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
