"""Keys of every generator: what one of them draws depends on that key alone."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import channel
from megjax.channel.random import split
from megjax.codec import fitting
from megjax.data import scenes
from megjax.diffusion import generation
from megjax.diffusion.samplers.base import draw
from megjax.keys import as_key, from_seed, threefry
from megjax.power.environment import PowerControl
from megjax.system import PromptLink, SplitConstants, SplitLink, draw_gains, realisation_keys
from tests.test_layers import FILES, ROOT, module_name
from tests.test_x64 import arrays_of

pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")

GENERATORS = ("rbg", "unsafe_rbg")
GAINS, POWER = jnp.ones(4, jnp.complex64), jnp.ones(4, jnp.float32)


def draw_link(key):
    ways = (channel.ImperfectCSI(1.0, 4, 1).sample(key, channel.RayleighFading(), 4, 0.1), split(key, 3))
    laws = (
        channel.RicianFading(3.0, random_phase=True),
        channel.ShadowedFading(channel.RayleighFading(), 6.0),
        channel.NakagamiFading(2.0),
        channel.JakesFading(0.1),
    )
    return ways, channel.Cell("uma", h_ut_m=20.0).drop(key, 3), [law.sample(key, 4) for law in laws]


def draw_codec(key):
    conditions = fitting.Conditions(group_size=8)
    latents = fitting.draw_latents(key, (jnp.arange(40.0).reshape(10, 4),), conditions)
    images = realisation_keys(key, np.arange(2))
    gains = draw_gains(images, channel.RayleighFading(), 4)
    draws = fitting.draw_conditions(key, conditions, 64), fitting.draw_power(key, POWER)
    return latents, gains, draws, fitting.draw_gains(key, 4)


def draw_system(key):
    split_link, prompt = SplitLink((2, 2, 2), num_blocks=4), PromptLink((2, 2, 2))
    constants, values = SplitConstants(jnp.zeros(2, jnp.float32), jnp.float32(1)), jnp.ones(8, jnp.float32)
    sent = split_link.transmit(constants, key, values, (), GAINS, POWER, jnp.float32(0.1))
    return sent, prompt.transmit(None, key, values, (), GAINS, POWER, jnp.float32(0.1)).latents


def draw_images(key):
    noise_keys, step_keys = generation.image_keys(key, 2)
    return noise_keys, draw(step_keys, 3, (2, 4)), scenes.render(key, scenes.sample_scene(key), 16)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [draw_link, draw_codec, draw_system, draw_images])
@pytest.mark.parametrize("impl", GENERATORS)
def test_draws_under_vmap_are_those_of_each_key_alone(impl, draw):
    key = jax.random.key(3, impl=impl)
    keys = jnp.stack([key, jax.random.fold_in(key, 5)])
    together = jax.jit(jax.vmap(draw))(keys)
    program = jax.jit(draw)
    for i in range(2):
        alone = arrays_of(program(keys[i]))
        for x, y in zip(arrays_of(jax.tree.map(lambda x, i=i: x[i], together)), alone, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * max(np.abs(y).max(), 1))


@pytest.mark.parametrize("impl", GENERATORS)
def test_a_rollout_draws_the_same_whatever_its_chunk(impl):
    def draw(key):
        return jax.random.normal(key, (2,), jnp.float32)

    options = {"num": 30, "reduction": channel.Samples(), "progress": False}
    key = jax.random.key(1, impl=impl)
    whole, parts = (channel.rollout(key, draw, chunk=chunk, **options) for chunk in (30, 7))
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize("impl", GENERATORS)
def test_an_episode_that_is_rewarded_by_quality(impl):
    env = PowerControl(2, quality=lambda key, gains, power, snr_db: jax.random.normal(key, (), jnp.float32))
    params = env.make_params()

    def play(key):
        _, state = env.reset(key, params)
        for _ in range(2):
            _, state, reward, _, _ = env.step_env(None, state, jnp.float32(0.5), params)
        return reward

    keys = jax.random.split(jax.random.key(2, impl=impl), 3)
    rewards = jax.jit(jax.vmap(play))(keys)
    assert len(set(np.asarray(rewards).tolist())) == 3
    np.testing.assert_array_equal(rewards[0], jax.jit(play)(keys[0]))


def test_threefry_keys_stay_and_others_use_all_of_their_words():
    key = jax.random.key(4)
    assert threefry(key) is key
    words = np.arange(1, 5, dtype=np.uint32)
    made = set()
    for changed in range(5):
        given = words + (np.arange(4) == changed).astype(np.uint32)
        made.add(str(jax.random.key_data(threefry(jax.random.wrap_key_data(jnp.asarray(given), impl="rbg")))))
    assert len(made) == 5
    assert str(jax.random.key_impl(as_key(jax.random.key(0, impl="rbg")))) == "threefry2x32"


def test_seeds_stand_for_the_same_key_whatever_the_default_generator():
    with jax.default_prng_impl("rbg"):
        keys = from_seed(5), as_key(5)
    for key in keys:
        np.testing.assert_array_equal(*(jax.random.key_data(k) for k in (key, jax.random.key(5))))


@pytest.mark.parametrize("path", [p for p in FILES if "random.key(" in p.read_text()], ids=module_name)
def test_only_keys_and_abstract_networks_make_keys_of_seeds(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    made = [node for node in calls if ast.unparse(node.func) in ("jax.random.key", "jax.random.PRNGKey")]
    assert not made or path.relative_to(ROOT).as_posix() in ("megjax/keys.py", "megjax/diffusion/layers.py")
