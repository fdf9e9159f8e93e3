"""Schedules and samplers against PyTorch diffusers, closed forms, and their own split runs."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.diffusion.samplers import (
    alpha_bar,
    denoise,
    from_vp,
    init_state,
    make_sampler,
    scale_initial,
    scale_input,
    step,
    to_vp,
)
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

SHAPE = (2, 3, 4)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SD_15 = SD | {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD_21 = SD_15 | {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"}

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}

# What varies beside prediction type, spacing, offset and number of steps.
VARIANTS = {
    "ddim": [
        {"set_alpha_to_one": True},
        {"set_alpha_to_one": False},
        {"set_alpha_to_one": False, "eta": 0.7},
        {"clip_sample": True, "clip_sample_range": 1.5, "eta": 0.7},
        LINEAR,
        {"rescale_betas_zero_snr": True},
    ],
    "pndm": [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}, LINEAR],
    "euler": [
        {},
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
        LINEAR | {"final_sigmas_type": "sigma_min"},
        {"rescale_betas_zero_snr": True},
    ],
    "euler_ancestral": [{}, LINEAR, {"rescale_betas_zero_snr": True}],
    "dpm++": [
        {},
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        LINEAR | {"solver_order": 1},
        {"rescale_betas_zero_snr": True},
    ],
}


def model(x, t):
    return jnp.tanh(0.7 * x + 0.3 * jnp.asarray(t, jnp.float32) / 1000 - 0.1)


@jax.jit
def run_ours(sampler, x, noise):
    return denoise(model, sampler, scale_initial(sampler, x), noise=noise)[0]


def run_diffusers(monkeypatch, scheduler, num_steps, x, noise, eta=0.0):
    torch = pytest.importorskip("torch")
    scheduler.set_timesteps(num_steps)
    x, noise = torch.tensor(x) * scheduler.init_noise_sigma, torch.tensor(noise)
    for i, t in enumerate(scheduler.timesteps):
        output = torch.tanh(0.7 * scheduler.scale_model_input(x, t) + 0.3 * t.float() / 1000 - 0.1)
        kwargs = {"eta": eta, "variance_noise": noise[i] if eta else None} if "DDIM" in type(scheduler).__name__ else {}
        if "Ancestral" in type(scheduler).__name__:
            monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, i=i, **__: noise[i])
        x = scheduler.step(output, t, x, **kwargs).prev_sample
    return x.numpy(), scheduler.timesteps.numpy()


def check_parity(monkeypatch, config, scheduler, name, num_steps, eta=0.0, tolerance=1e-4):
    sampler = make_sampler(config, name, num_steps, eta)
    rng = np.random.default_rng(num_steps)
    x = rng.standard_normal(SHAPE, np.float32)
    noise = rng.standard_normal((sampler.num_steps, *SHAPE), np.float32)
    expected, timesteps = run_diffusers(monkeypatch, scheduler, num_steps, x, noise, eta)
    # Karras timesteps of Euler are interpolated in a float32 table there.
    np.testing.assert_allclose(sampler.timesteps, timesteps, rtol=0, atol=2e-3 if name == "euler" else 0)
    error = np.abs(np.asarray(run_ours(sampler, x, noise)) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, (config, num_steps, eta, error)


@pytest.mark.parametrize("num_steps", [1, 7, 10, 25, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_parity_with_diffusers(monkeypatch, name, prediction, spacing, num_steps):
    diffusers = pytest.importorskip("diffusers")
    offsets = (0, 1) if spacing == "leading" or num_steps == 7 else (1,)  # the other spacings do not read it
    for variant, steps_offset in itertools.product(VARIANTS[name], offsets):
        values = {"skip_prk_steps": True, "prediction_type": prediction, "timestep_spacing": spacing}
        values = SD | values | {"steps_offset": steps_offset} | variant
        eta = values.pop("eta", 0.0)
        zero_snr = values.get("rescale_betas_zero_snr", False)
        if zero_snr and name == "ddim" and prediction == "epsilon":
            continue  # undefined at alpha-bar = 0; `test_bad_sampler` checks that it is refused
        config = SchedulerConfig.from_dict({"_class_name": CLASS_NAMES[name]} | values)
        scheduler = getattr(diffusers, CLASS_NAMES[name]).from_config(values)
        # One step from sigma = 4096: diffusers subtracts numbers of that size in float32, so it is off by 4096 * 2^-23.
        tolerance = 6e-4 if zero_snr and name.startswith("euler") and num_steps == 1 else 1e-4
        check_parity(monkeypatch, config, scheduler, name, num_steps, eta, tolerance)


@pytest.mark.parametrize("values", [{"prediction_type": "sample"}, {"beta_schedule": "squaredcos_cap_v2"}], ids=str)
@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_parity_of_rarer_configs(monkeypatch, name, values):
    diffusers = pytest.importorskip("diffusers")
    values = {"clip_sample": False, "timestep_spacing": "trailing"} | values
    config = SchedulerConfig.from_dict({"_class_name": CLASS_NAMES[name]} | values)
    check_parity(monkeypatch, config, getattr(diffusers, CLASS_NAMES[name]).from_config(values), name, 10)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "published", [SD_15, SD_21, SD_21 | {"_class_name": "PNDMScheduler"}], ids=["1.5", "2.1", "2.1p"]
)
def test_published_configs_with_every_sampler(monkeypatch, published, name):
    diffusers = pytest.importorskip("diffusers")
    original = getattr(diffusers, published["_class_name"]).from_config(published)
    scheduler = getattr(diffusers, CLASS_NAMES[name]).from_config(original.config)
    check_parity(monkeypatch, SchedulerConfig.from_dict(published), scheduler, name, 25)


@pytest.mark.parametrize("name", SAMPLERS)
def test_defaults_and_saved_files_are_those_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
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
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
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
    z, noise = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    t = jnp.full(SHAPE[0], level)
    x = add_noise(table, z, noise, t)
    outputs = {"epsilon": noise, "v_prediction": velocity(table, z, noise, t), "sample": z}
    for prediction_type, output in outputs.items():
        arguments = (prediction_type, x, output, table[level])
        np.testing.assert_allclose(predict_x0(*arguments), z, atol=2e-5)
        np.testing.assert_allclose(predict_epsilon(*arguments), noise, atol=2e-5)


def sd_sampler(name, num_steps=12):
    return make_sampler(SchedulerConfig.from_dict(SD_15), name, num_steps, eta=0.5 if name == "ddim" else 0.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_halves_equal_the_whole_and_the_loop(name):
    sampler = sd_sampler(name)
    num_steps = sampler.num_steps
    assert num_steps == (13 if name == "pndm" else 12)
    key, x = jax.random.key(1), scale_initial(sampler, jax.random.normal(jax.random.key(0), SHAPE))

    @functools.partial(jax.jit, static_argnames=("start", "stop"))
    def run(x, state, start, stop):
        return denoise(model, sampler, x, start=start, stop=stop, state=state, key=key)

    @jax.jit
    def one(x, state, i):
        noise = jax.random.normal(jax.random.fold_in(key, i), SHAPE)
        return step(sampler, state, model(scale_input(sampler, x, i), jnp.asarray(sampler.timesteps)[i]), i, x, noise)

    whole, state = run(x, None, 0, num_steps)
    for split in (1, 2, 6) if name == "pndm" else (6,):
        result, end_state = run(*run(x, None, 0, split), split, num_steps)
        np.testing.assert_allclose(result, whole, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(end_state.history, state.history, rtol=1e-6, atol=1e-6)
        assert end_state.count == state.count
    loop, loop_state = x, init_state(sampler, SHAPE)
    for i in range(num_steps):
        loop, loop_state = one(loop, loop_state, i)
    np.testing.assert_allclose(loop, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("start", [0, 1, 2, 7])
def test_a_restarted_solver_takes_a_first_order_step(name, start):
    config = SchedulerConfig.from_dict(SD_15)
    sampler = make_sampler(config, name, 12)
    vp = jax.random.normal(jax.random.key(0), SHAPE)
    noise = jnp.zeros((sampler.num_steps, *SHAPE))
    x = from_vp(sampler, vp, start)
    result, _ = denoise(model, sampler, x, start=start, stop=start + 1, noise=noise)
    if name == "pndm" and start == 1:
        np.testing.assert_array_equal(result, x)  # the correction of a step that this solver has not made
        return
    level, after, output = alpha_bar(sampler, start), alpha_bar(sampler, start + 1), model(vp, sampler.timesteps[start])
    x0, epsilon = predict_x0("epsilon", vp, output, level), predict_epsilon("epsilon", vp, output, level)
    spread = jnp.sqrt(1 - after)
    if name == "euler_ancestral":
        spread *= jnp.sqrt((1 / after - 1) / (1 / level - 1))  # sigma_down = sigma_to^2 / sigma_from
    expected = jnp.sqrt(after) * x0 + spread * epsilon  # DDIM
    np.testing.assert_allclose(to_vp(sampler, result, start + 1), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("name", "eta"), [(name, 0.0) for name in SAMPLERS] + [("ddim", 1.0)])
def test_gaussian_data_closed_form(name, eta):
    """For data N(0, c^2), whose exact model is linear, the result has standard deviation c."""
    c, config = 0.3, SchedulerConfig.from_dict(SD_15 | {"timestep_spacing": "trailing", "set_alpha_to_one": True})
    levels = jnp.asarray(alphas_cumprod(config), jnp.float32)

    def exact_model(x, t):
        level = jnp.interp(jnp.asarray(t, jnp.float32), jnp.arange(1000.0), levels)
        return jnp.sqrt(1 - level) * x / (level * c**2 + 1 - level)

    @jax.jit
    def std_of_result(sampler):
        # The sampler is linear here: each column carries one independent unit variable, the input or one step's noise.
        unit = jnp.eye(sampler.num_steps + 1)
        level = alpha_bar(sampler, 0)
        x = from_vp(sampler, unit[0] * jnp.sqrt(level * c**2 + 1 - level), 0)
        result, _ = denoise(exact_model, sampler, x, noise=unit[1:])
        return jnp.linalg.norm(result)

    # These numbers of steps divide 1000, so that the error is the solver's own, of first order in the step.
    coarse, fine = (
        abs(float(std_of_result(make_sampler(config, name, num_steps, eta))) / c - 1) for num_steps in (250, 500)
    )
    assert fine < 0.65 * coarse and fine < 0.035


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_levels(name):
    sampler = sd_sampler(name, 20)
    config = SchedulerConfig.from_dict(SD_15)
    levels = np.asarray([alpha_bar(sampler, i) for i in range(sampler.num_steps + 1)])
    if name not in ("euler", "euler_ancestral"):
        np.testing.assert_allclose(levels[:-1], alphas_cumprod(config)[sampler.timesteps], rtol=1e-5)
    assert np.all(np.diff(levels) >= 0)
    np.testing.assert_allclose(levels[-1], alphas_cumprod(config)[0] if name in ("ddim", "pndm") else 1.0, rtol=1e-6)
    x = jnp.ones(SHAPE)
    np.testing.assert_allclose(to_vp(sampler, from_vp(sampler, x, 3), 3), x, rtol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_jit_gradient_and_dtype(name):
    sampler, traces = sd_sampler(name, 5), []

    @jax.jit
    def run(sampler, x, key):
        traces.append(None)
        out, _ = denoise(lambda x, t: model(x, t).astype(jnp.bfloat16), sampler, x, key=key)
        return out

    x = jax.random.normal(jax.random.key(0), SHAPE)
    for seed in range(3):
        assert run(sampler, x, jax.random.key(seed)).dtype == jnp.float32
    run(sd_sampler(name, 5), x, jax.random.key(3))
    assert len(traces) == 1
    noise = jax.random.normal(jax.random.key(1), (sampler.num_steps, *SHAPE))
    gradient = jax.jit(jax.grad(lambda x: denoise(model, sampler, x, noise=noise)[0].sum()))(x)
    assert jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient != 0)
    vmapped = jax.jit(jax.vmap(lambda x, noise: denoise(model, sampler, x, noise=noise)[0], in_axes=(0, 1)))(x, noise)
    np.testing.assert_allclose(vmapped, denoise(model, sampler, x, noise=noise)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_for_every_number_of_steps(name):
    diffusers = pytest.importorskip("diffusers")
    for spacing in ("leading", "trailing", "linspace"):
        values = SD | {"timestep_spacing": spacing, "skip_prk_steps": True}
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


def test_bad_sampler():
    config = SchedulerConfig.from_dict(SD_15)
    zero_snr = dataclasses.replace(config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for match, arguments in {
        "sampler='heun'": (config, "heun", 10),
        "num_steps=0": (config, "ddim", 0),
        "num_steps=1001": (config, "ddim", 1001),
        "num_steps=1000": (config, "ddim", 1000),  # steps_offset 1 asks for timestep 1000
        "eta=0.5": (config, "euler", 10, 0.5),
        "eta=1.5": (config, "ddim", 10, 1.5),
        "skip_prk_steps=False": (dataclasses.replace(config, skip_prk_steps=False), "pndm", 10),
        "rescale_betas_zero_snr=True": (zero_snr, "pndm", 10),
        "prediction_type='epsilon'": (zero_snr, "ddim", 10),
        "prediction_type='sample'": (dataclasses.replace(config, prediction_type="sample"), "pndm", 10),
    }.items():
        with pytest.raises(ValueError, match=match):
            make_sampler(*arguments)


def test_bad_denoise_arguments():
    sampler, x = sd_sampler("euler_ancestral", 5), jnp.zeros(SHAPE)
    key, noise = jax.random.key(0), jnp.zeros((5, *SHAPE))
    for arguments in ({"start": 3, "stop": 2}, {"start": -1}, {"stop": 6}):
        with pytest.raises(ValueError, match="start"):
            denoise(model, sampler, x, key=key, **arguments)
    for arguments in ({}, {"key": key, "noise": noise}, {"noise": noise[:4]}):
        with pytest.raises(ValueError, match="noise"):
            denoise(model, sampler, x, **arguments)
    with pytest.raises(ValueError, match="noise"):
        step(sampler, init_state(sampler, SHAPE), x, 0, x)
    with pytest.raises(ValueError, match="state"):
        denoise(model, sampler, x, key=key, state=init_state(sd_sampler("pndm"), SHAPE))
