"""What every scheme keeps: draws that its numbers decide, the energy it is given, on a good channel what was sent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import RicianFading
from megjax.power import LoadedPower
from megjax.system import SCHEMES, BlockWeights, draw_gains, realisation_keys
from tests.products import inexact_products

FAST = ("centralized", "centralized-coded", "seed", "split")
FORMS = [
    pytest.param(scheme.name, marks=[] if scheme.name in FAST else [pytest.mark.slow])
    for scheme in SCHEMES
    if scheme.result != "error"  # a bound sends nothing
]
EXACT = ("seed", "seed-klt", "latent", "latent-wiener", "latent-denoiser", "centralized", "centralized-qam")
"""Schemes that bring what was sent when the channel is good."""
BLOCKS, K_LATENT, REALISATIONS = 16, 32, 5
RAYLEIGH, GOOD = RicianFading(0.0), RicianFading(1e8)  # of one structure, so that one program has both
ROUNDING = 1e-5  # of sums of sixteen float32 numbers
FLOAT32 = 1e-4  # the same computation in another order

pytestmark = pytest.mark.usefixtures("module_unchecked")


@pytest.fixture(scope="module")
def simulator(make):
    """`simulator(form)`: at the energy of the raw latent, with a load that is handed over."""
    weights = BlockWeights(jnp.zeros(1), jnp.ones((1, BLOCKS)))
    options = {"fading": RAYLEIGH, "policy": LoadedPower(jnp.ones(BLOCKS)), "weights": weights}
    return functools.cache(lambda form: make(form, mode="equal_energy", rate=1.0, device_steps=1, **options))


@pytest.fixture(scope="module")
def faded(simulator, deliver, source):
    """`faded(form)`: five realisations at 3 dB, later blocks of more power than earlier ones."""
    policy = LoadedPower(jnp.arange(1.0, BLOCKS + 1))
    return functools.cache(
        lambda form: deliver(simulator(form), source, 3.0, realisations=range(REALISATIONS), policy=policy)
    )


@pytest.fixture(scope="module")
def drawn():
    images, draws = np.repeat(np.arange(6), REALISATIONS), np.tile(np.arange(REALISATIONS), 6)
    draw = jax.jit(lambda key: draw_gains(realisation_keys(key, images, draws), RAYLEIGH, BLOCKS))
    gains = draw(jax.random.key(0))
    assert len(np.unique(gains)) == 6 * REALISATIONS * BLOCKS
    return gains


@pytest.mark.parametrize("form", FORMS)
def test_gains_are_those_of_the_key_and_the_numbers(drawn, faded, form):
    """So schemes and policies that are given the same key are compared on the same gains."""
    np.testing.assert_allclose(faded(form).gains.reshape(-1, BLOCKS), drawn, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_realisation_depends_on_its_numbers_only(simulator, faded, deliver, source, form):
    """Not on its place among those that are asked for with it."""
    images, draws = [4, 1, 0, 2, 3, 5], [3, 0, 1, 4, 2]
    moved = jax.tree.map(lambda x: x[np.asarray(images)], source)
    policy = LoadedPower(jnp.arange(1.0, BLOCKS + 1))
    found = deliver(simulator(form), moved, 3.0, images, draws, policy=policy)
    for name in ("images", "latents", "gains", "power", "energy"):
        mine, others = getattr(found, name), getattr(faded(form), name)
        assert (mine is None) == (others is None)
        if mine is not None:
            np.testing.assert_allclose(mine, others[np.asarray(images)][:, np.asarray(draws)], atol=FLOAT32)


@pytest.mark.parametrize("form", FORMS)
def test_all_radiate_the_energy_of_the_raw_latent(simulator, faded, form):
    delivery = faded(form)
    count, energy, power = (np.asarray(x) for x in (delivery.num_symbols, delivery.energy, delivery.power))
    assert count.shape == (6,) and energy.shape == (6, REALISATIONS) and power.shape == (6, REALISATIONS, BLOCKS)
    if not count.any():  # a device that does without the link
        assert np.all(energy == 0)
        return
    if (simulator(form).link.num_symbols or 0) % BLOCKS:  # longer blocks are not to take more than there is
        assert np.all(energy <= (1 + ROUNDING) * K_LATENT)
        return
    np.testing.assert_allclose(energy, K_LATENT, rtol=ROUNDING)
    # Blocks are equally long here, so that mean power and energy are the same budget.
    np.testing.assert_allclose(power.mean(2) * count[:, None], energy, rtol=ROUNDING)
    np.testing.assert_allclose(power / power[..., :1], np.broadcast_to(np.arange(1, BLOCKS + 1), power.shape), ROUNDING)


@pytest.mark.parametrize("form", [param for param in FORMS if param.values[0] in EXACT])
def test_a_good_channel_shows_what_was_sent(simulator, deliver, source, form):
    delivery = deliver(simulator(form), source, 80.0, realisations=range(REALISATIONS), fading=GOOD)
    if form.startswith("centralized"):
        tolerance = 1e-3 if form == "centralized" else 1 / 500  # half of a level of 8 bits
        assert np.abs(delivery.images - source.images[:, None]).max() < tolerance
    else:
        assert np.abs(delivery.latents - source.latents[:, None]).max() < 2e-3


def test_no_signal_shows_the_mean(simulator, deliver, source):
    analog = deliver(simulator("centralized"), source, -80.0, realisations=range(REALISATIONS))
    np.testing.assert_allclose(analog.images, np.broadcast_to([0.4, 0.5, 0.6], analog.images.shape), atol=2e-3)


@pytest.mark.parametrize("form", [param.values[0] for param in FORMS])
def test_products_outside_the_networks_are_exact(simulator, source, form):
    def deliver(params, source, snr_db):
        ids, numbers = jnp.zeros((2, 48), jnp.int32), (np.arange(2), np.arange(2))
        return simulator(form).deliver(jax.random.key(0), params, source, ids, snr_db, *numbers, generate=False)

    two = jax.tree.map(lambda x: x[:2], source)
    assert inexact_products(deliver, simulator(form).params, two, 3.0) == []
