"""A small data set with structure that no linear code sees, and the networks that the codec's tests share."""

import copy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.codec import SeedCodec, SeedCodecConfig, SeedNetwork, fitting
from megjax.codec.network import Constant
from tests import checks

SHAPE = (6, 4, 2)
NUM_LATENTS = 2000


@pytest.fixture(scope="module", autouse=True)
def small_programs(fast_compile):
    """Networks this small compile longer than they run."""


@pytest.fixture(scope="session")
def latents():
    """Latents [n 6 4 2]: one of twelve patterns in random size, and a little noise; a mean that is not zero."""
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(12, *SHAPE))
    size = rng.uniform(0.5, 1.5, (NUM_LATENTS, 1, 1, 1))
    chosen = patterns[rng.integers(len(patterns), size=NUM_LATENTS)]
    return (0.3 + size * chosen + 0.2 * rng.normal(size=(NUM_LATENTS, *SHAPE))).astype(np.float32)


@pytest.fixture(scope="session")
def config():
    return SeedCodecConfig(
        latent_shape=SHAPE, tile=(6, 4), width=16, hidden=16, decoder_blocks=1, snr_steps=3, rate_steps=3
    )


@pytest.fixture(scope="session")
def plain(config, latents):
    """The network at the start of training: graph, state, and what a loss takes apart."""
    with checks.fast_compile():
        return parts_of(fitting.initial_network(config, latents))


@pytest.fixture(scope="session")
def stirred(plain, latents):
    """The same with every parameter moved away from its start, then calibrated, so that no part is idle."""
    with checks.fast_compile():
        return parts_of(fitting.calibrate(stir(nnx.merge(plain.graph, plain.state)), latents))


@pytest.fixture(scope="session")
def stirred_codec(stirred):
    return SeedCodec(nnx.merge(stirred.graph, stirred.state))


@pytest.fixture(scope="session")
def codec(plain, stirred_codec):
    """The codec at the start of training; its compiled programs are those of `stirred_codec`."""
    codec = copy.copy(stirred_codec)
    codec.state = plain.state
    return codec


@pytest.fixture(scope="session")
def encode(stirred):
    """The stirred network's values for latents, an SNR in dB and a number of symbols: one program for all of these."""
    return jax.jit(lambda z, snr_db, k: nnx.merge(stirred.graph, stirred.state).encode(z, snr_db, k))


@pytest.fixture(scope="session")
def blank_network():
    """Networks of any configuration without drawing weights: parameters 0, means 0, deviations 1, no rotation."""
    return blank


@pytest.fixture(scope="session")
def stir_network():
    return stir


def blank(config):
    graph, shapes = nnx.split(nnx.eval_shape(lambda: SeedNetwork(config, nnx.Rngs(0))))
    filled = []
    for path, variable in nnx.to_flat_state(shapes):
        fill = jnp.zeros if isinstance(variable, nnx.Param) or path[-1].endswith("mean") else jnp.ones
        value = jnp.eye(variable.shape[0]) if path[-1] == "basis" else fill(variable.shape)
        filled.append((path, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def stir(network):
    """The network with normal noise on every parameter, of 0.3 of a unit-gain kernel's standard deviation."""
    graph, params, constants = nnx.split(network, nnx.Param, Constant)
    constants = jax.tree.map(jnp.copy, constants)  # not shared with the network that this came from
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    sizes = (0.3 / np.sqrt(x.shape[0]) if x.ndim == 2 else 0.3 for x in leaves)
    moved = [
        x + jnp.asarray(size * rng.normal(size=x.shape), jnp.float32) for x, size in zip(leaves, sizes, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved), constants)


def parts_of(network):
    graph, state = nnx.split(network)
    loss_graph, params, constants = nnx.split(network, nnx.Param, Constant)
    return types.SimpleNamespace(
        graph=graph, state=state, loss_graph=loss_graph, params=params, constants=constants, config=network.config
    )
