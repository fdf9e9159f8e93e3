"""The protocol is differentiable: gradients through seed coding, fading, reception, decoding and the image decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.channel import RayleighFading
from megjax.power import LoadedPower
from megjax.units import db_to_linear
from tests.checks import directional


@pytest.mark.slow
def test_gradients_are_those_of_central_differences(unchecked, make, source):
    loads = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, 16), jnp.float32)
    simulator = make(policy=LoadedPower(loads), fading=RayleighFading())
    params = simulator.params
    state = params["codec"].state
    trained, constants = nnx.split_state(state, nnx.Param, ...)
    rng = np.random.default_rng(1)

    def draw(x):
        return jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    # Moved away from the start, where half of the network has no gradient because its outputs are zero.
    trained = jax.tree.map(lambda x: x + 0.1 * draw(x), trained)

    @jax.jit
    @jax.value_and_grad
    def loss(point):
        trained, loads = point
        given = params | {
            "codec": dataclasses.replace(params["codec"], state=nnx.merge_state(trained, constants)),
            "policy": LoadedPower(loads),
        }
        numbers = jnp.arange(6), jnp.arange(2)
        images = simulator.deliver(jax.random.key(0), given, source, None, 3.0, *numbers).images
        return jnp.mean(jnp.square(images - source.images[:, None]))

    point = trained, loads
    _, gradient = loss(point)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    still = jax.tree.map(jnp.zeros_like, point)
    directions = {
        "codec": (jax.tree.map(lambda x: 0.1 * draw(x), trained), still[1]),
        "loads": (still[0], draw(loads)),
    }
    for name, direction in directions.items():
        products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
        expected = float(sum(jax.tree.leaves(products)))
        found, error = directional(lambda point: loss(point)[0], point, direction, 1e-2)
        assert abs(expected) > 5 * error, name  # there is something to compare
        assert abs(found - expected) < 2 * error, name


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["seed", "latent", "centralized", "split", "split-seed"])
def test_gradients_of_links_are_those_of_central_differences(unchecked, make, source, scheme):
    """In SNR, powers and gains, of what a link delivers."""
    simulator = make(scheme)
    link, params = simulator.link, simulator.params["codec"]
    wanted = source.images if link.result == "images" else source.latents
    keys = jax.random.split(jax.random.key(5), len(source.latents))

    @jax.jit
    @jax.value_and_grad
    def loss(point):
        snr_db, power, size = point
        gains = jax.lax.complex(size * jnp.cos(jnp.arange(16.0)), size * jnp.sin(jnp.arange(16.0)))
        code = link.code(params, source, snr_db, None)

        def send(key, payload):
            return link.transmit(params, key, payload, code.shared, gains, power, db_to_linear(-snr_db))

        decoded = link.decode(params, jax.vmap(send)(keys, code.payload), code.shared)
        latents, level = (decoded.latents, decoded.alpha_bar) if link.result == "noisy" else (decoded, jnp.zeros(1))
        return jnp.mean(jnp.square(latents - wanted)) + jnp.mean(level)

    rng = np.random.default_rng(6)

    def draw(low, high):
        return jnp.asarray(rng.uniform(low, high, 16), jnp.float32)

    point = jnp.float32(4.0), draw(0.5, 1.5), draw(0.4, 1.6)
    _, slopes = loss(point)
    for i, name in enumerate(("snr_db", "power", "gains")):
        along = [jnp.zeros_like(x) for x in point]
        along[i] = jnp.float32(5) if name == "snr_db" else draw(0.2, 1.0) * point[i]
        found, uncertainty = directional(lambda point: loss(point)[0], point, tuple(along), 5e-3)
        expected = float(jnp.sum(slopes[i] * along[i]))
        assert abs(found) > 5 * uncertainty, name
        assert expected == pytest.approx(found, abs=2 * uncertainty), name
