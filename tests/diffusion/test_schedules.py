"""Noise schedules against PyTorch diffusers, their configurations and the forward process."""

import dataclasses
import functools
import inspect
import json
import re
import warnings

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from megjax.diffusion import scheduler_config
from megjax.diffusion.samplers import SAMPLERS
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.schedules import (
    add_noise,
    alphas_cumprod,
    inference_timesteps,
    predict_epsilon,
    predict_x0,
    velocity,
)
from tests.diffusion.conftest import COMPARED
from tests.diffusion.published import SD_15, SD_21

# diffusers makes NumPy arrays of tensors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SHAPE = (2, 3, 4)
CLASS_NAMES = [method.class_name for method in SAMPLERS]
# Classes of diffusers that have no sampler here.
OTHERS = [
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMEulerScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
OTHERS = [name for name in OTHERS if name not in CLASS_NAMES]


@pytest.mark.parametrize("name", COMPARED)
def test_defaults_and_saved_files_are_those_of_diffusers(name):
    reference = getattr(diffusers, SAMPLERS.find(name).class_name)
    saved = json.loads(reference().to_json_string())
    ours = SchedulerConfig.from_dict({"_class_name": SAMPLERS.find(name).class_name}).for_sampler(name)
    for field in saved.keys() & {field.name for field in dataclasses.fields(SchedulerConfig)}:
        assert getattr(ours, field) == saved[field], field
    for d in (saved, SD_15, SD_21 | {"use_karras_sigmas": True, "sigma_min": 0.1}):
        config = SchedulerConfig.from_dict(d | {"_class_name": SAMPLERS.find(name).class_name})
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


@pytest.mark.parametrize("name", COMPARED)
def test_timesteps_for_every_number_of_steps(name):
    for spacing in ("leading", "trailing", "linspace"):
        values = {"timestep_spacing": spacing, "skip_prk_steps": True}
        config = SchedulerConfig.from_dict({"_class_name": SAMPLERS.find(name).class_name} | values).for_sampler(name)
        scheduler = getattr(diffusers, SAMPLERS.find(name).class_name).from_config(values)
        for num_steps in (*range(1, 120), 250, 500):
            if spacing == "leading" and name == "dpm++" and num_steps > 499:
                continue
            scheduler.set_timesteps(num_steps)
            expected = scheduler.timesteps.numpy()
            if name == "pndm" and num_steps > 1:
                expected = np.delete(expected, 1)
            ours = inference_timesteps(config, num_steps)
            np.testing.assert_allclose(ours, expected[:num_steps], atol=1e-3)


@pytest.mark.parametrize("name", COMPARED)
def test_each_class_reads_the_settings_of_its_own(name):
    """Its parameters in diffusers, and for DPM-Solver++ the ends of Karras sigmas that another class has left."""
    parameters = set(inspect.signature(getattr(diffusers, SAMPLERS.find(name).class_name)).parameters)
    known = {field.name for field in dataclasses.fields(SchedulerConfig)} | parameters
    left = {"sigma_min", "sigma_max"} if name == "dpm++" else set()
    assert {key for key in known if scheduler_config.reads(name, key)} == parameters | left
    assert set(SAMPLERS.find(name).settings) < parameters


@functools.cache
def saved_default(name):
    """scheduler_config.json of a class with its default settings."""
    return json.loads(getattr(diffusers, name)().to_json_string())


def saved_swap(source, target):
    """scheduler_config.json of a pipeline whose scheduler was changed from one class to another; None if impossible."""
    try:
        return json.loads(getattr(diffusers, target).from_config(saved_default(source)).to_json_string())
    except (TypeError, ValueError):
        # diffusers' own: DEIS's solvers of DPM-Solver++ must end at the least sigma, and EDM's must have one.
        assert (source, target) in (
            ("DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
            ("DEISMultistepScheduler", "DPMSolverSinglestepScheduler"),
            ("EulerDiscreteScheduler", "EDMEulerScheduler"),
            ("UniPCMultistepScheduler", "EDMEulerScheduler"),
        )
        return None


def opened(saved):
    """The configuration in a file, which also comes back from what we write of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "scheduler settings that .* does not read|the settings of EDMEulerScheduler")
        config = SchedulerConfig.from_dict(saved)
        assert SchedulerConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    return config


@pytest.mark.parametrize("source", OTHERS)
def test_every_sampler_reads_the_file_of_a_class_without_one_as_diffusers_does(source):
    saved = saved_default(source)
    config = opened(saved)
    written = config.to_dict()
    lost = {key for key, value in saved.items() if key not in written or written[key] != value}
    assert {key for key in lost if key[0] != "_"} <= {"lambda_min_clipped"}  # whose default, -inf, is no JSON
    for name in COMPARED:
        settings = {"final_sigmas_type": "sigma_min"} if source == "DEISMultistepScheduler" else {}
        reference = getattr(diffusers, SAMPLERS.find(name).class_name).from_config(saved | settings).config
        ours = dataclasses.replace(config, **settings).for_sampler(name)
        for field in dataclasses.fields(ours):
            if scheduler_config.reads(name, field.name) and field.name in reference:
                assert getattr(ours, field.name) == reference[field.name], (name, field.name)
    with pytest.raises(ValueError, match=f"{source}.*'ddim'.*'dpm"):
        config.for_sampler(config.sampler)


@pytest.mark.parametrize("target", [*CLASS_NAMES, *(n for n in OTHERS if "KDPM2" not in n)])
def test_swapped_schedulers_open(target):
    """From every class to every other, but for KDPM2's, which take diffusers half a second to build."""
    for source in (*CLASS_NAMES, *OTHERS):
        if source != target and (saved := saved_swap(source, target)) is not None:
            config = opened(saved)
            assert config.class_name == target, source
            assert (config.sampler in SAMPLERS) == (target in CLASS_NAMES)


def test_a_class_whose_file_gives_no_noise_schedule_takes_the_defaults_with_a_warning():
    """As diffusers' samplers do when they are made from its configuration."""
    with pytest.warns(UserWarning, match="EDMEulerScheduler do not say beta_start, beta_end, beta_schedule"):
        config = SchedulerConfig.from_dict(saved_default("EDMEulerScheduler"))
    reference = diffusers.DDIMScheduler.from_config(saved_default("EDMEulerScheduler"))
    np.testing.assert_allclose(alphas_cumprod(config), reference.alphas_cumprod.numpy(), rtol=2 * 1000 * 2**-23)


def test_unknown_settings_are_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="PNDMScheduler does not read are ignored: shift=3.0, timestep_values=None"):
        config = SchedulerConfig.from_dict(SD_15 | {"timestep_values": None, "shift": 3.0})
    plain = SchedulerConfig.from_dict(SD_15)
    assert all(config.for_sampler(name) == plain.for_sampler(name) for name in COMPARED)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": None},
        {"_class_name": "UNet2DModel"},
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "flow_prediction"},
        {"timestep_spacing": "log"},
        {"steps_offset": -1},
        {"beta_end": 2.0},
        {"trained_betas": [0.1, 0.2]},
    ],
    ids=str,
)
def test_unsupported_schedules_are_named(change):
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=name) as error:
        SchedulerConfig.from_dict(SD_15 | change)
    assert name == "trained_betas" or repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("samplers", "change"),
    [
        (("ddim", "dpm++"), {"thresholding": True}),
        (("dpm++",), {"algorithm_type": "sde-dpmsolver++"}),
        (("dpm++",), {"solver_type": "heun"}),
        (("dpm++",), {"solver_order": 3}),
        (("dpm++",), {"variance_type": "learned"}),
        (("dpm++",), {"lambda_min_clipped": -5.1}),
        (("dpm++",), {"use_flow_sigmas": True}),
        (("euler", "dpm++"), {"use_exponential_sigmas": True}),
        (("euler", "dpm++"), {"use_beta_sigmas": True}),
        (("euler", "dpm++"), {"use_karras_sigmas": 3}),
        (("euler",), {"interpolation_type": "log_linear"}),
        (("euler",), {"timestep_type": "continuous"}),
        (("ddim",), {"clip_sample_range": -1.0}),
        (("pndm",), {"skip_prk_steps": "no"}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_unsupported_settings_are_named_by_the_samplers_that_read_them(samplers, change):
    (name, value), *_ = change.items()
    config, plain = (SchedulerConfig.from_dict(SD_15 | settings) for settings in (change, {}))
    for sampler in COMPARED:
        if sampler in samplers:
            with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
                config.for_sampler(sampler)
        else:
            assert config.for_sampler(sampler) == plain.for_sampler(sampler)


def test_zero_terminal_snr_counts_for_the_classes_that_read_it():
    for name in COMPARED:
        values = {"_class_name": SAMPLERS.find(name).class_name, "rescale_betas_zero_snr": True}
        assert (alphas_cumprod(SchedulerConfig.from_dict(values))[-1] == 0) == (name != "pndm")
