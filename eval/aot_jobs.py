"""The jobs that `eval.aot` compiles: each a jittable function and the shapes of its arguments, placed on a mesh."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from megjax.channel import RayleighFading
from megjax.codec import link
from megjax.codec.coders import LearnedCoder
from megjax.codec.fitting import Conditions, codec_loss
from megjax.codec.network import Constant, SeedCodecConfig, SeedNetwork
from megjax.configs import require
from megjax.cost import shapes_of
from megjax.diffusion import generation, layout
from megjax.diffusion.clip import CLIPTextConfig, CLIPTextModel
from megjax.diffusion.generation import Graphs
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.pipeline import Configs
from megjax.diffusion.samplers import make_sampler
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.schedules import alphas_cumprod
from megjax.diffusion.unet import UNet2DConditionModel, UNetConfig
from megjax.diffusion.vae import AutoencoderKL, VAEConfig
from megjax.ldm.stages import unet_loss
from megjax.power.ppo import PPO
from megjax.power.recipe import PowerRecipe
from megjax.sharding import fsdp_specs, tensor_shardings
from megjax.system import AnalogLink, send_latents
from megjax.tpu import TpuConfig
from megjax.training import FitConfig, data_parallel, init_state, make_step

REFERENCE_PIXELS = 512 * 512
"""Batches count images of this size; a model of smaller ones takes as many more as have the same pixels."""
NUM_LATENTS = 2_048
"""Latents of a device in the training data of `codec` and `ldm`."""
RATE, NUM_BLOCKS = 4.0, 16
_SPLIT = ("data", "fsdp", "tensor")
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclasses.dataclass(frozen=True)
class Program:
    """Function of a job and the shapes of its arguments; one call does `items` of `unit`, over all devices.

    `knob` names the setting that makes it smaller.
    """

    fn: Callable
    args: tuple
    items: int
    unit: str
    knob: str
    donate: tuple[int, ...] = ()
    mesh: Mesh | None = None
    """Set where the compiler divides the work; other programs say themselves what each device does."""

    def lower(self) -> jax.stages.Lowered:
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return jax.jit(self.fn, donate_argnums=self.donate).lower(*self.args)


def model_configs(name: str, dtype: Any) -> tuple[Configs, int]:
    """Configurations of a model and the longest prompt in tokens: Stable Diffusion 1.5 and 2.1, or the bundled one.

    The numbers are those of the published config.json files. ValueError for another name.
    """
    require(name in MODELS, "--model-config", name, f"one of {MODELS}")
    if name == "scenes":
        folder = layout.locate("scenes")
        text = CLIPTextConfig.from_dict(layout.component_config(folder, "text_encoder"), dtype)
        unet = UNetConfig.from_dict(layout.component_config(folder, "unet"), dtype)
        vae = VAEConfig.from_dict(layout.component_config(folder, "vae"), dtype)
        return Configs(text, unet, vae, layout.scheduler_config(folder)), text.max_position_embeddings
    second = name == "sd21"
    width, depth, heads = (1024, 23, 16) if second else (768, 12, 12)
    text = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        hidden_act="gelu" if second else "quick_gelu",
        dtype=dtype,
    )
    unet = UNetConfig(
        sample_size=96 if second else 64,
        cross_attention_dim=width,
        attention_head_dim=(5, 10, 20, 20) if second else 8,
        use_linear_projection=second,
        upcast_attention=second,
        dtype=dtype,
    )
    vae = VAEConfig(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=768 if second else 512,
        dtype=dtype,
    )
    target = "v_prediction" if second else "epsilon"
    schedule = SchedulerConfig(
        sampler="ddim", prediction_type=target, set_alpha_to_one=False, clip_sample=False, **_BETAS
    )
    return Configs(text, unet, vae, schedule), text.max_position_embeddings


MODELS = ("sd15", "sd21", "scenes")


class Jobs:
    """Programs of one TPU configuration and one model."""

    def __init__(self, config: TpuConfig, mesh: Mesh, model: str, num_steps: int = 25, guidance_scale: float = 7.5):
        self.config, self.mesh, self.dtype = config, mesh, jnp.dtype(config.dtype)
        self.configs, self.length = model_configs(model, self.dtype)
        self.num_steps, self.guidance_scale = num_steps, guidance_scale
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec(_SPLIT))
        side = self.configs.unet.sample_size
        self.latent_shape = (side, side, self.configs.unet.in_channels)
        pixels = (side * self.configs.vae.downsample) ** 2
        self.more = max(1, REFERENCE_PIXELS // pixels) / 2 ** math.ceil(max(0.0, math.log2(pixels / REFERENCE_PIXELS)))

    def make(self, job: str) -> Program:
        """The program of a job; ValueError for another name."""
        require(job in JOBS, "--job", job, f"one of {JOBS}")
        return getattr(self, job)()

    def generate(self) -> Program:
        """Token ids to images: text encoder, guided sampling, image decoder, each device its own images."""
        graphs, params = self._networks(("text_encoder", "unet", "vae"))
        sampler = make_sampler(self.configs.scheduler, self.configs.scheduler.sampler, self.num_steps, 0.0)

        def local(params, key, noise, ids, negative_ids):
            latents = generation.generate_latents(
                graphs,
                params,
                sampler,
                key,
                ids,
                shape=self.latent_shape,
                negative_ids=negative_ids,
                guidance_scale=self.guidance_scale,
                initial_noise=noise,
            )
            return generation.decode(graphs, params, latents, self._images("decode"))

        whole, split = PartitionSpec(), PartitionSpec(_SPLIT)
        specs = (whole, whole, split, split, split)
        spread = jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=split, check_vma=False)

        def generate(params, key, ids, negative_ids):
            keys, _ = generation.image_keys(key, len(ids))
            noise = jax.vmap(lambda k: jax.random.normal(k, self.latent_shape))(keys)
            return spread(params, key, jax.lax.with_sharding_constraint(noise, self.split), ids, negative_ids)

        count = self._count("generate")
        ids = jax.ShapeDtypeStruct((count, self.length), jnp.int32, sharding=self.split)
        return Program(generate, (params, self._key(), ids, ids), count, "images", "batch.generate")

    def latency(self) -> Program:
        """Token ids of one prompt to its image, by all devices together: layers split over "tensor"."""
        graphs, params = self._networks(("text_encoder", "unet", "vae"))
        specs = tensor_shardings(self.mesh, params)
        params = jax.tree.map(shapes_of, params, specs)
        sampler = make_sampler(self.configs.scheduler, self.configs.scheduler.sampler, self.num_steps, 0.0)

        def generate(params, key, ids, negative_ids):
            latents = generation.generate_latents(
                graphs,
                params,
                sampler,
                key,
                ids,
                shape=self.latent_shape,
                negative_ids=negative_ids,
                guidance_scale=self.guidance_scale,
            )
            return generation.decode(graphs, params, latents)

        ids = jax.ShapeDtypeStruct((1, self.length), jnp.int32, sharding=self.everywhere)
        return Program(generate, (params, self._key(), ids, ids), 1, "image", "--latency-mesh", mesh=self.mesh)

    def sweep(self) -> Program:
        """Latents over the link to images: codec, Rayleigh fading, LMMSE, codec, image decoder."""
        graphs, params = self._networks(("vae",))
        network = self._codec_network()
        graph, state = nnx.split(network)
        num_symbols = link.symbols_at_rate(RATE, network.config.num_values)

        def local(params, state, keys, latents, snr_db):
            coder, way = LearnedCoder(graph, state), AnalogLink(num_symbols, NUM_BLOCKS)
            received, block_snr = send_latents(way, coder, keys, latents, snr_db, RayleighFading())
            return generation.decode(graphs, params, received, self._images("decode")), block_snr

        whole, split = PartitionSpec(), PartitionSpec(_SPLIT)
        specs = (whole, whole, split, split, whole)
        fn = jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=split, check_vma=False)
        count = self._count("sweep")
        keys = jax.ShapeDtypeStruct((count,), self._key().dtype, sharding=self.split)
        latents = jax.ShapeDtypeStruct((count, *self.latent_shape), jnp.float32, sharding=self.split)
        snr_db = jax.ShapeDtypeStruct((), jnp.float32, sharding=self.everywhere)
        args = (params, shapes_of(state, self.everywhere), keys, latents, snr_db)
        return Program(fn, args, count, "received images", "batch.sweep")

    def codec(self) -> Program:
        """One step of codec training, each device its own groups of latents."""
        graph, params, constants = nnx.split(self._codec_network(), nnx.Param, Constant)
        conditions = Conditions(groups=self.config.batch.codec, num_blocks=NUM_BLOCKS)
        latents = jax.ShapeDtypeStruct((NUM_LATENTS * self.mesh.size, math.prod(self.latent_shape)), jnp.float32)
        data = {
            "constants": shapes_of(constants, self.everywhere),
            "total_variance": jax.ShapeDtypeStruct((), jnp.float32, sharding=self.everywhere),
            "latents": (shapes_of(latents, self.split),),
        }
        specs = {"constants": PartitionSpec(), "total_variance": PartitionSpec(), "latents": PartitionSpec(_SPLIT)}
        loss = data_parallel(codec_loss(graph, conditions), self.mesh.size, self.mesh, data_specs=specs)
        count = self.mesh.size * conditions.groups * conditions.group_size
        return self._training(loss, params, data, count, "latents", "batch.codec")

    def ldm(self) -> Program:
        """One step of training text encoder and U-Net, each device its own images, parameters split over fsdp."""
        graphs, params = self._networks(("text_encoder", "unet"), jnp.float32)
        params = (params["text_encoder"], params["unet"])
        specs = fsdp_specs(params, self.mesh.shape["fsdp"])
        total = NUM_LATENTS * self.mesh.size
        moment = jax.ShapeDtypeStruct((total, math.prod(self.latent_shape)), jnp.float32, sharding=self.split)
        ids = jax.ShapeDtypeStruct((total, 1, self.length), jnp.int16, sharding=self.split)
        data = {"mean": moment, "log_variance": moment, "ids": ids}
        count = self._count("ldm")
        loss = unet_loss(
            (graphs.text_encoder, graphs.unet),
            alphas_cumprod(self.configs.scheduler),
            graphs.scaling_factor,
            self.latent_shape,
            count // self.mesh.size,
            jnp.zeros(self.length, jnp.int32),
        )
        split = {"param_specs": specs, "data_specs": PartitionSpec(_SPLIT)}
        loss = data_parallel(loss, self.mesh.size, self.mesh, **split)
        return self._training(loss, params, data, count, "images", "batch.ldm")

    def power(self) -> Program:
        """One PPO update of independent agents, each device its own."""
        recipe = PowerRecipe()
        env, env_params = recipe.environment()
        ppo, count = PPO(recipe.ppo, env), self.config.batch.power * self.mesh.size
        keys = jax.ShapeDtypeStruct((count,), self._key().dtype)
        states = shapes_of(jax.eval_shape(jax.vmap(ppo.init), keys), self.split)
        whole, split = PartitionSpec(), PartitionSpec(_SPLIT)
        fn = jax.shard_map(
            jax.vmap(ppo.update, (0, None)), mesh=self.mesh, in_specs=(split, whole), out_specs=split, check_vma=False
        )
        blocks = count * recipe.ppo.num_envs * recipe.num_blocks
        args = (states, shapes_of(env_params, self.everywhere))
        return Program(fn, args, blocks, "environment steps", "batch.power", donate=(0,))

    def _training(self, loss, params: PyTree, data: PyTree, count: int, unit: str, knob: str) -> Program:
        fit = FitConfig()
        state = jax.eval_shape(lambda p: init_state(fit, p), params)
        # Averages and optimiser moments have the shapes of the parameters, hence their splits.
        specs = fsdp_specs(state, self.mesh.shape["fsdp"] if unit == "images" else 1)
        placed = jax.tree.map(lambda x, spec: shapes_of(x, NamedSharding(self.mesh, spec)), state, specs)
        return Program(make_step(fit, loss), (placed, data, self._key()), count, unit, knob, donate=(0,))

    def _networks(self, names: tuple[str, ...], dtype: Any = None) -> tuple[Graphs, dict[str, PyTree]]:
        """Static halves of the networks, and the shapes of their parameters as `dtype` (default: the config's)."""
        builders = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
        dtype, graphs, params = self.dtype if dtype is None else dtype, {}, {}
        for name, build in builders.items():
            config = getattr(self.configs, name)
            graphs[name], shapes = nnx.split(nnx.eval_shape(lambda b=build, c=config: b(c, rngs=ShapeRngs())))
            if name in names:
                params[name] = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=self.everywhere), shapes
                )
        return Graphs(**graphs, scaling_factor=self.configs.vae.scaling_factor), params

    def _codec_network(self) -> SeedNetwork:
        config = SeedCodecConfig(latent_shape=self.latent_shape, width=448, hidden=448, dtype=self.dtype)
        return nnx.eval_shape(lambda: SeedNetwork(config, nnx.Rngs(0)))

    def _count(self, job: str) -> int:
        """Images of one call over all devices."""
        return self._images(job) * self.mesh.size

    def _images(self, job: str) -> int:
        """Images of a device that the file's batch stands for."""
        return max(1, int(getattr(self.config.batch, job) * self.more))

    def _key(self) -> jax.ShapeDtypeStruct:
        return shapes_of(jax.eval_shape(lambda: jax.random.key(0)), self.everywhere)


JOBS = ("generate", "latency", "sweep", "codec", "power", "ldm")
