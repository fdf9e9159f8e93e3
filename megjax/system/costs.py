"""What one image costs under a scheme: symbols, airtime, transmit energy, work at both ends, and latency."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from megjax.configs import require
from megjax.cost import cost_of, nominal_flops
from megjax.diffusion import generation
from megjax.keys import from_seed
from megjax.pytrees import value_of
from megjax.system.protocol import Source
from megjax.system.simulator import Simulator


@dataclasses.dataclass(frozen=True)
class Resources:
    """Bandwidth, transmit power and speeds that turn counts into seconds and joules.

    `bandwidth_hz` carries as many symbols a second (Nyquist, no excess bandwidth). `transmit_power_w` is the power of
    a symbol at P = 1. Speeds are sustained operations per second, a multiply-add being two.
    """

    bandwidth_hz: float = 1e6
    transmit_power_w: float = 0.1
    server_flops_per_s: float = 100e12
    device_flops_per_s: float = 1e12

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(0 < value < math.inf, field.name, value, "positive and finite")


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations for one image, by stage, as XLA counts them in the compiled stages."""

    text: float
    """Text encoder, prompt and negative prompt."""
    step: float
    """One denoising step, both halves of the guidance."""
    image: float
    """The VAE's decoder."""
    code: float
    """Seed coding."""
    decode: float
    """Seed decoding."""


@dataclasses.dataclass(frozen=True)
class SchemeCost:
    """The costs of one image; `bandwidth_ratio` is complex symbols per real number of the image, K / (3 H W)."""

    num_symbols: float
    bandwidth_ratio: float
    airtime_s: float
    energy_j: float
    server_flops: float
    device_flops: float
    server_s: float
    device_s: float

    @property
    def latency_s(self) -> float:
        """Server, airtime and device one after the other; propagation and queues left out."""
        return self.server_s + self.airtime_s + self.device_s


def measure_work(simulator: Simulator, ids: Array | np.ndarray, known: Work | None = None) -> Work:
    """Operations of the stages of a simulator for one image, each counted by XLA alone; of the networks as defined.

    `ids` [b l] are token ids of any prompt. All but seed coding and decoding is taken from `known` if given: the work
    of another scheme of the same pipeline and guidance. The host's image codec is not counted. Raises ValueError if the
    backend has no cost analysis.
    """
    graphs, params, link = simulator.graphs, simulator.params, simulator.link
    one = jax.ShapeDtypeStruct((1, ids.shape[1]), jnp.int32)
    latent = jax.ShapeDtypeStruct((1, *simulator.latent_shape), jnp.float32)
    level = jax.ShapeDtypeStruct((), jnp.float32)

    def text(params, ids):
        return generation.prompt_features(graphs, params, ids, ids if simulator.guided else None)

    features = jax.eval_shape(text, params, one)

    def step(params, x, features):
        return generation.denoiser_for(graphs, params, *features, 3.0)(x, jnp.zeros((), jnp.int32))

    def image(params, z):
        return generation.decode(graphs, params, z)

    def code(params, latents, images, snr_db):
        source = Source(latents, images, latents)
        return link.code(value_of(params["codec"]), source, snr_db, simulator.energy)

    pixels = jax.eval_shape(image, params, latent)
    coded = jax.eval_shape(code, params, latent, pixels, level)
    payload = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), coded.payload)
    blocks = link.num_blocks

    def receive(params, payload, shared, gains, power, noise_var):
        return link.transmit(value_of(params["codec"]), from_seed(0), payload, shared, gains, power, noise_var)

    gains = jax.ShapeDtypeStruct((blocks,), jnp.complex64), jax.ShapeDtypeStruct((blocks,), jnp.float32), level
    received = jax.eval_shape(receive, params, payload, coded.shared, *gains)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), received)

    def decode(params, received, shared):
        return link.decode(value_of(params["codec"]), received, shared)

    common = (
        (
            nominal_flops(*_of_leaves(text, params, one)),
            nominal_flops(*_of_leaves(step, params, latent, features)),
            nominal_flops(*_of_leaves(image, params, latent)),
        )
        if known is None
        else (known.text, known.step, known.image)
    )
    return Work(
        *common,
        cost_of(*_of_leaves(code, params, latent, pixels, level)).flops,
        cost_of(*_of_leaves(decode, params, batch, coded.shared)).flops,
    )


def _of_leaves(stage: Callable, *args: PyTree) -> tuple[Any, ...]:
    """A stage as a function of leaves, which need not fit the classes of their trees, and the leaves."""
    leaves, tree = jax.tree.flatten(args)
    return lambda *flat: stage(*jax.tree.unflatten(tree, flat)), *leaves


def scheme_cost(
    simulator: Simulator,
    work: Work,
    resources: Resources | None = None,
    num_symbols: float | None = None,
) -> SchemeCost:
    """Costs of one image under a simulator's scheme.

    `num_symbols` is the mean K where it depends on the image (coded pixels). The server encodes the text and takes its
    steps, and finishes the image if pixels are sent; the device decodes, and finishes the image if latents are. A
    device that denoises also encodes the text. Where nothing is sent the server does nothing. Raises ValueError
    without a K.
    """
    resources = Resources() if resources is None else resources
    count = num_symbols if simulator.link.num_symbols is None else simulator.link.num_symbols
    require(count is not None and count >= 0, "num_symbols", count, "given for images coded by the host")
    steps = simulator.sampler.num_steps if simulator.server_steps is None else simulator.server_steps
    pixels, denoises = simulator.link.result == "images", simulator.link.result == "noisy"
    server = work.text + steps * work.step + work.code + pixels * work.image if count else 0.0
    device = work.decode + (not pixels) * work.image + denoises * (work.text + simulator.device_steps * work.step)
    power = 1.0 if simulator.energy is None or not count else simulator.energy / count
    airtime = count / resources.bandwidth_hz
    image_size = math.prod(simulator.latent_shape[:2]) * _downsample(simulator) ** 2
    return SchemeCost(
        float(count),
        float(count / (3 * image_size)),
        airtime,
        resources.transmit_power_w * power * airtime,
        server,
        device,
        server / resources.server_flops_per_s,
        device / resources.device_flops_per_s,
    )


def _downsample(simulator: Simulator) -> int:
    """Pixels per latent pixel."""
    shape = jax.ShapeDtypeStruct((1, *simulator.latent_shape), jnp.float32)
    image = jax.eval_shape(lambda p, z: generation.decode(simulator.graphs, p, z), simulator.params, shape)
    return image.shape[1] // simulator.latent_shape[0]
