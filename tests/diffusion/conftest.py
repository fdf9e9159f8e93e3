"""Random-weight torch models in diffusers' layout, each beside what megjax's loader makes of its folder."""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.utils import filter_repo_objects

from megjax.diffusion import checkpoint, clip, unet, vae
from megjax.diffusion.generation import Graphs
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.pipeline import Configs, StableDiffusion
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.tokenization import train_tokenizer
from tests import checks
from tests.diffusion.published import SD_15

COMPARED = ("ddim", "pndm", "euler", "euler_ancestral", "dpm++")
"""Samplers whose every setting is compared with diffusers; one that is added brings a test of its own."""
KINDS = {
    clip.CLIPTextConfig: clip.CLIPTextModel,
    unet.UNetConfig: unet.UNet2DConditionModel,
    vae.VAEConfig: vae.AutoencoderKL,
}
SHARPENED = ("to_q.weight", "to_k.weight", "q_proj.weight", "k_proj.weight")
UNET = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
VAE = {"block_out_channels": (8, 16), "norm_num_groups": 4}
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


def randomise(model, seed):
    """Evaluation mode; norms and biases away from 1 and 0, attention away from uniform, so that a mix-up shows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
            elif name.endswith(SHARPENED):
                value.mul_(2.0)
    return model.eval()


def relative_error(ours, reference):
    """Largest absolute difference over the largest absolute value of the reference."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def channels_first(array):
    import torch

    return torch.tensor(np.moveaxis(array, -1, 1).copy())


def channels_last(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


@functools.cache
def program(function, graph):
    """`function(model, *arrays)`, jitted, with the parameters as an argument."""
    return jax.jit(lambda params, *arrays: function(nnx.merge(graph, params), *arrays))


def call(model, *arrays):
    return model(*arrays)


def encode_and_decode(model, image, latent):
    return *model.encode(image), model.decode(latent)


@dataclasses.dataclass
class Port:
    """A torch model, the folder it was saved to, and the graph and parameters that megjax loaded from there."""

    torch: Any
    folder: Path
    config: Any
    rename: Callable
    graph: nnx.GraphDef
    params: nnx.State

    def load(self, files, **options):
        """The parameters that these files hold."""
        return load(self.config, files, self.rename, **options)[1]

    def run(self, function, *arrays, checked=False):
        """`function(model, *arrays)`, compiled once for a function of a module; with shape checks if asked for."""
        with checks.fast_compile(), contextlib.nullcontext() if checked else checks.unchecked():
            return program(function, self.graph)(self.params, *arrays)

    def replace(self, **settings):
        """The same parameters in a model of other settings."""
        config, kind = dataclasses.replace(self.config, **settings), KINDS[type(self.config)]
        with checks.unchecked():
            graph, _ = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=ShapeRngs())))
        return dataclasses.replace(self, config=config, graph=graph)

    def unet_outputs(self, height, width, timesteps=(3, 700), tokens=5, checked=False):
        """The U-Net's output on random inputs of this size, ours and torch's, channels last."""
        import torch

        rng = np.random.default_rng(height * 100 + width)
        batch, config = len(timesteps), self.config
        x = rng.standard_normal((batch, height, width, config.in_channels), np.float32)
        context = rng.standard_normal((batch, tokens, config.cross_attention_dim), np.float32)
        with torch.no_grad():
            reference = self.torch(channels_first(x), torch.tensor(timesteps), torch.tensor(context)).sample
        ours = self.run(call, x, np.asarray(timesteps), context, checked=checked)
        return ours, channels_last(reference)

    def vae_outputs(self, height, width, checked=False):
        """Pairs of ours and torch's of mean, log-variance and decoded image, on a random image of this size."""
        import torch

        image = np.random.default_rng(height * 100 + width).uniform(-1, 1, (2, height, width, self.config.in_channels))
        image = image.astype(np.float32)
        with torch.no_grad():
            posterior = self.torch.encode(channels_first(image)).latent_dist
            decoded = self.torch.decode(posterior.mean).sample
        references = [channels_last(value) for value in (posterior.mean, posterior.logvar, decoded)]
        ours = self.run(encode_and_decode, image, references[0], checked=checked)
        return list(zip(ours, references, strict=True))

    def state_dict(self, path):
        """Our parameters, written to `path` by megjax and read by safetensors' torch side."""
        from safetensors.torch import load_file

        checkpoint.save_params(self.params, path)
        return load_file(path)


def load(config, files, rename, **options):
    """Graph and parameters of a model."""
    with checks.unchecked():
        build = functools.partial(KINDS[type(config)], config, rngs=ShapeRngs())
        return checkpoint.load_params(build, files, rename=rename, **options)


def port(model, folder, kind, stem, rename):
    """A Port of a torch model, which is saved to `folder`."""
    model.save_pretrained(folder)
    config = kind.from_dict(json.loads((folder / "config.json").read_text()))
    return Port(model, folder, config, rename, *load(config, checkpoint.weight_files(folder, stem), rename))


@pytest.fixture(scope="session")
def make_unet(tmp_path_factory):
    """`make_unet(**settings)`: a Port of a U-Net that is UNET but for `settings`."""
    import torch
    from diffusers import UNet2DConditionModel

    def make(**settings):
        torch.manual_seed(0)
        model = randomise(UNet2DConditionModel(**(UNET | settings)), 1)
        return port(model, tmp_path_factory.mktemp("unet"), unet.UNetConfig, checkpoint.UNET_WEIGHTS, lambda name: name)

    return make


@pytest.fixture(scope="session")
def make_vae(tmp_path_factory):
    """`make_vae(**settings)`: a Port of a VAE that is VAE but for `settings`."""
    import torch
    from diffusers import AutoencoderKL

    def make(**settings):
        settings = VAE | settings
        levels = len(settings["block_out_channels"])
        kinds = {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
        }
        torch.manual_seed(0)
        model = randomise(AutoencoderKL(**kinds, **settings), 1)
        return port(model, tmp_path_factory.mktemp("vae"), vae.VAEConfig, checkpoint.UNET_WEIGHTS, checkpoint.vae_name)

    return make


@pytest.fixture(scope="session")
def make_text(tmp_path_factory):
    """`make_text(**settings)`: a Port of a text encoder that is TEXT but for `settings`."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    def make(**settings):
        torch.manual_seed(0)
        model = randomise(CLIPTextModel(CLIPTextConfig(**(TEXT | settings))), 1)
        return port(
            model, tmp_path_factory.mktemp("text"), clip.CLIPTextConfig, checkpoint.TEXT_WEIGHTS, checkpoint.text_name
        )

    return make


@pytest.fixture(scope="session")
def tiny_unet(make_unet):
    return make_unet(block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))


@pytest.fixture(scope="session")
def tiny_vae(make_vae):
    return make_vae(block_out_channels=(8,))


@pytest.fixture(scope="session")
def tiny_text(make_text):
    return make_text()


@pytest.fixture(scope="session")
def random_params():
    """`random_params(make)`: graph and parameters of `make()`, standard deviation the inverse root of the fan-in."""

    def draw(make):
        graph, abstract = nnx.split(nnx.eval_shape(make))
        rng = np.random.default_rng(0)

        def fill(leaf):
            fan_in = np.prod(leaf.shape[:-1])
            return leaf.replace(jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(fan_in), jnp.float32))

        return graph, nnx.from_flat_state([(path, fill(leaf)) for path, leaf in nnx.to_flat_state(abstract)])

    return draw


@pytest.fixture(scope="session")
def half_close():
    """Check `low`, an output computed in bfloat16 or `dtype`, against the float32 one.

    Each layer rounds its weights, its input and its output by a uniform relative error of at most u, half of the type's
    epsilon: 2^-8 for bfloat16 (root mean square u / sqrt(3)), so by u together. With gains of about one, independent
    layers add in squares: at most u times the root of the number of layers, here counted as weight kernels, and `gain`
    times as much where layers pass on more than they get. Less than u / 8 would mean that float32 had been used.
    """

    def check(low, high, params, dtype=jnp.bfloat16, gain=1.0):
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        assert np.isfinite(low).all()
        kernels = sum(path[-1] in ("kernel", "embedding") for path, _ in nnx.to_flat_state(params))
        error, unit = np.sqrt(np.mean((low - high) ** 2) / np.mean(high**2)), float(jnp.finfo(dtype).eps) / 2
        assert unit / 8 < error < gain * unit * np.sqrt(kernels)

    return check


@pytest.fixture(scope="session")
def gradients_flow():
    """Check that the gradient of `loss(params)` is finite, and nonzero for every tensor of `params`.

    A bias of the keys shifts all logits of a query alike, which softmax ignores: its gradient is zero.
    """

    def check(loss, params):
        with checks.fast_compile():
            gradients = jax.jit(jax.grad(loss))(params)
        for tree in gradients if isinstance(gradients, tuple) else (gradients,):
            for path, value in nnx.to_flat_state(tree):
                largest = float(np.abs(np.asarray(value[...])).max())
                invariant = path[-1] == "bias" and path[-2] in ("k_proj", "to_k")
                assert np.isfinite(largest), path
                assert invariant or largest > 1e-7, path

    return check


@pytest.fixture(scope="session")
def error_of():
    """`error_of(ours, reference)`: the relative error that every parity test bounds."""
    return relative_error


@pytest.fixture(scope="session")
def whole(tmp_path_factory, random_params):
    """A complete pipeline folder with the smallest of networks, and prompts of 8 tokens."""
    with checks.unchecked():
        tokens = tmp_path_factory.mktemp("tokenizer")
        tokenizer = train_tokenizer(["a red house", "a green tree"] * 5, tokens, vocab_size=600, max_tokens=8)
        text_config = clip.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
        unet_config = unet.UNetConfig(
            sample_size=8,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
        )
        vae_config = vae.VAEConfig(block_out_channels=(8,), norm_num_groups=4)
        configs = Configs(text_config, unet_config, vae_config, SchedulerConfig.from_dict(SD_15))
        parts = {
            "text_encoder": random_params(lambda: clip.CLIPTextModel(text_config, rngs=ShapeRngs())),
            "unet": random_params(lambda: unet.UNet2DConditionModel(unet_config, rngs=ShapeRngs())),
            "vae": random_params(lambda: vae.AutoencoderKL(vae_config, rngs=ShapeRngs())),
        }
        graphs = Graphs(**{name: pair[0] for name, pair in parts.items()}, scaling_factor=vae_config.scaling_factor)
        model = StableDiffusion(configs, graphs, {name: pair[1] for name, pair in parts.items()}, tokenizer)
        folder = tmp_path_factory.mktemp("whole")
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the folder of `whole`, to change."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def hub(monkeypatch, whole, tmp_path):
    """`hub(files)`: the hub holds one repository of these files; returns what each download took from it."""

    def serve(files):
        taken = []

        def snapshot_download(repo_id, *, allow_patterns, ignore_patterns):
            assert repo_id == "owner/name"
            names = list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
            taken.append(names)
            (tmp_path / "snapshot").mkdir(exist_ok=True)
            for name in names:
                source, target = whole / re.sub(r"\.fp16|\.non_ema", "", name), tmp_path / "snapshot" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_file():
                    shutil.copy(source, target)
            return str(tmp_path / "snapshot")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo_id: files)
        return taken

    return serve
