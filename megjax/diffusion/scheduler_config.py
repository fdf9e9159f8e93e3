"""SchedulerConfig: diffusers' scheduler_config.json, with each setting read by the samplers whose class has it."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from megjax.configs import freeze
from megjax.diffusion.sampler_types import SAMPLERS

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# Settings of every sampler. The first are the noise schedule itself, whose defaults other classes than these change.
_SCHEDULE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_COMMON_KEYS = (*_SCHEDULE_KEYS, "trained_betas", "prediction_type", "timestep_spacing", "steps_offset")

_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": (None, "leading", "linspace", "trailing"),
    "set_alpha_to_one": (None, True, False),
    "clip_sample": (None, True, False),
}
# Settings whose default depends on the class: None until a sampler is asked for. These are the defaults of most.
_DEFAULTS = {"timestep_spacing": "linspace", "set_alpha_to_one": True, "clip_sample": False}
# The default of some classes' settings, which has no place in strict JSON.
_ENDLESS = (-math.inf, "-Infinity")


def reads(sampler: str, name: str) -> bool:
    """Whether the sampler `sampler` reads the setting `name`."""
    method = SAMPLERS.find(sampler)
    return name in _COMMON_KEYS or name in method.settings or name in method.settings_of_others


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """A diffusers scheduler_config.json: the noise schedule a model was trained with and how to sample it.

    Field names and defaults are diffusers'. `sampler` stands for `_class_name`: a name of `SAMPLERS`, or the name of a
    class that has no sampler here. Where diffusers' classes differ in a default (`timestep_spacing`,
    `set_alpha_to_one`, `clip_sample`), None means the default of whichever sampler is asked for. As with diffusers'
    `from_config`, settings that a sampler's class does not have are kept and not read by it. `others` holds the
    settings that have no field, as (name, value).

    Raises:
      ValueError: a setting of the noise schedule is outside what is supported; the message names it, its value and what
        is allowed. Settings that only some samplers read are checked by `for_sampler`.
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
    clip_sample: bool | None = None
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    solver_order: int = 2
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"
    others: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        named = isinstance(self.sampler, str) and (self.sampler in SAMPLERS or self.sampler.endswith("Scheduler"))
        if not named:
            reject("sampler", self.sampler, f"one of {SAMPLERS.names}, or the name of a scheduler class")
        self._check(_COMMON_KEYS, _CHOICES)
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", _check_betas(self.trained_betas, self.num_train_timesteps))

    def _check(self, names, choices):
        """ValueError unless each of these settings has a supported value, one of its `choices` if it has such."""
        types = {field.name: field.type for field in dataclasses.fields(self)}
        for name in names:
            if name not in types:
                continue
            value = getattr(self, name)
            if name in choices and value not in choices[name]:
                reject(name, value, f"one of {choices[name]}")
            if types[name] is bool and not isinstance(value, bool):
                reject(name, value, "True or False")
            least = {"num_train_timesteps": 1, "steps_offset": 0}.get(name)
            if least is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                reject(name, value, f"an integer >= {least}")
            if types[name] in (float, float | None) and not (value is None and types[name] == float | None):
                limit = 1.0 if name.startswith("beta_") else math.inf
                if not isinstance(value, (int, float)) or not 0 < value < limit:
                    reject(name, value, f"a number in (0, {limit})")

    @property
    def class_name(self) -> str:
        """The name of the scheduler's class in diffusers."""
        return SAMPLERS.find(self.sampler).class_name if self.sampler in SAMPLERS else self.sampler

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the schedule ends at alpha-bar 0: `rescale_betas_zero_snr`, where the class reads it."""
        own = self.sampler not in SAMPLERS or reads(self.sampler, "rescale_betas_zero_snr")
        return own and self.rescale_betas_zero_snr

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "SchedulerConfig":
        """Reads the content of a scheduler_config.json; keys that start with "_" other than `_class_name` are skipped.

        The class may be one that has no sampler here; where its file does not say what the noise schedule is, defaults
        are taken with a warning. Keys that no sampler reads are ignored with a warning.

        Raises:
          ValueError: `_class_name` is missing or no scheduler class, or the noise schedule is not supported.
        """
        class_name = d.get("_class_name")
        if not isinstance(class_name, str) or not class_name.endswith("Scheduler"):
            known = tuple(method.class_name for method in SAMPLERS)
            reject("_class_name", class_name, f"one of {known}, or another scheduler class")
        sampler = next((method.name for method in SAMPLERS if method.class_name == class_name), class_name)
        types = {field.name: field.type for field in dataclasses.fields(cls) if field.name not in ("sampler", "others")}
        values = {key: freeze(value) for key, value in d.items() if not key.startswith("_")}
        values = {key: value for key, value in values.items() if key in types or value not in _ENDLESS}
        known = types.keys() | {key for method in SAMPLERS for key in method.settings}
        unknown = {key: value for key, value in values.items() if key not in known}
        if sampler in SAMPLERS and unknown:
            listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
            warnings.warn(f"scheduler settings that {class_name} does not read are ignored: {listed}", stacklevel=2)
        absent = [key for key in _SCHEDULE_KEYS if key not in values]
        if sampler not in SAMPLERS and absent and values.get("trained_betas") is None:
            warnings.warn(
                f"the settings of {class_name} do not say {', '.join(absent)}: the defaults of diffusers' other "
                "schedulers are taken, which may not be what the model was trained with",
                stacklevel=2,
            )
        fields = {key: value for key, value in values.items() if key in types}
        for key, value in fields.items():
            if types[key] in (float, float | None) and type(value) is int:
                fields[key] = float(value)
        if isinstance(fields.get("trained_betas"), tuple):
            fields["trained_betas"] = tuple(map(float, fields["trained_betas"]))
        if fields.get("use_karras_sigmas", False) is None:
            fields["use_karras_sigmas"] = False  # diffusers' own type for this switch is bool | None
        others = sorted((key, value) for key, value in values.items() if key not in types)
        return cls(sampler=sampler, others=tuple(others), **fields)

    def to_dict(self) -> dict[str, Any]:
        """The scheduler_config.json content from which diffusers' class of this sampler, and `from_dict`, reopen it."""
        d: dict[str, Any] = {"_class_name": self.class_name, **dict(self.others)}
        of_class = {*_COMMON_KEYS, *SAMPLERS.find(self.sampler).settings} if self.sampler in SAMPLERS else ()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            per_class_default = field.name in _DEFAULTS and value is None
            # A class that has no sampler here may have other defaults.
            own = not of_class or field.name in of_class
            written = field.name not in ("sampler", "others") and not per_class_default
            if written and (own or value != field.default):
                d[field.name] = value
        return {name: list(value) if isinstance(value, tuple) else value for name, value in d.items()}

    def for_sampler(self, sampler: str) -> "SchedulerConfig":
        """This config as `sampler`'s class reads it (diffusers' `from_config`): with its own defaults filled in.

        Settings that it does not read are at their defaults.

        Raises:
          ValueError: `sampler` is unknown, or cannot honour a setting that it reads.
        """
        if sampler not in SAMPLERS.names:
            reject("sampler", sampler, f"one of {SAMPLERS.names}")
        method = SAMPLERS.find(sampler)
        for name, value in self.others:
            allowed = method.settings.get(name)
            if allowed is not None and value not in allowed:
                reject(name, value, " or ".join(map(repr, allowed)))
        if self.prediction_type in method.refused_predictions:
            others = " or ".join(repr(kind) for kind in PREDICTION_TYPES if kind not in method.refused_predictions)
            reject("prediction_type", self.prediction_type, f"{others} for sampler {sampler!r}")
        settings = {field.name: field.default for field in dataclasses.fields(self)}
        settings |= {name: getattr(self, name) for name in settings if reads(sampler, name)}
        settings |= {name: value for name, value in (_DEFAULTS | method.defaults).items() if settings[name] is None}
        settings["others"] = tuple((name, value) for name, value in self.others if name in method.settings)
        config = SchedulerConfig(**settings | {"sampler": sampler})
        choices = {name: allowed for name, allowed in method.settings.items() if allowed is not None}
        config._check([name for name in settings if reads(sampler, name)], choices | _CHOICES)
        return config


def reject(name: str, value: Any, allowed: str) -> None:
    """Raise the ValueError of a setting that is not supported."""
    raise ValueError(f"{name}={value!r} is not supported; it must be {allowed}")


def _check_betas(betas: Any, num_train_timesteps: int) -> tuple[float, ...]:
    table = np.asarray(betas, np.float64)
    if table.shape != (num_train_timesteps,) or not np.all((table > 0) & (table < 1)):
        reject("trained_betas", f"<shape {table.shape}>", f"{num_train_timesteps} numbers in (0, 1)")
    return tuple(table.tolist())
