"""What every fading law must do: keep to the protocol, be vmapped over its parameters, have finite gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import MIMOFading
from megjax.channel.fading import (
    DEPENDENCES,
    Fading,
    GaussMarkovFading,
    JakesFading,
    NakagamiFading,
    NoFading,
    RayleighFading,
    RicianFading,
    ShadowedFading,
)
from megjax.channel.ofdm import OFDM
from megjax.channel.tdl import TDL
from tests.products import inexact_products

pytestmark = pytest.mark.usefixtures("fast_compile")
VALUES = np.array([0.0, 0.5, 4.0], np.float32)
# Each law with its parameters as functions of one swept value of 0 to 4.
LAWS = {
    "none": lambda x: NoFading(),
    "rayleigh": lambda x: RayleighFading(),
    "rician": lambda x: RicianFading(x, 0.3),
    "rician of random phase": lambda x: RicianFading(1.0, x, random_phase=True),
    "nakagami": lambda x: NakagamiFading(0.5 + x),
    "shadowed": lambda x: ShadowedFading(RicianFading(x, 0.3), 2 * x),
    "jakes": lambda x: JakesFading(x / 4),
    "gauss-markov": lambda x: GaussMarkovFading(1 - x / 2),
    "ofdm": lambda x: OFDM(TDL("E", 1.5e-7 * x, 75.0 * x), 64, 15e3 + 0 * x, 16),
    "mimo": lambda x: MIMOFading(2, 3),
}
DEAR = set(LAWS) - {"rayleigh", "rician", "gauss-markov"}
# Leaves without influence where the value is 0: the phase of no line of sight, the times of what stands still.
UNDETERMINED = {"rician": ("los_phase",), "shadowed": ("los_phase",), "ofdm": ("interval_s", "subcarrier_spacing_hz")}


@pytest.mark.parametrize("name", LAWS)
def test_protocol_and_shapes(name):
    law = LAWS[name](1.0)
    assert isinstance(law, Fading)
    for num_blocks in (1, 17):
        gains = jax.eval_shape(lambda key, n=num_blocks: law.sample(key, n), jax.random.key(0))
        assert gains.shape == (num_blocks,) and gains.dtype == jnp.complex64
    with pytest.raises(ValueError, match="num_blocks is 0"):
        law.sample(jax.random.key(0), 0)


SENT = 4096
DEPENDENT = {"shadowed": 0.3, "jakes": 0.05, "gauss-markov": 0.05, "ofdm": 0.05}
"""Least correlation of neighbouring power gains that the parameters of the test give; others are 0."""


@pytest.mark.parametrize("name", LAWS)
def test_what_a_law_says_of_its_blocks(name):
    law, num = LAWS[name](4.0 if name == "shadowed" else 0.5), 3
    assert law.dependence in DEPENDENCES
    draw = jax.jit(jax.vmap(lambda key: jnp.square(jnp.abs(law.sample(key, num)))))
    gains = np.asarray(draw(jax.random.split(jax.random.key(8), SENT)), np.float64)
    assert abs(gains.mean() / getattr(law, "mean_gain", 1.0) - 1) < 5 * max(gains.std(), 1e-6) / np.sqrt(SENT)
    if gains.std() < 1e-6:
        assert law.dependence == "independent"
        return
    found = max(abs(np.corrcoef(gains[:, 0], gains[:, i])[0, 1]) for i in (1, 2))
    # The sample correlation of independent numbers has standard deviation 1 / sqrt(n).
    assert (found > DEPENDENT[name]) if name in DEPENDENT else found < 4.5 / np.sqrt(SENT)
    assert (law.dependence == "independent") == (name not in DEPENDENT)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in DEAR else ()) for name in LAWS])
def test_vmap_over_the_law_agrees_with_the_loop_and_gradients_are_finite(name):
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(law, key):
        gains = law.sample(key, 7)
        return jnp.mean(jnp.abs(gains[1:] - 0.3j) ** 2), gains

    keys, again = (jax.random.split(jax.random.key(1), 3) for _ in range(2))
    mapped = jax.jit(jax.vmap(lambda law, key: law.sample(key, 7)))(LAWS[name](jnp.asarray(VALUES)), keys)
    assert mapped.shape == (3, 7) and mapped.dtype == jnp.complex64
    for value, key, gains in zip(VALUES, again, mapped, strict=True):
        (_, single), slopes = loss(LAWS[name](float(value)), key)
        np.testing.assert_allclose(gains, single, rtol=1e-5, atol=1e-6)
        for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
            leaf = jax.tree_util.keystr(path).split(".")[-1]
            assert np.isfinite(slope)
            assert slope != 0 or (value == 0 and leaf in UNDETERMINED.get(name, ())), leaf


@pytest.mark.parametrize("name", LAWS)
def test_products_are_exact(name):
    assert inexact_products(lambda law: law.sample(jax.random.key(0), 7), LAWS[name](1.0), gradient=True) == []
