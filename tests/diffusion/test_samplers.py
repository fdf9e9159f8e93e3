"""Samplers against PyTorch diffusers, closed forms, and their own split runs."""

import dataclasses
import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from megjax.diffusion.samplers import (
    SAMPLERS,
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
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.schedules import alphas_cumprod, predict_epsilon, predict_x0
from tests.diffusion.conftest import COMPARED
from tests.diffusion.published import SD_15, SD_21

pytestmark = [
    pytest.mark.usefixtures("fast_compile"),
    # diffusers makes NumPy arrays of tensors.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SHAPE = (2, 3, 4)
LONGEST = 59  # model calls of PNDM for 50 steps, with Runge-Kutta steps
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}

PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
NUM_STEPS = (1, 7, 10, 25, 50)
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
    "pndm": [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}, LINEAR, {"skip_prk_steps": False}],
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


def lengthened(sampler, noise, num_steps=LONGEST):
    """A sampler and its noise with steps at the end that change nothing, so that one program serves any number of them.

    PNDM's second call repeats its first step, so it must be one of its own.
    """

    def extended(table, row=None):
        rows = np.broadcast_to(table[-1] if row is None else row, (num_steps - sampler.num_steps, *table.shape[1:]))
        return np.concatenate([table, rows.astype(table.dtype)])

    tables = {
        "timesteps": extended(sampler.timesteps),
        "alpha_bars": extended(sampler.alpha_bars),
        "x0_weights": extended(sampler.x0_weights, (0, 0)),
        "epsilon_weights": extended(sampler.epsilon_weights, (1, 0)),
        "output_weights": extended(sampler.output_weights, (0, 1, 0, 0)),
    }
    if sampler.name == "pndm":
        added = ((0, 0), (0, num_steps - sampler.num_steps), (0, 0))
        tables["extra"] = {"start_weights": np.pad(sampler.extra["start_weights"], added)}
    return dataclasses.replace(sampler, num_steps=num_steps, **tables), extended(noise)


def run_diffusers(monkeypatch, scheduler, num_steps, x, noise, eta=0.0, start=0):
    """Result from the input `x` of step `start`, scaled there if it is the first, and all timesteps."""
    scheduler.set_timesteps(num_steps)
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)  # as diffusers' image-to-image pipeline does
    x, draws = torch.tensor(x) * (1 if start else scheduler.init_noise_sigma), iter(torch.tensor(noise)[start:])
    kwargs = {}
    if "Ancestral" in type(scheduler).__name__:
        monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, **__: next(draws))
    for t in scheduler.timesteps[start:]:
        output = torch.tanh(0.7 * scheduler.scale_model_input(x, t) + 0.3 * t.float() / 1000 - 0.1)
        if "DDIM" in type(scheduler).__name__:
            kwargs = {"eta": eta, "variance_noise": next(draws) if eta else None}
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
    if sampler.num_steps > 1:
        sampler, noise = lengthened(sampler, noise)
    error = np.abs(np.asarray(run_ours(sampler, x, noise)) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, (config, num_steps, eta, error)


def settings(name):
    """All combinations that are read: (number of the variant, prediction type, spacing, offset, number of steps)."""
    rows = itertools.product(range(len(VARIANTS[name])), PREDICTIONS, SPACINGS, (0, 1), NUM_STEPS)
    for variant, prediction, spacing, offset, num_steps in rows:
        zero_snr = "rescale_betas_zero_snr" in VARIANTS[name][variant]
        # That is undefined at alpha-bar = 0; `test_bad_sampler` checks that it is refused.
        undefined = zero_snr and name == "ddim" and prediction == "epsilon"
        undefined |= "skip_prk_steps" in VARIANTS[name][variant] and num_steps < 4  # refused as well
        # Only one spacing reads the offset.
        if not undefined and (spacing == "leading" or offset or num_steps == 7):
            yield variant, prediction, spacing, offset, num_steps


def pairwise(rows):
    """A few of the rows, in which any two values meet that do so in one of them all."""
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs.values())
    while missing:
        row = max(pairs, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[row]
        yield row


def check_settings(monkeypatch, name, rows):
    for variant, prediction, spacing, offset, num_steps in rows:
        values = {"skip_prk_steps": True, "prediction_type": prediction, "timestep_spacing": spacing}
        values = SD | values | {"steps_offset": offset} | VARIANTS[name][variant]
        eta = values.pop("eta", 0.0)
        config = SchedulerConfig.from_dict({"_class_name": SAMPLERS.find(name).class_name} | values)
        scheduler = getattr(diffusers, SAMPLERS.find(name).class_name).from_config(values)
        # One step from sigma = 4096: diffusers subtracts numbers of that size in float32, so it is off by 4096 * 2^-23.
        large = values.get("rescale_betas_zero_snr", False) and name.startswith("euler") and num_steps == 1
        check_parity(monkeypatch, config, scheduler, name, num_steps, eta, 6e-4 if large else 1e-4)


@pytest.mark.parametrize("name", COMPARED)
def test_parity_with_diffusers(monkeypatch, name):
    check_settings(monkeypatch, name, pairwise(settings(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_parity_with_diffusers_in_all_settings(monkeypatch, name):
    check_settings(monkeypatch, name, settings(name))


@pytest.mark.parametrize("values", [{"prediction_type": "sample"}, {"beta_schedule": "squaredcos_cap_v2"}], ids=str)
@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_parity_of_rarer_configs(monkeypatch, name, values):
    values = {"clip_sample": False, "timestep_spacing": "trailing"} | values
    config = SchedulerConfig.from_dict({"_class_name": SAMPLERS.find(name).class_name} | values)
    check_parity(monkeypatch, config, getattr(diffusers, SAMPLERS.find(name).class_name).from_config(values), name, 10)


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize(
    "published", [SD_15, SD_21, SD_21 | {"_class_name": "PNDMScheduler"}], ids=["1.5", "2.1", "2.1p"]
)
def test_published_configs_with_every_sampler(monkeypatch, published, name):
    original = getattr(diffusers, published["_class_name"]).from_config(published)
    scheduler = getattr(diffusers, SAMPLERS.find(name).class_name).from_config(original.config)
    check_parity(monkeypatch, SchedulerConfig.from_dict(published), scheduler, name, 25)


@pytest.mark.parametrize(("name", "skip_prk_steps"), [(name, True) for name in COMPARED] + [("pndm", False)])
def test_a_late_start_matches_image_to_image_of_diffusers(monkeypatch, name, skip_prk_steps):
    """PNDM repeats its second step wherever it starts, and takes its Runge-Kutta steps from the first timesteps."""
    values, num_steps = SD_15 | {"skip_prk_steps": skip_prk_steps}, 9
    sampler = make_sampler(SchedulerConfig.from_dict(values), name, num_steps)
    scheduler = getattr(diffusers, SAMPLERS.find(name).class_name).from_config(values)
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    noise = np.random.default_rng(1).standard_normal((sampler.num_steps, *SHAPE), np.float32)
    start = 3
    given = np.array(from_vp(sampler, jnp.asarray(x), start))
    found = jax.jit(lambda x, noise: denoise(model, sampler, x, start=start, noise=noise)[0])(given, noise)
    expected, _ = run_diffusers(monkeypatch, scheduler, num_steps, given, noise, start=start)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def sd_sampler(name, num_steps=12):
    return make_sampler(SchedulerConfig.from_dict(SD_15), name, num_steps, eta=0.5 if name == "ddim" else 0.0)


@pytest.mark.parametrize("name", COMPARED)
def test_two_halves_equal_the_whole_and_the_loop(name):
    sampler = sd_sampler(name)
    num_steps = sampler.num_steps
    assert num_steps == (13 if name == "pndm" else 12)
    key, x = jax.random.key(1), scale_initial(sampler, jax.random.normal(jax.random.key(0), SHAPE))

    def one(i, carry):
        x, state = carry
        noise = jax.random.normal(jax.random.fold_in(key, i), SHAPE)
        return step(sampler, state, model(scale_input(sampler, x, i), jnp.asarray(sampler.timesteps)[i]), i, x, noise)

    @jax.jit
    def run(x, key):
        halves = []
        for split in (1, 2, 6) if name == "pndm" else (6,):
            part, state = denoise(model, sampler, x, stop=split, key=key)
            halves.append(denoise(model, sampler, part, start=split, state=state, key=key))
        loop, _ = jax.lax.fori_loop(0, num_steps, one, (x, init_state(sampler, SHAPE)))
        return denoise(model, sampler, x, key=key), halves, loop

    (whole, state), halves, loop = run(x, key)
    for result, end_state in halves:
        np.testing.assert_allclose(result, whole, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(end_state.history, state.history, rtol=1e-6, atol=1e-6)
        assert end_state.count == state.count
    np.testing.assert_allclose(loop, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", COMPARED)
def test_a_restarted_solver_takes_a_first_order_step(name):
    sampler = make_sampler(SchedulerConfig.from_dict(SD_15), name, 12)
    noise = jnp.zeros((sampler.num_steps, *SHAPE))

    @jax.jit
    def run(vp, start, end):
        """Input of the step, its output, that in variance-preserving scale, and DDIM's output at the level of `end`."""
        x = from_vp(sampler, vp, start)
        result, _ = step(sampler, init_state(sampler, SHAPE), output(vp, start), start, x, noise[0])
        level, after = alpha_bar(sampler, start), alpha_bar(sampler, end)
        x0, epsilon = (fn("epsilon", vp, output(vp, start), level) for fn in (predict_x0, predict_epsilon))
        spread = jnp.sqrt(1 - after)
        if name == "euler_ancestral":
            spread *= jnp.sqrt((1 / after - 1) / (1 / level - 1))  # sigma_down = sigma_to^2 / sigma_from
        return x, result, to_vp(sampler, result, end), jnp.sqrt(after) * x0 + spread * epsilon

    def output(vp, start):
        return model(vp, jnp.asarray(sampler.timesteps)[start])

    vp = jax.random.normal(jax.random.key(0), SHAPE)
    for start in (0, 1, 2, 7):
        # PNDM's step 1, at the same timestep as step 2, is then a whole step.
        x, result, found, expected = run(vp, start, start + 1 + (name == "pndm" and start == 1))
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    again, _ = jax.jit(lambda x: denoise(model, sampler, x, start=7, stop=8, noise=noise))(x)
    np.testing.assert_allclose(again, result, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "eta"), [(name, 0.0) for name in COMPARED] + [("ddim", 1.0)])
def test_gaussian_data_closed_form(name, eta):
    """For data N(0, c^2), whose exact model is linear, the result has standard deviation c."""
    c, config = 0.3, SchedulerConfig.from_dict(SD_15 | {"timestep_spacing": "trailing", "set_alpha_to_one": True})
    levels = jnp.asarray(alphas_cumprod(config), jnp.float32)

    def exact_model(x, t):
        level = jnp.interp(jnp.asarray(t, jnp.float32), jnp.arange(1000.0), levels)
        return jnp.sqrt(1 - level) * x / (level * c**2 + 1 - level)

    @jax.jit
    def std_of_result(sampler, noise):
        # The sampler is linear here: each column carries one independent unit variable, the input or one step's noise.
        level = alpha_bar(sampler, 0)
        x = from_vp(sampler, unit[0] * jnp.sqrt(level * c**2 + 1 - level), 0)
        result, _ = denoise(exact_model, sampler, x, noise=noise)
        return jnp.linalg.norm(result)

    # These numbers of steps divide 1000, so that the error is the solver's own, of first order in the step.
    unit = np.eye(1 + 501, dtype=np.float32)
    samplers = [make_sampler(config, name, num_steps, eta) for num_steps in (250, 500)]
    runs = [lengthened(sampler, unit[1 : 1 + sampler.num_steps], 501) for sampler in samplers]
    coarse, fine = (abs(float(std_of_result(*run)) / c - 1) for run in runs)
    assert fine < 0.65 * coarse and fine < 0.035


@pytest.mark.parametrize("name", COMPARED)
def test_noise_levels(name):
    sampler = sd_sampler(name, 20)
    config = SchedulerConfig.from_dict(SD_15)
    levels = np.asarray(jax.vmap(lambda i: alpha_bar(sampler, i))(jnp.arange(sampler.num_steps + 1)))
    if name not in ("euler", "euler_ancestral"):
        np.testing.assert_allclose(levels[:-1], alphas_cumprod(config)[sampler.timesteps], rtol=1e-5)
    assert np.all(np.diff(levels) >= 0)
    np.testing.assert_allclose(levels[-1], alphas_cumprod(config)[0] if name in ("ddim", "pndm") else 1.0, rtol=1e-6)
    x = jnp.ones(SHAPE)
    np.testing.assert_allclose(to_vp(sampler, from_vp(sampler, x, 3), 3), x, rtol=1e-6)


@pytest.mark.parametrize("name", COMPARED)
def test_jit_gradient_and_dtype(name):
    traces = []

    @jax.jit
    def run(sampler, x, noise, key):
        traces.append(None)

        def result(x, noise):
            return denoise(model, sampler, x, noise=noise)[0]

        half, _ = denoise(lambda x, t: model(x, t).astype(jnp.bfloat16), sampler, x, key=key)
        gradient = jax.grad(lambda x: result(x, noise).sum())(x)
        return half, gradient, jax.vmap(result, (0, 1))(x, noise), result(x, noise)

    x, *noise = np.random.default_rng(0).standard_normal((7, *SHAPE), np.float32)
    for seed in range(3):
        sampler = sd_sampler(name, 5)
        draws = np.stack(noise[: sampler.num_steps])
        half, gradient, vmapped, together = run(sampler, x, draws, jax.random.key(seed))
    assert len(traces) == 1
    assert half.dtype == jnp.float32
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)
    np.testing.assert_allclose(vmapped, together, rtol=1e-6, atol=1e-6)


def test_bad_sampler():
    config = SchedulerConfig.from_dict(SD_15)
    zero_snr = dataclasses.replace(config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for match, arguments in {
        "sampler='unipc'": (config, "unipc", 10),
        "num_steps=0": (config, "ddim", 0),
        "num_steps=1001": (config, "ddim", 1001),
        "num_steps=1000": (config, "ddim", 1000),  # steps_offset 1 asks for timestep 1000
        "eta=0.5": (config, "euler", 10, 0.5),
        "eta=1.5": (config, "ddim", 10, 1.5),
        "num_steps=3": (dataclasses.replace(config, skip_prk_steps=False), "pndm", 3),  # three of Runge-Kutta, one more
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
