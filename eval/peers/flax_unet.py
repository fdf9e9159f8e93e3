"""The U-Net of the last diffusers that had Flax models, in an environment of its own; see `make peer-flax`.

Run by that environment's Python, the file is the server of one call: a line of JSON on stdin makes the network, every
further line calls it once, and each is answered by a line when the call has finished.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PYTHON = Path(__file__).parents[2] / ".venv" / "flax-peer" / "bin" / "python"
SETTINGS = (
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


class FlaxUNet:
    """A call of the other environment's U-Net; `versions` and `platform` say what it runs on.

    RuntimeError if the other process ends.
    """

    def __init__(self, config: dict[str, Any], length: int, batch: int, dtype: str):
        settings = {name: config[name] for name in SETTINGS}
        self._process = subprocess.Popen(
            [str(PYTHON), str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        about = self._ask({"unet": settings, "length": length, "batch": batch, "dtype": dtype})
        self.versions, self.platform = about["versions"], about["platform"]

    def __call__(self) -> None:
        self._ask({})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"the old Flax U-Net ended with code {self._process.wait()}; {PYTHON} runs it")
        return json.loads(answer)

    def close(self) -> None:
        """End the other process."""
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """What the other environment runs; it has no megjax."""
    import diffusers
    import flax
    import jax
    import jax.numpy as jnp

    answers, sys.stdout = sys.stdout, sys.stderr
    request = json.loads(sys.stdin.readline())
    dtype = getattr(jnp, request["dtype"])
    model = diffusers.FlaxUNet2DConditionModel(**request["unet"], dtype=dtype)
    side, batch = request["unet"]["sample_size"], request["batch"]
    latents = jnp.ones((batch, request["unet"]["in_channels"], side, side), dtype)
    text = jnp.ones((batch, request["length"], request["unet"]["cross_attention_dim"]), dtype)
    shapes = jax.eval_shape(model.init_weights, jax.random.PRNGKey(0))
    params = jax.tree_util.tree_map(lambda x: jnp.full(x.shape, 0.01, dtype), shapes)
    call = jax.jit(lambda params, *args: model.apply({"params": params}, *args).sample)

    def answer(**values):
        print(json.dumps(values), file=answers, flush=True)

    versions = f"diffusers {diffusers.__version__}, flax {flax.__version__}, jax {jax.__version__}"
    answer(versions=versions, platform=jax.default_backend())
    for _ in sys.stdin:
        jax.block_until_ready(call(params, latents, jnp.full(batch, 500), text))
        answer(done=True)


if __name__ == "__main__":
    serve()
