"""Denoising from any level: levels of timesteps, the posterior mean, variances on Gaussian data, samplers of tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.diffusion.refine import level_of_timestep, refine, timestep_of_level
from megjax.diffusion.samplers import denoise, from_vp, make_sampler
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.schedules import alphas_cumprod

pytestmark = pytest.mark.usefixtures("fast_compile")

CONFIGS = {
    kind: SchedulerConfig(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind, clip_sample=False
    )
    for kind in ("epsilon", "v_prediction", "sample")
}
CONFIG = CONFIGS["v_prediction"]
TABLE = alphas_cumprod(CONFIG)
MEAN, VARIANCE = 0.3, 2.0


def perfect(kind, variance=VARIANCE, mean=MEAN):
    """The best denoiser for independent Gaussian latents: E[x0 | x] as the model's kind of output."""

    def denoiser(x, timestep):
        level = jnp.broadcast_to(level_of_timestep(TABLE, jnp.asarray(timestep, jnp.float32)), x.shape[:1])
        level = level[:, None, None, None]
        signal, noise = jnp.sqrt(level), jnp.sqrt(1 - level)
        clean = mean + variance * signal / (variance * level + 1 - level) * (x - signal * mean)
        epsilon = (x - signal * clean) / noise
        return {"epsilon": epsilon, "v_prediction": signal * epsilon - noise * clean, "sample": clean}[kind]

    return denoiser


def noisy(alpha_bar, num, variance=VARIANCE, mean=MEAN):
    """Noisy latents [n 4 4 2] of this level."""
    noise = np.random.default_rng(0).standard_normal((2, num, 4, 4, 2), np.float32)
    clean = mean + np.float32(np.sqrt(variance)) * noise[0]
    return jnp.asarray(np.float32(np.sqrt(alpha_bar)) * clean + np.float32(np.sqrt(1 - alpha_bar)) * noise[1])


def test_timesteps_and_levels_are_inverse():
    timesteps = jnp.asarray([0.0, 17.0, 480.5, 998.9, 999.0])
    rising = np.concatenate([[0.0], np.linspace(0.01, 0.99, 50), [1.0]])

    @jax.jit
    def run(timesteps, rising):
        levels = level_of_timestep(TABLE, timesteps)
        return levels, timestep_of_level(TABLE, levels), timestep_of_level(TABLE, rising)

    levels, again, found = run(timesteps, jnp.asarray(rising, jnp.float32))
    np.testing.assert_allclose(levels[1], TABLE[17], rtol=1e-6)
    np.testing.assert_allclose(levels[2], (TABLE[480] + TABLE[481]) / 2, rtol=1e-6)
    np.testing.assert_allclose(again, timesteps, atol=0.02)
    assert found[0] == 999 and found[-1] == 0 and np.all(np.diff(found) < 0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_step_gives_the_posterior_mean(kind):
    levels = jnp.repeat(jnp.asarray([0.1, 0.9]), 3)
    x = jnp.concatenate([noisy(level, 3) for level in (0.1, 0.9)])
    found = jax.jit(lambda x: refine(perfect(kind), CONFIGS[kind], x, levels, 1))(x)
    level = np.asarray(levels)[:, None, None, None]
    weight = VARIANCE * np.sqrt(level) / (VARIANCE * level + 1 - level)
    np.testing.assert_allclose(found, MEAN + weight * (x - np.sqrt(level) * MEAN), atol=2e-4)


@pytest.mark.parametrize(("sampler", "bound"), [("ddim", 0.05), ("euler", 0.05), ("dpm++", 0.005)])
def test_many_steps_recover_the_variance(sampler, bound):
    """The probability flow carries the law of noisy latents to that of clean ones; one step shrinks it."""
    alpha_bar, num = 0.3, 400
    x = noisy(alpha_bar, num)

    @jax.jit
    def run(x):
        return [refine(perfect("v_prediction"), CONFIG, x, jnp.full(num, alpha_bar), n, sampler) for n in (1, 50, 100)]

    one, half, many = map(np.asarray, run(x))
    # For Gaussian data the flow is linear: it scales deviations by sqrt(variance / that of the input).
    scale = np.sqrt(VARIANCE / (VARIANCE * alpha_bar + 1 - alpha_bar))
    expected = MEAN + scale * (np.asarray(x) - np.sqrt(alpha_bar) * MEAN)
    coarse, fine = (np.abs(found - expected).max() for found in (half, many))
    assert fine < 0.7 * coarse  # of first order in the step, as the last step of all samplers is
    assert fine < bound * many.std()
    spread = VARIANCE * np.sqrt(2 / x.size)
    assert abs(many.var() - VARIANCE) < 4 * spread + 2 * fine * np.sqrt(VARIANCE)
    assert one.var() < VARIANCE * 0.7


def test_levels_may_be_traced_and_differ():
    levels = jnp.asarray([0.05, 0.5, 0.97, 0.9999, 1.0])
    x = noisy(0.5, len(levels))

    def run(x, level):
        return refine(perfect("epsilon"), CONFIGS["epsilon"], x, level, 4)

    def alone(x, level):
        return run(x[None], level[None])[0]

    together, mapped = jax.jit(lambda *args: (run(*args), jax.vmap(alone)(*args)))(x, levels)
    np.testing.assert_allclose(together, mapped, atol=1e-5)
    # Where nothing is noise there is nothing to remove.
    np.testing.assert_allclose(together[-1], x[-1], atol=5e-3)


def test_the_model_sees_falling_timesteps_from_that_of_the_level():
    seen = []

    def denoiser(x, timestep):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), timestep, ordered=True)
        return jnp.zeros_like(x)

    levels = jnp.asarray([0.2, 0.8])
    refine(denoiser, CONFIG, jnp.ones((2, 2, 2, 1)), levels, 4)
    jax.effects_barrier()
    start = np.asarray(timestep_of_level(TABLE, levels))
    np.testing.assert_allclose(seen, start * np.array([1, 0.75, 0.5, 0.25])[:, None], rtol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpm++"])
def test_gradients_flow_through_the_level(sampler):
    x, key = noisy(0.5, 2), jax.random.key(0)

    def loss(level):
        return jnp.sum(refine(perfect("epsilon"), CONFIGS["epsilon"], x, level, 3, sampler, key))

    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray([0.4, 0.6])))
    assert np.all(np.isfinite(gradient)) and np.all(gradient != 0)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpm++"])
def test_from_the_level_of_a_step_it_goes_on_as_the_sampler_does(sampler):
    """Timesteps 999, 888, ..., 111 of nine steps, from the first or from a later one on."""
    spacing = {} if sampler == "dpm++" else {"timestep_spacing": "leading", "steps_offset": 111}
    config = dataclasses.replace(CONFIG, **spacing)
    tables = make_sampler(config, sampler, 9)
    assert tables.timesteps.tolist() == [111 * k for k in range(9, 0, -1)]
    tables.output_weights[-1] = [1, 0, 0, 0]  # all end at alpha-bar 1, where DDIM would end at timestep 0
    x, keys = noisy(0.5, 3), jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def run(x):
        results = []
        for start in (0, 3):
            level = jnp.full(3, TABLE[111 * (9 - start)], jnp.float32)
            found = refine(perfect("v_prediction"), config, x, level, 9 - start, sampler, keys)
            # Step i of the tables draws with the i-th number, so that its noise must be given to start later.
            noise = jnp.zeros((9, *x.shape))
            for i in range(9 - start):
                drawn = jax.vmap(lambda key, i=i: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:]))(keys)
                noise = noise.at[start + i].set(drawn)
            given = from_vp(tables, x, start)
            results.append((found, denoise(perfect("v_prediction"), tables, given, start=start, noise=noise)[0]))
        return results

    for found, expected in run(x):
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("pndm", "sampler is 'pndm'; it must be one that can start at any noise level: ddim, euler, euler_ancestral"),
        ("magic", "sampler is 'magic'; it must be one of ddim"),
        ("euler_ancestral", "key is None; it must be given, as sampler 'euler_ancestral' draws noise"),
    ],
)
def test_bad_samplers(sampler, message):
    with pytest.raises(ValueError, match=message):
        refine(perfect("epsilon"), CONFIG, jnp.zeros((1, 2, 2, 1)), jnp.full(1, 0.5), 2, sampler)


@pytest.mark.parametrize("num_steps", [0, -1, True])
def test_bad_number_of_steps(num_steps):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}.*integer of at least 1"):
        refine(perfect("epsilon"), CONFIG, jnp.zeros((1, 2, 2, 1)), jnp.full(1, 0.5), num_steps)
