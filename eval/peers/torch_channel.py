"""Channel rollouts in PyTorch on the kind of device that JAX has, whole batches at a time; importing needs PyTorch."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from eval.measure import prepare_torch

NAME = "PyTorch, eager"


def block_fading(symbols: np.ndarray, noise_var: float, compiled: bool = False) -> Callable[[], Tensor]:
    """A call that sends `symbols` [b t k] over fresh Rayleigh block fading with noise.

    Compiled, real and imaginary parts are apart, as Inductor has no kernels for complex numbers: [b t k 2].
    """
    device = _exact_device()
    sent = torch.from_numpy(symbols).to(device)

    def link() -> Tensor:
        gains = torch.randn(*sent.shape[:2], 1, dtype=sent.dtype, device=device)
        return torch.randn_like(sent).mul_(math.sqrt(noise_var)).addcmul_(gains, sent)

    parts = torch.view_as_real(sent)

    def link_of_parts() -> Tensor:
        gains = math.sqrt(0.5) * torch.randn(*sent.shape[:2], 1, 2, device=device)
        noise = math.sqrt(0.5 * noise_var) * torch.randn_like(parts)
        across = torch.stack([-parts[..., 1], parts[..., 0]], -1)
        return noise + gains[..., :1] * parts + gains[..., 1:] * across

    return _waiting(torch.compile(link_of_parts, dynamic=False) if compiled else link, device)


def jakes(batch: int, num_blocks: int, doppler: float, num_paths: int) -> Callable[[], Tensor]:
    """A call that draws Clarke/Jakes gains [b t]: the law of `megjax.channel.JakesFading`, an angle in each sector."""
    device = _exact_device()
    turns = 2 * math.pi * doppler * torch.arange(num_blocks, device=device)
    sectors = torch.arange(num_paths, device=device)

    def draw() -> Tensor:
        angles = (math.pi / num_paths) * (torch.rand(batch, num_paths, device=device) + sectors)
        phases = torch.cos(angles)[..., None] * turns
        paths = torch.randn(batch, 1, num_paths, dtype=torch.complex64, device=device)
        return (paths @ torch.polar(torch.ones_like(phases), phases))[:, 0] / math.sqrt(num_paths)

    return _waiting(draw, device)


def _exact_device() -> str:
    """PyTorch's device, on which it multiplies float32 in float32 from now on; RuntimeError where it has none."""
    device = prepare_torch()
    if device is None:
        raise RuntimeError("PyTorch cannot use this device")
    torch.set_float32_matmul_precision("highest")
    return device


def _waiting(make: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def call() -> Tensor:
        made = make()
        if device == "cuda":
            torch.cuda.synchronize()
        return made

    return call
