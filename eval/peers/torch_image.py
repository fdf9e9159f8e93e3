"""Stable Diffusion of diffusers in PyTorch with random weights, in a process that `eval.peers.lines` asks."""

import sys
import time
from typing import Any

from eval.peers.lines import Served, serve


def start(request: dict[str, Any], environ: dict[str, str] | None = None) -> Served:
    """The other process; RuntimeError if it cannot start."""
    return Served([sys.executable, "-m", "eval.peers.torch_image"], request, environ)


def _make(request: dict[str, Any]):
    import diffusers
    import torch
    import transformers

    diffusers.logging.set_verbosity_error()
    device = request["device"]
    options = {"device": device, "dtype": getattr(torch, request["dtype"])}

    def settings(name):
        return {key: value for key, value in request[name].items() if not key.startswith("_")}

    with torch.device(device):  # where their weights are drawn faster than on a CPU
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(request["text_encoder"]))
        networks = text, diffusers.UNet2DConditionModel(**settings("unet")), diffusers.AutoencoderKL(**settings("vae"))
    text, unet, vae = (network.eval().to(**options) for network in networks)
    if device == "cuda":
        unet, vae = (network.to(memory_format=torch.channels_last) for network in (unet, vae))
    if request["compiled"]:
        unet = torch.compile(unet, dynamic=False)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipe = diffusers.StableDiffusionPipeline(
        vae, text, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    ids = torch.ones((request["batch"], request["length"]), dtype=torch.long, device=device)

    @torch.inference_mode()
    def generate(steps: int) -> None:
        prompts, negative = text(torch.cat([ids, ids])).last_hidden_state.chunk(2)
        pipe(
            prompt_embeds=prompts,
            negative_prompt_embeds=negative,
            num_inference_steps=steps,
            guidance_scale=request["guidance"],
            output_type="pt",
        )
        if device == "cuda":
            torch.cuda.synchronize()

    started = time.perf_counter()
    generate(1)
    about = {"warm_up_s": time.perf_counter() - started, "threads": torch.get_num_threads()}
    about |= {"versions": f"PyTorch {torch.__version__}, diffusers {diffusers.__version__}"}
    peak = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        peak = torch.cuda.max_memory_allocated
    return about, lambda: generate(request["steps"]), peak


if __name__ == "__main__":
    serve(_make)
