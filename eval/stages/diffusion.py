"""Benchmark of the denoiser: a call of the U-Net at Stable Diffusion's sizes, next to diffusers in PyTorch."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eval.aot_jobs import model_configs
from eval.measure import Contender, Timing, measure
from eval.peers import flax_diffusers
from eval.peers.lines import Served
from eval.stages.codec import EAGER, compiler_problem, peer
from megjax.cost import Cost, cost_of_compiled, nominal_flops
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.unet import UNet2DConditionModel, UNetConfig

PEER = "torch_unet"
OLD_FLAX = "flax_diffusers"
MATMUL, SIDE = "matmul", 4096
COLUMNS = ["implementation", "seconds a call", "TFLOP/s", "of matmul", "of eager PyTorch", "first call (s)"]


def run(
    model: str, batches: tuple[int, ...], rounds: int, with_peers: bool, compiled: bool
) -> tuple[list[dict], list[str], list[str]]:
    """Rows of the benchmark file, the peers that are missing, and notes.

    `batches` are the U-Net's, two for each guided image. Weights are random: the work does not depend on them. Numbers
    are float32 on a CPU and bfloat16 elsewhere. `compiled` also measures torch.compile.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    configs, length = model_configs(model, dtype)
    module = peer(PEER) if with_peers else None
    with_flax = with_peers and flax_diffusers.PYTHON.exists()
    pixels = configs.unet.sample_size * configs.vae.downsample
    rows, notes = [], [f"{model}: random weights, {jnp.dtype(dtype).name}, {length} tokens, one device."]
    for batch in batches:
        ours = UNetCall(configs.unet, length, batch)
        contenders = [Contender("megjax", ours), Contender(MATMUL, matmul(dtype))]
        if module is not None:
            others, more = torch_contenders(module, configs.unet, length, batch, compiled)
            contenders += others
            notes += [note for note in more if note not in notes]
        old, note = old_flax(configs.unet, length, batch, dtype) if with_flax else (None, None)
        if old is not None:
            contenders.append(Contender(f"Flax of {old.about['versions'].split(',')[0]}", old))
        notes += [note] if note and note not in notes else []
        timings = measure(contenders, rounds, f"U-Net, batch {batch}")
        if old is not None:
            old.close()
        rows += rows_of(timings, f"U-Net of {model}, {pixels}x{pixels} pixels", batch, ours.nominal_flops, rounds)
        cost = ours.cost
        size, made = cost.memory.temporaries / 2**30, cost.flops / 1e12
        notes.append(
            f"{model}, batch {batch}: megjax makes {made:.2f} TFLOP in {size:.2f} GiB of temporaries, by XLA's count."
        )
    missing = [PEER] * (module is None) + [OLD_FLAX] * (not with_flax)
    return rows, missing if with_peers else [], notes


class UNetCall:
    """A call of a U-Net with random weights, compiled at the first."""

    def __init__(self, config: UNetConfig, length: int, batch: int):
        graph, shapes = nnx.split(nnx.eval_shape(lambda: UNet2DConditionModel(config, rngs=ShapeRngs())))
        rng, side = np.random.default_rng(0), config.sample_size

        def draw(shape, scale=1.0):
            return jnp.asarray(scale * rng.standard_normal(shape, np.float32), config.dtype)

        params = jax.tree.map(lambda x: draw(x.shape, float(np.prod(x.shape[:-1])) ** -0.5), shapes)
        latents, text = draw((batch, side, side, config.in_channels)), draw((batch, length, config.cross_attention_dim))
        self.args = params, latents, jnp.full(batch, 500), text
        self.fn = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args))

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The program."""
        return self.fn.lower(*self.args).compile()

    @property
    def cost(self) -> Cost:
        """Operations that the device makes, each pass of a loop counted, and memory."""
        return cost_of_compiled(self.compiled, repeat_loops=True)

    @property
    def nominal_flops(self) -> float:
        """Operations of the layers as they are defined."""
        return nominal_flops(self.fn, *self.args)

    def __call__(self):
        return jax.block_until_ready(self.compiled(*self.args))


def matmul(dtype):
    """A product of square matrices of `SIDE`: what the device reaches when nothing is in its way."""
    x = jnp.ones((SIDE, SIDE), dtype)
    product = jax.jit(lambda a, b: a @ b)
    return lambda: jax.block_until_ready(product(x, x))


def rows_of(timings: dict[str, Timing], case: str, batch: int, model_flops: float, rounds: int) -> list[dict]:
    """One row for each contender; all U-Nets are credited with the operations of the model's layers."""
    ceiling = 2 * SIDE**3 / timings[MATMUL].median_s
    rows = []
    for name, timing in timings.items():
        flops = 2 * SIDE**3 if name == MATMUL else model_flops
        compared = EAGER in timings and name != MATMUL
        rows.append(
            {
                "case": case,
                "batch": batch,
                "implementation": f"{MATMUL} {SIDE}x{SIDE}" if name == MATMUL else name,
                "seconds": timing.median_s,
                "seconds_quartiles": list(timing.quartiles_s),
                "flops": flops,
                "flops_per_second": flops / timing.median_s,
                "share_of_matmul": flops / timing.median_s / ceiling,
                "ratio_to_eager": timings[EAGER].median_s / timing.median_s if compared else None,
                "first_call_s": timing.first_s,
                "rounds": rounds,
            }
        )
    return rows


def cells(row) -> list[str]:
    """One line of the table."""
    low, high = row.seconds_quartiles
    ratio = row.ratio_to_eager
    return [
        row.implementation,
        f"{row.seconds:.3g} [{low:.3g}, {high:.3g}]",
        f"{row.flops_per_second / 1e12:.3f}",
        f"{100 * row.share_of_matmul:.0f} %",
        "-" if ratio is None or np.isnan(ratio) else f"{ratio:.2f}",
        f"{row.first_call_s:.1f}",
    ]


def torch_contenders(
    module: ModuleType, config: UNetConfig, length: int, batch: int, compiled: bool
) -> tuple[list[Contender], list[str]]:
    """diffusers' U-Net with scaled-dot-product attention, eager and compiled, and notes."""
    import torch

    on_cpu = jax.default_backend() == "cpu"
    if not on_cpu and not (jax.default_backend() == "gpu" and torch.cuda.is_available()):
        return [], ["PyTorch was not measured: it cannot use this device."]
    notes = [module.describe()]
    problem, modes = compiler_problem(on_cpu) if compiled else "not asked for", {EAGER: False}
    if problem:
        notes.append(f"torch.compile was not measured: {problem}.")
    else:
        modes["PyTorch, torch.compile"] = True
    options = {"device": "cpu" if on_cpu else "cuda", "dtype": "float32" if on_cpu else "bfloat16"}
    made = module.make_model(config, **options)
    return [Contender(name, module.make_call(made, length, batch, mode)) for name, mode in modes.items()], notes


def old_flax(config: UNetConfig, length: int, batch: int, dtype) -> tuple[Served | None, str]:
    """The old Flax U-Net in its own process, None where it cannot run on this device, and a note."""
    try:
        request = {"unet": config.to_dict(), "length": length, "batch": batch, "dtype": jnp.dtype(dtype).name}
        old = flax_diffusers.start(request)
    except RuntimeError as error:
        return None, f"Flax of diffusers was not measured: {error}."
    if old.about["platform"] == jax.default_backend():
        return old, f"Flax: {old.about['versions']}, in a process of its own."
    old.close()
    return None, f"Flax of diffusers was not measured: its JAX has {old.about['platform']} only."
