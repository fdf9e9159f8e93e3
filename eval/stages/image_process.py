"""megjax's side of stage `image`: a whole image as one program, in a process that `eval.peers.lines` asks."""

import sys
import time
from typing import Any

from eval.peers.lines import Served, serve


def start(request: dict[str, Any], environ: dict[str, str] | None = None) -> Served:
    """The other process; RuntimeError if it cannot start."""
    return Served([sys.executable, "-m", "eval.stages.image_process"], request, environ)


def _make(request: dict[str, Any]):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from eval.aot_jobs import model_configs
    from eval.stages.diffusion import random_weights
    from megjax.diffusion import generation
    from megjax.diffusion.clip import CLIPTextModel
    from megjax.diffusion.layers import ShapeRngs
    from megjax.diffusion.samplers import make_sampler
    from megjax.diffusion.unet import UNet2DConditionModel
    from megjax.diffusion.vae import AutoencoderKL
    from megjax.runtime import enable_compilation_cache

    enable_compilation_cache()
    dtype, steps, batch = jnp.dtype(request["dtype"]), request["steps"], request["batch"]
    configs, length = model_configs(request["model"], dtype)
    networks = {
        "text_encoder": (CLIPTextModel, configs.text_encoder),
        "unet": (UNet2DConditionModel, configs.unet),
        "vae": (AutoencoderKL, configs.vae),
    }
    graphs, params = {}, {}
    for name, (build, config) in networks.items():
        graphs[name], shapes = nnx.split(nnx.eval_shape(lambda b=build, c=config: b(c, rngs=ShapeRngs())))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
        params[name] = jax.block_until_ready(random_weights(shapes))
    graphs = generation.Graphs(**graphs, scaling_factor=configs.vae.scaling_factor)
    sampler = make_sampler(configs.scheduler, "ddim", steps, 0.0)
    side = configs.unet.sample_size
    shape = (side, side, configs.unet.in_channels)

    @jax.jit
    def generate(params, key, ids, negative_ids):
        options = {"shape": shape, "negative_ids": negative_ids, "guidance_scale": request["guidance"]}
        latents = generation.generate_latents(graphs, params, sampler, key, ids, **options)
        return generation.decode(graphs, params, latents)

    args = (params, jax.random.key(0), *(jnp.ones((batch, length), jnp.int32),) * 2)
    started = time.perf_counter()
    lowered = generate.lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    about = {"trace_s": traced - started, "compile_s": time.perf_counter() - started}
    about["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes

    def peak():
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    def image():
        return jax.block_until_ready(compiled(*args))

    return about, image, None if jax.default_backend() == "cpu" else peak


if __name__ == "__main__":
    serve(_make)
