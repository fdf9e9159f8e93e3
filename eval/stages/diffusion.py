"""Benchmark of the denoiser: a call of the U-Net at Stable Diffusion's sizes, next to diffusers in PyTorch."""

import functools
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from eval.aot_jobs import model_configs
from eval.markdown import interval
from eval.measure import Contender, Timing, matmul, matmul_side, measure, prepare_torch
from eval.peers import flax_diffusers
from eval.peers.lines import Served
from eval.stages import STAGES, Measured, Stage
from eval.stages.codec import EAGER, NO_DEVICE, peer, torch_modes
from megjax.cost import Cost, cost_of_compiled, nominal_flops
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.unet import UNet2DConditionModel, UNetConfig

PEER = "torch_unet"
OLD_FLAX = "flax_diffusers"
MATMUL = "matmul"
NUM_NORMALS = 1_000_003
"""Random numbers that weights are made of, a prime: no row of a matrix is another's."""
COLUMNS = [
    "implementation",
    "seconds a call",
    "guided steps/s",
    "image-steps/s",
    "TFLOP/s",
    "of matmul",
    "of eager PyTorch",
    "memory (GiB)",
    "first call (s)",
]


def run(
    model: str, batches: tuple[int, ...], rounds: int, with_peers: bool, compiled: bool = True, ours: bool = True
) -> Measured:
    """Rows of the benchmark file, the peers that are missing, and notes.

    `batches` are the U-Net's, two for each guided image. Weights are random: the work does not depend on them. Numbers
    are float32 on a CPU and bfloat16 elsewhere. `compiled` also measures torch.compile; without `ours`, only peers are
    measured.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    configs, length = model_configs(model, dtype)
    module = peer(PEER) if with_peers else None
    with_flax = with_peers and flax_diffusers.PYTHON.exists()
    pixels = configs.unet.sample_size * configs.vae.downsample
    rows, notes = [], [f"{model}: random weights, {jnp.dtype(dtype).name}, {length} tokens, one device."]
    for batch in batches:
        call, side = UNetCall(configs.unet, length, batch), matmul_side()
        contenders = [Contender("megjax", call)] if ours else []
        contenders.append(Contender(MATMUL, matmul(dtype, side)))
        peaks: dict[str, Callable[[], int | None]] = {"megjax": lambda call=call: call.memory_bytes}
        if module is not None:
            others, more = torch_contenders(module, configs.unet, length, batch, compiled)
            contenders += others
            peaks |= {other.name: functools.partial(module.peak_bytes, other.call) for other in others}
            notes += [note for note in more if note not in notes]
        old, note = old_flax(configs.unet, length, batch, dtype) if with_flax else (None, None)
        if old is not None:
            contenders.append(Contender(f"Flax of {old.about['versions'].split(',')[0]}", old))
        notes += [note] if note and note not in notes else []
        work = side, call.nominal_flops  # before what takes minutes, which an error would lose
        timings = measure(contenders, rounds, f"U-Net, batch {batch}")
        if old is not None:
            old.close()
        made = rows_of(timings, f"U-Net of {model}, {pixels}x{pixels} pixels", batch, work, rounds)
        rows += [row | {"peak_bytes": peaks.get(row["implementation"], lambda: None)()} for row in made]
        if ours and jax.default_backend() == "cpu":  # XLA does not count what libraries of a GPU do
            cost = call.cost
            size, count = cost.memory.temporaries / 2**30, cost.flops / 1e12
            notes.append(
                f"{model}, batch {batch}: megjax makes {count:.2f} TFLOP in {size:.2f} GiB of temporaries, by XLA's "
                "count."
            )
    missing = [PEER] * (module is None) + [OLD_FLAX] * (not with_flax)
    return rows, missing if with_peers else [], notes


class UNetCall:
    """A call of a U-Net with random weights, compiled at the first."""

    def __init__(self, config: UNetConfig, length: int, batch: int):
        graph, params = nnx.split(nnx.eval_shape(lambda: UNet2DConditionModel(config, rngs=ShapeRngs())))

        def shape_of(*shape):
            return jax.ShapeDtypeStruct(shape, config.dtype)

        side = config.sample_size
        inputs = shape_of(batch, side, side, config.in_channels), shape_of(batch, length, config.cross_attention_dim)
        self.shapes = jax.tree.map(lambda x: shape_of(*x.shape), params), *inputs
        self.fn = jax.jit(lambda params, z, text: nnx.merge(graph, params)(z, jnp.full(batch, 500), text))

    @functools.cached_property
    def args(self) -> tuple:
        """Weights and inputs."""
        params, *inputs = self.shapes
        return random_weights(params), *random_weights(inputs, scale=1.0)

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
        return nominal_flops(self.fn, *self.shapes)

    @property
    def memory_bytes(self) -> int:
        """What the program holds: weights, inputs, results and temporaries, by XLA's account."""
        stats = self.compiled.memory_analysis()
        return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes

    def __call__(self):
        return jax.block_until_ready(self.compiled(*self.args))


def random_weights(shapes: PyTree, scale: float | None = None) -> PyTree:
    """Normal numbers in the shapes and types of a tree, of deviation `scale`; by default, the fan-in's inverse root.

    They repeat after a million, since drawing as many as a large network has takes longer than compiling it.
    """
    normals = np.random.default_rng(0).standard_normal(NUM_NORMALS, np.float32)

    def draw(x):
        spread = float(np.prod(x.shape[:-1])) ** -0.5 if len(x.shape) > 1 else 0.1
        return jnp.asarray(np.resize((spread if scale is None else scale) * normals, x.shape), x.dtype)

    return jax.tree.map(draw, shapes)


def rows_of(timings: dict[str, Timing], case: str, batch: int, work: tuple[int, float], rounds: int) -> list[dict]:
    """One row for each contender; all U-Nets are credited with the operations of the model's layers.

    `work` is the side of the matrices that are multiplied, and those operations.
    """
    side, model_flops = work
    ceiling = 2 * side**3 / timings[MATMUL].median_s
    rows = []
    for name, timing in timings.items():
        flops = 2 * side**3 if name == MATMUL else model_flops
        compared = EAGER in timings and name != MATMUL
        rows.append(
            {
                "case": case,
                "batch": batch,
                "implementation": f"{MATMUL} {side}x{side}" if name == MATMUL else name,
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
    ratio, peak = row.ratio_to_eager, getattr(row, "peak_bytes", None)
    steps = 0 if row.implementation.startswith(MATMUL) else 1 / row.seconds
    return [
        row.implementation,
        interval(row.seconds, low, high, ".3g"),
        f"{steps:.3g}" if steps else "-",
        f"{steps * row.batch / 2:.3g}" if steps else "-",
        f"{row.flops_per_second / 1e12:.3f}",
        f"{100 * row.share_of_matmul:.0f} %",
        "-" if ratio is None or np.isnan(ratio) else f"{ratio:.2f}",
        "-" if peak is None or np.isnan(peak) else f"{peak / 2**30:.2f}",
        f"{row.first_call_s:.1f}",
    ]


def torch_contenders(
    module: ModuleType, config: UNetConfig, length: int, batch: int, compiled: bool
) -> tuple[list[Contender], list[str]]:
    """diffusers' U-Net with scaled-dot-product attention, eager and compiled, and notes."""
    device = prepare_torch()
    if device is None:
        return [], [NO_DEVICE]
    modes, notes = torch_modes(compiled, device)
    made = module.make_model(config, device, "float32" if device == "cpu" else "bfloat16")
    calls = {name: module.make_call(made, length, batch, mode) for name, mode in modes.items()}
    return [Contender(name, call) for name, call in calls.items()], [module.describe(), *notes]


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


STAGES.register(
    Stage(
        name="diffusion",
        title="a call of the U-Net",
        version=1,
        rank=50,
        run=lambda args, _: run(args.model, args.unet_batches, args.rounds, args.peers, args.torch_compile, args.ours),
        columns=COLUMNS,
        cells=cells,
    )
)
