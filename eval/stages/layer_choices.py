"""Benchmark of ways to compute the costly layers of Stable Diffusion 1.5, beside what megjax takes there."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eval.markdown import interval
from eval.measure import Contender, measure
from eval.stages import STAGES, Measured, Stage
from megjax.cost import nominal_flops
from megjax.diffusion import attention, layers
from megjax.diffusion.winograd import winograd

CONVOLUTIONS = ((320, 64), (640, 32), (1280, 16), (1280, 8))
"""Channels and pixels along a side of 3x3 convolutions."""
DOUBLINGS = ((640, 32), (1280, 16))
ATTENTIONS = ((4096, 8, 40), (1024, 8, 80))
"""Tokens, heads and their size."""
DECODER = ((128, 512), (256, 256))
"""Channels and pixels along a side of one image's normalised convolutions in the image decoder."""
LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.2}
"""Of a value, in standard deviations of all."""
FIRST = "XLA's own"
COLUMNS = ["way", "ms", "TFLOP/s as defined", "of XLA's own", "temporaries (MiB)"]


class Case(NamedTuple):
    """A layer, its arguments, and the ways to compute it; the first is XLA's own, which the others must agree with."""

    name: str
    args: tuple[jax.Array, ...]
    ways: dict[str, Callable]
    taken: Callable
    """What megjax computes, whichever way it takes."""


def run(
    batch: int,
    rounds: int,
    convolutions: Sequence[tuple[int, int]] = CONVOLUTIONS,
    doublings: Sequence[tuple[int, int]] = DOUBLINGS,
    attentions: Sequence[tuple[int, int, int]] = ATTENTIONS,
    decoder: Sequence[tuple[int, int]] = DECODER,
) -> Measured:
    """Rows of the benchmark file, no missing peers, and notes; RuntimeError where a way computes something else."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    rows, notes = [], [f"Numbers are {jnp.dtype(dtype).name}."]
    allowed = LARGEST_DIFFERENCE[jnp.dtype(dtype).name]
    listed = [*cases(batch, dtype, convolutions, doublings, attentions), *decoder_cases(dtype, decoder)]
    for case in listed:
        programs = {name: jax.jit(fn) for name, fn in {**case.ways, "megjax": case.taken}.items()}
        expected, *others = (np.asarray(fn(*case.args), np.float32) for fn in programs.values())
        for name, found in zip(list(programs)[1:], others, strict=True):
            if not np.abs(found - expected).max() < allowed * expected.std():
                raise RuntimeError(f"{case.name}: {name} is not what XLA's own way gives")
        timings = measure([contender(name, fn, case.args) for name, fn in programs.items()], rounds, case.name)
        flops = nominal_flops(case.ways[FIRST], *case.args)
        memory = {name: fn.lower(*case.args).compile().memory_analysis() for name, fn in programs.items()}
        for name, timing in timings.items():
            rows.append(
                {
                    "case": case.name,
                    "batch": len(case.args[0]),
                    "implementation": name,
                    "seconds": timing.median_s,
                    "seconds_quartiles": list(timing.quartiles_s),
                    "flops": flops,
                    "flops_per_second": flops / timing.median_s,
                    "ratio_to_first": timings[FIRST].median_s / timing.median_s,
                    "temporary_bytes": memory[name].temp_size_in_bytes,
                    "first_call_s": timing.first_s,
                    "rounds": rounds,
                }
            )
    return rows, [], notes


def contender(name: str, fn: Callable, args: tuple[jax.Array, ...]) -> Contender:
    """A way, called to the end."""
    return Contender(name, lambda: jax.block_until_ready(fn(*args)))


def cells(row) -> list[str]:
    """One line of the table."""
    low, high = row.seconds_quartiles
    size = getattr(row, "temporary_bytes", None)
    return [
        row.implementation,
        interval(1e3 * row.seconds, 1e3 * low, 1e3 * high, ".3g"),
        f"{row.flops_per_second / 1e12:.3f}",
        f"{row.ratio_to_first:.2f}",
        "-" if size is None else f"{size / 2**20:,.0f}",
    ]


def cases(
    batch: int,
    dtype: Any,
    convolutions: Sequence[tuple[int, int]],
    doublings: Sequence[tuple[int, int]],
    attentions: Sequence[tuple[int, int, int]],
) -> Iterator[Case]:
    """Every layer; ways that were made for a CPU are not tried elsewhere."""
    rng, on_cpu = np.random.default_rng(0), jax.default_backend() == "cpu"

    def draw(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape, np.float32), dtype)

    for channels, side in convolutions:
        ways = {FIRST: layers._convolve}
        if on_cpu:
            ways |= {"Winograd, 16 products": winograd, "Winograd, one product of stacks": winograd_of_stacks}
            ways |= {"one product of gathered windows": layers._one_product}
        args = draw(batch, side, side, channels), draw(3, 3, channels, channels, scale=(9 * channels) ** -0.5)
        yield Case(f"3x3 convolution, {channels} channels, {side}x{side}", args, ways, layers.conv3x3)
    for channels, side in doublings:
        ways = {FIRST: layers._double}
        if on_cpu:
            ways |= {"one convolution of four phases": layers._double_by_phases}
            ways |= {"doubling, then Winograd": lambda x, kernel: winograd(layers._repeat(x), kernel)}
        args = draw(batch, side, side, channels), draw(3, 3, channels, channels, scale=(9 * channels) ** -0.5)
        taken = partial(layers.double, bias=jnp.zeros(channels, dtype))
        yield Case(f"doubling of {side}x{side} and convolution, {channels} channels", args, ways, taken)
    for tokens, heads, size in attentions:
        args = tuple(draw(batch, tokens, heads * size) for _ in range(3))

        def split(x, heads=heads):
            return x.reshape(*x.shape[:2], heads, -1)

        def whole(*args, split=split, **options):
            return attention.dot_product(*map(split, args), **options).reshape(args[0].shape)

        def no_maximum(*args, split=split):
            return attend_without_maximum(*map(split, args)).reshape(args[0].shape)

        ways = {FIRST: whole, **({"in parts, without the maximum": no_maximum} if on_cpu else {})}
        if jax.default_backend() == "gpu":
            ways["cuDNN"] = partial(whole, implementation="cudnn")
        taken = partial(attention.attend, num_heads=heads)
        yield Case(f"attention over {tokens:,} tokens, {heads} heads of {size}", args, ways, taken)


def decoder_cases(dtype: Any, decoder: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Normalisation, SiLU and convolution of one image's large features, whole and as megjax makes them."""
    for channels, side in decoder:
        rngs = nnx.Rngs(0)
        modules = (
            layers.GroupNorm(channels, 32, 1e-6, dtype, rngs=rngs),
            layers.conv(channels, channels, 3, dtype, rngs),
        )
        graph, params = nnx.split(modules)

        def whole(x, params, graph=graph, way=layers._convolve):
            norm, conv = nnx.merge(graph, params)
            kernel, bias = (value[...].astype(x.dtype) for value in (conv.kernel, conv.bias))
            return way(nnx.silu(norm(x)), kernel) + bias[None, None, None]

        def taken(x, params, graph=graph):
            return layers.norm_silu_conv(*nnx.merge(graph, params), x)

        ways = {FIRST: whole, **({"whole, Winograd": partial(whole, way=winograd)} if dtype == jnp.float32 else {})}
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, side, side, channels), np.float32), dtype)
        yield Case(f"normalisation and 3x3 convolution, {channels} channels, {side}x{side}", (x, params), ways, taken)


_INPUTS = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
_TAPS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_OUTPUTS = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)


def winograd_of_stacks(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`winograd` of even sides with its 16 products as one of stacks of matrices."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = jnp.stack(
        [padded[:, i : i + height - 1 : 2, j : j + width - 1 : 2] for i in range(4) for j in range(4)]
    ).reshape(4, 4, -1, channels)
    tiles = jnp.einsum("ai,bj,ijnc->abnc", _INPUTS, _INPUTS, windows)
    taps = jnp.einsum("ai,bj,ijco->abco", _TAPS, _TAPS, kernel)
    products = jnp.einsum("abnc,abco->abno", tiles, taps)
    out = jnp.einsum("ya,xb,abno->nyxo", _OUTPUTS, _OUTPUTS, products)
    out = out.reshape(batch, height // 2, width // 2, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return out.reshape(batch, height, width, -1)


def attend_without_maximum(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention [b n h d] head by head in parts, as megjax does on a CPU, but with a softmax that may overflow."""
    batch, tokens, heads, size = query.shape
    of_heads = [x.transpose(0, 2, 1, 3).reshape(batch * heads, tokens, size) for x in (query, key, value)]
    part = max(1, min(tokens, attention._LOGITS_OF_A_PART // tokens))

    def one_head(of_head):
        query, key, value = of_head
        scaled = key.T * np.float32(size**-0.5)

        def one_part(query):
            weights = jnp.exp(query @ scaled)
            return (weights @ value) / weights.sum(-1, keepdims=True)

        return jax.lax.map(one_part, query.reshape(-1, part, size)).reshape(tokens, size)

    out = jax.lax.map(one_head, tuple(of_heads))
    return out.reshape(batch, heads, tokens, size).transpose(0, 2, 1, 3)


STAGES.register(
    Stage(
        name="layers",
        title="ways to compute the costly layers",
        version=1,
        rank=40,
        run=lambda args, _: run(2, args.rounds),
        columns=COLUMNS,
        cells=cells,
    )
)
