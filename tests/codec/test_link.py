"""Tests of the link between the values of a code and their estimates: order, blocks, loads and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import MAPPINGS, equalize_lmmse, pack, post_equalisation_snr, symbols_per_block
from megjax.codec import link
from tests.checks import STANDARD_ERRORS, check_distribution, within_standard_error

EPS = 2.0**-24
NUM_VALUES = 48
# (symbols, blocks), which divide the symbols or not.
SIZES = [(17, 16), (19, 16), (24, 8), (7, 3), (1, 1)]
GAINS = jnp.array([0.9 - 0.4j, 0.1 + 0.3j], jnp.complex64)
POWER = jnp.array([1.3, 0.6])
NOISE_VAR = 0.2
SMALL, NUM_SENT, NUM_DRAWS = 12, 5, 2**14
WAYS = ("channel", "direct")


def blocks_by_hand(num_symbols, num_blocks, mapping):
    """Block of each of the 2K values."""
    if mapping == "interleaved":
        return np.repeat(np.arange(num_symbols) % num_blocks, 2)
    return np.repeat(np.arange(num_blocks), 2 * symbols_per_block(num_symbols, num_blocks))


def random_spend(seed=0, decades=4.0, num_values=NUM_VALUES):
    return jnp.asarray(10 ** np.random.default_rng(seed).uniform(-decades, 0, num_values), jnp.float32)


@pytest.fixture(scope="module")
def small_code():
    """Spending and SNR of twelve values, of which five symbols carry ten in two blocks."""

    @jax.jit
    def split(spend):
        block = link.block_of_value(SMALL, NUM_SENT, 2, False)
        spending = link.split_load(spend, NUM_SENT, block, 2)
        return spending, link.value_snr(spending, post_equalisation_snr(GAINS, POWER, NOISE_VAR), block)

    return split(random_spend(2, 1.0, SMALL))


@pytest.fixture(scope="module")
def receive(small_code):
    """The two ways to receive values [12], by name."""
    spending, snr = small_code
    return {
        "channel": lambda key, x: link.send_code(key, x, spending, GAINS, POWER, NOISE_VAR, NUM_SENT),
        "direct": lambda key, x: link.receive_values(key, x, snr),
    }


@pytest.fixture(scope="module")
def drawn(receive):
    """Values of unit variance [n 12], keys [n], and what is received by each way, one compiled program each."""
    values = np.random.default_rng(2).normal(size=(NUM_DRAWS, SMALL)).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), NUM_DRAWS)
    return values, keys, {way: jax.jit(jax.vmap(receive[way]))(jax.random.clone(keys), values) for way in WAYS}


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize(("num_symbols", "num_blocks"), SIZES)
def test_values_travel_where_pack_puts_them(num_symbols, num_blocks, mapping):
    values = np.arange(1.0, 2 * num_symbols + 1, dtype=np.float32)
    symbols = np.asarray(jax.jit(pack, static_argnums=(1, 2))(values, num_blocks, mapping))
    block = blocks_by_hand(num_symbols, num_blocks, mapping)
    for t in range(num_blocks):
        carried = np.sort(np.concatenate([symbols[t].real, symbols[t].imag]))
        np.testing.assert_allclose(carried[carried > 0], values[block == t] / np.sqrt(2), rtol=4 * EPS)


@pytest.mark.parametrize("num_blocks", [1, 3, 5, 16])
def test_blocks_loads_and_shapes_of_a_traced_number_of_symbols(num_blocks):
    spend, counts = random_spend(), np.arange(num_blocks, NUM_VALUES // 2 + 1)

    @jax.jit
    def split(counts, interleaved):
        def one(num_symbols, interleaved):
            block = link.block_of_value(NUM_VALUES, num_symbols, num_blocks, interleaved)
            return link.split_load(spend, num_symbols, block, num_blocks), block

        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(counts, interleaved)

    spendings, blocks = jax.tree.map(np.asarray, split(counts, np.array([False, True])))
    assert blocks.min() >= 0 and blocks.max() < num_blocks
    for k, loads, shapes, found in zip(counts, *spendings, blocks, strict=True):
        for mapping, load, shape, block in zip(MAPPINGS, loads, shapes, found, strict=True):
            np.testing.assert_array_equal(block[: 2 * k], blocks_by_hand(int(k), num_blocks, mapping))
            np.testing.assert_allclose(load.mean(), 1, rtol=num_blocks * EPS)
            np.testing.assert_array_equal(shape[2 * k :], 0)
            means = [shape[: 2 * k][block[: 2 * k] == t].mean() for t in range(num_blocks)]
            np.testing.assert_allclose(means, 1, rtol=NUM_VALUES * EPS)
            # Load times shape is the spend of every value that is sent, up to one factor.
            ratio = (load[block] * shape / np.asarray(spend))[: 2 * k]
            np.testing.assert_allclose(ratio, ratio[0], rtol=NUM_VALUES * EPS)


@pytest.mark.parametrize("way", WAYS)
def test_the_two_ways_to_receive_have_the_same_law(drawn, small_code, way):
    """Gaussian noise of the LMMSE estimate's variance; over the data it makes the estimate the LMMSE one."""
    values, _, received = drawn
    sent = 2 * NUM_SENT
    snr = np.asarray(small_code[1])
    np.testing.assert_allclose(received[way].snr[0], snr, rtol=8 * EPS)
    snr = snr[:sent].astype(np.float64)
    estimate = np.asarray(received[way].estimate, np.float64)
    np.testing.assert_array_equal(estimate[:, sent:], 0)
    estimate, values = estimate[:, :sent], values[:, :sent].astype(np.float64)
    reliability = snr / (1 + snr)
    noise = (estimate - reliability * values) / np.sqrt(reliability * (1 - reliability))
    within_standard_error(noise, 0.0, axis=0)
    check_distribution(noise, "norm")
    # Gaussian: the variance has standard error sqrt(2 / n) of itself, a covariance 1 / sqrt(n) of its scales.
    errors = (np.ones((sent, sent)) + np.eye(sent)) ** 0.5 / np.sqrt(NUM_DRAWS)
    assert np.all(np.abs(noise.T @ noise / NUM_DRAWS - np.eye(sent)) <= STANDARD_ERRORS * errors)
    # For values of unit variance: E[x estimate] = a, error variance 1 - a, error orthogonal to the estimate.
    error = estimate - values
    within_standard_error(error**2, 1 / (1 + snr), axis=0)
    within_standard_error(error * estimate, 0.0, axis=0)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize(("num_symbols", "num_blocks"), [(19, 16), (24, 8)])
def test_scaling_without_noise(num_symbols, num_blocks, mapping):
    """Packed, equalised and unpacked, a value x arrives as a x, which is what the direct draw centres on."""
    rng = np.random.default_rng(4)
    values = rng.normal(size=NUM_VALUES).astype(np.float32)
    gains = (rng.normal(size=num_blocks) + 1j * rng.normal(size=num_blocks)).astype(np.complex64)
    power = rng.exponential(size=num_blocks).astype(np.float32)

    @jax.jit
    def trip(values, gains, power):
        block = link.block_of_value(NUM_VALUES, num_symbols, num_blocks, mapping == "interleaved")
        spending = link.split_load(random_spend(5), num_symbols, block, num_blocks)
        symbols = link.pack_code(values, spending, num_symbols, num_blocks, mapping)
        amplitude = jnp.sqrt(power).astype(jnp.complex64)
        equalised = equalize_lmmse((amplitude * gains)[:, None] * symbols, gains, power, NOISE_VAR)
        block_snr = post_equalisation_snr(gains, power, NOISE_VAR)
        received = link.unpack_code(equalised, block_snr, spending, num_symbols, mapping)
        return *received, spending.shape, block_snr[block]

    estimate, snr, shape, block_snr = map(np.asarray, trip(values, gains, power))
    np.testing.assert_allclose(snr, shape * block_snr, rtol=2 * EPS)
    # Turning a symbol back by the phase of its gain rounds either value relative to the larger of the two.
    sent = 2 * num_symbols
    amplitude = np.sqrt(shape.astype(np.float64))[:sent]
    size = np.repeat(np.linalg.norm((amplitude * values[:sent]).reshape(-1, 2), axis=1), 2)
    reliability = (snr / (1 + snr))[:sent]
    error = np.abs(estimate[:sent] - reliability * values[:sent])
    assert np.all(error <= 20 * EPS * reliability * size / amplitude)
    np.testing.assert_array_equal(estimate[sent:], 0)


def test_hand_computed_values():
    @jax.jit
    def trip(spend, values, snr):
        spending = link.split_load(spend, 2, link.block_of_value(5, 2, 2, False), 2)
        symbols = link.pack_code(values, spending, 2, 2, "ordered")
        shrunk = (snr / (1 + snr)).astype(jnp.complex64)[:, None] * symbols
        received = link.unpack_code(shrunk, snr, spending, 2, "ordered")
        return spending, symbols, received

    spend, values = (np.array(x, np.float32) for x in ([1, 3, 2, 2, 9], [2, -1, 4, 0, 7]))
    spending, symbols, received = trip(spend, values, np.array([2, 1], np.float32))
    # Spends 1, 3 | 2, 2 in two blocks of one symbol: means 2 and 2, so loads 1 and shapes 1/2, 3/2, 1, 1.
    np.testing.assert_allclose(spending.load, [1, 1], rtol=EPS)
    np.testing.assert_allclose(spending.shape, [0.5, 1.5, 1, 1, 0], rtol=EPS)
    # At block SNRs 2 and 1 the values have 1, 3, 1, 1; block 1's equalised symbols are 2/3 of what was sent.
    np.testing.assert_allclose(symbols[:, 0], [1 - np.sqrt(0.75) * 1j, np.sqrt(8)], rtol=4 * EPS)
    np.testing.assert_allclose(received.snr, [1, 3, 1, 1, 0], rtol=2 * EPS)
    np.testing.assert_allclose(received.estimate, [1, -0.75, 2, 0, 0], rtol=10 * EPS)


def test_vmap_agrees_with_the_loop(drawn, receive):
    values, keys, received = drawn
    send = jax.jit(receive["channel"])
    for i in range(3):
        one = send(jax.random.clone(keys)[i], values[i])
        # Terms of order 1 whose sum may cancel.
        np.testing.assert_allclose(received["channel"].estimate[i], one.estimate, rtol=20 * EPS, atol=20 * EPS)


def test_gradients_at_the_edges():
    @jax.jit
    def gradients(values, spend, gains, power, snr_db):
        def error(values, spend, gains, power, snr_db):
            block = link.block_of_value(SMALL, NUM_SENT, 2, True)
            spending = link.split_load(spend, NUM_SENT, block, 2)
            noise_var = 10 ** (-snr_db / 10)
            code = spending, gains, power, noise_var
            first = link.send_code(jax.random.key(8), values, *code, NUM_SENT, "interleaved")
            snr = link.value_snr(spending, spending.load * power * jnp.abs(gains + 1j) / noise_var, block)
            second = link.receive_values(jax.random.key(9), values, snr)
            return sum(jnp.square(r.estimate - values).sum() + jnp.log1p(r.snr).sum() for r in (first, second))

        return jax.grad(error, argnums=(0, 1, 2, 3, 4))(values, spend, gains, power, snr_db)

    values = np.random.default_rng(1).normal(size=SMALL).astype(np.float32)
    spend, sent = random_spend(2, 1.0, SMALL), np.arange(SMALL) < 2 * NUM_SENT
    usual = gradients(values, spend, GAINS, POWER, 5.0)
    for gradient, nonzero in zip(usual, (sent, sent, True, True, True), strict=True):
        assert np.all(np.isfinite(gradient))
        assert np.all((np.asarray(gradient) != 0) | ~np.asarray(nonzero))
    for present in ([1, 1], [0, 1], [0, 0]):
        for powered in ([1, 1], [1, 0], [0, 0]):
            gains, power = np.asarray(GAINS) * np.float32(present), np.asarray(POWER) * np.float32(powered)
            for snr_db in (-30.0, 25.0):
                edge = gradients(values, spend, gains, power, snr_db)
                assert all(np.all(np.isfinite(gradient)) for gradient in edge)


def test_symbols_at_a_rate():
    assert [link.symbols_at_rate(float(r), 256) for r in (1, 2, 4, 8)] == [128, 64, 32, 16]
    assert link.symbols_at_rate(3.0, 256) == 43  # 42.67
    assert link.symbols_at_rate(256.0, 256) == 1 and link.symbols_at_rate(128.0, 256) == 1
    assert link.symbols_at_rate(1.0, 64 * 64 * 4) == 8192


@pytest.mark.parametrize("rate", [0.0, -2.0, 0.99, 256.5, float("nan"), float("inf"), "4", None])
@pytest.mark.usefixtures("unchecked")
def test_rates_without_a_symbol_are_refused(rate):
    with pytest.raises(ValueError, match="^rate is .*; it must be a number from 1 to 256"):
        link.symbols_at_rate(rate, 256)


@pytest.mark.parametrize("num_symbols", [0, -1, 15, 25, 16.0, True, None])
@pytest.mark.usefixtures("unchecked")
def test_numbers_of_symbols_that_do_not_fit(num_symbols):
    link.check_symbols(16, 48, 16)
    link.check_symbols(24, 48, 16)
    with pytest.raises(ValueError, match="^num_symbols is .*; it must be an integer from 16 .* to 24"):
        link.check_symbols(num_symbols, 48, 16)


def test_sending_refuses_what_it_cannot_send(small_code):
    values, link_arguments = jnp.zeros(SMALL), (small_code[0], GAINS, POWER, NOISE_VAR)
    with pytest.raises(ValueError, match="^mapping is 'spiral'"):
        link.send_code(jax.random.key(0), values, *link_arguments, NUM_SENT, "spiral")
    for num_symbols in (1, 7):
        with pytest.raises(ValueError, match=f"^num_symbols is {num_symbols}"):
            link.send_code(jax.random.key(0), values, *link_arguments, num_symbols)
