"""The last diffusers that had Flax models, in an environment of its own; see `make peer-flax`.

Run by that environment's Python, the file is a process that `eval.peers.lines` asks: for a call of the U-Net, or for an
image of the whole pipeline.
"""

import time
from functools import partial
from typing import Any

from eval.peers.lines import ROOT, Served, serve

PYTHON = ROOT / ".venv" / "flax-peer" / "bin" / "python"
UNET_SETTINGS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "use_linear_projection",
)
VAE_SETTINGS = (
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
)


def start(request: dict[str, Any], environ: dict[str, str] | None = None) -> Served:
    """The other process; RuntimeError if it cannot start."""
    return Served([str(PYTHON), "-m", "eval.peers.flax_diffusers"], request, environ)


def _constant(shapes, dtype):
    import jax
    import jax.numpy as jnp

    return jax.tree_util.tree_map(lambda x: jnp.full(x.shape, 0.01, dtype), shapes)


def _make(request: dict[str, Any]):
    import diffusers
    import flax
    import jax
    import jax.numpy as jnp

    diffusers.logging.set_verbosity_error()
    dtype, batch, length = getattr(jnp, request["dtype"]), request["batch"], request["length"]
    unet = diffusers.FlaxUNet2DConditionModel(**{k: request["unet"][k] for k in UNET_SETTINGS}, dtype=dtype)
    unet_params = _constant(jax.eval_shape(unet.init_weights, jax.random.PRNGKey(0)), dtype)
    versions = f"diffusers {diffusers.__version__}, flax {flax.__version__}, jax {jax.__version__}"
    about = {"versions": versions, "platform": jax.default_backend()}
    if "vae" not in request:
        side = request["unet"]["sample_size"]
        latents = jnp.ones((batch, request["unet"]["in_channels"], side, side), dtype)
        text = jnp.ones((batch, length, request["unet"]["cross_attention_dim"]), dtype)
        call = jax.jit(lambda params, *args: unet.apply({"params": params}, *args).sample)
        return about, lambda: jax.block_until_ready(call(unet_params, latents, jnp.full(batch, 500), text)), None
    from transformers import CLIPTextConfig, FlaxCLIPTextModel

    vae = diffusers.FlaxAutoencoderKL(**{k: request["vae"][k] for k in VAE_SETTINGS}, dtype=dtype)
    text = FlaxCLIPTextModel(CLIPTextConfig.from_dict(request["text_encoder"]), dtype=dtype, _do_init=False)
    scheduler = diffusers.FlaxDDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline = diffusers.FlaxStableDiffusionPipeline(vae, text, None, unet, scheduler, None, None, dtype=dtype)
    params = {
        "unet": unet_params,
        "vae": _constant(jax.eval_shape(vae.init_weights, jax.random.PRNGKey(0)), dtype),
        "text_encoder": _constant(text.params_shape_tree, dtype),
        "scheduler": scheduler.create_state(),
    }
    size = request["unet"]["sample_size"] * 2 ** (len(request["vae"]["block_out_channels"]) - 1)
    options = {"num_inference_steps": request["steps"], "height": size, "width": size}
    generate = jax.jit(partial(pipeline._generate, guidance_scale=request["guidance"], **options))
    ids, key = jnp.ones((batch, length), jnp.int32), jax.random.PRNGKey(0)
    started = time.perf_counter()
    compiled = generate.lower(ids, params, key, neg_prompt_ids=ids).compile()
    about["compile_s"] = time.perf_counter() - started

    def peak():
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    def image():
        return jax.block_until_ready(compiled(ids, params, key, neg_prompt_ids=ids))

    return about, image, None if jax.default_backend() == "cpu" else peak


if __name__ == "__main__":
    serve(_make)
