"""Noise schedules: reading of diffusers' scheduler_config.json, alpha-bar tables and the forward process."""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

CLASS_NAMES = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
SAMPLERS = tuple(CLASS_NAMES)

_CHOICES = {
    "sampler": SAMPLERS,
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": (None, "leading", "linspace", "trailing"),
    "solver_order": (1, 2),
    "final_sigmas_type": ("zero", "sigma_min"),
    "set_alpha_to_one": (None, True, False),
}

# Keys of diffusers' scheduler classes that have one supported meaning: key -> values that mean it (None: any value,
# because the key is read only together with a feature whose own switch must be off here).
_INERT = {
    "thresholding": (False,),
    "dynamic_thresholding_ratio": None,
    "sample_max_value": None,
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "flow_shift": None,
    "use_dynamic_shifting": (False, None),
    "time_shift_type": None,
    "lambda_min_clipped": (-math.inf, "-Infinity"),
    "variance_type": (None,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
}

_COMMON_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
)
_CLASS_KEYS = {
    "ddim": ("set_alpha_to_one", "clip_sample", "clip_sample_range", "rescale_betas_zero_snr"),
    "pndm": ("set_alpha_to_one", "skip_prk_steps"),
    "euler": ("rescale_betas_zero_snr", "use_karras_sigmas", "sigma_min", "sigma_max", "final_sigmas_type"),
    "euler_ancestral": ("rescale_betas_zero_snr",),
    "dpm++": (
        "rescale_betas_zero_snr",
        "use_karras_sigmas",
        "solver_order",
        "lower_order_final",
        "euler_at_final",
        "final_sigmas_type",
    ),
}


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """A diffusers scheduler_config.json: the noise schedule a model was trained with and how to sample it.

    Field names and defaults are diffusers'. `sampler` stands for `_class_name`. Where diffusers' classes differ in a
    default (`timestep_spacing`, `set_alpha_to_one`), None means the default of whichever sampler is asked for. As with
    diffusers' `from_config`, fields that a sampler's class does not have are kept and not read by it.

    Raises:
      ValueError: a field is outside what is supported; the message names it, its value and what is allowed.
    """

    sampler: str = "ddim"
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    skip_prk_steps: bool = False
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    solver_order: int = 2
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                _reject(name, getattr(self, name), f"one of {allowed}")
        for field in dataclasses.fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                _reject(field.name, getattr(self, field.name), "True or False")
        for name, least in (("num_train_timesteps", 1), ("steps_offset", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                _reject(name, value, f"an integer >= {least}")
        for name in ("beta_start", "beta_end", "clip_sample_range", "sigma_min", "sigma_max"):
            value = getattr(self, name)
            if value is None and name.startswith("sigma_"):
                continue
            limit = 1.0 if name.startswith("beta_") else math.inf
            if not isinstance(value, (int, float)) or not 0 < value < limit:
                _reject(name, value, f"a number in (0, {limit})")
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", _check_betas(self.trained_betas, self.num_train_timesteps))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "SchedulerConfig":
        """Reads the content of a scheduler_config.json; keys that start with "_" other than `_class_name` are skipped.

        Raises:
          ValueError: `_class_name` is missing or not among the supported classes, a key is unknown, or a known key
            has a value that is not supported.
        """
        samplers = {class_name: sampler for sampler, class_name in CLASS_NAMES.items()}
        if d.get("_class_name") not in samplers:
            _reject("_class_name", d.get("_class_name"), f"one of {tuple(samplers)}")
        values = {key: value for key, value in d.items() if not key.startswith("_")}
        names = {field.name: field for field in dataclasses.fields(cls) if field.name != "sampler"}
        unknown = sorted(values.keys() - names.keys() - _INERT.keys())
        if unknown:
            raise ValueError(
                f"unknown scheduler config keys: {', '.join(f'{key}={values[key]!r}' for key in unknown)}; "
                f"known are {', '.join(sorted(names.keys() | _INERT.keys()))}"
            )
        for key, allowed in _INERT.items():
            if key in values and allowed is not None and values[key] not in allowed:
                _reject(key, values[key], " or ".join(map(repr, allowed)))
        fields = {key: value for key, value in values.items() if key in names}
        for key, value in fields.items():
            if names[key].type in (float, float | None) and type(value) is int:
                fields[key] = float(value)
        if fields.get("trained_betas") is not None:
            fields["trained_betas"] = tuple(map(float, fields["trained_betas"]))
        if fields.get("use_karras_sigmas", False) is None:
            fields["use_karras_sigmas"] = False  # diffusers' own type for this switch is bool | None
        return cls(sampler=samplers[d["_class_name"]], **fields)

    def to_dict(self) -> dict[str, Any]:
        """The scheduler_config.json content from which diffusers' class of this sampler, and `from_dict`, reopen it."""
        d: dict[str, Any] = {"_class_name": CLASS_NAMES[self.sampler]}
        own_keys = _COMMON_KEYS + _CLASS_KEYS[self.sampler]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            per_class_default = field.name in ("timestep_spacing", "set_alpha_to_one") and value is None
            if field.name != "sampler" and not per_class_default and (field.name in own_keys or value != field.default):
                d[field.name] = list(value) if isinstance(value, tuple) else value
        return d

    def for_sampler(self, sampler: str) -> "SchedulerConfig":
        """This config as `sampler`'s class reads it (diffusers' `from_config`): its own defaults filled in.

        Raises:
          ValueError: `sampler` is unknown, or cannot honour a field whose neglect would change the result.
        """
        if sampler not in SAMPLERS:
            _reject("sampler", sampler, f"one of {SAMPLERS}")
        if sampler == "pndm" and not self.skip_prk_steps:
            _reject("skip_prk_steps", self.skip_prk_steps, "True for sampler 'pndm' (no Runge-Kutta warm-up)")
        if sampler == "pndm" and self.rescale_betas_zero_snr:
            _reject("rescale_betas_zero_snr", True, "False for sampler 'pndm'")
        if sampler in ("pndm", "euler_ancestral") and self.prediction_type == "sample":
            _reject("prediction_type", "sample", f"'epsilon' or 'v_prediction' for sampler {sampler!r}")
        spacing = "leading" if sampler in ("ddim", "pndm") else "linspace"
        to_one = sampler != "pndm" if self.set_alpha_to_one is None else self.set_alpha_to_one
        return dataclasses.replace(
            self, sampler=sampler, timestep_spacing=self.timestep_spacing or spacing, set_alpha_to_one=to_one
        )


def _reject(name: str, value: Any, allowed: str) -> None:
    raise ValueError(f"{name}={value!r} is not supported; it must be {allowed}")


def _check_betas(betas: Any, num_train_timesteps: int) -> tuple[float, ...]:
    table = np.asarray(betas, np.float64)
    if table.shape != (num_train_timesteps,) or not np.all((table > 0) & (table < 1)):
        _reject("trained_betas", f"<shape {table.shape}>", f"{num_train_timesteps} numbers in (0, 1)")
    return tuple(table.tolist())


def betas(config: SchedulerConfig) -> Float[np.ndarray, "t"]:
    """Variances beta_t of the forward process before any zero-SNR rescaling, float64 [num_train_timesteps].

    `squaredcos_cap_v2` is the cosine schedule of Nichol and Dhariwal (2021), eq. 17, capped at 0.999.
    """
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.asarray(config.trained_betas, np.float64)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, steps)
    if config.beta_schedule == "scaled_linear":
        return np.linspace(config.beta_start**0.5, config.beta_end**0.5, steps) ** 2
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def alphas_cumprod(config: SchedulerConfig) -> Float[np.ndarray, "t"]:
    """alpha-bar_t, the signal power left at training timestep t, float64 [num_train_timesteps].

    With `rescale_betas_zero_snr`, sqrt(alpha-bar) is shifted and scaled so that the last entry is exactly zero and the
    first unchanged (Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", algorithm 1).
    """
    alpha_bar = np.cumprod(1 - betas(config))
    if not config.rescale_betas_zero_snr:
        return alpha_bar
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def inference_timesteps(config: SchedulerConfig, num_steps: int) -> Float[np.ndarray, "n"]:
    """Decreasing timesteps at which `config.sampler` (see `for_sampler`) calls the model, float64 [num_steps].

    Euler samplers keep fractional timesteps; DPM-Solver++ spaces one step more and leaves out the last, because its
    last step ends at the final sigma.

    Raises:
      ValueError: `num_steps` is not an integer in [1, num_train_timesteps], or the timesteps it gives repeat or leave
        the training range.
    """
    train_steps = config.num_train_timesteps
    try:
        num_steps = operator.index(num_steps)
    except TypeError:
        _reject("num_steps", num_steps, "an integer")
    if not 1 <= num_steps <= train_steps:
        _reject("num_steps", num_steps, f"in [1, {train_steps}]")
    points = num_steps + 1 if config.sampler == "dpm++" else num_steps
    if config.timestep_spacing == "trailing":
        # arange, whose rounding decides ties such as 937.5, because diffusers takes the same
        timesteps = np.round(np.arange(train_steps, 0, -train_steps / num_steps)[:num_steps]) - 1
    elif config.timestep_spacing == "leading":
        timesteps = (np.arange(points) * (train_steps // points))[::-1][:num_steps] + float(config.steps_offset)
    else:
        timesteps = np.linspace(0, train_steps - 1, points)[::-1][:num_steps]
        if not config.sampler.startswith("euler"):
            timesteps = np.round(timesteps)
    if timesteps[0] > train_steps - 1 or np.any(np.diff(timesteps) >= 0):
        spacing = f"timestep_spacing={config.timestep_spacing!r} and steps_offset={config.steps_offset}"
        _reject("num_steps", num_steps, f"fewer with {spacing}: timesteps must not repeat or exceed {train_steps - 1}")
    return timesteps


def prediction_weights(prediction_type: str, alpha_bar: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Weights ((x0_x, x0_m), (eps_x, eps_m)) with x0 = x0_x x + x0_m m and eps = eps_x x + eps_m m.

    m is the model's output for x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps: eps itself ("epsilon"),
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 ("v_prediction"; Salimans and Ho 2022, appendix D), or x0
    ("sample"). `alpha_bar` may be a NumPy or JAX array.
    """
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    zero, one = 0 * alpha_bar, 0 * alpha_bar + 1
    if prediction_type == "epsilon":
        return (1 / signal, -noise / signal), (zero, one)
    if prediction_type == "v_prediction":
        return (signal, -noise), (noise, signal)
    if prediction_type == "sample":
        return (zero, one), (1 / noise, -signal / noise)
    _reject("prediction_type", prediction_type, f"one of {_CHOICES['prediction_type']}")


def predict_x0(
    prediction_type: str,
    x: Float[Array, "b *d"],
    model_output: Float[Array, "b *d"],
    alpha_bar: Float[Array, ""] | float,
) -> Float[Array, "b *d"]:
    """The clean latent implied by the model's output at a variance-preserving `x` of noise level `alpha_bar`."""
    (of_x, of_output), _ = prediction_weights(prediction_type, jnp.asarray(alpha_bar, jnp.float32))
    return of_x * x + of_output * model_output


def predict_epsilon(
    prediction_type: str,
    x: Float[Array, "b *d"],
    model_output: Float[Array, "b *d"],
    alpha_bar: Float[Array, ""] | float,
) -> Float[Array, "b *d"]:
    """The noise implied by the model's output at a variance-preserving `x` of noise level `alpha_bar`."""
    _, (of_x, of_output) = prediction_weights(prediction_type, jnp.asarray(alpha_bar, jnp.float32))
    return of_x * x + of_output * model_output


def add_noise(
    alpha_bars: Float[np.ndarray, "train"],
    z: Float[Array, "b *d"],
    noise: Float[Array, "b *d"],
    t: Int[Array, "b"],
) -> Float[Array, "b *d"]:
    """The forward process q(z_t | z_0): sqrt(alpha-bar_t) z + sqrt(1 - alpha-bar_t) noise (Ho et al. 2020, eq. 4).

    `alpha_bars` is the host table of `alphas_cumprod`; `t` holds training timesteps, one per example.
    """
    signal, spread = _forward_weights(alpha_bars, z, t)
    return signal * z + spread * noise


def velocity(
    alpha_bars: Float[np.ndarray, "train"],
    z: Float[Array, "b *d"],
    noise: Float[Array, "b *d"],
    t: Int[Array, "b"],
) -> Float[Array, "b *d"]:
    """The target of v-prediction: sqrt(alpha-bar_t) noise - sqrt(1 - alpha-bar_t) z (Salimans and Ho 2022).

    Arguments as in `add_noise`.
    """
    signal, spread = _forward_weights(alpha_bars, z, t)
    return signal * noise - spread * z


def _forward_weights(alpha_bars: np.ndarray, z: Array, t: Array) -> tuple[Array, Array]:
    # Roots are taken before the cast: 1 - alpha-bar_0 is of order 1e-4 and would lose four digits in float32.
    table = np.asarray(alpha_bars, np.float64)
    shape = t.shape + (1,) * (z.ndim - t.ndim)
    return tuple(jnp.asarray(root, jnp.float32)[t].reshape(shape) for root in (np.sqrt(table), np.sqrt(1 - table)))
