"""What PPO learns where the best policy is known: to wait for a gain, to obey a reward at the end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import NoFading
from megjax.power import PPO, PowerControl, PPOConfig, make_ppo, power_problem

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_unchecked", "fast_compile")]
ALLOCATE = jax.jit(lambda policy, gains, problem: policy.allocate(gains, problem))


class CoinFading:
    """Every gain is 0 or 2 with probability one half."""

    dependence = "independent"

    def sample(self, key, num_blocks):
        return jnp.sqrt(2.0) * jax.random.bernoulli(key, 0.5, (num_blocks,)).astype(jnp.complex64)


def train(config, env, params):
    """The trained policy and the metrics."""
    state, metrics = jax.jit(make_ppo(config, env, params))(jax.random.key(0))
    return PPO(config, env).policy(state, params), metrics


def test_it_learns_to_wait_for_a_gain():
    """Two blocks of gain 0 or 2: all of the energy in the first if it is 2 and the second may be 0, none if it is 0.

    With energy 2 at 0 dB and g_1 = 2 the expected error is 1/(1 + 2 p) + (1 + 1/(1 + 2 (2 - p))) / 2. It is least where
    (1 + 2 (2 - p))^2 = (1 + 2 p)^2 / 2, p = (5 - 1/sqrt 2) / (2 + sqrt 2).
    """
    env = PowerControl(2)
    params = env.make_params(CoinFading(), (0.0, 0.0))
    policy, _ = train(PPOConfig(num_envs=1024, num_updates=60, minibatches=4, hidden=(32,)), env, params)
    power = functools.partial(ALLOCATE, policy)
    problem = power_problem(0.0, 2)
    best = (5 - 1 / np.sqrt(2)) / (2 + np.sqrt(2))
    assert power(jnp.array([2.0, 0.0]), problem)[0] == pytest.approx(best, abs=0.1)
    assert power(jnp.array([0.0, 0.0]), problem)[0] < 0.05

    def error(first_good, first_bad):
        def second(left):
            return 0.5 * (1 + 1 / (1 + 2 * left))

        return 0.5 * (1 / (1 + 2 * first_good) + second(2 - first_good)) + 0.5 * (1 + second(2 - first_bad))

    found = error(*(float(power(jnp.array([g, 0.0]), problem)[0]) for g in (2.0, 0.0)))
    assert error(1.0, 1.0) - found > 0.97 * (error(1.0, 1.0) - error(best, 0.0))


def test_it_obeys_a_reward_at_the_end():
    """A quality that wants 0.6 in the first of three blocks and 1.8 in the second."""
    wanted = jnp.array([0.6, 1.8, 0.6])
    env = PowerControl(3, quality=lambda key, gains, power, snr_db: -jnp.sum(jnp.square(power - wanted)))
    params = env.make_params(NoFading(), (0.0, 0.0))
    policy, metrics = train(PPOConfig(num_envs=256, num_updates=80, minibatches=4, hidden=(16,)), env, params)
    np.testing.assert_allclose(ALLOCATE(policy, jnp.ones(3), power_problem(0.0, 3)), wanted, atol=0.06)
    assert metrics["return"][-1] > metrics["return"][0]
