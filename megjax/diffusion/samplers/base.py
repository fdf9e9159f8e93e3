"""Tables of a sampler, its steps one by one, and the loop over them."""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from megjax.diffusion.sampler_types import SAMPLERS, Sampler, SolverState, Steps, Weights
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.schedules import inference_timesteps, prediction_weights
from megjax.keys import threefry


def make_sampler(config: SchedulerConfig, sampler: str, num_steps: int, eta: float = 0.0) -> Sampler:
    """Builds the tables of `sampler` for `num_steps` steps, in float64 on the host.

    Args:
      config: the model's noise schedule; settings the sampler's class lacks are not read, as in diffusers.
      sampler: a name of `SAMPLERS`.
      num_steps: as diffusers' num_inference_steps.
      eta: DDIM's noise, 0 (deterministic) to 1 (ancestral).

    Raises:
      ValueError: an unknown sampler, a config it cannot honour, or `num_steps` or `eta` out of range.
    """
    config = config.for_sampler(sampler)
    method = SAMPLERS.find(sampler)
    if not 0 <= eta <= 1 or (eta > 0 and not method.takes_eta):
        takers = " and ".join(repr(known.name) for known in SAMPLERS if known.takes_eta)
        raise ValueError(f"eta={eta!r} is not supported; it must be in [0, 1], and 0 for samplers other than {takers}")
    timesteps, here, after, extra = method.visits(config, inference_timesteps(config, num_steps))
    num = len(timesteps)
    if config.prediction_type == "epsilon" and here[0] == 0:
        raise ValueError(
            f"prediction_type='epsilon' is not supported by {sampler!r} from zero terminal SNR; it must be "
            "'v_prediction' or 'sample', or timestep_spacing 'leading'"
        )
    x0_weights, epsilon_weights = (np.stack(pair, 1) for pair in prediction_weights(config.prediction_type, here))
    weights = method.weights(config, Steps(np.arange(num), num, np.append(here[:1], here[:-1]), here, after), eta)
    output_weights = np.stack([np.broadcast_to(weight, num) for weight in weights], 1)
    init_noise_sigma = 1.0
    if method.sigma_space:
        x0_weights[:, 0] *= here**0.5
        epsilon_weights[:, 0] *= here**0.5
        output_weights = output_weights / np.sqrt(after)[:, None]
        max_variance = 1 / min(here.min(), after.min()) - 1
        init_noise_sigma = (max_variance + (config.timestep_spacing == "leading")) ** 0.5
    return Sampler(
        timesteps=timesteps.astype(np.float32 if method.sigma_space else np.int32),
        alpha_bars=np.append(here, after[-1]).astype(np.float32),
        x0_weights=x0_weights.astype(np.float32),
        epsilon_weights=epsilon_weights.astype(np.float32),
        output_weights=output_weights.astype(np.float32),
        extra={name: table.astype(np.float32) for name, table in extra.items()},
        init_noise_sigma=np.asarray(init_noise_sigma, np.float32),
        method=method,
        num_steps=num,
        stochastic=method.stochastic or eta > 0,
        clip_range=config.clip_sample_range if config.clip_sample else None,
    )


def alpha_bar(sampler: Sampler, i: Int[Array, ""] | int) -> Float[Array, ""]:
    """Variance-preserving noise level at the input of step `i`; `i = num_steps` gives the result's own level."""
    return jnp.asarray(sampler.alpha_bars)[i]


def to_vp(sampler: Sampler, x: Float[Array, "b *d"], i: Int[Array, ""] | int) -> Float[Array, "b *d"]:
    """`x` at the input of step `i`, from the sampler's own space to variance-preserving scale."""
    return x * jnp.sqrt(alpha_bar(sampler, i)) if sampler.method.sigma_space else x


def from_vp(sampler: Sampler, x: Float[Array, "b *d"], i: Int[Array, ""] | int) -> Float[Array, "b *d"]:
    """A variance-preserving latent of level `alpha_bar(sampler, i)`, in the space that step `i` works in."""
    return x / jnp.sqrt(alpha_bar(sampler, i)) if sampler.method.sigma_space else x


def scale_initial(sampler: Sampler, noise: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """The input of step 0 made of unit-variance noise."""
    return jnp.asarray(noise, jnp.float32) * sampler.init_noise_sigma


def scale_input(sampler: Sampler, x: Float[Array, "b *d"], i: Int[Array, ""] | int) -> Float[Array, "b *d"]:
    """What the model is given for `x` at step `i`: in sigma space x / sqrt(1 + sigma^2), else x."""
    return to_vp(sampler, x, i)


def init_state(sampler: Sampler, shape: tuple[int, ...]) -> SolverState:
    """The state of a solver that starts, or restarts at any step, on latents of this shape."""
    history = jnp.zeros((sampler.method.history, *shape), jnp.float32)
    return SolverState(history=history, count=jnp.zeros((), jnp.int32))


def step(
    sampler: Sampler,
    state: SolverState,
    model_output: Float[Array, "b *d"],
    i: Int[Array, ""] | int,
    x: Float[Array, "b *d"],
    noise: Float[Array, "b *d"] | None = None,
) -> tuple[Float[Array, "b *d"], SolverState]:
    """Step `i`, which may be traced, from its input `x` and the model's output for it, in float32.

    A fresh `state` makes it a first-order step, whatever `i`, unless the method has a step of its own (PNDM's repeats
    its second step from there). `noise` has unit variance and is read by stochastic samplers only.
    """
    if sampler.stochastic and noise is None:
        raise ValueError("noise=None is not supported by a stochastic sampler; it must be an array of the shape of x")
    x, output = jnp.asarray(x, jnp.float32), jnp.asarray(model_output, jnp.float32)
    if sampler.method.step is not None:
        return sampler.method.step(sampler, state, output, i, x, noise)
    x0, epsilon = predictions(sampler, i, x, output)
    weights = Weights(*jnp.asarray(sampler.output_weights)[i])
    return weighted_sum(weights, state, x0, epsilon, noise if sampler.stochastic else None)


def predictions(
    sampler: Sampler, i: Int[Array, ""] | int, x: Float[Array, "b *d"], output: Float[Array, "b *d"]
) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    """Clean latents x0, clipped if the sampler does so, and noise that the model's output at step `i` stands for."""
    of_x0, of_epsilon = jnp.asarray(sampler.x0_weights)[i], jnp.asarray(sampler.epsilon_weights)[i]
    x0 = of_x0[0] * x + of_x0[1] * output
    if sampler.clip_range is not None:
        x0 = jnp.clip(x0, -sampler.clip_range, sampler.clip_range)
    return x0, of_epsilon[0] * x + of_epsilon[1] * output


def weighted_sum(
    weights: Weights,
    state: SolverState,
    x0: Float[Array, "b *d"],
    epsilon: Float[Array, "b *d"],
    noise: Float[Array, "b *d"] | None,
) -> tuple[Float[Array, "b *d"], SolverState]:
    """Latents that a step leads to, by weights that broadcast to them, and the state after it.

    The change of x0 counts from the second step after the start of a state that remembers x0. Without `noise` none is
    added.
    """
    result = weights.x0 * x0 + weights.epsilon * epsilon
    if noise is not None:
        result += weights.noise * jnp.asarray(noise, jnp.float32)
    if state.history.shape[0]:
        result += jnp.where(state.count > 0, weights.change, 0.0) * (x0 - state.history[0])
        state = SolverState(history=x0[None], count=state.count + 1)
    return result, state


def draw(key: Key[Array, "*b"], i: Int[Array, ""] | int, shape: tuple[int, ...]) -> Float[Array, "b *d"]:
    """Noise of step `i`, of unit variance, from one key for the batch or one for each of its elements."""
    key = threefry(key)
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), shape[1:], jnp.float32))(key)


def denoise(
    model_fn: Callable[[Float[Array, "b *d"], Shaped[Array, ""]], Float[Array, "b *d"]],
    sampler: Sampler,
    x: Float[Array, "b *d"],
    *,
    start: int = 0,
    stop: int | None = None,
    state: SolverState | None = None,
    key: Key[Array, "*b"] | None = None,
    noise: Float[Array, "n b *d"] | None = None,
) -> tuple[Float[Array, "b *d"], SolverState]:
    """Runs steps `start` to `stop` (all that remain if None) by `lax.scan`.

    Args:
      model_fn: (scaled input, timestep) -> model output; guidance is its business. Where it has a method `at_steps`,
        `model_fn.at_steps(timesteps)` is used instead, (scaled input, index of the timestep) -> model output.
      x: input of step `start` in the sampler's own space (`scale_initial` at step 0, `from_vp` elsewhere).
      state: what an earlier call returned, to go on exactly where it stopped; None restarts the solver at `start`.
        PNDM then repeats its second step, as in diffusers, and its latents lag one step behind.
      key: for stochastic samplers, one for the batch or one for each of its elements [b]; step i draws with
        `fold_in(key, i)`, so that a split run draws the same noise.
      noise: in place of `key`, the unit-variance noise of all `num_steps` steps. Deterministic samplers read neither.

    Returns:
      The input of step `stop` (the result, if that is `num_steps`), float32, and the solver's state.

    Raises:
      ValueError: not 0 <= start <= stop <= num_steps, a stochastic sampler without exactly one of `key` and `noise`,
        or `noise` or `state` of another shape.
    """
    start, stop = operator.index(start), sampler.num_steps if stop is None else operator.index(stop)
    if not 0 <= start <= stop <= sampler.num_steps:
        raise ValueError(f"start={start}, stop={stop} must satisfy 0 <= start <= stop <= {sampler.num_steps}")
    if sampler.stochastic and (key is None) == (noise is None):
        raise ValueError(f"sampler {sampler.name!r} is stochastic: exactly one of key and noise must be given")
    if sampler.stochastic and noise is not None and noise.shape != (sampler.num_steps, *x.shape):
        raise ValueError(f"noise of shape {noise.shape} must have shape {(sampler.num_steps, *x.shape)}")
    fresh = init_state(sampler, x.shape)
    if state is None:
        state = fresh
    elif state.history.shape != fresh.history.shape:
        raise ValueError(f"state.history of shape {state.history.shape} must have shape {fresh.history.shape}")

    timesteps = jnp.asarray(sampler.timesteps)
    at_steps = getattr(model_fn, "at_steps", lambda times: lambda x, i: model_fn(x, times[i]))
    output_at = at_steps(timesteps)

    def body(carry, i):
        x, state = carry
        output = output_at(scale_input(sampler, x, i), i)
        drawn = None
        if sampler.stochastic:
            drawn = draw(key, i, x.shape) if noise is None else jnp.asarray(noise)[i]
        return step(sampler, state, output, i, x, drawn), None

    carry, _ = jax.lax.scan(body, (jnp.asarray(x, jnp.float32), state), jnp.arange(start, stop))
    return carry
