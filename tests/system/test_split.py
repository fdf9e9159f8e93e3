"""Devices that denoise: the prediction of a seed's error, the law of what denoising starts from, nothing sent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import RayleighFading
from megjax.codec import link
from megjax.codec.coders import LearnedCoder
from megjax.system import AnalogLink, PromptLink, SeedSplit, SeedSplitLink, Source, fit_seed_errors

BLOCKS = 16


@pytest.fixture(scope="module")
def received(codec, latents):
    """`received(snr_db)`: what devices have of 400 latents, the prediction being fitted on 500 others."""
    seed, num = LearnedCoder(codec.graph, codec.state), 400
    way = SeedSplitLink(AnalogLink(16, BLOCKS), (4, 4, 4), 1)
    levels = (-10.0, 0.0, 5.0, 10.0, 20.0)
    errors = fit_seed_errors(jax.random.key(0), seed, way.analog, latents[500:], RayleighFading(), levels)
    params = SeedSplit(seed, errors)

    @jax.jit
    def run(params, values, snr_db):
        code, noise_var = way.code(params, Source(values, None, values), snr_db, None), 10 ** (-snr_db / 10)

        def one(key, payload):
            gain_key, noise_key = jax.random.split(key)
            gains = RayleighFading().sample(gain_key, BLOCKS)
            return way.transmit(params, noise_key, payload, code.shared, gains, code.load, noise_var)

        found = jax.vmap(one)(jax.random.split(jax.random.key(8), num), code.payload)
        return found, way.analog.decode(params.codec, found[0], code.shared), way.decode(params, found, code.shared)

    sent = jnp.asarray(latents[:num])
    return functools.cache(lambda snr_db: (sent, *run(params, sent, jnp.float32(snr_db))))


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 7.0, 20.0])
def test_the_error_is_predicted_from_the_blocks(received, snr_db):
    """Also between the SNRs that it was fitted at (7 dB), and for latents that it was not fitted on."""
    sent, (_, added, _), decoded, _ = received(snr_db)
    error, predicted = np.asarray(jnp.square(decoded - sent).mean((1, 2, 3))), np.asarray(added) / 2
    assert abs(predicted.mean() / error.mean() - 1) < 0.12
    worse = predicted > np.median(predicted)
    ratio = predicted[worse].mean() / predicted[~worse].mean()
    assert ratio > 1.1 and abs(error[worse].mean() / error[~worse].mean() / ratio - 1) < 0.12


def test_the_devices_input_is_the_estimate_noised_again(received):
    _, (_, added, noise), decoded, start = received(0.0)
    alpha_bar = np.asarray(start.alpha_bar)
    np.testing.assert_allclose(alpha_bar, 1 / (1 + np.asarray(added)), rtol=1e-5)
    residual = np.asarray(start.latents) - np.sqrt(alpha_bar)[:, None, None, None] * np.asarray(decoded)
    scaled = residual / np.sqrt(1 - alpha_bar)[:, None, None, None]
    np.testing.assert_allclose(scaled, noise, atol=1e-4)
    count = scaled.size
    assert abs(scaled.mean()) < 4 / np.sqrt(count) and abs(scaled.var() - 1) < 4 * np.sqrt(2 / count)
    assert abs(np.corrcoef(scaled[:, 0, 0, 0], np.asarray(decoded)[:, 0, 0, 0])[0, 1]) < 0.2  # 4 standard errors


def test_coefficients_are_those_of_the_wiener_error():
    """White values received one by one: the error is exactly additive, so the fit finds its coefficients."""

    class Plain:
        def spending(self, snr_db, num_symbols, num_blocks, mapping):
            return link.spending(jnp.ones(64), num_symbols, num_blocks, mapping)

        def encode(self, latents, snr_db, num_symbols):
            return latents.reshape(len(latents), -1)

        def decode(self, received, snr_db, num_symbols):
            return received.estimate.reshape(-1, 4, 4, 4)

    white = jax.random.normal(jax.random.key(0), (2000, 4, 4, 4))
    way = AnalogLink(16, BLOCKS)
    errors = fit_seed_errors(jax.random.key(1), Plain(), way, white, RayleighFading(), (0.0, 10.0))
    # 32 of 64 values are sent, two in each block; the others are received as zero.
    np.testing.assert_allclose(errors.coefficients[:, 0], 0.5, atol=0.03)
    np.testing.assert_allclose(errors.coefficients[:, 1:].mean(1), 2 / 64, rtol=0.1)
    np.testing.assert_allclose(errors.coefficients[:, 1:], 2 / 64, atol=0.04)


def test_nothing_sent_depends_on_the_draw_only():
    way, key = PromptLink((4, 4, 4)), jax.random.key(0)
    one, other = (way.transmit((), jax.random.clone(key), None, (), gains, None, 1.0) for gains in (1.0, 2.0))
    np.testing.assert_array_equal(one.latents, other.latents)
    assert one.alpha_bar == 0 and np.std(one.latents) > 0.5


@pytest.mark.parametrize(
    ("construct", "match"),
    [
        (lambda: SeedSplitLink(AnalogLink(32), (4, 4, 4), 0), "device_steps is 0"),
        (lambda: SeedSplitLink(AnalogLink(32), (4, 4, 4), 1, 0.0), r"renoise is 0\.0.*positive"),
        (lambda: PromptLink((4, 4, 4), 0), "device_steps is 0"),
    ],
)
def test_bad_input(construct, match):
    with pytest.raises(ValueError, match=match):
        construct()
