"""Gradients of the received error through every fading law and receiver, against central differences."""

import jax
import jax.numpy as jnp
import pytest

from megjax import channel
from megjax.channel import ImperfectCSI, effective_noise_var, equalize_lmmse, equalize_zf, transmit
from megjax.units import db_to_linear
from tests.channel.test_laws import LAWS
from tests.checks import directional

pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")
T, SYMBOLS, DRAWS, STEP = 6, 4, 16, 0.01
# Rayleigh fading through every receiver, and every law through the first one.
RECEIVERS = ("lmmse", "zf", "estimated")
CASES = [("rayleigh", receiver) for receiver in RECEIVERS]
CASES += [pytest.param(law, "lmmse", marks=pytest.mark.slow) for law in LAWS if law != "rayleigh"]
REJECTED = ("['law'].m",)


def error(receiver, point, key):
    """Mean squared error of the symbols of one transmission."""
    law_key, symbol_key, noise_key = jax.random.split(key, 3)
    noise_var = db_to_linear(-point["snr_db"])
    symbols = channel.complex_normal(symbol_key, (T, SYMBOLS))
    if receiver == "estimated":
        known = ImperfectCSI(point["pilot_power"], 2).sample(law_key, point["law"], T, noise_var)
        gains, seen = known.gains, known.receiver
        noise = effective_noise_var(noise_var, point["power"], known.error_var)
    else:
        gains = seen = point["law"].sample(law_key, T)
        noise = jnp.full(T, noise_var)
    received = transmit(noise_key, symbols, gains, point["power"], noise_var)
    if receiver == "zf":
        # Weighted by the gain, without which the mean over Rayleigh fading does not exist.
        weight = jnp.square(jnp.abs(gains))[:, None]
        return jnp.mean(weight * jnp.square(jnp.abs(equalize_zf(received, seen, point["power"]) - symbols)))
    estimate = jax.vmap(equalize_lmmse)(received[:, None], seen[:, None], point["power"][:, None], noise)[:, 0]
    return jnp.mean(jnp.square(jnp.abs(estimate - symbols)))


@pytest.mark.parametrize(("law", "receiver"), CASES)
def test_gradients_are_those_of_central_differences(law, receiver):
    keys = jax.random.split(jax.random.key(4), DRAWS)
    point = {
        "law": jax.tree.map(jnp.float32, LAWS[law](1.0)),
        "snr_db": jnp.float32(3.0),
        "power": jnp.linspace(0.5, 1.5, T),
        "pilot_power": jnp.float32(1.5),
    }
    total = jax.jit(lambda point: jnp.mean(jax.vmap(lambda key: error(receiver, point, key))(keys)))
    slopes = jax.jit(jax.grad(total))(point)
    leaves = jax.tree_util.tree_leaves_with_path(point)
    compared = 0
    for i, (path, value) in enumerate(leaves):
        name = jax.tree_util.keystr(path)
        # Gamma variables are drawn by rejection: only the mean over many has the derivative in m (see test_fading).
        if name in REJECTED or (receiver != "estimated" and "pilot_power" in name):
            continue
        along = [jnp.zeros_like(x) for _, x in leaves]
        along[i] = jnp.where(value == 0, 1.0, value) * jnp.linspace(0.5, 1, max(value.size, 1)).reshape(value.shape)
        direction = jax.tree.unflatten(jax.tree.structure(point), along)
        found, uncertainty = directional(total, point, direction, STEP)
        expected = float(jnp.sum(jax.tree.leaves(slopes)[i] * along[i]))
        assert expected == pytest.approx(found, abs=2 * uncertainty), name
        compared += abs(found) > 5 * uncertainty
    assert compared >= 2
