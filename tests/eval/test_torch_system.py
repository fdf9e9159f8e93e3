"""Tests of the PyTorch peer of scheme `seed`: for the same gains and noise it receives what the library receives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import megjax
from eval.peers import torch_system
from megjax.channel import RayleighFading, complex_normal, unpack
from megjax.codec import link
from megjax.codec.coders import LearnedCoder
from tests.coders import simulate

NUM, REALISATIONS, BLOCKS = 3, 4, 16
CASES = [(32, 0.0, "ordered"), (45, 6.3, "interleaved"), (101, -4.1, "ordered")]
"""Symbols, SNR in dB, mapping; blocks divide the first of them only."""


@pytest.fixture(scope="module")
def models(module_unchecked, fast_compile):
    return megjax.StableDiffusion.from_pretrained("scenes"), megjax.SeedCodec.from_pretrained("scenes")


@pytest.fixture(scope="module")
def draws():
    """Keys of the noise [b r] and gains [b r t]."""
    gain_key, noise_key = jax.random.split(jax.random.key(0))
    gains = complex_normal(gain_key, (NUM, REALISATIONS, BLOCKS))
    return jax.random.split(noise_key, (NUM, REALISATIONS)), gains


def received_latents(codec, latents, keys, gains, num_symbols, snr_db, mapping):
    """Latents [b*r h w c] by the library."""

    def run(state, latents, keys, gains):
        network = nnx.merge(codec.graph, state)
        spending = link.spending(network.spend(snr_db, num_symbols), num_symbols, BLOCKS, mapping)
        values = network.encode(latents, snr_db, num_symbols)

        def send(key, values, gains):
            noise_var = 10 ** (-snr_db / 10)
            return link.send_code(key, values, spending, gains, spending.load, noise_var, num_symbols, mapping)

        received = jax.vmap(jax.vmap(send, (0, None, 0)))(keys, values, gains)
        estimate, snr = (x.reshape(-1, values.shape[1]) for x in received)
        size = len(estimate)
        return network.decode(estimate, snr, jnp.full(size, snr_db), jnp.full(size, num_symbols))

    return jax.jit(run)(codec.state, latents, keys, gains)


def noise_of(keys, num_symbols, mapping):
    """The noise [b r k] that the library draws from these keys, symbol by symbol."""
    per_block = -(-num_symbols // BLOCKS)

    def one(key):
        pairs = unpack(complex_normal(key, (BLOCKS, per_block)), 2 * num_symbols, mapping).reshape(-1, 2)
        return jax.lax.complex(pairs[:, 0], pairs[:, 1]) / np.complex64(np.sqrt(2))

    return jax.jit(jax.vmap(jax.vmap(one)))(keys)


def tensor(array):
    return torch.from_numpy(np.array(array))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_peer_receives_the_same(models, draws, case):
    (pipe, codec), (keys, gains), (num_symbols, snr_db, mapping) = models, draws, case
    latents = codec.validation[:NUM]
    peer = torch_system.make_link(pipe, codec, num_symbols, snr_db, BLOCKS, mapping, decode_batch=5)
    noise = tensor(noise_of(jax.random.clone(keys), num_symbols, mapping))
    arguments = tensor(latents), REALISATIONS, None, tensor(gains), noise
    expected = received_latents(codec, latents, jax.random.clone(keys), gains, num_symbols, snr_db, mapping)
    found = peer.receive(*arguments)
    assert found.shape == (NUM * REALISATIONS, *codec.latent_shape)
    assert np.abs(found.numpy() - expected).max() < 1e-4
    images = peer(*arguments)
    assert images.shape == (NUM * REALISATIONS, 3, 64, 64)
    assert np.abs(images.permute(0, 2, 3, 1).numpy() - pipe.decode(expected)).max() < 1e-4
    sent = np.repeat(latents, REALISATIONS, axis=0)
    assert 0.01 < np.square(found.numpy() - sent).mean() / latents.var() < 0.8  # neither perfect nor lost


def test_symbols_have_unit_power_in_every_block(models):
    peer = torch_system.make_link(*models, 45, 3.0)
    latents = tensor(models[1].validation)
    with torch.inference_mode():
        energy = peer.encode(latents).abs().square()
    for block in range(BLOCKS):
        power = energy[:, peer.constants.block == block].mean(1)
        assert abs(power.mean() - 1) < 0.1  # the moments are those of the training set


@pytest.mark.slow
def test_own_draws_have_the_same_law(models):
    (pipe, codec), num_symbols, snr_db, times = models, 32, 0.0, 256
    latents = codec.validation[:32]
    peer = torch_system.make_link(pipe, codec, num_symbols, snr_db)
    generator = torch.Generator().manual_seed(0)
    found = peer.receive(tensor(latents), times, generator)
    again = peer.receive(tensor(latents), times, generator.manual_seed(0))
    assert torch.equal(found, again) and not torch.equal(found[0], found[1])
    keys = jax.random.split(jax.random.key(1), len(latents) * times)
    sent = np.repeat(latents, times, axis=0)
    scheme = LearnedCoder(codec.graph, codec.state)
    run = jax.jit(lambda k, z: simulate(scheme, k, z, snr_db, RayleighFading(), num_symbols=num_symbols)[0])
    errors = [np.square(np.asarray(x) - sent).mean((1, 2, 3)).reshape(-1, times) for x in (found, run(keys, sent))]
    spread = np.sqrt(sum(e.var(axis=1).mean() for e in errors) / errors[0].size)
    assert abs(errors[0].mean() - errors[1].mean()) < 4 * spread
    assert spread < 0.02 * errors[1].mean()


def test_bad_arguments(models):
    with pytest.raises(ValueError, match="mapping is 'random'"):
        torch_system.make_link(*models, 32, 0.0, mapping="random")
    with pytest.raises(ValueError, match="num_symbols is 129"):
        torch_system.make_link(*models, 129, 0.0)


@pytest.mark.slow
def test_the_compiled_link_receives_the_same(models, draws, monkeypatch):
    """As graphs with their functions split up; code is not generated from them, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    noise = tensor(noise_of(jax.random.clone(draws[0]), 32, "ordered"))
    arguments = tensor(models[1].validation[:NUM]), REALISATIONS, None, tensor(draws[1]), noise
    eager, compiled = (torch_system.make_link(*models, 32, 0.0, compiled=c)(*arguments) for c in (False, True))
    assert (eager - compiled).abs().max() < 1e-4
