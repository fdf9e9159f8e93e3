"""Channel rollouts: a function of one realisation, streamed over as many of them as one likes."""

import functools
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Key
from tqdm import tqdm

from megjax.channel.random import fold_in_each
from megjax.channel.reductions import Moments, Reduction
from megjax.configs import require_count
from megjax.files import read_safetensors, read_safetensors_metadata, write_safetensors
from megjax.keys import threefry
from megjax.sharding import mesh_of

_LIMIT = 2**32 - 1
_SAVE_EVERY_S = 10.0


def rollout(
    key: Key[Array, ""],
    fn: Callable[..., Any],
    num: int,
    chunk: int = 65_536,
    *,
    args: tuple = (),
    reduction: Reduction | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
    checkpoint: Path | str | None = None,
) -> Any:
    """Draw `num` realisations of `fn(realisation_key, *args)` and reduce them as they come.

    Realisation i gets the key `fold_in(key, i)`, where a key of another generator than Threefry is first made one of
    Threefry (`megjax.keys`): neither `chunk`, the number computed at a time, nor the number of devices changes what it
    draws; only the rounding of the sums depends on them. `fn` returns an array or a tree of arrays for one realisation.
    It is vmapped, compiled once, and kept compiled for further calls with the same `fn` object as long as the globals
    and attributes that it reads are the same; what varies between calls is better put into `args`, a tree of arrays or
    channel models, which needs no new compilation. (What is inside a `jax.jit` of yours stays as JAX first saw it.)

    Args:
        num: realisations, at most 2^32 - 1.
        chunk: realisations computed at a time, over all devices; the results of two chunks may be in memory at once.
        reduction: `Moments()` by default, which returns `Statistics`; `Histogram`, `Samples` or a `Reduction` of yours.
        devices: the chunk is split evenly over them; default: all local devices.
        progress: a bar on stderr, if that is a terminal.
        checkpoint: file (.safetensors) that keeps the sums every ten seconds and on interruption. If it exists, the
            rollout goes on where it stopped, to the same numbers bit for bit when `chunk` and devices are the same.
            It stays when the rollout is done: the same call then returns at once, and one with a larger `num` goes on.

    Raises ValueError for bad counts, a key that is not a scalar typed key, an `fn` that returns no arrays, or a
    checkpoint of another rollout.
    """
    reduction = Moments() if reduction is None else reduction
    _check(key, fn, num, chunk, args, reduction)
    key = threefry(key)
    devices = tuple(jax.local_devices() if devices is None else devices)
    if not devices:
        raise ValueError("devices is empty; it must name at least one device")
    share = -(-min(chunk, num) // len(devices))
    size = share * len(devices)
    program, structure = _trace(fn, reduction, key, args)
    step = _compiled_step(fn, reduction, share, devices, program)
    store = None if checkpoint is None else _Checkpoint(Path(checkpoint), _fingerprint(program, key, args, reduction))
    # (realisations done, their sums): one variable, so that an interrupt finds them in step.
    state = (0, None) if store is None else store.load(structure)
    if state[0] > num:
        raise ValueError(f"num is {num}; checkpoint {str(checkpoint)!r} already holds {state[0]} realisations")
    with tqdm(total=num, initial=state[0], unit=" draws", unit_scale=True, disable=None if progress else True) as bar:
        try:
            starts = range(state[0], num, size)
            for start, parts in _one_ahead(lambda i: step(key, np.uint32(i), np.uint32(num), args), starts):
                end = min(start + size, num)
                state = (end, _merge(reduction, state[1], parts, len(devices)))
                bar.update(end - start)
                if store is not None:
                    store.save(*state, at_once=end == num)
        except KeyboardInterrupt:
            if store is not None and state[0]:
                store.save(*state, at_once=True)
            raise
    return reduction.finish(state[1])


def _one_ahead(step: Callable[[int], Any], starts: range) -> Iterator[tuple[int, Any]]:
    """(first index, parts) of every chunk; each is dispatched before the one ahead of it is handed out."""
    pending = None
    for index in starts:
        following = (index, step(index))
        if pending is not None:
            yield pending
        pending = following
    if pending is not None:
        yield pending


def _merge(reduction: Reduction, total: Any, parts: Any, num_devices: int) -> Any:
    """`total` and the parts of one chunk, leaves [device ...], in the order of the realisations."""
    parts = jax.device_get(parts)
    for i in range(num_devices):
        part = jax.tree.map(lambda leaf, i=i: leaf[i], parts)
        total = part if total is None else reduction.merge(total, part)
    return total


def _check(key: Any, fn: Any, num: Any, chunk: Any, args: Any, reduction: Any) -> None:
    """ValueError for arguments of `rollout` that cannot work."""
    require_count("num", num)
    require_count("chunk", chunk)
    if num > _LIMIT:
        raise ValueError(f"num is {num}; it must be at most 2^32 - 1 = {_LIMIT}")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((key, args))):
        raise ValueError("rollout runs outside jit, vmap and grad; apply them to what fn does")
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape:
        raise ValueError(f"key is {key!r}; it must be one typed key, as jax.random.key(seed) makes")
    if not callable(fn):
        raise ValueError(f"fn is {fn!r}; it must be a function of a key")
    if not isinstance(args, tuple):
        raise ValueError(f"args is a {type(args).__name__}; it must be a tuple: (value,) for one argument")
    if isinstance(reduction, type) or not isinstance(reduction, Reduction):
        raise ValueError(f"reduction is {reduction!r}; it must be Moments(), Histogram(...), Samples() or a Reduction")


def _compiled_step(fn: Callable, reduction: Reduction, share: int, devices: tuple, program: Any) -> Callable[..., Any]:
    """`_make_step`, kept for the next call with the same function and the same traced program, if that can be told."""
    constants = tuple(_constants(program))
    # Arrays of JAX do not change, so that it is enough to know that they are the same objects.
    held = tuple(_Same(value) for value in constants if isinstance(value, jax.Array))
    digest = _digest(program, (value for value in constants if not isinstance(value, jax.Array)))
    try:
        return _kept_step(fn, reduction, share, devices, digest, held)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _make_step(fn, reduction, share, devices)


def _make_step(fn: Callable[..., Any], reduction: Reduction, share: int, devices: tuple) -> Callable[..., Any]:
    """jit of (key, first index, num, args) -> the parts of one chunk, stacked over devices on the first axis."""
    mesh = mesh_of(devices)

    def part(key, start, num, args):
        offset = jnp.uint32(jax.lax.axis_index("data")) * np.uint32(share)
        index = start + offset + jnp.arange(share, dtype=jnp.uint32)
        valid = (index < num) & (index >= start)  # the latter fails where the sum has passed 2^32
        values = jax.vmap(lambda k: fn(k, *args))(fold_in_each(key, index))
        return jax.tree.map(lambda leaf: leaf[None], reduction.partial(values, valid))

    everywhere, split = PartitionSpec(), PartitionSpec("data")
    # The parts of a padded last chunk differ between devices in ways that its checker cannot follow.
    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(everywhere,) * 4, out_specs=split, check_vma=False))


class _Same:
    """A value that equals itself only."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self.value is other.value


@functools.lru_cache(maxsize=32)
def _kept_step(fn, reduction, share: int, devices: tuple, digest: str, held: tuple) -> Callable[..., Any]:
    """`_make_step` of a function whose program has this digest and these `_Same` arrays."""
    del digest, held
    return _make_step(fn, reduction, share, devices)


def _trace(fn: Callable[..., Any], reduction: Reduction, key: Key[Array, ""], args: tuple) -> tuple[Any, Any]:
    """`fn` as a program, and the tree structure of the reduction's parts; ValueError if it does not return arrays.

    JAX keeps the programs of function objects; the new function makes it trace `fn` again, which may read globals and
    attributes that have changed.
    """
    try:
        program, shapes = jax.make_jaxpr(lambda key, *args: fn(key, *args), return_shape=True)(key, *args)
    except TypeError as error:
        if "is not a valid JAX type" in str(error):
            raise ValueError(f"fn must return an array or a tree of arrays: {error}") from None
        raise
    if not jax.tree.leaves(shapes):
        raise ValueError("fn returns nothing; it must return an array or a tree of arrays")
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), shapes)
    return program, jax.tree.structure(jax.eval_shape(reduction.partial, batch, jax.ShapeDtypeStruct((1,), jnp.bool_)))


def _fingerprint(program: Any, key: Key[Array, ""], args: tuple, reduction: Reduction) -> str:
    """Digest of what determines the result: the traced program with its constants, the arguments and the key.

    What a host callback computes cannot be seen here.
    """
    values = (jax.random.key_data(key), *_constants(program), *jax.tree.leaves(args))
    return _digest(program, values, f"{reduction!r} {jax.tree.structure(args)}")


def _digest(program: Any, values: Iterable[Any], text: str = "") -> str:
    """SHA-256 of a program's text, of more text, and of these values."""
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", f"{program.jaxpr} {text}").encode())
    for leaf in values:
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) else leaf
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _constants(program: Any) -> Iterator[Any]:
    """Constants of a traced program and of the programs inside it."""
    yield from getattr(program, "consts", ())
    for equation in getattr(program, "jaxpr", program).eqns:
        yield from (variable.val for variable in equation.invars if hasattr(variable, "val"))
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns"):
                yield from _constants(value)


class _Checkpoint:
    """The sums of an unfinished rollout in one safetensors file, replaced in one step."""

    def __init__(self, path: Path, fingerprint: str):
        if path.suffix != ".safetensors":
            raise ValueError(f"checkpoint is {str(path)!r}; it must end in .safetensors")
        if not path.parent.is_dir():
            raise ValueError(f"checkpoint is {str(path)!r}; its folder does not exist")
        self.path, self.fingerprint, self.saved_at = path, fingerprint, time.monotonic()

    def load(self, structure: Any) -> tuple[int, Any]:
        """Realisations done and their sums; (0, None) without a file."""
        if not self.path.exists():
            return 0, None
        metadata, arrays = read_safetensors_metadata(self.path), read_safetensors(self.path)
        if metadata.get("rollout") != self.fingerprint or len(arrays) != structure.num_leaves:
            raise ValueError(
                f"checkpoint {str(self.path)!r} belongs to another rollout (key, fn, args or reduction differ); "
                "remove it or name another file"
            )
        leaves = [_stored_leaf(arrays, i) for i in range(len(arrays))]
        return int(metadata["done"]), jax.tree.unflatten(structure, leaves)

    def save(self, done: int, total: Any, at_once: bool) -> None:
        """Write the sums now, or when ten seconds have passed since they last were."""
        if not at_once and time.monotonic() - self.saved_at < _SAVE_EVERY_S:
            return
        leaves = dict(_named_leaf(i, np.asarray(leaf, order="C")) for i, leaf in enumerate(jax.tree.leaves(total)))
        write_safetensors(self.path, leaves, {"rollout": self.fingerprint, "done": str(done)})
        self.saved_at = time.monotonic()


def _named_leaf(i: int, leaf: np.ndarray) -> tuple[str, np.ndarray]:
    """Safetensors has no complex128: such a leaf is kept as pairs of reals."""
    return (
        (f"{i}.pairs", leaf.reshape(*leaf.shape, 1).view(np.float64)) if leaf.dtype == np.complex128 else (f"{i}", leaf)
    )


def _stored_leaf(arrays: Mapping[str, np.ndarray], i: int) -> np.ndarray:
    pairs = arrays.get(f"{i}.pairs")
    return arrays[f"{i}"] if pairs is None else pairs.view(np.complex128)[..., 0]
