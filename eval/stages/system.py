"""Benchmark of the whole link: images received a second by scheme `seed`, next to a loop and to PyTorch."""

import functools
import math
from types import ModuleType

import jax
import numpy as np

from eval.markdown import interval
from eval.measure import Contender, Timing, measure, prepare_torch
from eval.stages import STAGES, Measured, Stage
from eval.stages.codec import EAGER, NO_DEVICE, peer, torch_modes
from megjax.codec import SeedCodec
from megjax.data.latents import over_devices
from megjax.diffusion.pipeline import StableDiffusion
from megjax.system import Seed, Simulator, SystemConfig, make_simulator

PEER = "torch_system"
LOOP = "megjax, a loop over receptions"
SNR_DB, RATE, STEPS = 0.0, 4.0, 25
COLUMNS = ["implementation", "images/s", "ms an image", "of eager PyTorch", "first call (s)"]


def seed_simulator(pipe: StableDiffusion, codec: SeedCodec) -> Simulator:
    """The simulator of the stage."""
    return make_simulator(pipe, codec, Seed(rate=RATE), config=SystemConfig(num_steps=STEPS))


def run(
    images: int,
    realisations: int,
    batch: int,
    rounds: int,
    with_peers: bool,
    compiled: bool = True,
    ours: bool = True,
) -> Measured:
    """Rows of the benchmark file, the peers that are missing, and notes.

    `images` latents go over so many realisations each, `batch` receptions at a time. `compiled` also measures
    torch.compile; without `ours`, only peers are measured.
    """
    pipe, codec = StableDiffusion.from_pretrained("scenes"), SeedCodec.from_pretrained("scenes")
    latents = np.asarray(codec.validation[:images], np.float32)
    contenders, loops, notes = [], {}, []
    if ours:
        whole = Parts(seed_simulator(pipe, codec), latents, realisations, batch)
        contenders = [Contender("megjax", whole.received), Contender(LOOP, whole.loop)]
        loops = {LOOP: whole.looped}
    peer_module = peer(PEER) if with_peers else None
    if peer_module is not None:
        others, notes = torch_contenders(peer_module, (pipe, codec), latents, realisations, compiled)
        contenders += others
    timings = measure(contenders, rounds, "system")
    case = f"seed, r = {RATE:g}, {images} images x {realisations} realisations"
    rows = rows_of(timings, case, batch, images * realisations, rounds, loops)
    missing = [PEER] if with_peers and peer_module is None else []
    if not ours:
        return rows, missing, notes
    parts = [
        Contender("encode, channel, decode", whole.latents_only),
        Contender("VAE", whole.vae),
        Contender("sampler", whole.sampler),
    ]
    counts = {"sampler": images}
    timings = measure(parts, rounds, "parts of the system")
    rows += rows_of(timings, "parts; the sampler runs once an image", batch, images * realisations, rounds, counts)
    notes.append(f"megjax uses {len(jax.local_devices())} devices, {batch} receptions at a time.")
    return rows, missing, notes


class Parts:
    """Calls that do the whole work once, and its parts."""

    def __init__(self, simulator: Simulator, latents: np.ndarray, realisations: int, batch: int):
        self.simulator, self.realisations = simulator, realisations
        self.chunk = max(1, batch // len(latents))
        self.looped = min(len(latents) * realisations, 64)
        """Receptions of `loop`."""
        self.params, self.key = simulator.params, jax.random.key(0)
        spread = over_devices(len(latents))
        self.latents, self.images = spread(latents), spread(np.arange(len(latents), dtype=np.uint32))
        self.ids = spread(np.repeat(simulator.params["negative_ids"], len(latents), axis=0))
        self.source = jax.block_until_ready(jax.jit(simulator.source)(self.params, self.latents))
        self.batch = spread(np.repeat(latents, self.chunk, axis=0)[: len(latents) * self.chunk])
        self._deliver = jax.jit(self._run, static_argnames="generate")

    def _run(self, params, key, source, images, draws, generate: bool):
        found = self.simulator.deliver(key, params, source, None, SNR_DB, images, draws, generate=generate)
        return found.images if generate else found.latents

    def _all(self, generate: bool):
        starts = range(0, self.realisations, self.chunk)
        draws = (np.arange(start, start + self.chunk, dtype=np.uint32) for start in starts)
        made = [self._deliver(self.params, self.key, self.source, self.images, one, generate=generate) for one in draws]
        return jax.block_until_ready(made)

    def received(self):
        """Every reception, as images."""
        return self._all(True)

    def latents_only(self):
        """Every reception, as latents."""
        return self._all(False)

    def loop(self):
        """`looped` receptions one by one, each a call of a compiled program."""
        for i in range(self.looped):
            one = jax.tree.map(lambda x, i=i: x[i % len(self.latents)][None], self.host)
            number = np.array([i % len(self.latents)], np.uint32), np.array([i // len(self.latents)], np.uint32)
            jax.block_until_ready(self._deliver(self.params, self.key, one, *number, generate=True))

    @functools.cached_property
    def host(self):
        """The source off the devices, of which the loop takes one image at a time."""
        return jax.device_get(self.source)

    def vae(self):
        """As many images as receptions, decoded in the same batches."""
        calls = math.ceil(self.realisations / self.chunk)
        return jax.block_until_ready([self._decode(self.params, self.batch) for _ in range(calls)])

    @functools.cached_property
    def _decode(self):
        return jax.jit(lambda params, z: self.simulator.source(params, z).images)

    def sampler(self):
        """The server's latents, once an image."""
        return jax.block_until_ready(self._infer(self.params, self.key, self.ids))

    @functools.cached_property
    def _infer(self):
        return jax.jit(lambda params, key, ids: self.simulator.infer(key, params, ids).latents)


def rows_of(
    timings: dict[str, Timing], case: str, batch: int, total: int, rounds: int, counts: dict[str, int]
) -> list[dict]:
    """One row for each contender; `counts` are the images of those that do not make `total`."""
    rates = {name: counts.get(name, total) / timing.median_s for name, timing in timings.items()}
    rows = []
    for name, timing in timings.items():
        low, high = timing.quartiles_s
        count = counts.get(name, total)
        rows.append(
            {
                "case": case,
                "batch": batch,
                "implementation": name,
                "images_per_second": rates[name],
                "images_per_second_quartiles": [count / high, count / low],
                "ratio_to_eager": rates[name] / rates[EAGER] if EAGER in rates else None,
                "first_call_s": timing.first_s,
                "rounds": rounds,
            }
        )
    return rows


def cells(row) -> list[str]:
    """One line of the table."""
    low, high = row.images_per_second_quartiles
    ratio = row.ratio_to_eager
    return [
        row.implementation,
        interval(row.images_per_second, low, high, ",.1f"),
        f"{1e3 / row.images_per_second:,.2f}",
        "-" if ratio is None or np.isnan(ratio) else f"{ratio:.2f}",
        f"{row.first_call_s:.1f}",
    ]


def torch_contenders(
    module: ModuleType,
    models: tuple[StableDiffusion, SeedCodec],
    latents: np.ndarray,
    realisations: int,
    compiled: bool,
) -> tuple[list[Contender], list[str]]:
    """The same link in PyTorch with the same weights, eager and compiled, and notes."""
    import torch

    device = prepare_torch()
    if device is None:
        return [], [NO_DEVICE]
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    modes, problems = torch_modes(compiled, device)
    (pipe, codec), given, contenders = models, torch.from_numpy(latents).to(device), []
    for name, compile_it in modes.items():
        link = module.make_link(pipe, codec, codec.num_symbols(RATE), SNR_DB, compiled=compile_it, device=device)
        generator = torch.Generator(device).manual_seed(0)

        def call(link=link, generator=generator):
            images = link(given, realisations, generator)
            if device == "cuda":
                torch.cuda.synchronize()
            return images

        contenders.append(Contender(name, call))
    return contenders, [f"PyTorch {torch.__version__}{threads}.", *problems]


STAGES.register(
    Stage(
        name="system",
        title="images received a second",
        version=1,
        rank=70,
        run=lambda args, _: run(
            args.images, args.realisations, args.receptions, args.rounds, args.peers, args.torch_compile, args.ours
        ),
        columns=COLUMNS,
        cells=cells,
        splits_cpu=True,  # as eval.sweep does
    )
)
