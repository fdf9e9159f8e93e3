"""The same keys give the same numbers with JAX's 64-bit mode on."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import channel
from megjax.codec import SeedCodec, fitting
from megjax.codec.coders import LearnedCoder
from megjax.diffusion.pipeline import StableDiffusion
from megjax.power import Problem, make_policy
from megjax.power.environment import PowerControl
from megjax.power.ppo import PPO, PPOConfig
from megjax.system import SplitConstants, SplitLink, realisation_keys
from tests.coders import simulate
from tests.test_layers import FILES, module_name

pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")

# How many positional arguments a call has when the last of them is the type of what is drawn.
TYPED = {"normal": 3, "uniform": 3, "bits": 3, "loggamma": 4, "randint": 5}
NO_DRAWS = {"key", "split", "fold_in", "clone", "key_data", "wrap_key_data", "key_impl"}
PROMPTS = ["a small red house on the right"]
KEY = 7


def arrays_of(tree):
    keyed = [isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(tree)]
    leaves = zip(jax.tree.leaves(tree), keyed, strict=True)
    return [np.asarray(jax.random.key_data(x) if is_key else x) for x, is_key in leaves]


def assert_same_in_both_modes(draw, rounding=1e-5):
    """Equal types, equal integers, and other numbers equal up to what another order of operations makes of them."""
    usual = arrays_of(draw())
    with jax.enable_x64(True):
        wide = arrays_of(draw())
    assert usual and [x.dtype for x in wide] == [x.dtype for x in usual]
    for x, y in zip(usual, wide, strict=True):
        if x.dtype.kind in "fc":
            assert np.isfinite(x).all()
            np.testing.assert_allclose(y, x, rtol=0, atol=rounding * np.abs(x).max())
        else:
            np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("path", [pytest.param(p, id=module_name(p)) for p in FILES if "random." in p.read_text()])
def test_every_draw_names_its_type(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("jax.random.")):
            continue
        name, text = node.func.attr, ast.unparse(node)
        if name in NO_DRAWS:
            continue
        if name == "bernoulli":  # its draw has the type of the probability
            assert ast.unparse(node.args[1]).startswith("jnp.float32("), text
            continue
        assert name in TYPED, text
        assert len(node.args) >= TYPED[name] or any(word.arg == "dtype" for word in node.keywords), text


def test_fading_laws():
    laws = (
        channel.RicianFading(3.0, random_phase=True),
        channel.ShadowedFading(channel.RayleighFading(), 6.0),
        channel.GaussMarkovFading(0.9),
    )
    draw = jax.jit(lambda key: [law.sample(key, 8) for law in laws])
    assert_same_in_both_modes(lambda: draw(jax.random.key(KEY)))


@pytest.mark.slow
def test_link_and_cell():
    @jax.jit
    def draw(key):
        gains = channel.RayleighFading().sample(key, 8)
        received = channel.transmit(key, gains[:, None], gains, jnp.abs(gains), 0.5)
        known = channel.ImperfectCSI(1.0, 4, 1).sample(key, channel.RayleighFading(), 8, 0.1)
        gamma = channel.NakagamiFading(1.7).sample(key, 8)
        return received, known, gamma, channel.Cell("uma", h_ut_m=20.0).drop(key, 20)

    assert_same_in_both_modes(lambda: draw(jax.random.key(KEY)))


def test_rollout():
    def capacity(key):
        return jnp.mean(jnp.log2(1 + jnp.square(jnp.abs(channel.RayleighFading().sample(key, 8)))))

    assert_same_in_both_modes(
        lambda: channel.rollout(jax.random.key(KEY), capacity, num=200, chunk=100, progress=False).mean
    )


@pytest.mark.slow
def test_draws_of_codec_training():
    conditions = fitting.Conditions(group_size=8, first_share=0.5)
    sets = tuple(np.arange(size * 4, dtype=np.float32).reshape(size, 4) for size in (10, 12))

    @jax.jit
    def draw(key, sets):
        load = jnp.linspace(0.5, 1.5, 8, dtype=jnp.float32)
        gains, power = fitting.draw_gains(key, 8), fitting.draw_power(key, load)
        return fitting.draw_conditions(key, conditions, 64), gains, power, fitting.draw_latents(key, sets, conditions)

    assert_same_in_both_modes(lambda: draw(jax.random.key(KEY), sets))


@pytest.mark.slow
def test_codec(tiny_codec):
    codec = SeedCodec.from_pretrained(tiny_codec)
    latents = codec.validation[:3]

    @jax.jit
    def send(key, state):
        keys, coder = realisation_keys(key, np.arange(3)), LearnedCoder(codec.graph, state)
        return simulate(coder, keys, latents, 3.0, channel.RayleighFading(), num_symbols=16)

    assert_same_in_both_modes(lambda: send(jax.random.key(KEY), codec.state))


@pytest.mark.slow
def test_power_environment_and_policies():
    env = PowerControl(4, history=1)
    law = channel.GaussMarkovFading(0.8)

    def draw():
        params = env.make_params(law, weights=np.ones((3, 4)), weight_spread=0.3, max_power=3.0)
        episodes = jax.jit(jax.vmap(env.begin, (0, None)))(jax.random.split(jax.random.key(KEY), 3), params)
        powers = [
            jax.jit(jax.vmap(make_policy(name, law, 4).allocate))(episodes.known, episodes.problem)
            for name in ("inversion", "waterfilling")
        ]
        return episodes, powers

    assert_same_in_both_modes(draw)


@pytest.mark.slow
def test_causal_optimum():
    law = channel.RayleighFading()
    gains = jnp.asarray([0.3, 2.0, 1.0, 0.1], jnp.float32)
    weights = jnp.linspace(0.5, 1.5, 4, dtype=jnp.float32)
    problem = Problem(jnp.float32(2), weights, jnp.float32(4), jnp.float32(3))
    assert_same_in_both_modes(lambda: jax.jit(make_policy("dp", law, 4).allocate)(gains, problem))


def test_an_update_of_ppo_keeps_the_types_of_its_state():
    ppo = PPO(PPOConfig(num_envs=8, num_updates=4, epochs=1, minibatches=2, hidden=(8,)), PowerControl(4))

    def types(tree):
        return [leaf.dtype for leaf in jax.tree.leaves(tree)]

    params = ppo.env.make_params()
    with jax.enable_x64(True):
        state = jax.eval_shape(ppo.init, jax.random.key(KEY))
        after, metrics = jax.eval_shape(ppo.update, state, params)
    usual = jax.eval_shape(ppo.init, jax.random.key(KEY))
    assert types(state) == types(after) == types(usual)
    assert set(types(metrics)) == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
def test_generation(tiny_model):
    """With a sampler that draws noise in every step."""
    pipe = StableDiffusion.from_pretrained(tiny_model)
    ids = pipe.tokenize(PROMPTS)
    options = {"num_steps": 1, "sampler": "euler_ancestral", "guidance_scale": 1.0}
    assert_same_in_both_modes(lambda: pipe.generate_latents(jax.random.key(KEY), ids, **options))


def test_split():
    """Whose signs both ends draw."""
    link, shape = SplitLink((4, 4, 2), num_blocks=4), (32,)
    constants = SplitConstants(jnp.zeros(2, jnp.float32), jnp.float32(1))
    values, gains, power = jnp.ones(shape, jnp.float32), jnp.ones(4, jnp.complex64), jnp.ones(4, jnp.float32)
    send = jax.jit(lambda key: link.transmit(constants, key, values, (), gains, power, jnp.float32(0.1)))
    assert_same_in_both_modes(lambda: send(jax.random.key(KEY)))
