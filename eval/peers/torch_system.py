"""Scheme `seed` in PyTorch, from latents to received images: a link in batches, with the weights of megjax's models."""

import math
import tempfile
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from flax import nnx
from torch import Tensor
from torch.nn import functional

from eval.peers.torch_codec import TorchNetwork
from megjax.channel import MAPPINGS
from megjax.codec import SeedCodec, SeedNetwork, link
from megjax.configs import require
from megjax.diffusion.pipeline import StableDiffusion
from megjax.units import check_snr_db

NAME = "PyTorch"
DECODE_BATCH = 16
"""Images that the VAE decodes at a time on a CPU: larger batches leave the caches and the allocator's pools."""


class Constants(NamedTuple):
    """Constants of the link at one rate, SNR and mapping, as tensors; r is the number of reals sent, 2K."""

    mean: Tensor
    """Of the values sent over the data [r]."""
    std: Tensor
    """Of the values sent over the data [r]."""
    root_shape: Tensor
    """Amplitude of the values inside their blocks [r]."""
    root_power: Tensor
    """Amplitude of the blocks [t]."""
    block: Tensor
    """Block of every symbol [k]."""
    mode: tuple[Tensor, Tensor]
    """Row [1] and column [1] of the encoder in the grid of SNRs and rates."""
    features: Tensor
    """Condition of the decoder [1 2]."""


class TorchLink:
    """`link(latents, realisations)`: every latent over as many realisations of a Rayleigh fading link.

    Encoding happens once a latent. Symbols are not padded into blocks: a symbol looks up the gain of its block.
    """

    def __init__(
        self,
        network: TorchNetwork,
        vae: AutoencoderKL,
        constants: Constants,
        noise_var: float,
        compiled: bool = False,
        decode_batch: int | None = None,
    ):
        self.network, self.vae, self.constants = network, vae, constants
        self.noise_var, self.decode_batch = noise_var, decode_batch
        self._refine, self._render = self.refine, self.render
        if compiled:
            self._refine = torch.compile(self.refine, dynamic=False)
            self._render = torch.compile(self.render, dynamic=False)

    @torch.inference_mode()
    def __call__(
        self,
        latents: Tensor,
        realisations: int,
        generator: torch.Generator | None = None,
        gains: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Images [b*r 3 H W] in [0, 1], those of a latent together, of latents [b h w c] on the link's device.

        `gains` [b r t] and `noise` [b r k], both CN(0, 1), are drawn from `generator` unless given.
        """
        decoded = self.receive(latents, realisations, generator, gains, noise)
        factor, (height, width) = 2 ** (len(self.vae.config.block_out_channels) - 1), decoded.shape[1:3]
        shape = len(decoded), self.vae.config.out_channels, factor * height, factor * width
        images = torch.empty(shape, device=decoded.device, memory_format=torch.channels_last)
        size = self.decode_batch or len(decoded)
        for part, place in zip(decoded.split(size), images.split(size), strict=True):
            place.copy_(self._render(part))  # at once, as the next run of a CUDA graph overwrites its result
        return images

    @torch.inference_mode()
    def receive(
        self,
        latents: Tensor,
        realisations: int,
        generator: torch.Generator | None = None,
        gains: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The latents [b*r h w c] that the codec makes of what arrives; arguments as in a call."""
        constants, options = self.constants, {"generator": generator, "device": latents.device}
        shape = len(latents), realisations
        if gains is None:
            gains = torch.randn(*shape, len(constants.root_power), dtype=torch.complex64, **options)
        if noise is None:
            noise = torch.randn(*shape, len(constants.block), dtype=torch.complex64, **options)
        equalised, block_snr = self.transmit(self.encode(latents), gains, noise)
        return self._refine(torch.view_as_real(equalised).flatten(2).flatten(0, 1), block_snr.flatten(0, 1))

    def encode(self, latents: Tensor) -> Tensor:
        """Symbols [b k] of latents [b h w c], of unit mean power in every block."""
        constants, sent = self.constants, len(self.constants.mean)
        values = (self.network.analyse(latents, *constants.mode)[:, :sent] - constants.mean) / constants.std
        values = values * (math.sqrt(0.5) * constants.root_shape)
        return torch.view_as_complex(values.unflatten(1, (-1, 2)))

    def transmit(self, symbols: Tensor, gains: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """LMMSE estimates [b r k] of symbols [b k] after gains [b r t] and noise [b r k], and blocks' SNRs [b r t]."""
        amplitude = gains * self.constants.root_power
        energy = amplitude.real.square() + amplitude.imag.square()
        weight = amplitude.conj() / (energy + self.noise_var)
        amplitude, weight = amplitude[..., self.constants.block], weight[..., self.constants.block]
        received = torch.add(amplitude * symbols[:, None], noise, alpha=math.sqrt(self.noise_var))
        return weight * received, energy / self.noise_var

    def refine(self, equalised: Tensor, block_snr: Tensor) -> Tensor:
        """Latents [n h w c] from equalised symbols, as reals [n 2k], and the SNR of their blocks [n t]."""
        constants = self.constants
        block_snr = block_snr[:, constants.block].repeat_interleave(2, 1, output_size=equalised.shape[1])
        snr = constants.root_shape.square() * block_snr
        # The equaliser took every value's variance for 1; it is the square of `root_shape`.
        weight = math.sqrt(2) * constants.root_shape * (1 + block_snr) / (1 + snr)
        estimate = torch.addcmul(constants.mean, constants.std, weight * equalised)
        unsent = 0, self.network.config.num_values - estimate.shape[1]
        return self.network.decode(functional.pad(estimate, unsent), functional.pad(snr, unsent), constants.features)

    def render(self, latents: Tensor) -> Tensor:
        """Images [n 3 H W] in [0, 1] of latents [n h w c], channels last in memory."""
        scaled = (latents / self.vae.config.scaling_factor).permute(0, 3, 1, 2)
        return self.vae.decode(scaled, return_dict=False)[0].mul_(0.5).add_(0.5).clamp_(0.0, 1.0)


def make_link(
    pipe: StableDiffusion,
    codec: SeedCodec,
    num_symbols: int,
    snr_db: float,
    num_blocks: int = 16,
    mapping: str = "ordered",
    compiled: bool = False,
    device: str | torch.device = "cpu",
    decode_batch: int | None = None,
) -> TorchLink:
    """The link with the weights of `pipe` and `codec`, blocks being loaded as the codec asks at mean power 1.

    `compiled` puts what follows the equaliser through torch.compile, which on a CPU needs a C++
    compiler; the channel stays eager, as Inductor has no kernels for complex numbers. Another number of images is
    compiled anew. At most `decode_batch` images are in the VAE at a time; by default all of them on a GPU and
    `DECODE_BATCH` on a CPU. ValueError for symbols that do not fit, another mapping, or a codec of several tiles.
    """
    require(mapping in MAPPINGS, "mapping", mapping, f"one of {MAPPINGS}")
    link.check_symbols(num_symbols, codec.config.num_values, num_blocks)
    require(check_snr_db(snr_db).ndim == 0, "snr_db", snr_db, "one number in dB")
    device = torch.device(device)
    if decode_batch is None and device.type == "cpu":
        decode_batch = DECODE_BATCH
    network = load_network(codec).to(device)
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", low_cpu_mem_usage=False)
    vae = vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    constants = link_constants(codec, network, num_symbols, snr_db, num_blocks, mapping)
    return TorchLink(network, vae, constants, 10 ** (-snr_db / 10), compiled, decode_batch)


def link_constants(
    codec: SeedCodec, network: TorchNetwork, num_symbols: int, snr_db: float, num_blocks: int, mapping: str
) -> Constants:
    """The constants of a link on the device of `network`, from megjax's own codec."""
    ours: SeedNetwork = nnx.merge(codec.graph, codec.state)
    device, sent = network.basis.device, 2 * num_symbols
    spending = link.spending(ours.spend(snr_db, num_symbols), num_symbols, num_blocks, mapping)
    block = link.block_of_value(codec.config.num_values, num_symbols, num_blocks, mapping == "interleaved")
    mean, std = ours.moments(snr_db, num_symbols)
    arrays = mean[:sent], std[:sent], np.sqrt(spending.shape[:sent]), np.sqrt(spending.load), block[:sent:2]
    mode, place = ((np.array(x).reshape(1) for x in f(snr_db, num_symbols)) for f in (ours.mode, ours.position))
    return Constants(
        *(torch.from_numpy(np.array(x)).to(device) for x in arrays),
        mode=tuple(torch.from_numpy(x).to(device) for x in mode),
        features=network.features(*(torch.from_numpy(x).to(device) for x in place)),
    )


def load_network(codec: SeedCodec) -> TorchNetwork:
    """The codec's network with its weights, for inference; ValueError for a codec of several tiles."""
    tensors = {}
    for path, variable in nnx.to_flat_state(codec.state):
        name, value = ".".join(map(str, path)), np.array(variable[...], np.float32)
        if name.endswith(".kernel"):
            name, value = name.removesuffix("kernel") + "weight", np.ascontiguousarray(value.T)
        if not name.startswith("code_"):  # the moments, which are among the link's constants
            tensors[name.replace("norm.scale", "norm.weight")] = torch.from_numpy(value)
    network = TorchNetwork(codec.config)
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)
