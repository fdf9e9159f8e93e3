"""Radiated energy: the budget of every scheme under every kind of policy, peaks, and the equal-energy comparison."""

import jax.numpy as jnp
import numpy as np
import pytest

from megjax.power import LoadedPower

LOADED = LoadedPower(jnp.arange(1.0, 17.0))
CASES = [
    ("centralized", "analog", "equal_power", (LOADED,)),
    ("centralized", "analog", "equal_energy", ("inversion",)),
    ("centralized", "qam", "equal_power", ("inversion",)),
    ("centralized", "qam", "equal_energy", (LOADED,)),
    ("centralized", "coded", "equal_power", ("equal", LOADED)),
    ("centralized", "coded", "equal_energy", ("inversion",)),
    ("latent", "symbol", "equal_power", ("equal", "static")),
    ("latent", "wiener", "equal_energy", ("inversion",)),
    ("seed", "learned", "equal_power", ("codec", "static", "inversion", "dp", "ppo", LOADED)),
    ("seed", "learned", "equal_energy", ("codec", "ppo")),
    ("seed", "klt", "equal_energy", ("static",)),
    ("split", "latent", "equal_power", ("ppo", LOADED)),
    ("split", "latent", "equal_energy", ("inversion",)),
    ("split", "seed", "equal_energy", ("codec", "static")),
]
K_LATENT, REALISATIONS = 32, 20
ROUNDING = 1e-5  # of sums of sixteen float32 numbers


@pytest.mark.parametrize(("scheme", "variant", "mode", "policies"), CASES)
def test_energy_keeps_the_budget(make, deliver, source, scheme, variant, mode, policies):
    for policy in policies:
        simulator = make(scheme, variant, policy=policy, mode=mode)
        delivery = deliver(simulator, source, 3.0, REALISATIONS)
        count, energy, power = (np.asarray(x) for x in (delivery.num_symbols, delivery.energy, delivery.power))
        budget = np.full(len(count), K_LATENT) if mode == "equal_energy" else count
        assert energy.shape == (6, REALISATIONS) and power.shape == (6, REALISATIONS, 16)
        assert np.all(energy <= budget[:, None] * (1 + ROUNDING)), policy
        assert np.all(energy.mean(1) > 0.99 * budget), policy  # nobody here leaves energy unspent
        # Blocks are equally long here, so that mean power and energy are the same budget.
        np.testing.assert_allclose(power.mean(2) * count[:, None], energy, rtol=ROUNDING)
        assert power.min() >= 0


@pytest.mark.parametrize("policy", ["codec", "inversion", "ppo", LOADED])
def test_no_block_exceeds_the_peak(make, deliver, source, policy):
    plain, limited = (
        deliver(make(policy=policy, mode="equal_energy", **options), source, 3.0, REALISATIONS)
        for options in ({}, {"peak_power": 1.1})
    )
    mean_power = K_LATENT / float(limited.num_symbols[0])
    assert float(plain.power.max()) > 1.1 * mean_power  # the peak matters
    assert float(limited.power.max()) <= 1.1 * mean_power * (1 + ROUNDING)
    assert float(limited.energy.max()) <= K_LATENT * (1 + ROUNDING)


def test_equal_energy_is_another_snr(make, deliver, source):
    """P = K_latent / K: a seed at ratio 2 gains 3.01 dB, and nothing but the effective SNR tells the modes apart."""
    for scheme, variant, gain in (("seed", "learned", 2.0), ("centralized", "analog", K_LATENT / 384)):
        options = {"policy": "codec", "fading": None}
        at_energy = deliver(make(scheme, variant, mode="equal_energy", **options), source, 3.0, 4)
        at_power = deliver(make(scheme, variant, **options), source, 3.0 + 10 * np.log10(gain), 4)
        name = "latents" if scheme == "seed" else "images"
        np.testing.assert_allclose(getattr(at_energy, name), getattr(at_power, name), atol=1e-4)
        np.testing.assert_allclose(at_energy.power, gain * at_power.power, rtol=1e-5)


FIRST = LoadedPower(jnp.arange(16.0, 0.0, -1.0))


@pytest.mark.parametrize("policy", ["codec", "equal", LOADED, FIRST])
def test_blocks_of_different_length(make, deliver, source, policy):
    """K = 26 in 16 blocks: neither mean power nor energy, which counts ten blocks twice, exceeds what P allows."""
    delivery = deliver(make(rate=32 / 26, policy=policy), source, 3.0, 2)
    assert float(delivery.num_symbols[0]) == 26
    power, energy, lengths = np.asarray(delivery.power), np.asarray(delivery.energy), np.repeat([2, 1], [10, 6])
    np.testing.assert_allclose(energy, (power * lengths).sum(2), rtol=ROUNDING)
    assert power.mean(2).max() <= 1 + ROUNDING and energy.max() <= 26 * (1 + ROUNDING)
    if policy is FIRST:  # wants 298 / 17 > 26 x 16 / 16 in all, so the last blocks are cut
        np.testing.assert_allclose(energy, 26, rtol=ROUNDING)
        np.testing.assert_allclose(power[..., 0], 32 / 17, rtol=ROUNDING)
    if policy == "equal":
        np.testing.assert_allclose(power, 1, rtol=ROUNDING)


def test_nothing_sent_radiates_nothing(make, deliver, source):
    delivery = deliver(make("prompt", mode="equal_energy"), source, 3.0, 2)
    assert np.all(np.asarray(delivery.energy) == 0) and np.all(np.asarray(delivery.num_symbols) == 0)
