"""Tests of the link between the values of a code and their estimates: order, blocks, loads and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import MAPPINGS, equalize_lmmse, pack, post_equalisation_snr, symbols_per_block
from megjax.codec import link

FOUR_SIGMA = 4.0
EPS = 2.0**-24
NUM_VALUES = 48
# (symbols, blocks), which divide the symbols or not.
SIZES = [(17, 16), (19, 16), (24, 8), (7, 3), (1, 1)]
GAINS = jnp.array([0.9 - 0.4j, 0.1 + 0.3j], jnp.complex64)
POWER = jnp.array([1.3, 0.6])
NOISE_VAR = 0.2
NUM_SENT, NUM_DRAWS = 5, 40_000
SEND = jax.jit(link.send_code, static_argnums=(6, 7))


def blocks_by_hand(num_symbols, num_blocks, mapping):
    """Block of each of the 2K values."""
    if mapping == "interleaved":
        return np.repeat(np.arange(num_symbols) % num_blocks, 2)
    return np.repeat(np.arange(num_blocks), 2 * symbols_per_block(num_symbols, num_blocks))


def random_spend(seed=0, decades=4.0, num_values=NUM_VALUES):
    return jnp.asarray(10 ** np.random.default_rng(seed).uniform(-decades, 0, num_values), jnp.float32)


def small_code():
    """Twelve values, of which five symbols carry ten, with their spending and their blocks, two."""
    values = jnp.asarray(np.random.default_rng(1).normal(size=12), jnp.float32)
    block = link.block_of_value(12, NUM_SENT, 2, False)
    return values, link.split_load(random_spend(2, 1.0, 12), NUM_SENT, block, 2), block


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize(("num_symbols", "num_blocks"), SIZES)
def test_values_travel_where_pack_puts_them(num_symbols, num_blocks, mapping):
    values = np.arange(1.0, 2 * num_symbols + 1, dtype=np.float32)
    symbols = np.asarray(pack(jnp.asarray(values), num_blocks, mapping))
    block = np.asarray(link.block_of_value(NUM_VALUES, num_symbols, num_blocks, mapping == "interleaved"))
    for t in range(num_blocks):
        carried = np.sort(np.concatenate([symbols[t].real, symbols[t].imag]))
        expected = values[block[: 2 * num_symbols] == t] / np.sqrt(2)
        np.testing.assert_allclose(carried[carried > 0], expected, rtol=4 * EPS)
    np.testing.assert_array_equal(block[: 2 * num_symbols], blocks_by_hand(num_symbols, num_blocks, mapping))


@pytest.mark.parametrize("num_blocks", [1, 3, 16])
def test_blocks_of_a_traced_number_of_symbols(num_blocks):
    counts = jnp.arange(num_blocks, NUM_VALUES // 2 + 1)
    one = jax.vmap(lambda k, i: link.block_of_value(NUM_VALUES, k, num_blocks, i), (None, 0))
    found = np.asarray(jax.jit(jax.vmap(one, (0, None)))(counts, jnp.array([False, True])))
    assert found.min() >= 0 and found.max() < num_blocks
    for k, row in zip(np.asarray(counts), found, strict=True):
        for mapping, block in zip(MAPPINGS, row, strict=True):
            np.testing.assert_array_equal(block[: 2 * k], blocks_by_hand(int(k), num_blocks, mapping))


@pytest.mark.parametrize("num_blocks", [1, 5, 16])
def test_loads_and_shapes(num_blocks):
    spend, counts = random_spend(), jnp.arange(num_blocks, NUM_VALUES // 2 + 1)

    @jax.jit
    @jax.vmap
    def split(num_symbols, interleaved):
        block = link.block_of_value(NUM_VALUES, num_symbols, num_blocks, interleaved)
        return link.split_load(spend, num_symbols, block, num_blocks), block

    for interleaved in (False, True):
        spendings, blocks = split(counts, jnp.full(counts.shape, interleaved))
        for k, load, shape, block in zip(*map(np.asarray, (counts, *spendings, blocks)), strict=True):
            np.testing.assert_allclose(load.mean(), 1, rtol=num_blocks * EPS)
            np.testing.assert_array_equal(shape[2 * k :], 0)
            for t in range(num_blocks):
                members = shape[: 2 * k][block[: 2 * k] == t]
                np.testing.assert_allclose(members.mean(), 1, rtol=NUM_VALUES * EPS)
            # Load times shape is the spend of every value that is sent, up to one factor.
            ratio = (load[block] * shape / np.asarray(spend))[: 2 * k]
            np.testing.assert_allclose(ratio, ratio[0], rtol=NUM_VALUES * EPS)


def test_the_two_ways_to_receive_have_the_same_law():
    values, spending, block = small_code()
    sent = 2 * NUM_SENT
    snr = link.value_snr(spending, post_equalisation_snr(GAINS, POWER, NOISE_VAR), block)
    ways = {
        "channel": lambda key: link.send_code(key, values, spending, GAINS, POWER, NOISE_VAR, NUM_SENT),
        "direct": lambda key: link.receive_values(key, values, snr),
    }
    reliability = np.asarray(snr, np.float64) / (1 + np.asarray(snr, np.float64))
    variance = reliability * (1 - reliability)
    for seed, (name, receive) in enumerate(ways.items()):
        keys = jax.random.split(jax.random.key(seed), NUM_DRAWS)
        received = jax.jit(jax.vmap(receive))(keys)
        np.testing.assert_allclose(received.snr[0], snr, rtol=8 * EPS, err_msg=name)
        estimate = np.asarray(received.estimate, np.float64)
        np.testing.assert_array_equal(estimate[:, sent:], 0)
        noise = estimate[:, :sent] - (reliability * np.asarray(values))[:sent]
        scale = np.sqrt(variance[:sent])
        assert np.all(np.abs(noise.mean(0)) <= FOUR_SIGMA * scale / np.sqrt(NUM_DRAWS)), name
        # Gaussian: the variance has standard error sqrt(2 / n) of itself, a covariance 1 / sqrt(n) of its scales.
        covariance = noise.T @ noise / NUM_DRAWS / np.outer(scale, scale)
        errors = (np.ones((sent, sent)) + np.eye(sent)) ** 0.5 / np.sqrt(NUM_DRAWS)
        assert np.all(np.abs(covariance - np.eye(sent)) <= FOUR_SIGMA * errors), name


def test_estimates_are_lmmse_over_the_data():
    """For values of unit variance: E[x estimate] = a, error variance 1 - a, error orthogonal to the estimate."""
    _, spending, block = small_code()
    sent = 2 * NUM_SENT
    snr = np.asarray(link.value_snr(spending, post_equalisation_snr(GAINS, POWER, NOISE_VAR), block), np.float64)
    values = jax.random.normal(jax.random.key(2), (NUM_DRAWS, 12))
    send = jax.vmap(lambda key, x: link.send_code(key, x, spending, GAINS, POWER, NOISE_VAR, NUM_SENT, "ordered"))
    received = jax.jit(send)(jax.random.split(jax.random.key(3), NUM_DRAWS), values)
    estimate = np.asarray(received.estimate, np.float64)[:, :sent]
    error = estimate - np.asarray(values, np.float64)[:, :sent]
    for samples, expected in ((error**2, 1 / (1 + snr[:sent])), (error * estimate, 0.0)):
        spread = samples.std(0, ddof=1) / np.sqrt(NUM_DRAWS)
        assert np.all(np.abs(samples.mean(0) - expected) <= FOUR_SIGMA * spread)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize(("num_symbols", "num_blocks"), [(19, 16), (24, 8)])
def test_scaling_without_noise(num_symbols, num_blocks, mapping):
    """Packed, equalised and unpacked, a value x arrives as a x, which is what the direct draw centres on."""
    rng = np.random.default_rng(4)
    values = jnp.asarray(rng.normal(size=NUM_VALUES), jnp.float32)
    gains = jnp.asarray(rng.normal(size=num_blocks) + 1j * rng.normal(size=num_blocks), jnp.complex64)
    power = jnp.asarray(rng.exponential(size=num_blocks), jnp.float32)
    block = link.block_of_value(NUM_VALUES, num_symbols, num_blocks, mapping == "interleaved")
    spending = link.split_load(random_spend(5), num_symbols, block, num_blocks)
    symbols = link.pack_code(values, spending, num_symbols, num_blocks, mapping)
    clean = (jnp.sqrt(power) * gains)[:, None] * symbols
    equalised = equalize_lmmse(clean, gains, power, NOISE_VAR)
    block_snr = post_equalisation_snr(gains, power, NOISE_VAR)
    estimate, snr = link.unpack_code(equalised, block_snr, spending, num_symbols, mapping)
    np.testing.assert_allclose(snr, spending.shape * block_snr[block], rtol=2 * EPS)
    # Turning a symbol back by the phase of its gain rounds either value relative to the larger of the two.
    sent = 2 * num_symbols
    amplitude = np.sqrt(np.asarray(spending.shape, np.float64))[:sent]
    size = np.repeat(np.linalg.norm((amplitude * np.asarray(values)[:sent]).reshape(-1, 2), axis=1), 2)
    reliability = np.asarray(snr / (1 + snr))[:sent]
    error = np.abs(np.asarray(estimate)[:sent] - reliability * np.asarray(values)[:sent])
    assert np.all(error <= 20 * EPS * reliability * size / amplitude)
    np.testing.assert_array_equal(estimate[sent:], 0)


def test_hand_computed_values():
    # Spends 1, 3 | 2, 2 in two blocks of one symbol: means 2 and 2, so loads 1 and shapes 1/2, 3/2, 1, 1.
    block = link.block_of_value(5, 2, 2, False)
    spending = link.split_load(jnp.array([1.0, 3.0, 2.0, 2.0, 9.0]), 2, block, 2)
    np.testing.assert_allclose(spending.load, [1, 1], rtol=EPS)
    np.testing.assert_allclose(spending.shape, [0.5, 1.5, 1, 1, 0], rtol=EPS)
    # At block SNRs 2 and 1 the values have 1, 3, 1, 1; block 1's equalised symbols are 2/3 of what was sent.
    values = jnp.array([2.0, -1.0, 4.0, 0.0, 7.0])
    snr = jnp.array([2.0, 1.0])
    symbols = link.pack_code(values, spending, 2, 2, "ordered")
    np.testing.assert_allclose(symbols[:, 0], [1 - np.sqrt(0.75) * 1j, np.sqrt(8)], rtol=4 * EPS)
    received = link.unpack_code((snr / (1 + snr))[:, None] * symbols, snr, spending, 2, "ordered")
    np.testing.assert_allclose(received.snr, [1, 3, 1, 1, 0], rtol=2 * EPS)
    np.testing.assert_allclose(received.estimate, [1, -0.75, 2, 0, 0], rtol=10 * EPS)


def test_vmap_and_jit_agree_with_the_loop():
    _, spending, _ = small_code()
    batch = jax.random.normal(jax.random.key(6), (3, 12))
    keys = jax.random.split(jax.random.key(7), 3)
    send = jax.jit(jax.vmap(lambda key, x: link.send_code(key, x, spending, GAINS, POWER, NOISE_VAR, NUM_SENT)))
    mapped = send(jax.random.clone(keys), batch)
    for i in range(3):
        one = SEND(keys[i], batch[i], spending, GAINS, POWER, NOISE_VAR, NUM_SENT, "ordered")
        # Terms of order 1 whose sum may cancel.
        np.testing.assert_allclose(mapped.estimate[i], one.estimate, rtol=20 * EPS, atol=20 * EPS)


def test_gradients_at_the_edges():
    values = small_code()[0]

    @jax.jit
    def gradients(values, spend, gains, power, snr_db):
        def error(values, spend, gains, power, snr_db):
            block = link.block_of_value(12, NUM_SENT, 2, True)
            spending = link.split_load(spend, NUM_SENT, block, 2)
            noise_var = 10 ** (-snr_db / 10)
            code = spending, gains, power, noise_var
            first = link.send_code(jax.random.key(8), values, *code, NUM_SENT, "interleaved")
            snr = link.value_snr(spending, spending.load * power * jnp.abs(gains + 1j) / noise_var, block)
            second = link.receive_values(jax.random.key(9), values, snr)
            return sum(jnp.square(r.estimate - values).sum() + jnp.log1p(r.snr).sum() for r in (first, second))

        return jax.grad(error, argnums=(0, 1, 2, 3, 4))(values, spend, gains, power, snr_db)

    spend = random_spend(2, 1.0, 12)
    sent = np.arange(12) < 2 * NUM_SENT
    usual = gradients(values, spend, GAINS, POWER, 5.0)
    for gradient, nonzero in zip(usual, (sent, sent, True, True, True), strict=True):
        assert np.all(np.isfinite(gradient))
        assert np.all((np.asarray(gradient) != 0) | ~np.asarray(nonzero))
    zero = jnp.zeros(2)
    for gains in (GAINS, GAINS.at[0].set(0), zero.astype(jnp.complex64)):
        for power in (POWER, POWER.at[1].set(0.0), zero):
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


def test_sending_refuses_what_it_cannot_send():
    values, spending, _ = small_code()
    link_arguments = spending, GAINS, POWER, NOISE_VAR
    with pytest.raises(ValueError, match="^mapping is 'spiral'"):
        link.send_code(jax.random.key(0), values, *link_arguments, NUM_SENT, "spiral")
    for num_symbols in (1, 7):
        with pytest.raises(ValueError, match=f"^num_symbols is {num_symbols}"):
            link.send_code(jax.random.key(0), values, *link_arguments, num_symbols)
