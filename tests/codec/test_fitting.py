"""Tests of the codec's training: draws, loss, start, calibration, and that a run learns and resumes to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax import training
from megjax.codec import SeedCodecConfig, fitting
from megjax.codec.fitting import Conditions
from megjax.training import FitConfig

FOUR_SIGMA = 4.0
EPS = 2.0**-24
# The statistics are sums of 1000 float32 terms at a time, whose rounding is at most this.
MOMENT_ERROR = 1000 * EPS
CONDITIONS = Conditions(groups=2, group_size=64, num_blocks=4, snr_db=0.0, num_symbols=8)
FIT = FitConfig(
    num_steps=30, learning_rate=1e-2, warmup_steps=5, log_every=15, steps_per_dispatch=1, checkpoint_minutes=0.0
)


def keys(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def total_variance(latents):
    return float(latents.astype(np.float64).var(0).sum())


@pytest.fixture(scope="module")
def data(plain, latents):
    return {
        "constants": plain.constants,
        "total_variance": jnp.float32(total_variance(latents)),
        "latents": (jnp.asarray(latents),),
    }


@pytest.fixture(scope="module")
def run(plain, data, fast_jit):
    """`training.fit` of a small codec, `(folder, on_checkpoint) -> state`; all calls share one compiled step."""
    loss = fitting.codec_loss(plain.loss_graph, CONDITIONS)
    step = fast_jit(training.make_step(FIT, loss))

    def fit(folder, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "make_chunk", lambda *_: lambda state, data, key, num_steps: step(state, data, key))
            return training.fit(loss, plain.params, data, FIT, folder, **options)

    return fit


@pytest.fixture(scope="module")
def losses(plain, data, fast_jit):
    """The loss of parameters for thirty draws, always the same."""
    loss = fast_jit(lambda params, key: fitting.codec_loss(plain.loss_graph, CONDITIONS)(params, data, key)[0])
    return lambda params: np.array([loss(params, key) for key in keys(0, 30)], np.float64)


def test_a_run_learns_and_resumes_to_the_bit(run, losses, plain, tmp_path):
    class Stop(Exception):
        pass

    def stop(state):
        if int(state.step) == 15:
            raise Stop

    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "halves", on_checkpoint=stop)
    resumed = run(tmp_path / "halves")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "halves")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 2
    # The start is the best linear scheme; twelve patterns leave it far from the best of all.
    gain_db = losses(plain.params) - losses(whole.params)
    assert gain_db.mean() > FOUR_SIGMA * gain_db.std(ddof=1) / np.sqrt(len(gain_db))


def test_the_loss_starts_at_the_error_of_the_klt(plain, data, losses, fast_jit):
    """The mean NMSE in dB at the start against the formula for the same scheme, averaged over the same law of gains."""
    samples = losses(plain.params)
    network = nnx.merge(plain.graph, plain.state)
    variances, spend = jnp.square(network.scale[...]), network.spend(0.0, 8)

    @fast_jit
    @jax.vmap
    def nmse_db(key, interleaved):
        """Error of a group given its gains: of every value, its variance over 1 + snr."""
        draw = fitting.Draw(jnp.float32(0.0), jnp.int32(8), interleaved)
        values = jnp.zeros((CONDITIONS.group_size, 48))
        snr = fitting.transmit_group(key, values, spend, draw, CONDITIONS.num_blocks).snr
        return 10 * jnp.log10((variances[None] / (1 + snr)).sum(1).mean() / data["total_variance"])

    expected = np.asarray(nmse_db(keys(1, 120), jnp.arange(120) % 2 == 0), np.float64)
    error = np.sqrt(samples.var(ddof=1) / len(samples) + expected.var(ddof=1) / len(expected))
    # Moments of the group's own 64 latents, one mean and one variance a value, flatter it by at most 2 / 64.
    difference = samples.mean() - expected.mean()
    assert 10 * np.log10(1 - 2 / 64) - FOUR_SIGMA * error <= difference <= FOUR_SIGMA * error


def test_images_join_the_loss(stirred, data, fast_jit):
    def decode_images(latents):
        return jax.nn.sigmoid(latents[..., :1] * jnp.ones((1, 1, 1, 3)))

    conditions = Conditions(groups=2, group_size=8, num_blocks=4, image_weight=0.25)
    loss = fitting.codec_loss(stirred.loss_graph, conditions, decode_images)
    gradient = fast_jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradients = gradient(stirred.params, data, jax.random.key(2))
    assert metrics.keys() == {"nmse_db", "image_mse_db"}
    assert np.isfinite(value) and metrics["image_mse_db"] < 0
    np.testing.assert_allclose(value, 0.75 * metrics["nmse_db"] + 0.25 * metrics["image_mse_db"], rtol=4 * EPS)
    for leaf in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf) != 0)
    with pytest.raises(ValueError, match="^image_weight is 0.25; it must be 0 without image decoder"):
        fitting.codec_loss(stirred.loss_graph, conditions)


@functools.cache
def drawn(conditions, num_values=256, count=2000):
    draw = jax.jit(jax.vmap(lambda key: fitting.draw_conditions(key, conditions, num_values)))
    return fitting.Draw(*(np.asarray(x).reshape(-1) for x in draw(keys(3, count))))


def test_draws_of_rate_snr_and_mapping():
    conditions = Conditions(groups=5, num_blocks=20)
    draw = drawn(conditions)
    count = draw.snr_db.size
    assert draw.num_symbols.dtype == np.int32 and draw.snr_db.dtype == np.float32
    # Rates 1, 2, 4, 8 of 256 values: 128, 64, 32 and, for want of symbols for 20 blocks, 20.
    assert draw.num_symbols.min() == 20 and draw.num_symbols.max() == 128
    energy_db = 10 * np.log10(128 / draw.num_symbols)
    assert np.all(draw.snr_db >= -15) and np.all(draw.snr_db <= 25 + energy_db + 1e-5)
    assert draw.snr_db.max() > 25  # some at equal energy
    # Half of the draws take equal energy: the mean offset is half of the mean energy ratio.
    excess = draw.snr_db - 5 - 0.5 * energy_db
    for samples, expected in ((excess, 0.0), (draw.interleaved, 0.5), (np.isin(draw.num_symbols, (64, 128)), None)):
        samples = samples.astype(np.float64)
        error = samples.std(ddof=1) / np.sqrt(count)
        if expected is None:
            # 0.7 of the draws are exact, half of them these; of the others about one in 10 comes out as 64 or 128.
            assert samples.mean() > 0.35 - FOUR_SIGMA * error
        else:
            assert abs(samples.mean() - expected) <= FOUR_SIGMA * error
    # Rates between the exact ones occur, everywhere.
    between = draw.num_symbols[~np.isin(draw.num_symbols, (20, 32, 64, 128))]
    assert between.size > 0.2 * count and np.unique(between).size > 80


def test_draws_at_equal_power_only():
    draw = drawn(Conditions(groups=5, equal_energy=False, min_snr_db=-3.0, max_snr_db=7.0, rates=(2.0,)))
    assert draw.snr_db.min() >= -3 and draw.snr_db.max() <= 7
    np.testing.assert_array_equal(draw.num_symbols, 64)
    spread = 10 / np.sqrt(12 * draw.snr_db.size)
    assert abs(draw.snr_db.mean() - 2) <= FOUR_SIGMA * spread


def test_draws_of_a_specialist():
    draw = drawn(Conditions(groups=5, snr_db=3.5, num_symbols=37))
    np.testing.assert_array_equal(draw.snr_db, 3.5)
    np.testing.assert_array_equal(draw.num_symbols, 37)
    assert draw.num_symbols.dtype == np.int32 and 0 < draw.interleaved.mean() < 1


def test_draws_of_gains():
    count, blocks = 40_000, 6
    gains = jax.jit(jax.vmap(lambda key: fitting.draw_gains(key, blocks)))(keys(4, count))
    gains = np.asarray(gains, np.float64)
    assert gains.shape == (count, blocks) and np.all(gains >= 0)
    # Realisations are independent, blocks are not.
    for samples in gains.T:
        assert abs(samples.mean() - 1) <= FOUR_SIGMA * samples.std(ddof=1) / np.sqrt(count)
    # A fifth has no fading, half is Rayleigh: of these P(g < 0.1) = 1 - exp(-0.1); Jakes' share, 0.15, has that too.
    still = np.all(np.abs(gains - 1) < 1e-5, axis=1)
    assert abs(still.mean() - 0.2) <= FOUR_SIGMA * np.sqrt(0.2 * 0.8 / count)
    deep = gains[:, 0] < 0.1
    error = FOUR_SIGMA * deep.std() / np.sqrt(count)
    rayleigh = 0.65 * (1 - np.exp(-0.1))
    assert rayleigh - error <= deep.mean() <= rayleigh + 0.15 * (1 - np.exp(-0.1)) + error


def test_draws_of_powers():
    count, load = 20_000, jnp.array([2.0, 1.0, 0.7, 0.3])
    powers = jax.jit(jax.vmap(lambda key: fitting.draw_power(key, load)))(keys(5, count))
    powers = np.asarray(powers, np.float64)
    assert np.all(powers >= 0)
    np.testing.assert_allclose(powers.mean(1), 1, rtol=8 * EPS)
    for exact, share in ((load, 0.65 * 0.7), (jnp.ones(4), 0.35 * 0.7)):
        same = np.all(np.abs(powers - np.asarray(exact)) < 1e-6, axis=1)
        assert abs(same.mean() - share) <= FOUR_SIGMA * np.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.3, 3), (0.5, 5), (1.0, 10)])
def test_draws_of_latents(share, expected, fast_jit):
    values = np.broadcast_to(np.arange(200, dtype=np.float32)[:, None, None, None], (200, 2, 1, 1))
    first, second = jnp.asarray(values[:50]), jnp.asarray(values[100:])
    conditions = Conditions(groups=3, group_size=10, first_share=share)
    draw = fast_jit(lambda key, sets: fitting.draw_latents(key, sets, conditions))
    batch = np.asarray(draw(jax.random.key(6), (first, second)))
    assert batch.shape == (30, 2, 1, 1)
    np.testing.assert_array_equal((batch[:, 0, 0, 0].reshape(3, 10) < 100).sum(1), expected)
    assert np.unique(batch).size > 10
    if share == 0.3:  # with one set the share says nothing
        alone = np.asarray(draw(jax.random.key(7), (first,)))
        assert alone.shape == (30, 2, 1, 1) and alone.max() < 100


def test_moments_of_a_group():
    values = jnp.asarray(np.random.default_rng(8).normal(3, 2, (2, 50, 4)), jnp.float32)
    mean, std = jax.jit(fitting.group_moments)(values)
    assert mean.shape == std.shape == (2, 1, 4)
    standard = np.asarray((values - mean) / std, np.float64)
    np.testing.assert_allclose(standard.mean(1), 0, atol=50 * EPS)
    # 1e-6 is added to a variance of about 4.
    np.testing.assert_allclose(np.square(standard).mean(1), 1, atol=1e-6 + 50 * EPS)


def test_calibration_is_exact_at_every_grid_point(stirred, latents, fast_jit):
    network, config = nnx.merge(stirred.graph, stirred.state), stirred.config
    encode = fast_jit(lambda snr_db, k: network.encode(jnp.asarray(latents), snr_db, k))
    seen = set()
    for snr_db in config.snr_grid_db:
        for rate in config.rate_grid:
            num_symbols = round(config.num_values / (2 * rate))
            row, column = network.mode(float(snr_db), num_symbols)
            seen.add((int(row), int(column)))
            values = np.asarray(encode(float(snr_db), num_symbols), np.float64)
            np.testing.assert_allclose(values.mean(0), 0, atol=2 * MOMENT_ERROR)
            np.testing.assert_allclose(values.var(0), 1, rtol=2 * MOMENT_ERROR)
    assert len(seen) == config.snr_steps * config.rate_steps


def test_calibration_leaves_its_network_alone(plain, latents, blank_network):
    network = blank_network(
        SeedCodecConfig(
            latent_shape=(6, 4, 2), tile=(6, 4), transform="raw", encoder_blocks=0, snr_steps=2, rate_steps=2
        )
    )
    graph, state = nnx.split(network)
    before = jax.tree.map(np.array, state)
    after = nnx.state(fitting.calibrate(nnx.merge(graph, state), latents[:100]))
    assert np.abs(after["code_mean"][...] - before["code_mean"][...]).max() > 0.1
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_raw_network(latents, fast_jit):
    """Values in the latent's own order, standardised per place, with the same moments at every grid point."""
    config = SeedCodecConfig(
        latent_shape=(6, 4, 2),
        tile=(6, 4),
        width=8,
        hidden=8,
        decoder_blocks=1,
        transform="raw",
        encoder_blocks=0,
        snr_steps=2,
        rate_steps=2,
    )
    network = fitting.calibrate(fitting.initial_network(config, latents), latents)
    graph, state = nnx.split(network)
    values = fast_jit(lambda z: nnx.merge(graph, state).encode(z, 20.0, 24))(jnp.asarray(latents))
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    np.testing.assert_allclose(values, (flat - flat.mean(0)) / flat.std(0), atol=10 * MOMENT_ERROR)
    np.testing.assert_array_equal(network.code_mean[1, 1], network.code_mean[0, 0])


def test_the_start_of_training(plain, latents):
    """Statistics of the latents, and loads that fall along the coefficients and are spread wider at low SNR."""
    network, config = nnx.merge(plain.graph, plain.state), plain.config
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    np.testing.assert_allclose(network.latent_mean[...], flat.mean(0), rtol=4 * EPS, atol=4 * EPS)
    np.testing.assert_allclose(jnp.square(network.scale[...]).sum(), total_variance(latents), rtol=48 * EPS)
    logits, nmse = np.asarray(network.load_logits[...]), np.square(network.encoder_scale[...])
    assert logits.shape == (3, 3, 48) and nmse.shape == (3, 3)
    assert np.all(np.isfinite(logits)) and np.all((nmse > 0) & (nmse < 1))
    # More SNR and more symbols leave less error.
    assert np.all(np.diff(nmse, axis=0) < 0) and np.all(np.diff(nmse, axis=1) > 0)
    # At -15 dB only the first patterns are worth their power: loads fall from first to last.
    for column, rate in enumerate(config.rate_grid):
        sent = int(np.ceil(48 / rate))
        assert np.all(np.diff(logits[0, column, :sent]) <= 1e-4)
    # Loads are of mean 1 over the values that are sent; the floor, 1e-4, can only raise it.
    mean = np.exp(logits[:, 0].astype(np.float64)).mean(1)
    assert np.all((mean >= 1 - 100 * EPS) & (mean <= 1 + 1e-4 + 100 * EPS))


def test_latents_that_do_not_fit(config):
    with pytest.raises(ValueError, match=r"^latents' shape is \(4, 6, 2\); it must be \(6, 4, 2\)"):
        fitting.initial_network(config, np.zeros((10, 4, 6, 2), np.float32))
    broken = np.random.default_rng(0).normal(size=(10, 6, 4, 2)).astype(np.float32)
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="^latents is '?1 of 10 not finite"):
        fitting.initial_network(config, broken)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("groups", dict(groups=0)),
        ("group_size", dict(group_size=7)),
        ("group_size", dict(group_size=0)),
        ("num_blocks", dict(num_blocks=0)),
        ("max_snr_db", dict(min_snr_db=5.0, max_snr_db=4.0)),
        ("max_snr_db", dict(max_snr_db=float("nan"))),
        ("rates", dict(rates=())),
        ("rates", dict(rates=(0.5, 2.0))),
        ("image_weight", dict(image_weight=1.5)),
        ("first_share", dict(first_share=-0.1)),
    ],
)
def test_bad_conditions_are_named(name, values):
    with pytest.raises(ValueError, match=f"^{name} is "):
        Conditions(**values)
