"""Samplers that a user registers: the one of the documentation against diffusers, and one made of weights alone."""

import re
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from megjax.diffusion.pipeline import StableDiffusion
from megjax.diffusion.refine import refine
from megjax.diffusion.samplers import (
    SAMPLERS,
    SamplingMethod,
    denoise,
    discrete_visits,
    first_order,
    make_sampler,
    scale_initial,
)
from megjax.diffusion.scheduler_config import SchedulerConfig
from tests.diffusion.published import SD_15

pytestmark = pytest.mark.usefixtures("fast_compile")

DOCS = Path(__file__).parents[2] / "docs"
SHAPE = (2, 3, 4)


@pytest.fixture
def heun():
    """The sampler of the documentation, registered as a user does it."""
    section = next(text for text in (page.read_text() for page in DOCS.glob("extending*.md")) if "## A sampler" in text)
    block = re.search(r"## A sampler\n.*?```python\n(.*?)```", section, re.DOTALL)[1]
    exec(compile(block, "extending.md", "exec"), {})
    yield SAMPLERS.find("heun")
    SAMPLERS.remove("heun")


@pytest.fixture
def lazy():
    """A sampler whose steps keep a share of the noise back, which a setting of its own says."""

    def weights(config, steps, eta):
        return first_order(config, steps, eta)._replace(epsilon=(1 - steps.after) ** 0.5 * dict(config.others)["share"])

    method = SamplingMethod(
        name="lazy",
        title="lazy",
        class_name="LazyScheduler",
        settings={"share": (0.5, 1.0), "set_alpha_to_one": None},
        defaults={"timestep_spacing": "leading"},
        visits=discrete_visits,
        weights=weights,
    )
    yield SAMPLERS.register(method)
    SAMPLERS.remove("lazy")


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"prediction_type": "v_prediction", "use_karras_sigmas": True},
        {"timestep_spacing": "trailing", "clip_sample": True},
    ],
    ids=str,
)
def test_the_sampler_of_the_documentation_is_that_of_diffusers(heun, settings, num_steps):
    values = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} | settings
    reference = diffusers.HeunDiscreteScheduler(**values)
    reference.set_timesteps(num_steps)
    noise = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    expected = torch.tensor(noise) * reference.init_noise_sigma
    for t in reference.timesteps:
        output = torch.tanh(0.7 * reference.scale_model_input(expected, t) + 0.3 * t.float() / 1000 - 0.1)
        expected = reference.step(output, t, expected).prev_sample

    config = SchedulerConfig.from_dict({"_class_name": "HeunDiscreteScheduler"} | values)
    assert config.sampler == "heun"
    sampler = make_sampler(config, "heun", num_steps)
    np.testing.assert_allclose(sampler.timesteps, reference.timesteps, atol=2e-3)

    def model(x, t):
        return jnp.tanh(0.7 * x + 0.3 * t / 1000 - 0.1)

    found = jax.jit(lambda sampler, x: denoise(model, sampler, scale_initial(sampler, x))[0])(sampler, noise)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.usefixtures("unchecked", "heun")
def test_a_pipeline_takes_it_by_its_name(whole):
    pipe = StableDiffusion.from_pretrained(whole)
    ids = pipe.tokenize(["a red house"])
    found, plain = (pipe.generate_latents(0, ids, sampler=name, num_steps=3) for name in ("heun", "euler"))
    assert np.all(np.isfinite(found)) and found.shape == plain.shape and not np.allclose(found, plain, atol=1e-3)


def test_a_step_of_its_own_cannot_start_at_any_level(heun):
    with pytest.raises(ValueError, match="sampler is 'heun'; it must be one that can start at any noise level: ddim"):
        refine(lambda x, t: x, SchedulerConfig(), jnp.zeros((1, 2, 2, 1)), jnp.ones(1), 2, "heun")


def test_weights_alone_make_a_sampler_that_starts_anywhere(lazy):
    values = SD_15 | {"_class_name": "LazyScheduler", "share": 0.5}
    config = SchedulerConfig.from_dict(values)
    assert (config.sampler, config.others) == ("lazy", (("share", 0.5),)) and lazy.any_level
    assert SchedulerConfig.from_dict(config.to_dict()) == config
    sampler = make_sampler(config, "lazy", 10)
    np.testing.assert_allclose(2 * sampler.output_weights[:, 1], make_sampler(config, "ddim", 10).output_weights[:, 1])
    x = jnp.ones((1, 2, 2, 1))

    def run(name):
        return refine(lambda x, t: 0.5 * x, config, x, jnp.full(1, 0.5), 2, name)

    found, plain = jax.jit(lambda: (run("lazy"), run("ddim")))()
    assert np.all(np.isfinite(found)) and np.all(found < plain)
    with pytest.raises(ValueError, match=r"share=2.0 is not supported; it must be 0.5 or 1.0"):
        SchedulerConfig.from_dict(values | {"share": 2.0}).for_sampler("lazy")
    SAMPLERS.remove("lazy")
    with pytest.raises(ValueError, match="sampler='lazy'.*one of .*'ddim'"):
        make_sampler(SchedulerConfig(), "lazy", 10)


@pytest.mark.parametrize(
    "wrong", [{"class_name": "Lazy"}, {"history": 2}, {"class_name": None}], ids=lambda wrong: next(iter(wrong))
)
def test_bad_records(wrong):
    (name, value), *_ = wrong.items()
    given = {"name": "lazy", "title": "lazy", "class_name": "LazyScheduler", "visits": discrete_visits} | wrong
    with pytest.raises(Exception, match=f"{name}.*{value!r}"):
        SamplingMethod(**given)
