"""The stages of training the bundled model; each continues from its own checkpoints under one run folder."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from tqdm import trange

from megjax.configs import require
from megjax.data import scenes
from megjax.diffusion.clip import CLIPTextModel
from megjax.diffusion.generation import Graphs
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.pipeline import Configs, StableDiffusion
from megjax.diffusion.schedules import alphas_cumprod
from megjax.diffusion.tokenization import load_tokenizer, tokenize, train_tokenizer
from megjax.diffusion.unet import UNet2DConditionModel
from megjax.diffusion.vae import AutoencoderKL
from megjax.files import read_safetensors, read_safetensors_metadata, write_safetensors
from megjax.keys import from_seed
from megjax.ldm import stages
from megjax.ldm.recipe import MAX_TOKENS, Recipe
from megjax.metrics.scenenet import SceneNet
from megjax.processes import gather, is_first, wait_for_file
from megjax.system import SourceStatistics
from megjax.training import FitState, fit

LATENTS = "latents.safetensors"
ENCODE_BATCH = 200
VOCAB_SIZE = 1024

OnCheckpoint = Callable[[FitState], None] | None


def train_vae(recipe: Recipe, folder: Path, on_checkpoint: OnCheckpoint = None) -> tuple[nnx.GraphDef, nnx.State]:
    """Train the autoencoder; returns its graph and averaged parameters."""
    graph, params = nnx.split(AutoencoderKL(recipe.vae_config, rngs=nnx.Rngs(recipe.vae.fit.seed)))
    loss_fn = stages.vae_loss(graph, recipe.vae.batch, recipe.image_size)
    description = {"image_size": recipe.image_size, "widths": recipe.vae_widths, "batch": recipe.vae.batch}
    state = fit(
        loss_fn, params, (), recipe.vae.fit, folder / "vae", description=description, on_checkpoint=on_checkpoint
    )
    return graph, state.ema


def train_scenenet(recipe: Recipe, folder: Path, on_checkpoint: OnCheckpoint = None) -> tuple[nnx.GraphDef, nnx.State]:
    """Train the attribute classifier; returns its graph and averaged parameters."""
    graph, params = nnx.split(SceneNet(recipe.scenenet_config, nnx.Rngs(recipe.scenenet.fit.seed)))
    loss_fn = stages.scenenet_loss(graph, recipe.scenenet.batch, recipe.image_size)
    description = {**dataclasses.asdict(recipe.scenenet_config), "batch": recipe.scenenet.batch}
    state = fit(
        loss_fn,
        params,
        (),
        recipe.scenenet.fit,
        folder / "scenenet",
        description=description,
        on_checkpoint=on_checkpoint,
    )
    return graph, state.ema


def captions_of(drawn: scenes.Scene) -> list[list[str]]:
    """Every phrasing of every scene of a batch."""
    drawn = jax.device_get(drawn)
    rows = [scenes.Scene(*(field[i] for field in drawn)) for i in range(len(drawn.time))]
    return [[scenes.caption(row, phrasing) for phrasing in range(scenes.NUM_PHRASINGS)] for row in rows]


def prepare_tokenizer(folder: Path):
    """The tokenizer of the run, trained on captions of the training split at first use, by the first process."""
    path = folder / "tokenizer"
    ready = path / "tokenizer_config.json"
    if not ready.is_file() and is_first():
        _train_tokenizer(path)
    gather()
    wait_for_file(ready)
    return load_tokenizer(path)


def _train_tokenizer(path: Path) -> None:
    drawn = jax.jit(jax.vmap(scenes.sample_scene))(jax.random.split(from_seed(0), 2000))
    captions = [caption for row in captions_of(drawn) for caption in row]
    train_tokenizer(captions, path, vocab_size=VOCAB_SIZE, max_tokens=MAX_TOKENS)


def latents_identity(recipe: Recipe, folder: Path, params: nnx.State) -> dict[str, str]:
    """What the stored latents depend on: digests of autoencoder and tokenizer, the number of images and the seed."""
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        weights.update(np.asarray(leaf).tobytes())
    vocabulary = hashlib.sha256((folder / "tokenizer" / "vocab.json").read_bytes()).hexdigest()
    counts = {"num_images": str(recipe.num_images), "seed": str(recipe.unet.fit.seed)}
    return {"vae": weights.hexdigest(), "tokenizer": vocabulary, **counts}


def encode_scenes(
    recipe: Recipe, folder: Path, vae: tuple[nnx.GraphDef, nnx.State], tokenizer
) -> dict[str, Float[np.ndarray, "..."] | Int[np.ndarray, "..."]]:
    """Posterior moments [n h w c] and caption ids [n p l] of the U-Net's training images, kept in the run folder.

    The first process makes them. Raises ValueError if the run folder holds those of another autoencoder, tokenizer or
    number of images.
    """
    path, identity = folder / LATENTS, latents_identity(recipe, folder, vae[1])
    if not path.is_file() and is_first():
        _encode_scenes(recipe, path, vae, tokenizer, identity)
    gather()
    wait_for_file(path)
    found = read_safetensors_metadata(path)
    other = sorted(name for name in identity if found.get(name) != identity[name])
    require(not other, f"{path}: made with another", other, "made by this run; delete the file to make it anew")
    return read_safetensors(path)


def _encode_scenes(
    recipe: Recipe, path: Path, vae: tuple[nnx.GraphDef, nnx.State], tokenizer, identity: dict[str, str]
) -> None:
    graph, params = vae

    @jax.jit
    def encode(params, key):
        drawn, images = stages.draw_scenes(key, ENCODE_BATCH, recipe.image_size)
        return drawn, nnx.merge(graph, params).encode(2.0 * images - 1.0)

    parts = []
    key = from_seed(recipe.unet.fit.seed)
    for i in trange(-(-recipe.num_images // ENCODE_BATCH), desc="encode", unit_scale=ENCODE_BATCH):
        drawn, (mean, log_variance) = encode(params, jax.random.fold_in(key, i))
        captions = [caption for row in captions_of(drawn) for caption in row]
        ids = tokenize(tokenizer, captions).reshape(ENCODE_BATCH, scenes.NUM_PHRASINGS, -1)
        moments = {"mean": np.asarray(mean), "log_variance": np.asarray(log_variance)}
        parts.append({**moments, "ids": ids.astype(np.int16)})
    data = {name: np.concatenate([part[name] for part in parts])[: recipe.num_images] for name in parts[0]}
    write_safetensors(path, data, identity)


def scaling_factor(data: dict) -> float:
    """One over the standard deviation of the latents, which brings them to the unit variance that diffusion assumes."""
    variance = data["mean"].var(axis=(0, 1, 2)) + np.exp(data["log_variance"]).mean(axis=(0, 1, 2))
    return round(float(1.0 / np.sqrt(variance.mean() + data["mean"].mean(axis=(0, 1, 2)).var())), 5)


def train_unet(
    recipe: Recipe,
    folder: Path,
    vae: tuple[nnx.GraphDef, nnx.State],
    on_checkpoint: Callable[[StableDiffusion, int], None] | None = None,
) -> StableDiffusion:
    """Train text encoder and U-Net on the latents of `vae`; returns the whole model."""
    tokenizer = prepare_tokenizer(folder)
    host = encode_scenes(recipe, folder, vae, tokenizer)
    factor = scaling_factor(host)
    seeds = nnx.Rngs(recipe.unet.fit.seed)
    vocab_size = len(tokenizer)
    configs = Configs(
        recipe.text_config(vocab_size),
        recipe.unet_config,
        dataclasses.replace(recipe.vae_config, scaling_factor=factor),
        recipe.scheduler_config,
    )
    text_graph, text_params = nnx.split(CLIPTextModel(configs.text_encoder, rngs=seeds))
    unet_graph, unet_params = nnx.split(UNet2DConditionModel(configs.unet, rngs=seeds))
    # The graph carries the configuration, and the decoder's is final only now.
    vae_graph, _ = nnx.split(nnx.eval_shape(lambda: AutoencoderKL(configs.vae, rngs=ShapeRngs())))
    graphs = Graphs(text_graph, unet_graph, vae_graph, factor)

    empty = jnp.asarray(tokenize(tokenizer, [""])[0])
    levels = alphas_cumprod(configs.scheduler)
    share = recipe.unet.batch // recipe.unet.num_shards
    loss_fn = stages.unet_loss((text_graph, unet_graph), levels, factor, host["mean"].shape[1:], share, empty)
    description = {
        "image_size": recipe.image_size,
        "widths": recipe.unet_widths,
        "text": [recipe.text_width, recipe.text_layers, vocab_size],
        "num_images": recipe.num_images,
        "batch": [recipe.unet.batch, recipe.unet.num_shards],
        "scaling_factor": factor,
    }
    pipe = StableDiffusion(configs, graphs, {"vae": vae[1]}, tokenizer)

    def update(state: FitState) -> None:
        text_encoder, unet = jax.device_put(state.ema, jax.local_devices()[0])
        pipe.params = {"text_encoder": text_encoder, "unet": unet, "vae": vae[1]}

    def saved(state: FitState) -> None:
        update(state)
        if on_checkpoint is not None:
            on_checkpoint(pipe, int(state.step))

    update(
        fit(
            loss_fn,
            (text_params, unet_params),
            {name: jnp.asarray(x if name == "ids" else x.reshape(len(x), -1)) for name, x in host.items()},
            recipe.unet.fit,
            folder / "unet",
            num_shards=recipe.unet.num_shards,
            description=description,
            on_checkpoint=saved,
        )
    )
    return pipe


def source_statistics(recipe: Recipe, data: dict, factor: float, num_images: int = 2000) -> SourceStatistics:
    """Per-channel constants of the training set's pixels and scaled latents (posterior samples)."""
    draw = jax.jit(lambda key: stages.draw_scenes(key, ENCODE_BATCH, recipe.image_size)[1])
    keys = (jax.random.fold_in(from_seed(recipe.unet.fit.seed), i) for i in range(num_images // ENCODE_BATCH))
    pixels = np.concatenate([np.asarray(draw(key)) for key in keys])
    mean, variance = data["mean"].mean((0, 1, 2)), data["mean"].var((0, 1, 2))
    variance = variance + np.exp(data["log_variance"]).mean((0, 1, 2))
    return SourceStatistics(
        pixel_mean=tuple(map(float, pixels.mean((0, 1, 2)))),
        pixel_std=tuple(map(float, pixels.std((0, 1, 2)))),
        latent_mean=tuple(map(float, factor * mean)),
        latent_std=tuple(map(float, factor * np.sqrt(variance))),
    )


def export(recipe: Recipe, folder: Path, pipe: StableDiffusion, scenenet: tuple, destination: Path) -> None:
    """Write the model in the diffusers layout as its fp16 variant, with SceneNet and the link's constants beside it."""
    pipe.save_pretrained(destination, dtype=np.float16, variant="fp16")
    nnx.merge(*scenenet).save(destination / "scenenet", dtype="float16")
    data = read_safetensors(folder / LATENTS)
    source_statistics(recipe, data, pipe.configs.vae.scaling_factor).save(destination)
