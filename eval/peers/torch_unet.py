"""The U-Net of diffusers in PyTorch with random weights, as users run it: inference mode, fused attention."""

from collections.abc import Callable

import diffusers
import torch

from megjax.diffusion.unet import UNetConfig


def describe() -> str:
    """Versions and threads."""
    threads = f", {torch.get_num_threads()} threads" if not torch.cuda.is_available() else ""
    return f"PyTorch {torch.__version__}, diffusers {diffusers.__version__}{threads}."


def make_model(config: UNetConfig, device: str, dtype: str) -> torch.nn.Module:
    """The network of a configuration, channels-last on a GPU, where that is faster."""
    settings = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    with torch.device(device):  # where its weights are drawn faster than on a CPU
        model = diffusers.UNet2DConditionModel(**settings)
    model = model.eval().to(device, getattr(torch, dtype))
    return model.to(memory_format=torch.channels_last) if device == "cuda" else model


def make_call(model: torch.nn.Module, length: int, batch: int, compiled: bool) -> Callable[[], torch.Tensor]:
    """One call at a batch, finished when it returns."""
    weight, config = next(model.parameters()), model.config
    options = {"device": weight.device, "dtype": weight.dtype}
    latents = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, **options)
    text = torch.randn(batch, length, config.cross_attention_dim, **options)
    step = torch.full((batch,), 500, device=weight.device)
    forward = torch.compile(model, dynamic=False) if compiled else model

    @torch.inference_mode()
    def call() -> torch.Tensor:
        sample = forward(latents, step, encoder_hidden_states=text).sample
        if weight.device.type == "cuda":
            torch.cuda.synchronize()
        return sample

    return call


def peak_bytes(call: Callable[[], torch.Tensor]) -> int | None:
    """The most that is allocated on a GPU during a call, weights included; None without one."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()
