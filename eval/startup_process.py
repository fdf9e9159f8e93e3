"""A new process up to its first images, timed part by part for stage `startup`: it has loaded little before."""

import time
from typing import Any

from eval.peers.lines import serve

PARTS = ("imports_s", "weights_s", "first_image_s", "next_image_s")


def _make(request: dict[str, Any]):
    started = time.perf_counter()
    import jax

    from megjax.diffusion.pipeline import StableDiffusion
    from megjax.runtime import enable_compilation_cache

    enable_compilation_cache()
    times = [started, time.perf_counter()]
    pipe = StableDiffusion.from_pretrained("scenes")
    times.append(time.perf_counter())
    ids = pipe.tokenize(["a red house under a night sky"])
    for i in range(2):
        jax.block_until_ready(pipe.generate(jax.random.key(i), ids))
        times.append(time.perf_counter())
    parts = (later - earlier for earlier, later in zip(times, times[1:], strict=False))
    return dict(zip(PARTS, parts, strict=True)), lambda: None, None


if __name__ == "__main__":
    serve(_make)
