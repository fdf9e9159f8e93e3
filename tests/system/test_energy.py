"""Radiated energy: budgets and peaks under every kind of policy, and the equal-energy comparison."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import NoFading, RayleighFading
from megjax.power import LoadedPower, make_policy
from megjax.system.protocol import mean_power
from tests import checks

RISING, FALLING = (LoadedPower(jnp.asarray(load, jnp.float32)) for load in (np.arange(1, 17), np.arange(16, 0, -1)))
POLICIES = ("codec", "inversion", "ppo", "rising")
PEAK = 1.1
ROUNDING = 1e-5  # of sums of sixteen float32 numbers


def test_mean_power_is_one_or_what_the_energy_allows():
    np.testing.assert_array_equal(mean_power(32, None), 1)
    np.testing.assert_array_equal(mean_power(np.array([16, 64]), 32.0), [2, 0.5])


@pytest.fixture(scope="module")
def allocated(make, source):
    """Powers [r t] of every policy without and with a peak, in units of P, for a hundred draws of the gains."""
    policies = {name: RISING if name == "rising" else make_policy(name, RayleighFading()) for name in POLICIES}
    simulator = make(policy="inversion")

    @jax.jit
    def run(params, policies, source):
        code = simulator.link.code(params["codec"], source, 3.0, None)
        gains = jax.vmap(lambda key: RayleighFading().sample(key, 16))(jax.random.split(jax.random.key(0), 100))

        def powers(policy, peak, gains):
            limited = dataclasses.replace(simulator, peak_power=peak)
            return limited.allocate(params | {"policy": policy}, code, gains, jnp.float32(0.5))

        each = jax.vmap(jax.vmap(powers, (None, None, 0)), (None, 0, None))
        return {name: each(policy, jnp.array([jnp.inf, PEAK]), gains) for name, policy in policies.items()}

    with checks.unchecked():  # a peak is not meant to be traced
        return jax.tree.map(np.asarray, run(simulator.params, policies, source))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_the_budget_and_the_peak(allocated, policy):
    plain, limited = allocated[policy]
    for power in (plain, limited):
        assert np.all(power >= 0) and np.all(power.mean(1) <= 1 + ROUNDING)
    assert np.all(plain.mean() > 0.99)  # nobody here leaves energy unspent
    assert plain.max() > PEAK  # the peak matters
    assert limited.max() <= PEAK * (1 + ROUNDING)


@pytest.mark.slow
def test_equal_energy_is_another_snr(make, deliver, source):
    """P = K_latent / K: a seed at ratio 2 gains 3.01 dB, and nothing but the effective SNR tells the modes apart."""
    options = {"policy": "codec", "fading": NoFading()}
    at_energy = deliver(make(mode="equal_energy", **options), source, 3.0)
    at_power = deliver(make(**options), source, 3.0 + 10 * np.log10(2))
    np.testing.assert_allclose(at_energy.latents, at_power.latents, atol=1e-4)
    np.testing.assert_allclose(at_energy.power, 2 * at_power.power, rtol=ROUNDING)
    np.testing.assert_allclose(at_energy.energy, 32, rtol=ROUNDING)
    np.testing.assert_allclose(at_power.energy, 16, rtol=ROUNDING)


@pytest.fixture(scope="module")
def radiated(make, source):
    """`radiated(policy)`: power [b r t] and energy [b r] of a seed of 26 symbols; nothing is decoded."""
    simulator = make(rate=32 / 26)
    assert simulator.link.num_symbols == 26

    @jax.jit
    def run(params, source):
        numbers = jnp.arange(6), jnp.arange(2)
        found = simulator.deliver(jax.random.key(0), params, source, None, 3.0, *numbers, generate=False)
        return found.power, found.energy

    return lambda policy: jax.tree.map(np.asarray, run(simulator.params | {"policy": policy}, source))


LOADS = {
    "codec": None,
    "equal": LoadedPower(jnp.asarray(np.ones(16), jnp.float32)),
    "rising": RISING,
    "falling": FALLING,
}


@pytest.mark.parametrize("name", LOADS)
def test_blocks_of_different_length(radiated, name):
    """K = 26 in 16 blocks: neither mean power nor energy, which counts ten blocks twice, exceeds what P allows."""
    power, energy = radiated(LOADS[name])
    lengths = np.repeat([2, 1], [10, 6])
    np.testing.assert_allclose(energy, (power * lengths).sum(2), rtol=ROUNDING)
    assert power.mean(2).max() <= 1 + ROUNDING and energy.max() <= 26 * (1 + ROUNDING)
    if name == "falling":  # wants 298 / 17 > 26 x 16 / 16 in all, so the last blocks are cut
        np.testing.assert_allclose(energy, 26, rtol=ROUNDING)
        np.testing.assert_allclose(power[..., 0], 32 / 17, rtol=ROUNDING)
    if name == "equal":
        np.testing.assert_allclose(power, 1, rtol=ROUNDING)
