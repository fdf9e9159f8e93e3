"""Benchmark of channel rollouts: block fading with noise, Jakes fading, TDL taps, and their Gaussian numbers."""

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.markdown import interval
from eval.measure import Contender, measure, prepare_torch
from eval.stages import STAGES, Measured, Stage
from eval.stages.codec import COMPILED, NO_DEVICE, compiler_problem
from megjax.channel import TDL, JakesFading, RayleighFading, transmit
from megjax.channel.random import complex_normal, fold_in_each

NUM_BLOCKS, BLOCK_SYMBOLS = 16, 64
NOISE_VAR = 0.1
DOPPLER, NUM_PATHS = 0.05, 20
"""Turns a block, and sinusoids a tap; Sionna's TDL also sums 20 unless told otherwise."""
PROFILE, DELAY_SPREAD_S, INTERVAL_S = "A", 100e-9, 1e-3
PEERS = ("numpy_channel", "torch_channel", "sionna_channel")
COPY = "copy"
"""The name of the contender that only copies the output: the ceiling for bytes written."""
COLUMNS = ["implementation", "thousand realisations/s", "first call (s)", "GB/s written", "of copy"]


def peers() -> dict[str, Any]:
    """Modules of the peers by name; None for one that is not installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.import_module(f"eval.peers.{name}")
        except ImportError:
            found[name] = None
    return found


def run(batches: tuple[int, ...], rounds: int, with_peers: bool, with_gaussians: bool = True) -> Measured:
    """Rows of the benchmark file, the peers that are missing, and notes."""
    installed = peers() if with_peers else dict.fromkeys(PEERS)
    missing = [name for name, module in installed.items() if module is None and with_peers]
    rows, notes = [], []
    if installed.get("torch_channel"):
        installed["torch_channel"], notes = usable_torch(installed["torch_channel"])
    for case, batch, written, contenders in cases(batches, installed, with_gaussians):
        title = f"{case}, batch {batch}"
        timings = measure(contenders, rounds, title)
        for name, timing in timings.items():
            low, high = timing.quartiles_s
            rows.append(
                {
                    "case": case,
                    "batch": batch,
                    "implementation": name,
                    "per_second": batch / timing.median_s,
                    "per_second_quartiles": [batch / high, batch / low],
                    "first_call_s": timing.first_s,
                    "bytes_written_per_second": written / timing.median_s,
                    "share_of_copy": timings[COPY].median_s / timing.median_s,
                    "rounds": rounds,
                }
            )
    return rows, missing, notes


def cells(row) -> list[str]:
    """One line of a table: implementation, rate with quartiles, first call, bytes written, share of a copy."""
    low, high = row.per_second_quartiles
    return [
        row.implementation,
        interval(row.per_second / 1e3, low / 1e3, high / 1e3, ",.1f"),
        f"{row.first_call_s:.2f}",
        f"{row.bytes_written_per_second / 1e9:.2f}",
        f"{100 * row.share_of_copy:.0f} %",
    ]


def usable_torch(module: ModuleType) -> tuple[ModuleType | None, list[str]]:
    """The peer in PyTorch, None where it cannot use JAX's device, and notes on what is left out."""
    if prepare_torch() is None:
        return None, [NO_DEVICE]
    problem = compile_problem()
    return module, [f"torch.compile was not measured: {problem}."] if problem else []


def compile_problem() -> str | None:
    """Why this stage leaves out torch.compile, if it does."""
    if jax.default_backend() != "gpu":
        return "this stage compiles on a GPU only"
    return compiler_problem(on_cpu=False)


def cases(
    batches: tuple[int, ...], installed: dict[str, Any], with_gaussians: bool = True
) -> Iterator[tuple[str, int, int, list[Contender]]]:
    """(case, batch, bytes of the output, contenders), built one after the other so that memory is given back."""
    yield from (block_fading(batch, installed) for batch in batches)
    yield from (jakes(batch, installed) for batch in batches)
    yield tdl(min(batches), installed)
    if with_gaussians:
        yield gaussians(min(batches))


def block_fading(batch: int, installed: dict[str, Any]) -> tuple[str, int, int, list[Contender]]:
    """T = 16 blocks of 64 given symbols a realisation: gains, noise, received symbols."""
    shape = (batch, NUM_BLOCKS, BLOCK_SYMBOLS)
    symbols = np.random.default_rng(0).standard_normal((*shape[:2], 2 * BLOCK_SYMBOLS), np.float32)
    symbols = (symbols * np.float32(np.sqrt(0.5))).view(np.complex64)

    def link(key, sent):
        fading_key, noise_key = jax.random.split(key)
        gains = RayleighFading().sample(fading_key, NUM_BLOCKS)
        return transmit(noise_key, sent, gains, jnp.ones(NUM_BLOCKS), NOISE_VAR)

    contenders = [_megjax(link, batch, jnp.asarray(symbols)), _copy(shape, np.complex64)]
    for peer in filter(None, installed.values()):
        contenders.append(Contender(peer.NAME, peer.block_fading(symbols, NOISE_VAR)))
    peer = installed.get("torch_channel")
    if peer and compile_problem() is None:
        contenders.append(Contender(COMPILED, peer.block_fading(symbols, NOISE_VAR, compiled=True)))
    return f"Rayleigh, {NUM_BLOCKS} blocks x {BLOCK_SYMBOLS} symbols, noise", batch, symbols.nbytes, contenders


def jakes(batch: int, installed: dict[str, Any]) -> tuple[str, int, int, list[Contender]]:
    """Gains of 16 blocks that follow Clarke's autocorrelation."""
    fading = JakesFading(DOPPLER, num_paths=NUM_PATHS)
    shape = (batch, NUM_BLOCKS)
    contenders = [_megjax(lambda key: fading.sample(key, NUM_BLOCKS), batch), _copy(shape, np.complex64)]
    for peer in filter(None, (installed["numpy_channel"], installed["torch_channel"])):
        contenders.append(Contender(peer.NAME, peer.jakes(batch, NUM_BLOCKS, DOPPLER, NUM_PATHS)))
    return f"Jakes, {NUM_BLOCKS} blocks, {NUM_PATHS} paths", batch, 8 * batch * NUM_BLOCKS, contenders


def tdl(batch: int, installed: dict[str, Any]) -> tuple[str, int, int, list[Contender]]:
    """Taps of 16 snapshots of a tapped delay line; Sionna's draws angles for each tap, the others share them."""
    doppler_hz = DOPPLER / INTERVAL_S
    model = TDL(PROFILE, DELAY_SPREAD_S, doppler_hz, interval_s=INTERVAL_S, num_paths=NUM_PATHS)
    powers = np.asarray(model.powers)
    shape = (batch, NUM_BLOCKS, len(powers))
    contenders = [_megjax(lambda key: model.sample(key, NUM_BLOCKS), batch), _copy(shape, np.complex64)]
    if numpy := installed["numpy_channel"]:
        contenders.append(Contender(numpy.NAME, numpy.tdl(batch, NUM_BLOCKS, DOPPLER, powers, NUM_PATHS)))
    if sionna := installed["sionna_channel"]:
        call = sionna.tdl(batch, NUM_BLOCKS, doppler_hz, INTERVAL_S, PROFILE, DELAY_SPREAD_S, NUM_PATHS)
        contenders.append(Contender(sionna.NAME, call))
    case = f"TDL-{PROFILE}, {NUM_BLOCKS} snapshots x {len(powers)} taps, {NUM_PATHS} paths"
    return case, batch, 8 * int(np.prod(shape)), contenders


def gaussians(batch: int) -> tuple[str, int, int, list[Contender]]:
    """The ways to make the 1,040 complex Gaussian numbers of a realisation that the library chose between."""
    count = NUM_BLOCKS * (BLOCK_SYMBOLS + 1)

    def by_erfinv(key, shape):
        low, high = np.nextafter(np.float32(-1), np.float32(0)), np.float32(1)
        reals = jax.random.uniform(key, (2, *shape), jnp.float32, low, high)
        return jax.lax.complex(jax.lax.erf_inv(reals[0]), jax.lax.erf_inv(reals[1]))

    def by_library_functions(key, shape):
        uniform = jax.random.uniform(key, (2, *shape), jnp.float32, np.float32(2**-24), 1.0)
        magnitude, angle = jnp.sqrt(-jnp.log(uniform[0])), np.float32(2 * np.pi) * uniform[1]
        return jax.lax.complex(magnitude * jnp.cos(angle), magnitude * jnp.sin(angle))

    def by_jax(key, shape):
        return jax.random.normal(key, shape, jnp.complex64)

    contenders = [
        _megjax(lambda key: complex_normal(key, (count,)), batch),
        _megjax(lambda key: complex_normal(key, (count,)), batch, name="megjax, 128 realisations at a time", piece=128),
        _megjax(lambda key: by_jax(key, (count,)), batch, name="jax.random.normal"),
        _megjax(lambda key: by_jax(key, (count,)), batch, name="jax.random.normal, 128 at a time", piece=128),
        _megjax(lambda key: by_jax(key, (count,)), batch, name="jax.random.normal, not partitionable", whole=False),
        _megjax(lambda key: by_jax(key, (count,)), batch, name="jax.random.normal, rbg keys", impl="rbg"),
        _megjax(lambda key: by_erfinv(key, (count,)), batch, name="jax.random.uniform, two erfinv"),
        _megjax(lambda key: by_library_functions(key, (count,)), batch, name="jax.random.uniform, log, cos, sin"),
        _copy((batch, count), np.complex64),
    ]
    return f"{count:,} complex Gaussian numbers", batch, 8 * batch * count, contenders


def _megjax(
    fn: Callable,
    batch: int,
    *data: jax.Array,
    name: str = "megjax",
    piece: int | None = None,
    whole: bool = True,
    impl: str | None = None,
) -> Contender:
    """`fn(key, *row)` of every realisation in one program, `piece` at a time; `whole`: partitionable Threefry."""

    def everything(key, data):
        index = jnp.arange(batch, dtype=jnp.uint32)
        # `fold_in_each` makes keys of other generators Threefry's.
        keys = fold_in_each(key, index) if impl is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        if piece is None:
            return jax.vmap(fn)(keys, *data)
        return jax.lax.map(lambda row: fn(*row), (keys, *data), batch_size=piece)

    program, key = jax.jit(everything), jax.random.key(0, impl=impl)

    def call():
        with jax.threefry_partitionable(whole):
            return program(key, data).block_until_ready()

    return Contender(name, call)


def _copy(shape: tuple[int, ...], dtype: type) -> Contender:
    source, program = jnp.ones(shape, dtype), jax.jit(jnp.copy)
    return Contender(COPY, lambda: program(source).block_until_ready())


STAGES.register(
    Stage(
        name="channel",
        title="channel rollouts",
        version=1,
        rank=10,
        run=lambda args, _: run(args.batches, args.rounds, args.peers, args.gaussians),
        columns=COLUMNS,
        cells=cells,
    )
)
