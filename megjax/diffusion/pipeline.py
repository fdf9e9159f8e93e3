"""StableDiffusion: a text-to-image model in the diffusers folder layout, and what a user does with it."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped, UInt32

from megjax.configs import is_integer, require, require_count, require_number, require_type, write_json
from megjax.diffusion import checkpoint, generation, layout
from megjax.diffusion.clip import CLIPTextConfig
from megjax.diffusion.generation import Graphs
from megjax.diffusion.samplers import SAMPLERS, Sampler, make_sampler
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.tokenization import load_tokenizer, save_tokenizer, tokenize
from megjax.diffusion.unet import UNetConfig
from megjax.diffusion.vae import VAEConfig
from megjax.keys import as_key


@dataclasses.dataclass(frozen=True)
class Configs:
    """Configurations of the three networks and of the noise schedule."""

    text_encoder: CLIPTextConfig
    unet: UNetConfig
    vae: VAEConfig
    scheduler: SchedulerConfig

    def __post_init__(self):
        text, cross = self.text_encoder.hidden_size, self.unet.cross_attention_dim
        require(text == cross, "text encoder's hidden_size", text, f"the U-Net's cross_attention_dim, {cross}")
        latent, inputs = self.vae.latent_channels, self.unet.in_channels
        require(latent == inputs, "VAE's latent_channels", latent, f"the U-Net's in_channels, {inputs}")
        require(
            self.unet.out_channels == inputs, "unet: out_channels", self.unet.out_channels, f"in_channels, {inputs}"
        )


class StableDiffusion:
    """A Stable Diffusion 1.x or 2.x model: parameters, and jitted methods that never retrace for shapes seen before.

    `params` (a dict of `text_encoder`, `unet`, `vae`) and `graphs` feed the pure functions of `generation`; `configs`
    and `tokenizer` are plain data.
    """

    def __init__(self, configs: Configs, graphs: Graphs, params: dict[str, Any], tokenizer):
        limit = configs.text_encoder.max_position_embeddings
        length = tokenizer.model_max_length
        require(length <= limit, "tokenizer's model_max_length", length, f"at most {limit} (max_position_embeddings)")
        words, table = len(tokenizer), configs.text_encoder.vocab_size
        require(words <= table, "number of the tokenizer's tokens", words, f"at most {table} (vocab_size)")
        self.configs, self.graphs, self.params, self.tokenizer = configs, graphs, params, tokenizer
        static = ("shape", "clip_skip", "guidance_interval")
        self._latents = jax.jit(functools.partial(generation.generate_latents, graphs), static_argnames=static)
        self._decode = jax.jit(functools.partial(generation.decode, graphs), static_argnames="batch_size")
        self._encode = jax.jit(functools.partial(generation.encode, graphs), static_argnames="batch_size")
        self._image = jax.jit(self._generate, static_argnames=(*static, "decode_batch"))
        self._sampler = functools.cache(lambda *spec: make_sampler(configs.scheduler, *spec))

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        dtype=jnp.float32,
        *,
        param_dtype=jnp.float32,
        variant: str | None = None,
    ) -> "StableDiffusion":
        """Load "scenes" (bundled), a local folder in the diffusers layout, or a model of the Hugging Face hub.

        Args:
          dtype: of activations, float32, bfloat16 or float16 (the VAE then stays in float32 if it asks so).
            Products of float32 are as exact as `jax.default_matmul_precision` asks when a method is called.
          param_dtype: of the parameters in memory, whatever type they are stored in, 8-bit floats included.
          variant: "fp16" or "non_ema" for the files so marked of the networks that have some, and the plain ones of the
            others; None takes full precision, else fp16.

        Raises:
          ValueError: no such folder or model, a pipeline or setting that is not supported, pickled or damaged weights,
            or tensors that do not fit (all of them listed).
        """
        dtype, param_dtype = (
            getattr(jnp, require_type(name, value, ("float32", "bfloat16", "float16")).name)
            for name, value in (("dtype", dtype), ("param_dtype", param_dtype))
        )
        folder = layout.locate(path_or_hub_id, variant)
        configs = Configs(
            CLIPTextConfig.from_dict(layout.component_config(folder, "text_encoder"), dtype),
            layout.unet_config(folder, dtype),
            VAEConfig.from_dict(layout.component_config(folder, "vae"), dtype),
            layout.scheduler_config(folder),
        )
        tokenizer = load_tokenizer(folder / "tokenizer")
        graphs, params = layout.load_networks(folder, configs, param_dtype, variant)
        return cls(configs, Graphs(**graphs, scaling_factor=configs.vae.scaling_factor), params, tokenizer)

    def save_pretrained(self, folder: str | Path, *, dtype=np.float32, variant: str | None = None) -> None:
        """Write the diffusers layout to `folder`; diffusers' StableDiffusionPipeline opens it.

        `dtype` is that of the stored tensors (float32, bfloat16, float16, float8_e4m3fn or float8_e5m2), `variant` the
        mark in their file names ("fp16" by convention). Raises ValueError, before anything is written, for another type
        or one that is too small for a parameter.
        """
        folder, dtype = Path(folder), require_type("dtype", dtype, checkpoint.STORED)
        for name, part in self.params.items():
            checkpoint.check_storable(part, dtype, name)
        layout.save_networks(folder, self.configs, self.params, dtype, variant)
        write_json(folder / "model_index.json", layout.model_index(self.configs.scheduler))
        write_json(folder / "scheduler" / "scheduler_config.json", self.configs.scheduler.to_dict())
        save_tokenizer(self.tokenizer, folder / "tokenizer")

    @property
    def downsample(self) -> int:
        """Image pixels per latent pixel, f_d."""
        return self.configs.vae.downsample

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model was trained on."""
        size = self.configs.unet.sample_size
        require(size is not None, "unet: sample_size", size, "set, or height and width given")
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.downsample, width * self.downsample

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """[h w c] of the latent of an image of these pixels (default: `image_size`)."""
        given = (height, width)
        height, width = (self.image_size[axis] if value is None else value for axis, value in enumerate(given))
        for name, value in (("height", height), ("width", width)):
            factor = self.downsample
            valid = is_integer(value) and value >= factor and value % factor == 0
            require(valid, name, value, f"a positive multiple of {factor}")
        return int(height) // self.downsample, int(width) // self.downsample, self.configs.vae.latent_channels

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, "b l"]:
        """Token ids, int32; over-long prompts are cut with a warning. ValueError on an empty list."""
        return tokenize(self.tokenizer, prompts)

    def sampler(self, sampler: str | None = None, num_steps: int = 25, eta: float = 0.0) -> Sampler:
        """The tables of a sampler by its name in `SAMPLERS`, such as "ddim" or "dpm++" (None: the checkpoint's own)."""
        name = self.configs.scheduler.sampler if sampler is None else sampler
        whose = "the checkpoint's own sampler" if sampler is None else "sampler"
        require(
            name in SAMPLERS.names,
            whose,
            name,
            f"one of {SAMPLERS.names}" + ", named by `sampler=`" * (sampler is None),
        )
        return self._sampler(name, require_count("num_steps", num_steps), require_number("eta", eta))

    def _arguments(
        self, ids, negative_ids, guidance_scale, guidance_interval, num_steps, sampler, eta, size, initial_noise
    ):
        shape = self.latent_shape(*size)
        words = self.configs.text_encoder.vocab_size
        ids = _as_ids("ids", ids, words)
        if initial_noise is not None:
            expected = (ids.shape[0], *shape)
            require(
                np.shape(initial_noise) == expected, "initial_noise's shape", np.shape(initial_noise), str(expected)
            )
            initial_noise = jnp.asarray(initial_noise)
        guidance_scale = require_number("guidance_scale", guidance_scale)
        guided = guidance_scale > 1.0
        if guided and negative_ids is None:
            negative_ids = np.repeat(self.tokenize([""]), ids.shape[0], axis=0)
        if guided:
            negative_ids = _as_ids("negative_ids", negative_ids, words)
            shapes = negative_ids.shape, ids.shape
            require(shapes[0] == shapes[1], "negative_ids' shape", shapes[0], f"that of ids, {shapes[1]}")
        return (
            self.sampler(sampler, num_steps, eta),
            ids,
            {
                "shape": shape,
                "negative_ids": negative_ids if guided else None,
                "guidance_scale": jnp.float32(guidance_scale),
                "guidance_interval": tuple(map(float, guidance_interval)),
                "initial_noise": initial_noise,
            },
        )

    def generate_latents(
        self,
        key: Key[Array, ""] | UInt32[Array, "2"] | int,
        ids: Int[Array | np.ndarray, "b l"] | Sequence[Sequence[int]],
        negative_ids: Int[Array | np.ndarray, "b l"] | Sequence[Sequence[int]] | None = None,
        *,
        num_steps: int = 25,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str | None = None,
        eta: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        initial_noise: Float[Array, "b h w c"] | None = None,
        sampler_noise: Float[Array, "n b h w c"] | None = None,
        clip_skip: int = 0,
    ) -> Float[Array, "b h w c"]:
        """Latents [b h w c] for token ids, unit-scaled as the U-Net sees them, float32.

        Image i depends on `key`, i and its prompt, not on the batch. Guidance is off at `guidance_scale` <= 1;
        `negative_ids` defaults to the empty prompt; outside of `guidance_interval`, a share of the steps from the first
        on, there is no guidance. `initial_noise` (unit variance) replaces what `key` draws.

        `key` may be a seed, which stands for `jax.random.key(seed)`, and ids nested lists. Raises ValueError on an
        unknown sampler, bad step count or interval, no prompts, or sizes that `downsample` does not divide.
        """
        table, ids, options = self._arguments(
            ids,
            negative_ids,
            guidance_scale,
            guidance_interval,
            num_steps,
            sampler,
            eta,
            (height, width),
            initial_noise,
        )
        return self._latents(
            self.params, table, as_key(key), ids, sampler_noise=sampler_noise, clip_skip=clip_skip, **options
        )

    def generate(
        self,
        key: Key[Array, ""] | UInt32[Array, "2"] | int,
        ids: Int[Array | np.ndarray, "b l"] | Sequence[Sequence[int]],
        negative_ids: Int[Array | np.ndarray, "b l"] | Sequence[Sequence[int]] | None = None,
        *,
        num_steps: int = 25,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str | None = None,
        eta: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        initial_noise: Float[Array, "b h w c"] | None = None,
        sampler_noise: Float[Array, "n b h w c"] | None = None,
        clip_skip: int = 0,
        decode_batch: int | None = None,
    ) -> Float[Array, "b H W 3"]:
        """Images [b H W 3] in [0, 1]: one compiled program from token ids to pixels.

        `decode_batch` bounds how many images the decoder holds at once; the rest is as in `generate_latents`.
        """
        table, ids, options = self._arguments(
            ids,
            negative_ids,
            guidance_scale,
            guidance_interval,
            num_steps,
            sampler,
            eta,
            (height, width),
            initial_noise,
        )
        options |= {"sampler_noise": sampler_noise, "clip_skip": clip_skip, "decode_batch": decode_batch}
        return self._image(self.params, table, as_key(key), ids, **options)

    def _generate(self, params, table, key, ids, *, decode_batch, **options):
        latents = generation.generate_latents(self.graphs, params, table, key, ids, **options)
        return generation.decode(self.graphs, params, latents, decode_batch)

    def decode(
        self, latents: Float[Array | np.ndarray, "b h w c"], batch_size: int | None = None
    ) -> Float[Array, "b H W 3"]:
        """Images in [0, 1] of latents, at most `batch_size` at a time."""
        return self._decode(self.params, _as_batch("latents", latents), batch_size=batch_size)

    def encode(
        self, images: Shaped[Array | np.ndarray, "b H W 3"], batch_size: int | None = None
    ) -> Float[Array, "b h w c"]:
        """Mean latents of images in [0, 1], or of uint8 up to 255, scaled as the U-Net sees them."""
        return self._encode(self.params, _as_images(images), batch_size=batch_size)


def _as_ids(name: str, ids: Any, words: int) -> Int[Array | np.ndarray, "b l"]:
    """Token ids as an array; ValueError unless they are some integers [b l], outside jit below the number of words."""
    try:
        array = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    except ValueError:
        raise ValueError(
            f"{name} has rows of different lengths; it must be integers [b l], as tokenize gives"
        ) from None
    if array.ndim != 2 or array.size == 0 or not jnp.issubdtype(array.dtype, jnp.integer):
        found = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"{name} is {found}; it must be integers of shape [b l], as tokenize gives for some prompts")
    if not isinstance(array, jax.core.Tracer):
        ends = int(np.min(array)), int(np.max(array))
        require(ends[0] >= 0 and ends[1] < words, f"{name} from smallest to largest", ends, f"in 0 to {words - 1}")
    return array


def _as_batch(name: str, values: Any) -> Float[Array | np.ndarray, "b h w c"]:
    """Latents or images as an array; ValueError unless there are some, of shape [b h w c]."""
    array = values if isinstance(values, jax.Array) else np.asarray(values)
    require(array.ndim == 4 and array.size > 0, f"{name}' shape", array.shape, "[b h w c], all of at least 1")
    return array


_ROUNDING = 1e-3
"""What values of images may exceed [0, 1] by, as those of a resized image do."""


def _as_images(images: Any) -> Float[Array | np.ndarray, "b H W 3"]:
    """Images: uint8 divided by 255, or real numbers; ValueError, outside jit, unless in [0, 1] but for rounding."""
    images = _as_batch("images", images)
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    real = jnp.issubdtype(images.dtype, jnp.floating)
    require(real, "images' type", images.dtype.name, "uint8, of 0 to 255, or real, of 0 to 1")
    if not isinstance(images, jax.core.Tracer):
        ends = float(images.min()), float(images.max())
        inside = ends[0] >= -_ROUNDING and ends[1] <= 1 + _ROUNDING
        require(inside, "images from smallest to largest", ends, "in 0 to 1, or uint8")
    return images


FlaxStableDiffusion = StableDiffusion
