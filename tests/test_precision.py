"""Products outside networks are exact whatever JAX's default is, which a network's products follow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.lax import Precision
from jax.sharding import AxisType, PartitionSpec

from megjax import channel
from megjax.channel import mimo, theory
from megjax.codec import SeedCodec, SeedCodecConfig, SeedNetwork
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.unet import UNet2DConditionModel
from megjax.ldm.recipe import PRESETS
from megjax.precision import EXACT, exact_matmul
from tests.models import random_params
from tests.products import inexact_products, products


@jax.custom_vjp
def own_gradient(x):
    return exact_matmul(x, x)


own_gradient.defvjp(lambda x: (own_gradient(x), x), lambda x, gradient: (gradient @ x,))


def on_devices(x):
    mesh, whole = jax.make_mesh((1,), ("data",), (AxisType.Auto,)), PartitionSpec()
    return jax.shard_map(lambda x: x @ x, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)(x)


def after_a_network(x):
    """The same product by a network's layer, which may be inexact, and by others."""
    x = x[:, None]
    return nnx.dot_product_attention(x, x, x), jnp.einsum("...qhd,...khd->...hqk", x, x)


INEXACT = {
    "product": lambda x: x @ x,
    "convolution": lambda x: jax.lax.conv(x[None, None], x[None, None], (1, 1), "SAME"),
    "jit": jax.jit(lambda x: x @ x),
    "scan": lambda x: jax.lax.scan(lambda carry, _: (carry @ x, None), x, None, 2)[0],
    "while": lambda x: jax.lax.stop_gradient(jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ y, x)),
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x),
    "map": lambda x: jax.lax.map(lambda row: x @ row, x),
    "checkpoint": jax.checkpoint(lambda x: x @ x),
    "custom gradient": lambda x: own_gradient(x),
    "devices": on_devices,
    "JAX's own": lambda x: jnp.cov(x) + jnp.linalg.matrix_power(x, 3),
    "after a network": after_a_network,
}


@pytest.mark.parametrize("name", INEXACT)
def test_the_check_itself(name):
    x = jnp.ones((3, 3))
    found = inexact_products(INEXACT[name], x, gradient=True)
    assert found and all(place.startswith(__file__) for place in found)
    with jax.default_matmul_precision("highest"):
        assert inexact_products(INEXACT[name], x, gradient=True) == []


def test_half_exact_is_not_exact():
    assert len(inexact_products(lambda x: jnp.matmul(x, x, precision=("highest", "default")), jnp.ones((3, 3)))) == 1


def ofdm_link(ofdm, grid):
    taps = ofdm.tdl.sample(jax.random.key(0), 3)
    impulse_response = ofdm.impulse_response(taps)
    received = ofdm.demodulate(ofdm.convolve(ofdm.modulate(grid), impulse_response))
    return received, ofdm.frequency_response(taps), ofdm.sampled_frequency_response(impulse_response)


def antennas(matrix, snr):
    beams, gains = mimo.svd_beams(matrix), (mimo.svd_gain(matrix), mimo.mrc_gain(matrix[:, 0]))
    return beams, gains, mimo.capacity(matrix, snr), mimo.capacity_waterfilling(matrix, snr)


def estimated_link(csi, fading, symbols, power, snr):
    known = csi.sample(jax.random.key(0), fading, 3, 1 / snr)
    received = channel.transmit(jax.random.key(1), symbols, known.gains, power, 1 / snr)
    noise_var = channel.effective_noise_var(1 / snr, power, known.error_var)
    lmmse = channel.equalize_lmmse(received, known.receiver, power, noise_var)
    return lmmse, channel.equalize_zf(received, known.receiver, power)


def error_rates(snr, bits):
    decided = channel.demodulate(channel.modulate(bits, "16qam"), "16qam")
    closed = theory.ber_nakagami(snr, "16qam", 2.0), theory.ber_rician(snr, "qpsk", 1.0)
    return decided, closed, theory.ergodic_capacity_nakagami(snr, 2.0), theory.mean_lmmse_error_rician(snr, 1.0)


def reduced(key, fading):
    values = jax.vmap(lambda key: jnp.abs(fading.sample(key, 3)))(jax.random.split(key, 4))
    reductions = channel.Moments(), channel.Histogram(0.0, 3.0, 5), channel.Samples()
    return [reduction.partial(values, jnp.ones(4, bool)) for reduction in reductions]


SYMBOLS = np.ones((3, 64), np.complex64)
CHANNEL = {
    "ofdm": (ofdm_link, channel.OFDM(channel.TDL("A", 1e-7, 50.0), 64, 15e3, 16), SYMBOLS),
    "mimo": (antennas, SYMBOLS[:, :4], 2.0),
    "csi": (estimated_link, channel.ImperfectCSI(1.0, 2), channel.JakesFading(0.1), SYMBOLS, np.ones(3), 2.0),
    "error rates": (error_rates, 2.0, np.ones(8, bool)),
    "large scale": (lambda cell: cell.drop(jax.random.key(0), 3), channel.Cell("uma")),
    "static load": (lambda x: channel.static_load(x, 2.0, theory.mean_lmmse_error_rayleigh), np.ones(4, np.float32)),
}


@pytest.mark.parametrize("name", CHANNEL)
def test_products_of_the_channel_are_exact(name):
    function, *args = CHANNEL[name]
    assert inexact_products(function, *args, gradient=name != "error rates") == []


def test_products_of_rollouts_are_exact():
    assert inexact_products(reduced, jax.random.key(0), channel.JakesFading(0.1)) == []


def unet():
    config = dataclasses.replace(PRESETS["tiny"].unet_config, layers_per_block=1)
    graph, state = nnx.split(nnx.eval_shape(lambda: UNet2DConditionModel(config, rngs=ShapeRngs())))
    latents, text = jnp.ones((1, 8, 8, 4)), jnp.ones((1, 5, config.cross_attention_dim))
    return lambda state, *given: nnx.merge(graph, state)(*given), state, latents, jnp.ones(1), text


def codec():
    config = SeedCodecConfig(latent_shape=(4, 4, 4), tile=(4, 4), width=8, hidden=8, snr_steps=3, rate_steps=2)
    graph, state = random_params(lambda: SeedNetwork(config, nnx.Rngs(0)), np.random.default_rng(0))
    made = SeedCodec(nnx.merge(graph, state))

    def there_and_back(latents):
        symbols, load = made.encode(latents, 16, 5.0)
        return made.decode(symbols, load[None], 16, 5.0)

    return there_and_back, jnp.ones((1, 4, 4, 4))


@pytest.mark.parametrize("make", [unet, codec])
def test_networks_follow_the_default_of_jax(make):
    """In one process, one after the other, with the programs that objects keep; everything else stays exact."""
    function, *args = make()
    for asked, precision in ((None, None), ("bfloat16", (Precision.DEFAULT, Precision.DEFAULT))):
        with jax.default_matmul_precision(asked):
            found = products(function, *args)
        network, others = ([p.precision for p in found if p.network == of] for of in (True, False))
        assert len(network) > 10 and set(network) == {precision} and set(others) <= {(EXACT, EXACT)}
