"""Noise schedules against PyTorch diffusers, their configurations and the forward process."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from megjax.diffusion.schedules import (
    CLASS_NAMES,
    SAMPLERS,
    SchedulerConfig,
    add_noise,
    alphas_cumprod,
    inference_timesteps,
    predict_epsilon,
    predict_x0,
    velocity,
)
from tests.diffusion.published import SD_15, SD_21

# diffusers makes NumPy arrays of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 3, 4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_defaults_and_saved_files_are_those_of_diffusers(name):
    reference = getattr(diffusers, CLASS_NAMES[name])
    saved = json.loads(reference().to_json_string())
    saved |= {"skip_prk_steps": True} if name == "pndm" else {}
    ours = SchedulerConfig.from_dict({"_class_name": CLASS_NAMES[name], "skip_prk_steps": True}).for_sampler(name)
    for field in saved.keys() & {field.name for field in dataclasses.fields(SchedulerConfig)}:
        assert getattr(ours, field) == saved[field], field
    for d in (saved, SD_15, SD_21 | {"use_karras_sigmas": True, "sigma_min": 0.1}):
        config = SchedulerConfig.from_dict(d | {"_class_name": CLASS_NAMES[name]})
        written = json.loads(json.dumps(config.to_dict()))
        assert SchedulerConfig.from_dict(written) == config
        reopened, unused = reference.from_config(written, return_unused_kwargs=True)
        for key, value in written.items():
            assert reopened.config[key] == value
        assert all(key in d for key in unused if key != "_class_name")


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"])
def test_forward_process_matches_diffusers(schedule):
    values = {"num_train_timesteps": 100, "beta_schedule": schedule}
    if schedule == "trained":
        values = {"num_train_timesteps": 100, "trained_betas": tuple(np.linspace(0.001, 0.1, 100).tolist())}
    reference = diffusers.DDIMScheduler(**values)
    table = alphas_cumprod(SchedulerConfig(**values))
    # float32 betas and cumulative product of 100 factors there
    np.testing.assert_allclose(table, reference.alphas_cumprod.numpy(), rtol=2 * 100 * 2**-23)
    rng = np.random.default_rng(0)
    arguments = rng.standard_normal(SHAPE, np.float32), rng.standard_normal(SHAPE, np.float32), np.array([3, 90])
    theirs, ours = [torch.tensor(a) for a in arguments], [jnp.asarray(a) for a in arguments]
    np.testing.assert_allclose(add_noise(table, *ours), reference.add_noise(*theirs), atol=1e-5)
    np.testing.assert_allclose(velocity(table, *ours), reference.get_velocity(*theirs), atol=1e-5)


def test_predictions_invert_the_forward_process():
    table, level = alphas_cumprod(SchedulerConfig()), 600
    clean, noise = np.random.default_rng(0).standard_normal((2, *SHAPE), np.float32)

    @jax.jit
    def run(z, noise):
        t = jnp.full(SHAPE[0], level)
        x = add_noise(table, z, noise, t)
        outputs = {"epsilon": noise, "v_prediction": velocity(table, z, noise, t), "sample": z}
        given = [(kind, x, output, table[level]) for kind, output in outputs.items()]
        return [(predict_x0(*arguments), predict_epsilon(*arguments)) for arguments in given]

    for found in run(clean, noise):
        np.testing.assert_allclose(found, (clean, noise), atol=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_for_every_number_of_steps(name):
    for spacing in ("leading", "trailing", "linspace"):
        values = {"timestep_spacing": spacing, "skip_prk_steps": True}
        config = SchedulerConfig.from_dict({"_class_name": CLASS_NAMES[name]} | values).for_sampler(name)
        scheduler = getattr(diffusers, CLASS_NAMES[name]).from_config(values)
        for num_steps in (*range(1, 120), 250, 500):
            if spacing == "leading" and name == "dpm++" and num_steps > 499:
                continue
            scheduler.set_timesteps(num_steps)
            expected = scheduler.timesteps.numpy()
            if name == "pndm" and num_steps > 1:
                expected = np.delete(expected, 1)
            ours = inference_timesteps(config, num_steps)
            np.testing.assert_allclose(ours, expected[:num_steps], atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "LMSDiscreteScheduler"},
        {"_class_name": None},
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "flow_prediction"},
        {"timestep_spacing": "log"},
        {"thresholding": True},
        {"algorithm_type": "sde-dpmsolver++"},
        {"solver_type": "heun"},
        {"solver_order": 3},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous"},
        {"variance_type": "learned"},
        {"lambda_min_clipped": -5.1},
        {"steps_offset": -1},
        {"beta_end": 2.0},
        {"trained_betas": [0.1, 0.2]},
        {"shift": 3.0},
    ],
    ids=str,
)
def test_unsupported_config_values_are_named(change):
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=name) as error:
        SchedulerConfig.from_dict(SD_15 | change)
    assert name == "trained_betas" or repr(value) in str(error.value)
