"""Samplers as pure functions over precomputed schedules: DDIM, PNDM, Euler, Euler ancestral and DPM-Solver++ 2M."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from megjax.diffusion import pndm
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.schedules import alphas_cumprod, inference_timesteps, prediction_weights
from megjax.keys import threefry
from megjax.pytrees import pytree_dataclass, static

# Arrays of the latent's shape that the solver remembers; PNDM's Runge-Kutta steps take one more.
_HISTORY = {"pndm": 4, "dpm++": 1}


@functools.partial(pytree_dataclass, eq=False)
class Sampler:
    """Host-made float32 tables of one sampler at one number of steps; a pytree whose tables are leaves.

    Every sampler here is, at step i with model output m, x0 = x0_weights[i] . (x, m), eps = epsilon_weights[i] . (x, m)
    and x_next = output_weights[i] . (x0, eps, noise, x0 - previous x0). PNDM first replaces m by a combination of
    outputs, and its first k calls give x_next = start_weights[call, i] . (x at the step's beginning, m). "euler" and
    "euler_ancestral" keep diffusers' sigma space, x = x_VP sqrt(1 + sigma^2) with sigma^2 = (1 - alpha-bar) / alpha-bar
    (`to_vp`, `from_vp` convert); the others are variance preserving.
    """

    timesteps: Shaped[
        Array | np.ndarray, "n"
    ]  # what the model is given: float32 for the Euler samplers, int32 for the others
    alpha_bars: Float[Array | np.ndarray, "n+1"]  # at the input of each step and, last, at the output of the last
    x0_weights: Float[Array | np.ndarray, "n 2"]
    epsilon_weights: Float[Array | np.ndarray, "n 2"]
    output_weights: Float[Array | np.ndarray, "n 4"]
    start_weights: Float[Array | np.ndarray, "k m 2"]  # m = n for PNDM, else k = m = 0
    init_noise_sigma: Float[Array | np.ndarray, ""]
    name: str = static()
    num_steps: int = static()  # model calls: PNDM makes one more than asked for (Runge-Kutta: nine), as diffusers does
    stochastic: bool = static()
    clip_range: float | None = static()


@pytree_dataclass
class SolverState:
    """What a multi-step solver remembers, with fixed shapes.

    `history` is [k *latent]: nothing (k = 0), the previous x0 ("dpm++", k = 1), or the last three model outputs, newest
    first, and the input of the step they belong to ("pndm", k = 4), with Runge-Kutta steps also the sum of outputs
    (k = 5). `count` is how many outputs it has taken in since its start.
    """

    history: Float[Array, "k *d"]
    count: Int[Array, ""]


def make_sampler(config: SchedulerConfig, sampler: str, num_steps: int, eta: float = 0.0) -> Sampler:
    """Builds the tables of `sampler` for `num_steps` steps, in float64 on the host.

    Args:
      config: the model's noise schedule; settings the sampler's class lacks are not read, as in diffusers.
      sampler: "ddim" (Song et al. 2021, eq. 12), "pndm" (Liu et al. 2022, with Runge-Kutta steps unless
        `config.skip_prk_steps`), "euler" and "euler_ancestral" (Karras et al. 2022, algorithm 2 without churn; its
        ancestral form from k-diffusion), or "dpm++" (Lu et al. 2022, DPM-Solver++(2M), algorithm 2). Karras sigmas come
        with `config.use_karras_sigmas`.
      num_steps: as diffusers' num_inference_steps.
      eta: DDIM's noise, 0 (deterministic) to 1 (ancestral).

    Raises:
      ValueError: an unknown sampler, a config it cannot honour, or `num_steps` or `eta` out of range.
    """
    config = config.for_sampler(sampler)
    if not 0 <= eta <= 1 or (eta > 0 and sampler != "ddim"):
        raise ValueError(f"eta={eta!r} is not supported; it must be in [0, 1], and 0 for samplers other than 'ddim'")
    timesteps = inference_timesteps(config, num_steps)
    start_weights = np.zeros((0, 0, 2))
    sigma_space = sampler.startswith("euler")
    if sampler in ("ddim", "pndm"):
        timesteps, level_from, level_to, start_weights = _discrete_levels(config, timesteps)
        level = np.append(level_from, level_to[-1])
    else:
        timesteps, sigmas = _sigmas(config, timesteps)
        level = 1 / (1 + sigmas**2)
        level_from, level_to = level[:-1], level[1:]
    if config.prediction_type == "epsilon" and level_from[0] == 0:
        raise ValueError(
            "prediction_type='epsilon' is not supported by 'ddim' from zero terminal SNR; it must be 'v_prediction' "
            "or 'sample', or timestep_spacing 'leading'"
        )
    x0_weights, epsilon_weights = (np.stack(pair, 1) for pair in prediction_weights(config.prediction_type, level_from))
    init_noise_sigma = 1.0
    if sigma_space:
        x0_weights[:, 0] *= level_from**0.5
        epsilon_weights[:, 0] *= level_from**0.5
        output_weights = _sigma_space_weights(sampler, sigmas)
        max_sigma = sigmas.max()
        init_noise_sigma = max_sigma if config.timestep_spacing != "leading" else (max_sigma**2 + 1) ** 0.5
    else:
        output_weights = _variance_preserving_weights(level_from, level_to, eta)
    if sampler == "dpm++":
        output_weights[:, 3] = _second_order_weights(config, sigmas)
    return Sampler(
        timesteps=timesteps.astype(np.float32 if sigma_space else np.int32),
        alpha_bars=level.astype(np.float32),
        x0_weights=x0_weights.astype(np.float32),
        epsilon_weights=epsilon_weights.astype(np.float32),
        output_weights=output_weights.astype(np.float32),
        start_weights=start_weights.astype(np.float32),
        init_noise_sigma=np.asarray(init_noise_sigma, np.float32),
        name=sampler,
        num_steps=len(timesteps),
        stochastic=sampler == "euler_ancestral" or eta > 0,
        clip_range=config.clip_sample_range if sampler == "ddim" and config.clip_sample else None,
    )


def _discrete_levels(config: SchedulerConfig, timesteps: np.ndarray) -> tuple[np.ndarray, ...]:
    """Timesteps [n], alpha-bar as each step goes from [n] and to [n], and PNDM's weights of its first calls [k n 2].

    A step spans num_train_timesteps // num_steps timesteps whatever the spacing, as in diffusers.
    """
    table = alphas_cumprod(config)
    final = 1.0 if config.set_alpha_to_one else table[0]
    timesteps = timesteps.astype(np.int64)
    span = config.num_train_timesteps // len(timesteps)
    start_weights = np.zeros((0, 0, 2))
    if config.sampler == "pndm":
        timesteps = pndm.visited(config, timesteps)
        start_weights = pndm.start_weights(config, timesteps, span, table, final)
    step_to = timesteps - span
    level_to = np.where(step_to >= 0, table[np.maximum(step_to, 0)], final)
    return timesteps, table[timesteps], level_to, start_weights


def _sigmas(config: SchedulerConfig, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [n] and sigmas [n+1], the last being the final one: Euler samplers and DPM-Solver++."""
    table = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        table[-1] = 2.0**-24  # keeps the largest sigma finite: 4096, as in diffusers
    all_sigmas = np.sqrt((1 - table) / table)
    steps = np.arange(len(table))
    sigmas = np.interp(timesteps, steps, all_sigmas)
    if config.use_karras_sigmas:
        ends = all_sigmas[[-1, 0]] if config.sampler == "dpm++" else sigmas[[0, -1]]
        sigmas = _karras(config.sigma_max or ends[0], config.sigma_min or ends[1], len(timesteps))
        timesteps = np.interp(np.log(sigmas), np.log(all_sigmas), steps)
        if config.sampler == "dpm++" and config.beta_schedule != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)  # the cast to integers cuts those of the cosine schedule, as in diffusers
    return timesteps, np.append(sigmas, all_sigmas[0] if config.final_sigmas_type == "sigma_min" else 0.0)


def _karras(sigma_max: float, sigma_min: float, num: int) -> np.ndarray:
    """Karras et al. 2022, eq. 5, with rho = 7."""
    rho = 7.0
    return (sigma_max ** (1 / rho) + np.linspace(0, 1, num) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def _variance_preserving_weights(level_from: np.ndarray, level_to: np.ndarray, eta: float) -> np.ndarray:
    """Weights of (x0, eps, noise, 0) in Song et al. 2021 (DDIM), eq. 12, its sigma_t being eta times eq. 16's."""
    # Both maxima only guard against rounding: a step that stands still, and eta = 1 from zero SNR.
    spread = eta * np.sqrt((1 - level_to) / (1 - level_from) * np.maximum(1 - level_from / level_to, 0))
    direction = np.sqrt(np.maximum(1 - level_to - spread**2, 0))
    return np.stack([level_to**0.5, direction, spread, 0 * spread], 1)


def _sigma_space_weights(sampler: str, sigmas: np.ndarray) -> np.ndarray:
    """Weights of (x0, eps, noise, 0) for x = x0 + sigma eps: an Euler step down, then noise up to sigma_to."""
    variance = sigmas**2
    up = variance[1:] * (1 - variance[1:] / variance[:-1]) * (sampler == "euler_ancestral")
    return np.stack([np.ones_like(up), np.sqrt(variance[1:] - up), np.sqrt(up), 0 * up], 1)


def _second_order_weights(config: SchedulerConfig, sigmas: np.ndarray) -> np.ndarray:
    """Weight of x0 - previous x0 in each step of DPM-Solver++(2M), zero where the step is of first order.

    Lu et al. 2022 (DPM-Solver++), algorithm 2: alpha_t (1 - exp(-h_i)) / (2 r_i), r_i = h_{i-1} / h_i.
    """
    num = len(sigmas) - 1
    second = np.arange(num) >= (1 if config.solver_order == 2 else num)
    if config.final_sigmas_type == "zero" or config.euler_at_final or (config.lower_order_final and num < 15):
        second[-1] = False
    weights = np.zeros(num)
    i = np.flatnonzero(second)
    h, h_before = np.log(sigmas[i] / sigmas[i + 1]), np.log(sigmas[i - 1] / sigmas[i])
    weights[i] = -0.5 * np.expm1(-h) * h / h_before / np.sqrt(1 + sigmas[i + 1] ** 2)
    return weights


def alpha_bar(sampler: Sampler, i: Int[Array, ""] | int) -> Float[Array, ""]:
    """Variance-preserving noise level at the input of step `i`; `i = num_steps` gives the result's own level."""
    return jnp.asarray(sampler.alpha_bars)[i]


def to_vp(sampler: Sampler, x: Float[Array, "b *d"], i: Int[Array, ""] | int) -> Float[Array, "b *d"]:
    """`x` at the input of step `i`, from the sampler's own space to variance-preserving scale."""
    return x * jnp.sqrt(alpha_bar(sampler, i)) if sampler.name.startswith("euler") else x


def from_vp(sampler: Sampler, x: Float[Array, "b *d"], i: Int[Array, ""] | int) -> Float[Array, "b *d"]:
    """A variance-preserving latent of level `alpha_bar(sampler, i)`, in the space that step `i` works in."""
    return x / jnp.sqrt(alpha_bar(sampler, i)) if sampler.name.startswith("euler") else x


def scale_initial(sampler: Sampler, noise: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """The input of step 0 made of unit-variance noise."""
    return jnp.asarray(noise, jnp.float32) * sampler.init_noise_sigma


def scale_input(sampler: Sampler, x: Float[Array, "b *d"], i: Int[Array, ""] | int) -> Float[Array, "b *d"]:
    """What the model is given for `x` at step `i`: the Euler samplers divide by sqrt(1 + sigma^2)."""
    return to_vp(sampler, x, i)


def init_state(sampler: Sampler, shape: tuple[int, ...]) -> SolverState:
    """The state of a solver that starts, or restarts at any step, on latents of this shape."""
    size = _HISTORY.get(sampler.name, 0) + (sampler.start_weights.shape[0] == pndm.RUNGE_KUTTA_CALLS)
    return SolverState(history=jnp.zeros((size, *shape), jnp.float32), count=jnp.zeros((), jnp.int32))


def step(
    sampler: Sampler,
    state: SolverState,
    model_output: Float[Array, "b *d"],
    i: Int[Array, ""] | int,
    x: Float[Array, "b *d"],
    noise: Float[Array, "b *d"] | None = None,
) -> tuple[Float[Array, "b *d"], SolverState]:
    """Step `i`, which may be traced, from its input `x` and the model's output for it, in float32.

    A fresh `state` makes it a first-order step, whatever `i`. PNDM's second step since then only corrects the first, as
    if both had the timesteps of steps 0 and 1, and its Runge-Kutta steps are always those from the first timestep: so
    does diffusers where image-to-image generation starts late. `noise` has unit variance and is read by stochastic
    samplers only.
    """
    if sampler.stochastic and noise is None:
        raise ValueError("noise=None is not supported by a stochastic sampler; it must be an array of the shape of x")
    x, output = jnp.asarray(x, jnp.float32), jnp.asarray(model_output, jnp.float32)
    if sampler.name == "pndm":
        return _pndm_step(sampler, state, output, i, x)
    x0, epsilon = _predictions(sampler, i, x, output)
    weights = jnp.asarray(sampler.output_weights)[i]
    result = weights[0] * x0 + weights[1] * epsilon
    if sampler.stochastic:
        result += weights[2] * jnp.asarray(noise, jnp.float32)
    if sampler.name == "dpm++":
        result += jnp.where(state.count > 0, weights[3], 0.0) * (x0 - state.history[0])
        state = SolverState(history=x0[None], count=state.count + 1)
    return result, state


def _predictions(sampler: Sampler, i: Any, x: Array, output: Array) -> tuple[Array, Array]:
    of_x0, of_epsilon = jnp.asarray(sampler.x0_weights)[i], jnp.asarray(sampler.epsilon_weights)[i]
    x0 = of_x0[0] * x + of_x0[1] * output
    if sampler.clip_range is not None:
        x0 = jnp.clip(x0, -sampler.clip_range, sampler.clip_range)
    return x0, of_epsilon[0] * x + of_epsilon[1] * output


def _pndm_step(sampler: Sampler, state: SolverState, output: Array, i: Any, x: Array) -> tuple[Array, SolverState]:
    """Pseudo numerical method (Liu et al. 2022, eqs. 11 to 13); the transfer part is the DDIM step."""
    past, special = state.history, sampler.start_weights.shape[0]
    plan = jnp.asarray(pndm.PLANS[special], jnp.float32)
    row = plan[jnp.minimum(state.count, plan.shape[0] - 1)]
    begins, total = row[7] > 0, past[4] if past.shape[0] > 4 else jnp.zeros_like(x)
    combined = row[0] * output + row[1] * past[0] + row[2] * past[1] + row[3] * past[2] + row[4] * total
    base = jnp.where(begins, x, past[3])
    x0, epsilon = _predictions(sampler, i, base, combined)
    to, start = jnp.asarray(sampler.output_weights)[i], jnp.asarray(sampler.start_weights)
    start = start[jnp.minimum(state.count, special - 1), i]
    result = jnp.where(state.count < special, start[0] * base + start[1] * combined, to[0] * x0 + to[1] * epsilon)
    outputs = jnp.where(begins, jnp.stack([output, past[0], past[1]]), past[:3])
    history = jnp.concatenate([outputs, base[None], (row[5] * total + row[6] * output)[None]])[: past.shape[0]]
    return result, SolverState(history=history, count=state.count + 1)


def _draw(key: Array, i: Any, shape: tuple[int, ...]) -> Array:
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
        draw = None
        if sampler.stochastic:
            draw = _draw(key, i, x.shape) if noise is None else jnp.asarray(noise)[i]
        return step(sampler, state, output, i, x, draw), None

    carry, _ = jax.lax.scan(body, (jnp.asarray(x, jnp.float32), state), jnp.arange(start, stop))
    return carry
