"""Multi-head attention, computed by whichever kernel a platform, a type and a shape have.

- TPU, bfloat16, many tokens: the flash kernel of JAX (T. Dao, "FlashAttention-2", 2023), in Pallas.
- GPU, half precision: cuDNN's fused attention.
- CPU, many tokens: heads one by one and queries in parts, which stay in the caches.
- CPU and TPU, float16: in float32, as only GPUs have float16 products with float32 sums.
- Everything else: XLA's own, queries in parts where float32 logits would not fit.
"""

import contextlib
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from megjax.sharding import RULES

MANY_LOGITS = 2**18
"""Logits of one head, 1 MiB of float32, from which on a CPU computes attention in parts that stay in its caches."""
_LOGITS_OF_A_PART = 2**21
LOGITS_AT_ONCE = 2**28
"""Float32 logits of all heads, 1 GiB, that are made at once where heads are not taken one by one."""
FLASH_TOKENS = 1024
"""Fewest queries and keys for which a TPU's flash kernel beats logits in memory."""
_LANES = 128
_FLASH_QUERIES, _FLASH_KEYS = 1024, 512
"""Blocks of the flash kernel and its gradient that fit the on-chip memory of every TPU generation.

Longer blocks of queries read keys and values less often; for heads of more than 128 numbers they are `_FLASH_KEYS`.
"""


def dot_product(query, key, value, **options):
    """`jax.nn.dot_product_attention`, inside which half precision meets float32 by implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, key, value, **options)


def attend(
    query: Float[Array, "b q d"],
    key: Float[Array, "b s d"],
    value: Float[Array, "b s d"],
    num_heads: int,
    *,
    mask: Bool[Array, "q s"] | None = None,
    upcast: bool = False,
) -> Float[Array, "b q d"]:
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, eq. 1), softmax in float32.

    `upcast` asks for logits of float32 queries and keys, as checkpoints with `upcast_attention` do. The flash kernel
    needs no conversion for that: products of bfloat16 numbers are exact in float32, and it adds them in float32.
    """
    dtype = value.dtype
    query, key, value = (x.reshape(*x.shape[:2], num_heads, -1) for x in (query, key, value))

    def upcasting(kernel, upcast=upcast):
        return lambda *heads: kernel(*(x.astype(jnp.float32) if upcast else x for x in heads)).astype(dtype)

    whole = _attend_whole
    if mask is not None:
        whole = partial(dot_product, mask=mask[None, None])
    kernels = {}
    if dtype == jnp.float16:
        # Only GPUs add products of float16 numbers in float32: elsewhere JAX refuses them.
        kernels = dict.fromkeys(("cpu", "tpu"), upcasting(whole, upcast=True))
    if mask is None and query.shape[1] * key.shape[1] >= MANY_LOGITS:
        kernels["cpu"] = upcasting(_attend_in_parts, upcast or dtype == jnp.float16)
    if mask is None and _can_flash(query, key, value):
        kernels["tpu"] = _attend_flash
    choose = partial(jax.lax.platform_dependent, **kernels, default=upcasting(whole)) if kernels else upcasting(whole)
    out = choose(query, key, value)
    return out.reshape(*out.shape[:2], -1)


def _can_flash(query, key, value) -> bool:
    """Whether a TPU runs the flash kernel on these heads, and it is known how devices share them.

    They are one device's own without a mesh on one device and inside `jax.shard_map`, and shared by the rules of
    `megjax.sharding` under `jax.set_mesh`. A program for several devices that is compiled ahead of time needs one of
    the two.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shared = {name for name in mesh.auto_axes if mesh.shape[name] > 1}
    known = (
        shared <= {*RULES["batch"], *RULES["heads"]} and not (shared and mesh.manual_axes) and not mesh.explicit_axes
    )
    if mesh.empty and jax.device_count() > 1:
        known = False
    large = min(query.shape[1], key.shape[1]) >= FLASH_TOKENS and query.size > 0
    if not (known and large and query.dtype == jnp.bfloat16):
        return False
    if mesh.manual_axes:
        # With `check_vma` a shard_map refuses the kernel, which does not say over which axes its result varies.
        with contextlib.suppress(ValueError):
            jax.eval_shape(_flash, query, key, value)
            return True
        return False
    return True


def _attend_flash(query, key, value):
    """`jax.nn.dot_product_attention` by the Pallas kernel, which every device runs on its own images and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return _flash(query, key, value)

    def dividing(names, size):
        found = tuple(name for name in names if name in mesh.axis_names)
        return found if size % math.prod(mesh.shape[name] for name in found) == 0 else None

    spec = PartitionSpec(dividing(RULES["batch"], query.shape[0]), None, dividing(RULES["heads"], query.shape[2]))
    return jax.shard_map(_flash, in_specs=spec, out_specs=spec, check_vma=False)(query, key, value)


def _flash(query, key, value):
    """The kernel on one device; tokens and large heads are padded to whole lanes, and padded keys are masked."""
    queries, keys, size = query.shape[1], key.shape[1], query.shape[3]
    heads_first = [_pad(x).swapaxes(1, 2) for x in (query, key, value)]
    padded_queries, padded_keys = (x.shape[2] for x in heads_first[:2])
    segments = None
    if padded_keys > keys:
        masks = (jnp.ones(padded_queries, jnp.int32), (jnp.arange(padded_keys) < keys).astype(jnp.int32))
        segments = flash.SegmentIds(*(jnp.broadcast_to(mask, (query.shape[0], *mask.shape)) for mask in masks))
    q = _block(padded_queries, _FLASH_QUERIES if size <= _LANES else _FLASH_KEYS)
    k = _block(padded_keys, _FLASH_KEYS)
    forward = {"block_b": 1, "block_q": q, "block_k_major": k, "block_k": k}
    of_keys = {"block_q_major_dkv": q, "block_q_dkv": q, "block_k_major_dkv": k, "block_k_dkv": k}
    of_queries = {"block_q_dq": q, "block_k_major_dq": k, "block_k_dq": k}
    sizes = flash.BlockSizes(**forward, **of_keys, **of_queries)
    out = flash.flash_attention(*heads_first, segment_ids=segments, sm_scale=size**-0.5, block_sizes=sizes)
    return out.swapaxes(1, 2)[:, :queries, :, :size]


def _pad(x):
    size = x.shape[3]
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _LANES), (0, 0), (0, -size % _LANES if size > _LANES else 0)))


def _block(tokens: int, limit: int) -> int:
    """The largest block of whole lanes up to the limit that divides the tokens."""
    lanes = tokens // _LANES
    return _LANES * max(n for n in range(1, limit // _LANES + 1) if lanes % n == 0)


def _attend_whole(query, key, value):
    if jax.default_backend() == "gpu" and query.dtype.itemsize == 2:
        # cuDNN raises for shapes and GPUs that it does not know.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            fused = partial(dot_product, implementation="cudnn")
            # Whatever the backend, the layers can be lowered for another platform, as to count their operations.
            return jax.lax.platform_dependent(query, key, value, cuda=fused, default=dot_product)
    batch, queries, heads, size = query.shape
    part = max(1, LOGITS_AT_ONCE // max(1, batch * heads * key.shape[1]))
    if query.dtype != jnp.float32 or part >= queries:
        return dot_product(query, key, value)
    count = -(-queries // part)
    parts = jnp.pad(query, ((0, 0), (0, count * part - queries), (0, 0), (0, 0)))
    parts = parts.reshape(batch, count, part, heads, size).swapaxes(0, 1)
    # Gradients make the logits again: kept, they would be as many as those of all queries.
    attended = jax.lax.map(jax.checkpoint(lambda of: dot_product(of, key, value)), parts)
    return attended.swapaxes(0, 1).reshape(batch, -1, heads, size)[:, :queries]


def _attend_in_parts(query, key, value):
    batch, queries, heads, size = query.shape
    of_heads = [x.transpose(0, 2, 1, 3).reshape(batch * heads, -1, size) for x in (query, key, value)]
    part = min(queries, max(1, _LOGITS_OF_A_PART // key.shape[1]))
    count = -(-queries // part)

    def one_head(of_head):
        query, key, value = of_head
        scaled = key.T * np.asarray(size**-0.5, key.dtype)

        def one_part(query):
            logits = (query @ scaled).astype(jnp.float32)
            weights = jnp.exp(logits - logits.max(-1, keepdims=True))
            return (weights.astype(value.dtype) @ value) / weights.sum(-1, keepdims=True).astype(value.dtype)

        whole = jnp.pad(query, ((0, count * part - queries), (0, 0))).reshape(count, part, size)
        return jax.lax.map(one_part, whole).reshape(-1, size)[:queries]

    out = jax.lax.map(one_head, tuple(of_heads))
    return out.reshape(batch, heads, queries, size).transpose(0, 2, 1, 3)
