"""Benchmark of a whole image, from token ids to pixels in guided steps, next to diffusers in PyTorch and old Flax."""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from eval.aot_jobs import model_configs
from eval.peers import flax_diffusers, torch_image
from eval.peers.lines import Served
from eval.stages import STAGES, Measured, Stage, image_process
from eval.stages.codec import EAGER, peer, torch_modes
from megjax.configs import require_count

GIB = 2**30
GUIDANCE = 7.5
COLUMNS = [
    "implementation",
    "seconds an image",
    "image-steps/s",
    "of eager PyTorch",
    "peak memory (GiB)",
    "compilation (s)",
    "from the cache (s)",
]
OLD_FLAX = "flax_diffusers"
MEGJAX, FLAX = "megjax", "Flax of diffusers 0.39"


def run(
    model: str,
    batches: tuple[int, ...],
    steps: int,
    rounds: int,
    with_peers: bool,
    compiled: bool = True,
    ours: bool = True,
    calls: int = 0,
) -> Measured:
    """Rows of the benchmark file, the peers that are missing, and notes; `batches` are images at a time.

    Every sample is a call in a new process, one after the other, so that its memory can be seen and that several copies
    of the weights need not fit side by side. With `calls`, every implementation keeps one process, and all are called
    in turn so many times. Weights are random. Numbers are float32 on a CPU and bfloat16 elsewhere. Without `ours`, only
    peers are measured.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    configs, length = model_configs(model, dtype)
    request = {"model": model, "steps": steps, "guidance": GUIDANCE, "dtype": jnp.dtype(dtype).name}
    request |= {"length": length, "device": "cpu" if on_cpu else "cuda"}
    networks = {name: getattr(configs, name).to_dict() for name in ("text_encoder", "unet", "vae")}
    starts: dict[str, Callable[..., Served]] = {MEGJAX: image_process.start} if ours else {}
    asked: dict[str, dict[str, Any]] = {MEGJAX: {}}
    notes, missing = [f"{model}: random weights, {jnp.dtype(dtype).name}, DDIM, guidance {GUIDANCE:g}."], []
    if with_peers:
        if peer("torch_unet") is None:
            missing.append("torch_image")
        else:
            modes, problems = torch_modes(compiled, request["device"])
            notes += problems
            for name, compile_it in modes.items():
                starts[name], asked[name] = torch_image.start, {**networks, "compiled": compile_it}
        if flax_diffusers.PYTHON.exists():
            starts[FLAX], asked[FLAX] = flax_diffusers.start, networks
        else:
            missing.append(OLD_FLAX)
    pixels = configs.unet.sample_size * configs.vae.downsample
    case, rows, versions = f"image of {model}, {pixels}x{pixels} pixels, {steps} guided steps", [], set()
    for batch in batches:
        of_batch = {name: partial(start, {**request, **asked[name], "batch": batch}) for name, start in starts.items()}
        samples, problems = measure(of_batch, rounds, calls)
        rows += [row | {"steps": steps} for row in rows_of(samples, case, batch)]
        notes += problems
        versions |= {sample["versions"] for made in samples.values() for sample in made if "versions" in sample}
    return rows, missing, [*notes, *(f"{version}." for version in sorted(versions))]


def measure(
    starts: dict[str, Callable[..., Served]], rounds: int, calls: int = 0
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Samples of every implementation, A B C A B C ..., each with what its process said of itself; and problems.

    Compiled programs are kept from one process to the next; a first process of each only starts, to compile. With
    `calls`, each has one process, which is called once to warm up and then for so many samples.
    """
    samples, problems = {name: [] for name in starts}, []

    @contextlib.contextmanager
    def left_out_if_it_fails(name: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            problems.append(f"{name} was not measured: {error}.")
            del samples[name]

    total = len(starts) * (calls or rounds + 1)
    with (
        tempfile.TemporaryDirectory() as cache,
        contextlib.ExitStack() as kept,
        tqdm(total=total, leave=False) as bar,
    ):
        environ = {"JAX_COMPILATION_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
        served = {}
        for name in starts if calls else ():
            with left_out_if_it_fails(name):
                served[name] = starts[name](environ=environ)
                kept.callback(served[name].close)
                served[name]()
        for i in range(calls or rounds + 1):
            for name in list(samples):
                bar.set_description(name)
                with left_out_if_it_fails(name):
                    one = served[name] if calls else starts[name](environ=environ)
                    samples[name].append({**one.about, **(one() if calls or i else {})})
                    if not calls:
                        one.close()
                bar.update()
    return samples, problems


def rows_of(samples: dict[str, list[dict[str, Any]]], case: str, batch: int) -> list[dict]:
    """One row for each implementation, without a start from the cache where the first process was called."""
    seconds = {name: [x["seconds"] for x in made if "seconds" in x] for name, made in samples.items()}
    rows = []
    for name, made in samples.items():
        median = statistics.median(seconds[name])
        starts = [x.get("compile_s", x.get("warm_up_s")) for x in made]
        rows.append(
            {
                "case": case,
                "batch": batch,
                "implementation": name,
                "seconds": median / batch,
                "seconds_range": [min(seconds[name]) / batch, max(seconds[name]) / batch],
                "ratio_to_eager": statistics.median(seconds[EAGER]) / median if EAGER in seconds else None,
                "peak_bytes": max(x["peak_bytes"] for x in made if "seconds" in x),
                "temporary_bytes": made[0].get("temporary_bytes"),
                "compilation_s": starts[0],
                "cached_s": None if "seconds" in made[0] else starts[-1],
                "rounds": len(seconds[name]),
            }
        )
    return rows


def cells(row) -> list[str]:
    """One line of the table."""
    low, high = row.seconds_range
    ratio, cached, steps = row.ratio_to_eager, row.cached_s, getattr(row, "steps", None)
    spread = f" [{low:.4g}, {high:.4g}]" if row.rounds > 1 else ""
    return [
        row.implementation,
        f"{row.seconds:.4g}{spread}",
        "-" if steps is None or np.isnan(steps) else f"{steps / row.seconds:.3g}",
        "-" if ratio is None or np.isnan(ratio) else f"{ratio:.2f}",
        f"{row.peak_bytes / GIB:.2f}",
        f"{row.compilation_s:.1f}",
        "-" if cached is None or np.isnan(cached) else f"{cached:.1f}",
    ]


def run_as_asked(args, _) -> Measured:
    """`run` with the options of `eval.benchmark`."""
    few, which = (args.rounds, args.peers), (args.torch_compile, args.ours)
    return run(args.model, args.image_batches, args.image_steps, *few, *which, args.image_calls)


def check(args) -> None:
    """ValueError for a negative number of calls."""
    require_count("--image-calls", args.image_calls, 0)


STAGES.register(
    Stage(
        name="image",
        title="from token ids to pixels",
        version=1,
        rank=60,
        run=run_as_asked,
        columns=COLUMNS,
        cells=cells,
        check=check,
        fewest_rounds=1,
    )
)
