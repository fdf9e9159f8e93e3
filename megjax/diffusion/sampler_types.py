"""What a sampler is: its tables, what it remembers between steps, and the record by which it is asked for."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from megjax.configs import require
from megjax.pytrees import pytree_dataclass, static
from megjax.registry import Record, Registry

THRESHOLDING = {"thresholding": (False,), "dynamic_thresholding_ratio": None, "sample_max_value": None}
"""`SamplingMethod.settings` of classes that can clip predictions by their own quantiles, which is not supported."""
SIGMA_SPACINGS = {"use_karras_sigmas": None, "use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None)}
"""`SamplingMethod.settings` of classes that can space sigmas otherwise than timesteps; Karras's way is supported."""


class Visits(NamedTuple):
    """Where a sampler calls the model: a row for each of its n calls, NumPy arrays in float64.

    `extra` holds tables of the sampler's own, which its `step` reads.
    """

    timesteps: Shaped[np.ndarray, " n"]
    here: Float[np.ndarray, " n"]
    """alpha-bar of the latents that the model is given."""
    after: Float[np.ndarray, " n"]
    """alpha-bar of the latents that the step leads to."""
    extra: Mapping[str, Float[np.ndarray, "..."]] = {}


class Steps(NamedTuple):
    """Steps between noise levels alpha-bar: float64 NumPy arrays of all steps, or float32 JAX arrays, maybe traced.

    `index` counts the steps from 0, and `num_steps` is how many there are, a Python integer. `before`, `here` and
    `after` are the levels at the input of the step before (in the first step, of this one), at the input and at the
    output.
    """

    index: Int[Array | np.ndarray, "..."]
    num_steps: int
    before: Float[Array | np.ndarray, "..."]
    here: Float[Array | np.ndarray, "..."]
    after: Float[Array | np.ndarray, "..."]

    @property
    def xp(self) -> Any:
        """The module whose functions take these arrays, numpy or jax.numpy."""
        return self.here.__array_namespace__()


class Weights(NamedTuple):
    """Weights of the sum that a step leads to, on variance-preserving scale.

    They belong to the predicted clean latents x0, to the predicted noise, to fresh noise of unit variance, and to the
    change of x0 since the step before, if there was one.
    """

    x0: Any
    epsilon: Any
    noise: Any = 0.0
    change: Any = 0.0


def first_order(config: Any, steps: Steps, eta: float) -> Weights:
    """Weights of the first-order step of the probability flow.

    This is J. Song et al., "Denoising diffusion implicit models", 2021, eq. 12 with sigma = 0, which is also Euler's
    step where latents are scaled to x0 + sigma eps.
    """
    return Weights(steps.xp.sqrt(steps.after), steps.xp.sqrt(1 - steps.after))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingMethod(Record):
    """A sampler by name: which settings of a scheduler file it reads, which steps it takes, and how it takes one.

    A step with model output m predicts the clean latents x0 and the noise eps from m, and leads to a weighted sum of
    both, of fresh noise, and of the change of x0 (`weights`), unless the sampler has a `step` of its own.
    """

    class_name: str
    """Class of this sampler in diffusers, which scheduler files name; it must end in "Scheduler"."""
    settings: Mapping[str, tuple | None] = dataclasses.field(default_factory=dict, hash=False)
    """Settings that the class has beside those of every class, each with the values that are supported; None stands for
    any value. Those that `SchedulerConfig` has no field for are in its `others`."""
    settings_of_others: tuple[str, ...] = ()
    """Settings that are read where another class left them in the file."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Settings for which the class has another default than most: `timestep_spacing` "linspace", `set_alpha_to_one`
    True, `clip_sample` False."""
    refused_predictions: tuple[str, ...] = ()
    """Prediction types that the sampler cannot work with."""
    fractional_timesteps: bool = False
    """Whether timesteps are kept as real numbers where their spacing gives such."""
    spare_timestep: bool = False
    """Whether timesteps are spaced as for one step more, whose timestep, the last, is left out."""
    sigma_space: bool = False
    """Whether latents are scaled to x0 + sigma eps, sigma^2 = (1 - alpha-bar) / alpha-bar, as in diffusers' class; if
    not, to sqrt(alpha-bar) x0 + sqrt(1 - alpha-bar) eps: variance preserving."""
    stochastic: bool = False
    """Whether a step adds fresh noise."""
    takes_eta: bool = False
    """Whether `eta` sets how much noise a step adds."""
    history: int = 0
    """How many arrays of the latents' shape the sampler remembers: without a `step` of its own 1 for the previous x0,
    else 0."""
    visits: Callable[..., Visits]
    """`visits(config, timesteps)`: the model calls of evenly spaced timesteps, float64 [n]."""
    weights: Callable[..., Weights] = first_order
    """`weights(config, steps, eta)`: how the steps of these `Steps` are taken; arrays of the shape of their levels."""
    step: Callable[..., tuple[Array, "SolverState"]] | None = None
    """`step(sampler, state, model_output, i, x, noise)`, with the arguments and results of `samplers.step`, in place of
    the weighted sum."""

    def __post_init__(self):
        name = self.class_name
        require(isinstance(name, str) and name.endswith("Scheduler"), "class_name", name, "a name ending in Scheduler")
        require(self.step is not None or self.history in (0, 1), "history", self.history, "0 or 1 without a step")

    @property
    def any_level(self) -> bool:
        """Whether the sampler can start at a noise level that is known only when the program runs."""
        return self.step is None


SAMPLERS: Registry[SamplingMethod] = Registry("sampler", "megjax.diffusion.samplers", "megjax.samplers")


@functools.partial(pytree_dataclass, eq=False)
class Sampler:
    """Host-made float32 tables of one sampler at one number of steps; a pytree whose tables are leaves.

    At step i with model output m, x0 = x0_weights[i] . (x, m), eps = epsilon_weights[i] . (x, m) and, unless the
    method has a step of its own, x_next = output_weights[i] . (x0, eps, noise, x0 - previous x0). Tables are for
    latents scaled as the method's are (`samplers.to_vp` and `samplers.from_vp` convert them).
    """

    timesteps: Shaped[Array | np.ndarray, "n"]  # what the model is given: float32 in sigma space, else int32
    alpha_bars: Float[Array | np.ndarray, "n+1"]  # at the input of each step and, last, at the output of the last
    x0_weights: Float[Array | np.ndarray, "n 2"]
    epsilon_weights: Float[Array | np.ndarray, "n 2"]
    output_weights: Float[Array | np.ndarray, "n 4"]
    extra: dict[str, Float[Array | np.ndarray, "..."]]  # tables of the method's own
    init_noise_sigma: Float[Array | np.ndarray, ""]
    method: SamplingMethod = static()
    num_steps: int = static()  # model calls, of which PNDM and others make more than asked for, as diffusers does
    stochastic: bool = static()
    clip_range: float | None = static()

    @property
    def name(self) -> str:
        """Name of the method in `SAMPLERS`."""
        return self.method.name


@pytree_dataclass
class SolverState:
    """What a multi-step solver remembers, with fixed shapes.

    `history` is [k *latent], k being its method's `history`: the previous x0 (k = 1) for methods without a step of
    their own. `count` is how many outputs it has taken in since its start.
    """

    history: Float[Array, "k *d"]
    count: Int[Array, ""]
