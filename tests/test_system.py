"""Tests of the schemes without a codec: energy, noise, gains shared by all, and their symbol counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import system
from megjax.channel import NoFading, RayleighFading, pack
from megjax.codec import SeedCodecConfig
from megjax.codec.fitting import initial_network
from megjax.system import SourceStatistics, num_symbols, send_image, send_latent, send_seed, send_values

STATISTICS = SourceStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), (0.5, -0.2, 0.0, 0.1), (1.2, 0.8, 1.0, 0.9))
REALISATIONS = 4000


def gaussian_latents(key, num):
    noise = jax.random.normal(key, (num, 8, 8, 4))
    return (
        noise * jnp.asarray(STATISTICS.latent_std)[None, None, None]
        + jnp.asarray(STATISTICS.latent_mean)[None, None, None]
    )


def test_symbol_counts():
    assert num_symbols("centralized", (64, 64, 3), (8, 8, 4)) == 3 * 64 * 64 // 2
    assert num_symbols("latent", (64, 64, 3), (8, 8, 4)) == 128
    assert num_symbols("seed", (64, 64, 3), (8, 8, 4), rate=4.0) == 32
    with pytest.raises(ValueError, match="rate is 0.5"):
        num_symbols("seed", (64, 64, 3), (8, 8, 4), rate=0.5)
    with pytest.raises(ValueError, match="scheme is 'pigeon'"):
        num_symbols("pigeon", (64, 64, 3), (8, 8, 4))


@pytest.fixture(scope="module")
def network():
    """An untrained codec, which is the linear one of these latents."""
    config = SeedCodecConfig((4, 4, 2), tile=(4, 4), width=8, hidden=8, decoder_blocks=1, snr_steps=3, rate_steps=2)
    return initial_network(config, np.asarray(jax.random.normal(jax.random.key(20), (200, 4, 4, 2))))


@pytest.mark.parametrize("snr_db", [-5.0, 5.0])
def test_error_on_awgn_is_that_of_the_lmmse_receiver(snr_db):
    keys = jax.random.split(jax.random.key(1), REALISATIONS)
    latents = gaussian_latents(jax.random.key(2), REALISATIONS)
    received = jax.jit(jax.vmap(lambda k, z: send_latent(k, z, STATISTICS, NoFading(), snr_db)))(keys, latents)
    errors = np.square(np.asarray(received - latents) / np.asarray(STATISTICS.latent_std)).mean((1, 2, 3))
    expected = 1 / (1 + 10 ** (snr_db / 10))
    assert abs(errors.mean() - expected) < 4 * errors.std() / np.sqrt(REALISATIONS)


def test_error_on_rayleigh_is_the_mean_of_the_blocks_errors():
    keys = jax.random.split(jax.random.key(3), REALISATIONS)
    latents = gaussian_latents(jax.random.key(4), REALISATIONS)
    send = jax.jit(jax.vmap(lambda k, z: send_latent(k, z, STATISTICS, RayleighFading(), 0.0)))
    errors = np.square(np.asarray(send(keys, latents) - latents) / np.asarray(STATISTICS.latent_std)).mean((1, 2, 3))
    # E[1 / (1 + g)] for g ~ Exp(1) is e E1(1) = 0.596347.
    assert abs(errors.mean() - 0.596347) < 4 * errors.std() / np.sqrt(REALISATIONS)


def test_symbols_have_unit_power_and_the_budget_is_kept():
    latents = gaussian_latents(jax.random.key(5), REALISATIONS)
    values = (latents - jnp.asarray(STATISTICS.latent_mean)[None, None, None]) / jnp.asarray(STATISTICS.latent_std)[
        None, None, None
    ]
    symbols = jax.vmap(lambda v: pack(v.reshape(-1), 16, "interleaved"))(values)
    energy = np.square(np.abs(np.asarray(symbols))).sum((1, 2))  # K = 128 symbols at p_t = 1
    assert abs(energy.mean() - 128) < 4 * energy.std() / np.sqrt(REALISATIONS)


def test_a_seed_without_noise_is_the_latent(network):
    latents = jax.random.normal(jax.random.key(21), (3, 4, 4, 2))
    send = jax.vmap(lambda key, z: send_seed(key, z, network, NoFading(), 60.0, num_symbols=16, num_blocks=4))
    # At 60 dB on white values the error is 1e-6 of the variance; loads differ by their clipping only.
    error = np.square(np.asarray(jax.jit(send)(jax.random.split(jax.random.key(22), 3), latents) - latents))
    assert error.mean() < 1e-5
    with pytest.raises(ValueError, match="num_symbols is 17"):
        send_seed(jax.random.key(23), latents[0], network, NoFading(), 0.0, num_symbols=17, num_blocks=4)


def test_schemes_given_the_same_key_see_the_same_gains(network):
    seen = []

    class Recording(RayleighFading):
        def sample(self, key, num_blocks):
            gains = super().sample(key, num_blocks)
            seen.append(np.asarray(gains))
            return gains

    key = jax.random.key(6)
    send_latent(key, jnp.zeros((8, 8, 4)), STATISTICS, Recording(), 0.0)
    send_image(jax.random.clone(key), jnp.zeros((64, 64, 3)), STATISTICS, Recording(), 10.0)
    send_seed(jax.random.clone(key), jnp.zeros((4, 4, 2)), network, Recording(), 0.0, num_symbols=16)
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])


def test_high_snr_returns_the_source_and_low_snr_its_mean():
    image = jax.random.uniform(jax.random.key(7), (16, 16, 3))
    near = send_image(jax.random.key(8), image, STATISTICS, NoFading(), 80.0)
    np.testing.assert_allclose(near, image, atol=1e-3)
    far = send_image(jax.random.key(9), image, STATISTICS, NoFading(), -80.0)
    np.testing.assert_allclose(far, np.broadcast_to(STATISTICS.pixel_mean, far.shape), atol=1e-3)


def test_vmap_agrees_with_the_loop_and_gradients_flow():
    keys = jax.random.split(jax.random.key(10), 3)
    values = jax.random.normal(jax.random.key(11), (3, 5, 3))

    def send(key, value):
        return send_values(key, value, 0.0, 1.0, RayleighFading(), 3.0, num_blocks=4)

    together = jax.vmap(send)(keys, values)
    for i in range(3):
        np.testing.assert_allclose(together[i], send(jax.random.clone(keys)[i], values[i]), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda v: jnp.sum(jnp.square(send(jax.random.key(12), v))))(values[0])
    assert np.all(np.isfinite(gradient)) and np.all(gradient != 0)


def test_statistics_round_trip_and_are_checked(tmp_path):
    STATISTICS.save(tmp_path)
    assert SourceStatistics.load(tmp_path) == STATISTICS
    with pytest.raises(ValueError, match="pixel_std is"):
        SourceStatistics(pixel_std=(0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="latent_std is"):
        SourceStatistics(latent_std=(1.0,))
    with pytest.warns(UserWarning, match=system.STATISTICS_NAME):
        assert SourceStatistics.load(tmp_path / "none", 8).latent_std == (1.0,) * 8
