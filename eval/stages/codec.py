"""Benchmark of training: steps of the seed codec a second, next to the same model and loop in PyTorch."""

import importlib
import os
import shutil
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eval.markdown import interval
from eval.measure import Contender, Timing, measure, prepare_torch
from eval.stages import STAGES, Measured, Stage
from megjax.codec.fitting import codec_loss
from megjax.codec.network import Constant, SeedNetwork
from megjax.codec.recipe import PRESETS, CodecRecipe
from megjax.training import init_state, make_chunk

NUM_LATENTS = 10_000
PEER = "torch_codec"
EAGER, COMPILED = "PyTorch, eager", "PyTorch, torch.compile"
NOT_ASKED = "not asked for"
NO_DEVICE = "PyTorch was not measured: it cannot use this device."
COLUMNS = ["implementation", "steps/s", "images/s", "of eager PyTorch", "compilation (s)"]


def run(preset: str, steps: int, rounds: int, with_peers: bool, compiled: bool = True, ours: bool = True) -> Measured:
    """Rows of the benchmark file, the peers that are missing, and notes.

    `compiled` also measures torch.compile; without `ours`, only peers are measured.
    """
    recipe = PRESETS[preset]
    latents = np.random.default_rng(0).standard_normal((NUM_LATENTS, *recipe.codec.latent_shape), np.float32)
    contenders, notes = [megjax_contender(recipe, latents, steps)] if ours else [], []
    torch_codec = peer() if with_peers else None
    if torch_codec is not None:
        others, notes = torch_contenders(torch_codec, recipe, latents, steps, compiled)
        contenders += others
    timings = measure(contenders, rounds, f"codec, {preset}")
    missing = [PEER] if with_peers and torch_codec is None else []
    return rows_of(timings, preset, recipe, steps, rounds), missing, notes


def rows_of(timings: dict[str, Timing], preset: str, recipe: CodecRecipe, steps: int, rounds: int) -> list[dict]:
    """One row for each contender of calls of `steps` steps; `ratio_to_eager` is None without PyTorch."""
    batch = recipe.conditions.groups * recipe.conditions.group_size
    rows = []
    for name, timing in timings.items():
        low, high = timing.quartiles_s
        per_second = steps / timing.median_s
        rows.append(
            {
                "case": f"training of the codec, preset {preset}, {steps} steps a call",
                "batch": batch,
                "implementation": name,
                "steps_per_second": per_second,
                "steps_per_second_quartiles": [steps / high, steps / low],
                "images_per_second": batch * per_second,
                "ratio_to_eager": timings[EAGER].median_s / timing.median_s if EAGER in timings else None,
                "compilation_s": max(0.0, timing.first_s - timing.median_s),
                "rounds": rounds,
            }
        )
    return rows


def cells(row) -> list[str]:
    """One line of the table."""
    low, high = row.steps_per_second_quartiles
    ratio = row.ratio_to_eager
    return [
        row.implementation,
        interval(row.steps_per_second, low, high, ",.2f"),
        f"{row.images_per_second:,.0f}",
        "-" if ratio is None or np.isnan(ratio) else f"{ratio:.2f}",
        f"{row.compilation_s:.1f}",
    ]


def peer(name: str = PEER) -> ModuleType | None:
    """A peer's module; None where what it needs is not installed."""
    try:
        return importlib.import_module(f"eval.peers.{name}")
    except ModuleNotFoundError:
        return None


def megjax_contender(recipe: CodecRecipe, latents: np.ndarray, steps: int) -> Contender:
    """`make_chunk` of the recipe: all steps of a call in one dispatch, the state carried from call to call."""
    network = SeedNetwork(recipe.codec, nnx.Rngs(0))
    graph, params, constants = nnx.split(network, nnx.Param, Constant)
    total = latents.reshape(len(latents), -1).astype(np.float64).var(0).sum()
    data = {
        "constants": constants,
        "total_variance": jnp.float32(total),
        "latents": (jnp.asarray(latents.reshape(len(latents), -1)),),
    }
    chunk, key = make_chunk(recipe.fit, codec_loss(graph, recipe.conditions)), jax.random.key(0)
    state = init_state(recipe.fit, params)

    def call():
        nonlocal state
        state, metrics = chunk(state, data, key, steps)
        return jax.block_until_ready((state, metrics))[1]

    return Contender("megjax", call)


def torch_contenders(
    torch_codec: ModuleType, recipe: CodecRecipe, latents: np.ndarray, steps: int, compiled: bool
) -> tuple[list[Contender], list[str]]:
    """PyTorch on the kind of device that JAX has, eager and compiled, and notes on what could not be measured."""
    import torch

    device = prepare_torch()
    if device is None:
        return [], [NO_DEVICE]
    data = torch.from_numpy(latents).to(device)
    threads = f" with {torch.get_num_threads()} threads" if device == "cpu" else ""
    notes = [f"{torch_codec.NAME} {torch.__version__}{threads}, fused AdamW; the loss and its gradient are compiled."]
    modes, problems = torch_modes(compiled, device)
    kinds = {name: (compile_it, None) for name, compile_it in modes.items()}
    if device == "cuda" and COMPILED in modes:
        kinds[f"{COMPILED}, CUDA graphs"] = (True, "reduce-overhead")
    contenders = []
    for name, (compile_it, mode) in kinds.items():
        loop = torch_codec.training(recipe.codec, recipe.conditions, recipe.fit, data, compile_it, mode)
        contenders.append(Contender(name, lambda loop=loop: loop.run(steps)))
    return contenders, notes + problems


def torch_modes(compiled: bool, device: str) -> tuple[dict[str, bool], list[str]]:
    """Names of PyTorch's ways, eager and compiled, each with whether it is; and why it is not compiled, if so."""
    problem = compiler_problem(device == "cpu") if compiled else NOT_ASKED
    if problem:
        return {EAGER: False}, [f"torch.compile was not measured: {problem}."]
    return {EAGER: False, COMPILED: True}, []


def compiler_problem(on_cpu: bool) -> str | None:
    """Why torch.compile cannot work here: its kernels need a C++ compiler on CPU and a C compiler on a GPU."""
    variable, usual = ("CXX", ("g++", "clang++")) if on_cpu else ("CC", ("gcc", "clang", "cc"))
    names = (os.environ[variable],) if variable in os.environ else usual
    if any(shutil.which(name) for name in names):
        return None
    return f"no C{'++' * on_cpu} compiler ({' or '.join(names)}) is installed"


STAGES.register(
    Stage(
        name="codec",
        title="training of the seed codec",
        version=1,
        rank=20,
        run=lambda args, _: run(args.preset, args.steps, args.rounds, args.peers, args.torch_compile, args.ours),
        columns=COLUMNS,
        cells=cells,
    )
)
