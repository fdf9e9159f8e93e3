"""Small computations with fixed keys for the stored outputs: fading laws, policies, samplers, latents, programs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from megjax import channel
from megjax.channel import FADINGS, RayleighFading, find_fading
from megjax.codec import SeedCodec, SeedCodecConfig, digital, fitting
from megjax.codec.coders import KLTCoder
from megjax.codec.linear import latent_statistics
from megjax.codec.network import Constant
from megjax.diffusion.pipeline import StableDiffusion
from megjax.diffusion.samplers import SAMPLERS, denoise, make_sampler, scale_initial
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.power import (
    POLICIES,
    PPO,
    Hyperparameters,
    LoadedPower,
    PowerControl,
    PPOConfig,
    Problem,
    make_policy,
    power_problem,
)
from megjax.precision import promoting
from megjax.registry import Registry
from megjax.system import AnalogLink, SystemConfig, Transmission, fit_image_codec, fit_seed_errors, make_simulator
from tests.contract.stored import Part, outputs

ARGUMENTS = {"rician": "6", "nakagami": "2", "jakes": "0.05", "gauss-markov": "0.9", "shadowed": "6"}
"""What follows the colon in the names of laws that need a number."""
PROMPTS = ["a red house, large, in the centre", "two green trees under a clear sky"]
NUM_BLOCKS = 16


def fading_gains(name: str) -> dict[str, np.ndarray]:
    """Eight gains of a law."""
    law = find_fading(f"{name}:{ARGUMENTS[name]}" if name in ARGUMENTS else name)
    return outputs(gains=jax.jit(lambda key: law.sample(key, 8))(jax.random.key(1)))


@jax.jit
def allocate(policy, gains, problems):
    """Power [n p t] of gains [n t] and problems [p]."""
    over_problems = jax.vmap(policy.allocate, (None, 0))
    return jax.vmap(over_problems, (0, None))(gains, problems)


def policy_power(name: str) -> dict[str, np.ndarray]:
    """Powers of three transmissions at 0 and 10 dB, with and without a peak, blocks weighted unequally."""
    policy = make_policy(name, RayleighFading(), NUM_BLOCKS)
    if policy is None:
        policy = LoadedPower(jnp.linspace(1.5, 0.5, NUM_BLOCKS))
    gains = np.random.default_rng(2).exponential(size=(3, NUM_BLOCKS)).astype(np.float32)
    weights = np.linspace(1.6, 0.4, NUM_BLOCKS)
    made = [
        power_problem(snr_db, NUM_BLOCKS, weights, max_power=peak) for snr_db in (0.0, 10.0) for peak in (np.inf, 2.0)
    ]
    return outputs(power=allocate(policy, gains, Problem(*map(jnp.stack, zip(*made, strict=True)))))


SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
V_PREDICTION = {"prediction_type": "v_prediction"}
VARIANTS = {
    "ddim": {"sample": {"prediction_type": "sample"}, "noisy": {"eta": 0.7}},
    "pndm": {"runge_kutta": {"skip_prk_steps": False}},
    "euler": {"karras": {"use_karras_sigmas": True}},
    "dpm++": {"karras": {"use_karras_sigmas": True}, "sample": {"prediction_type": "sample"}},
}
"""Settings of samplers beside the two usual prediction types."""


@jax.jit
def sample(sampler, noise, steps_noise):
    """Latents from noise by an analytic denoiser."""

    def model(x, t):
        return jnp.tanh(0.7 * x + 0.3 * jnp.asarray(t, jnp.float32) / 1000 - 0.1)

    return denoise(model, sampler, scale_initial(sampler, noise), noise=steps_noise)[0]


def sampled_latents(name: str) -> dict[str, np.ndarray]:
    """What a sampler makes of noise in five steps, by prediction type and setting."""
    found, rng = {}, np.random.default_rng(3)
    noise, steps_noise = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 2), (20, 2, 3, 2)))
    for variant, given in {"epsilon": {}, "v_prediction": V_PREDICTION, **VARIANTS.get(name, {})}.items():
        settings = dict(given)
        eta = settings.pop("eta", 0.0)
        sampler = make_sampler(SchedulerConfig(**SCHEDULE | {"skip_prk_steps": True} | settings), name, 5, eta)
        found[variant] = sample(sampler, noise, steps_noise[: sampler.num_steps])
    return outputs(**found)


@functools.cache
def transmitted() -> Transmission:
    """Seeds of two prompts by the model that ships, after three guided steps, over one realisation of the link."""
    pipe, codec = StableDiffusion.from_pretrained("scenes"), SeedCodec.from_pretrained("scenes")
    simulator = make_simulator(pipe, codec, "seed", config=SystemConfig(num_steps=3))
    return jax.jit(simulator)(jax.random.key(5), simulator.params, pipe.tokenize(PROMPTS), jnp.float32(5.0))


def server_latents() -> dict[str, np.ndarray]:
    """The server's first latent and image, the latter thinned out."""
    source = transmitted().source
    return outputs(latent=source.latents[0], image=source.images[0, ::8, ::8])


def received_image() -> dict[str, np.ndarray]:
    """What the device has of the first prompt, its image thinned out, and what the link was for both."""
    delivery = transmitted().delivery
    first = {"latent": delivery.latents[0, 0], "image": delivery.images[0, 0, ::8, ::8]}
    names = ("gains", "power", "energy", "num_symbols")
    return outputs(**first, **{name: getattr(delivery, name) for name in names})


def transmission(key):
    """Gains and squared errors of one transmission over four blocks."""
    gain_key, symbol_key, noise_key = jax.random.split(key, 3)
    gains, power = RayleighFading().sample(gain_key, 4), jnp.array([1.5, 1.0, 1.0, 0.5])
    symbols = channel.complex_normal(symbol_key, (4, 3))
    received = channel.transmit(noise_key, symbols, gains, power, 0.3)
    errors = channel.equalize_lmmse(received, gains, power, 0.3) - symbols
    return {"gains": gains, "error": jnp.square(errors.real) + jnp.square(errors.imag)}


def rollout_moments() -> dict[str, np.ndarray]:
    """Moments of 1,000 transmissions."""
    found = channel.rollout(jax.random.key(6), transmission, 1000, 256, progress=False)
    moments = {f"{name}_mean": value for name, value in found.mean.items()}
    return outputs(count=found.count, **moments, **{f"{name}_variance": x for name, x in found.variance.items()})


def codec_step() -> dict[str, np.ndarray]:
    """Loss and gradient at the start of a small codec's training, and its parameters after a step of Adam."""
    rng = np.random.default_rng(7)
    patterns = rng.normal(size=(12, 6, 4, 2))[rng.integers(12, size=300)]
    latents = (0.3 + patterns + 0.2 * rng.normal(size=patterns.shape)).astype(np.float32)
    config = SeedCodecConfig(
        latent_shape=(6, 4, 2), tile=(6, 4), width=16, hidden=16, decoder_blocks=1, snr_steps=3, rate_steps=3
    )
    network = fitting.initial_network(config, latents)
    graph, params, constants = nnx.split(network, nnx.Param, Constant)
    total = np.float32(latents.reshape(300, -1).var(0).sum())
    data = {"constants": constants, "total_variance": jnp.asarray(total), "latents": (jnp.asarray(latents),)}
    loss_of = fitting.codec_loss(graph, fitting.Conditions(groups=2, group_size=32, num_blocks=4))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, key):
        (loss, _), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, data, key)
        updates, _ = promoting(optimizer.update)(gradient, optimizer.init(params))
        after = optax.apply_updates(params, updates)
        return loss, optax.tree.norm(gradient), optax.tree.norm(after)

    loss, gradient_norm, norm = step(params, jax.random.key(8))
    load = network.spend(jnp.float32(0.0), jnp.int32(8))
    return outputs(loss=loss, gradient_norm=gradient_norm, norm=norm, load=load)


def ppo_update() -> dict[str, np.ndarray]:
    """Metrics and parameters of the second update of a small training; the first one only measures."""
    env = PowerControl(4)
    ppo = PPO(PPOConfig(num_envs=32, num_updates=3, minibatches=2, epochs=2, hidden=(8,)), env)
    params, update = env.make_params(), jax.jit(ppo.update)
    state = jax.jit(ppo.init)(jax.random.key(9), Hyperparameters())
    for _ in range(2):
        state, metrics = update(state, params)
    moments = {"obs_mean": state.moments.mean, "obs_var": state.moments.var}
    return outputs(norm=optax.tree.norm(state.params), **moments, **metrics)


def digital_seed() -> dict[str, np.ndarray]:
    """Tables of the digital seed of Gaussian latents, its best step, and a latent as decoded there."""
    latents = (np.random.default_rng(10).normal(size=(400, 2, 3, 2)) * np.linspace(2, 0.2, 12).reshape(2, 3, 2)) + 0.7
    statistics = latent_statistics(latents)
    tables = digital.fit_digital(statistics, latents, num_steps=12)
    capacities = jnp.linspace(0.0, 60.0, 30)
    step = jax.jit(digital.choose_step)(tables, capacities)
    decoded = jax.jit(digital.quantise)(tables, statistics, latents[0].astype(np.float32), step)
    expected = jax.jit(digital.expected_nmse)(tables, capacities)
    return outputs(
        steps=tables.steps[1:], bits=tables.bits, nmse=tables.nmse, step=step, decoded=decoded, expected_nmse=expected
    )


def image_codec() -> dict[str, np.ndarray]:
    """The coded image's choices at three SNRs, on four smooth pictures."""
    x, y, number, colour = np.meshgrid(np.arange(48), np.arange(48), np.arange(4), np.arange(3), indexing="ij")
    waves = np.sin(0.11 * (number + 1) * x + colour) * np.cos(0.17 * y + number * colour)
    pictures = np.moveaxis(0.5 + 0.45 * waves, 2, 0).astype(np.float32)
    table = fit_image_codec(jax.random.key(11), pictures, RayleighFading(), [0.0, 12.0, 25.0])
    return outputs(snr_db=table.snr_db, choice=table.choice, rate=table.rate, mean_image=table.mean_image[::8, ::8])


def seed_errors() -> dict[str, np.ndarray]:
    """How the error of a linear code depends on the errors of its blocks, at two SNRs."""
    latents = (np.random.default_rng(13).normal(size=(40, 2, 2, 2)) * np.linspace(2, 0.2, 8).reshape(2, 2, 2)) + 0.7
    scheme, link = KLTCoder(latent_statistics(latents), (2, 2, 2)), AnalogLink(4, 4, "ordered")
    sent = latents.astype(np.float32)
    found = fit_seed_errors(jax.random.key(12), scheme, link, sent, RayleighFading(), (0.0, 10.0))
    return outputs(**found._asdict())


SLOW = ("nakagami", "dp", "ppo", "rollout", "codec_step", "ppo_update", "image_codec", "seed_errors")
PROGRAMS = {
    "rollout": rollout_moments,
    "codec_step": codec_step,
    "ppo_update": ppo_update,
    "digital": digital_seed,
    "image_codec": image_codec,
    "seed_errors": seed_errors,
}


def registered(kind: str, registry: Registry, compute: Callable[[str], dict[str, np.ndarray]]) -> list[Part]:
    """The parts of a registry, each at its version; those that declare none are users' own."""
    return [
        Part(kind, part.name, functools.partial(compute, part.name), part.name in SLOW, str(part.version))
        for part in registry
        if part.version is not None
    ]


PARTS = (
    *registered("fading", FADINGS, fading_gains),
    *registered("policy", POLICIES, policy_power),
    *registered("sampler", SAMPLERS, sampled_latents),
    *(Part("program", name, compute, name in SLOW) for name, compute in PROGRAMS.items()),
    Part("latents", "server", server_latents, slow=True),
    Part("latents", "received", received_image, slow=True),
)
