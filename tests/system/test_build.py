"""Simulators by name: what they refuse, and the moments and weights that they are made with."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.codec import SeedCodec, SeedCodecConfig, SeedNetwork
from megjax.power import EqualPower
from megjax.system import SourceStatistics, codec_statistics, latent_moments, make_simulator, measured_weights
from megjax.system.schemes import WEIGHT_GRID_DB


def test_moments_are_those_of_the_codecs_latents(codec, latents):
    mean, std = latent_moments(codec, SourceStatistics())
    np.testing.assert_allclose(mean, latents.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(std, latents.std((0, 1, 2)), rtol=1e-4)
    statistics = SourceStatistics(latent_mean=(1.0, 2.0, 3.0, 4.0), latent_std=(0.5, 1.0, 2.0, 4.0))
    mean, std = latent_moments(None, statistics)
    np.testing.assert_array_equal([mean, std], [statistics.latent_mean, statistics.latent_std])


def test_statistics_of_the_codec(codec, latents):
    found = codec_statistics(codec)
    flat = latents.reshape(len(latents), -1)
    np.testing.assert_allclose(found.mean, flat.mean(0), atol=1e-5)
    covariance = np.asarray(found.basis) * np.asarray(found.variances) @ np.asarray(found.basis).T
    np.testing.assert_allclose(covariance, np.cov(flat.T, bias=True), atol=2e-3)


def test_weights_of_the_blocks(codec, make):
    way = make().link
    found = measured_weights(codec, way, [-5.0, 5.0])
    np.testing.assert_allclose(found.weights.mean(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.weights[1], codec.block_weights(16, 5.0, 16), rtol=1e-6)
    assert found.weights[0, 0] > found.weights[0, -1]  # most important first
    np.testing.assert_allclose(found.at(jnp.float32(0.0)), found.weights.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.at(jnp.float32(60.0)), found.weights[1], rtol=1e-6)
    np.testing.assert_array_equal(measured_weights(None, way, [0.0]).weights, np.ones((1, 16)))


def test_equal_simulators_are_equal(make):
    one, other = make(), make(weights=(0.0,))
    assert one is not other and one == other and hash(one) == hash(other)
    assert one != make(rate=1.0)
    assert one != dataclasses.replace(one, peak_power=2.0)


@pytest.mark.slow
def test_what_is_measured_where_nobody_says(codec, make):
    """The weights of a policy that asks for them, and the errors of a split seed."""
    levels = WEIGHT_GRID_DB
    found = make("split-seed", policy="static", fitted=None).params
    np.testing.assert_array_equal(found["weights"].snr_db, levels)
    np.testing.assert_allclose(found["weights"].weights[3], codec.block_weights(16, levels[3], 16), rtol=1e-6)
    errors = found["codec"].errors
    np.testing.assert_array_equal(errors.snr_db, levels)
    coefficients = np.asarray(errors.coefficients)
    assert coefficients.shape == (len(levels), 17) and np.all(coefficients >= 0)
    at_zero = [float(errors.at(level, jnp.zeros(16))) for level in (levels[0], levels[-1])]
    np.testing.assert_allclose(at_zero, coefficients[[0, -1]].sum(1), rtol=1e-5)
    assert make().params["weights"] is None
    table = make("centralized-coded", fitted=None).params["codec"]  # of the images of the validation latents
    np.testing.assert_allclose(table.snr_db, levels)
    assert table.mean_image.shape == (16, 16, 3)


class Nothing:
    pass


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scheme": "pigeon"}, "scheme is 'pigeon'.*centralized"),
        ({"scheme": "seed:colour=2"}, "scheme is 'seed:colour=2'.*rate, mapping"),
        ({"scheme": "seed:rate=fast"}, "scheme 'seed': rate is 'fast'.*a number"),
        ({"scheme": 3}, "scheme is 3.*centralized"),
        ({"mode": "equal"}, "mode is 'equal'.*equal_energy"),
        ({"policy": "best"}, "policy is 'best'.*waterfilling"),
        ({"policy": "dp:3"}, "policy is 'dp:3'.*dp alone"),
        ({"policy": Nothing()}, "policy is <.*allocate"),
        ({"fading": "fog"}, "fading is 'fog'.*rayleigh"),
        ({"fading": Nothing()}, "fading is <.*sample"),
        ({"codec": Nothing()}, "codec is <.*spending"),
        ({"codec": None}, "codec is None"),
        ({"codec": None, "scheme": "seed-klt"}, "codec is None.*SeedCodec for scheme 'seed-klt'"),
        ({"scheme": "latent-wiener", "codec": None}, "codec is None.*SeedCodec"),
        ({"rate": 0.5}, r"rate is 0\.5"),
        ({"rate": 64.0}, "num_symbols is 1"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": 33, "policy": "equal"}, "num_symbols is 16"),
        ({"scheme": "split", "num_blocks": 33}, "num_blocks is 33"),
        ({"mapping": "random"}, "mapping is 'random'"),
        ({"scheme": "centralized-qam", "modulation": "8psk"}, "modulation is '8psk'"),
        ({"scheme": "centralized-coded", "fitted": None, "codec": None}, "codec of scheme.*None.*fit_image_codec"),
        ({"scheme": "split", "device_steps": 0}, "device_steps is 0"),
        ({"scheme": "split", "server_steps": 3}, "server_steps is 3.*from 1 to 2"),
        ({"scheme": "prompt", "device_steps": 0}, "device_steps is 0"),
        ({"peak_power": 0.0}, r"peak_power is 0\.0.*positive"),
        ({"peak_power": float("nan")}, "peak_power is nan"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"sampler": "lms"}, "sampler is 'lms'"),
        ({"policy": "ppo", "num_blocks": 8}, "num_blocks is 16"),
        ({"decode_batch": 0}, "decode_batch is 0"),
        (
            {"scheme": "latent", "codec": None, "statistics": SourceStatistics(latent_mean=(0.0,), latent_std=(1.0,))},
            "latent_mean is .*4",
        ),
    ],
)
def test_bad_input(unchecked, make, options, match):
    with pytest.raises(ValueError, match=match) as error:
        make(**options)
    assert "\n" not in str(error.value)


def test_parts_that_do_not_fit(make, pipe, table):
    def blank(config):
        return SeedCodec(nnx.eval_shape(lambda: SeedNetwork(config, nnx.Rngs(0))))

    small = SeedCodecConfig((2, 2, 2), tile=(2, 2), width=4, hidden=4, decoder_blocks=1, snr_steps=2, rate_steps=2)
    with pytest.raises(ValueError, match="codec's latent shape is .*2, 2, 2"):
        make(codec=blank(small))
    with pytest.raises(ValueError, match="fitted's image is .*8, 8, 3"):
        make("centralized-coded", fitted=table._replace(mean_image=jnp.zeros((8, 8, 3))))
    raw = SeedCodecConfig((4, 4, 4), (4, 4), 4, 4, 0, 1, "raw", snr_steps=2, rate_steps=2)
    with pytest.raises(ValueError, match="transform 'raw'.*transform 'klt'"):
        make("seed-klt", codec=blank(raw))
    with pytest.raises(TypeError, match="colour"):
        make_simulator(pipe, None, "latent", colour="red")
    assert isinstance(make(policy=EqualPower()).params["policy"], EqualPower)
