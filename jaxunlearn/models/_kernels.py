# SPDX-License-Identifier: Apache-2.0
"""Attention kernels: cuDNN on GPUs, splash (Pallas) on TPUs, tokamax's on both.

None creates an array of scores, [B, H, L, L], except tokamax where it has no kernel.
For real tokens all compute what `_attention.attend` computes. A padded query gets other
finite values, which no real token reads. None is partitioned automatically under jit,
so on a mesh each device runs its rows and heads under shard_map.

In bfloat16 splash rounds the scaled queries once more than XLA's form does. In float32
a TPU multiplies with its default precision, as in XLA's form.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import backend
from jax.sharding import PartitionSpec

from jaxunlearn import _checks, sharding
from jaxunlearn.models._config import DecoderConfig
from jaxunlearn.sharding import BATCH
from jaxunlearn.typing import Array

_BLOCKS = (512, 256, 128)  # tokens of a tile; splash needs a multiple of 128
_BEST = {"tpu": "splash", "gpu": "cudnn"}


def choose(config: DecoderConfig) -> str:
    """The implementation that runs: config.attention, or the one that "auto" selects.

    The platform is that of the mesh in `jax.set_mesh` (which may be of described
    devices), or else that of jax's default device.

    Raises:
        ValueError: if the named kernel does not support the config, the mesh or the
            platform. ImportError: for "tokamax" without that library.
    """
    platform = sharding.platform()
    if config.attention == "auto":
        best = _BEST.get(platform, "xla")
        return "xla" if _unsupported(best, config, platform) else best
    if unsupported := _unsupported(config.attention, config, platform):
        needed, came = unsupported
        raise ValueError(
            f"attention={config.attention!r} needs {needed}, got {came}. Change it, or "
            "set attention='auto', which uses 'xla' where a kernel cannot run."
        )
    if config.attention == "tokamax":
        _checks.library("attention='tokamax'", "tokamax", "tokamax")
    return config.attention


def _unsupported(
    kernel: str, config: DecoderConfig, platform: str
) -> tuple[str, str] | None:
    """(what the kernel needs, what came) if it cannot run, else None."""
    if kernel == "xla":
        return None
    parts, dtype = sharding.parts_of("context"), config.compute_dtype
    if parts > 1:
        return "unsharded sequences", f"a mesh with context={parts}"
    if kernel == "tokamax":
        return None
    if kernel == "splash":
        if platform not in ("tpu", "cpu"):
            return "a TPU (or a CPU, where it is interpreted)", f"a {platform}"
        if dtype == "float16":
            return "compute_dtype 'bfloat16' or 'float32'", repr(dtype)
        return None
    if dtype not in ("bfloat16", "float16"):
        return "compute_dtype 'bfloat16' or 'float16'", repr(dtype)
    if config.attention_softcap is not None:
        return "scores without a cap", f"attention_softcap={config.attention_softcap}"
    if platform != "gpu":
        return "an NVIDIA GPU", f"a {platform}"
    if "cuda" not in backend.get_backend("gpu").platform_version:
        return "an NVIDIA GPU", "another GPU"
    newest = float(jax.local_devices(backend="gpu")[0].compute_capability) >= 9.0
    widest = 256 if newest else 128
    if config.head_dim % 8 or config.head_dim > widest:
        needed = f"a head_dim of at most {widest} that 8 divides"
        return needed, f"head_dim={config.head_dim}"
    return None


def cudnn(
    q: Array,
    k: Array,
    v: Array,
    order: tuple[Array, Array, Array],
    *,
    scale: float,
    window: int | None = None,
) -> Array:
    """cuDNN's attention through `jax.nn.dot_product_attention`, for one device.

    cuDNN represents padding by a length, so real tokens are moved to the front of their
    row, and the result is moved back. The window therefore counts real tokens only,
    wherever the padding is.

    Args:
        q: [B, L, H, head_dim] bfloat16 or float16.
        k, v: [B, L, K, head_dim].
        order: from `real_first`.
        scale: factor on the scores.
        window: number of tokens a query attends to, itself included; None for all.
    Returns:
        [B, L, H, head_dim].
    """
    forth, back, lengths = order
    q, k, v = (_take(x, forth) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return _take(mixed, back)


def tokamax(
    q: Array,
    k: Array,
    v: Array,
    order: tuple[Array, Array, Array],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Array:
    """The best of tokamax's kernels for the platform, for one device.

    Real tokens are moved as in `cudnn`, with the same arguments and result. `softcap`
    is c, if scaled scores x become c * tanh(x / c). Where tokamax has no kernel, on
    CPUs for example, it creates the scores.
    """
    from tokamax import dot_product_attention

    forth, back, lengths = order
    q, k, v = (_take(x, forth) for x in (q, k, v))
    mixed = dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        logits_soft_cap=softcap,
    )
    return _take(mixed, back)


def real_first(mask: Array) -> tuple[Array, Array, Array]:
    """Permutations that move the real tokens of a mask [B, L] to the front and back.

    Returns:
        (order [B, L] int32 with real tokens first, its inverse [B, L], number of real
        tokens [B] int32, at least 1).
    """
    forth = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    back = jnp.argsort(forth, axis=1).astype(jnp.int32)
    return forth, back, jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)


def splash(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> Array:
    """Splash attention, for one device. Lengths are padded to a multiple of 128.

    A tile has 512, 256 or 128 tokens, the largest that divides the padded length;
    multiples of 512 run fastest.

    Args:
        q: [B, L, H, head_dim].
        k, v: [B, L, K, head_dim].
        mask: [B, L] bool, True at real tokens. With a window they must be contiguous,
            because padding between them would count towards the window.
        scale: factor on the scores.
        softcap: c, if scaled scores x become c * tanh(x / c).
        window: number of tokens a query attends to, itself included; None for all.
        interpret: runs on a CPU, slowly.
    Returns:
        [B, L, H, head_dim].
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    length, padding = q.shape[1], -q.shape[1] % _BLOCKS[-1]
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    if padding:
        q, k, v, mask = (
            jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
            for x in (q, k, v, mask)
        )
    padded = length + padding
    block = next(size for size in _BLOCKS if padded % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    sizes = {f"block_{name}": block for name in (*names, "q_dq", "kv_dq")}
    if window is None:
        visible = pallas.CausalMask((padded, padded))
    else:
        visible = pallas.LocalMask((padded, padded), (window - 1, 0), 0)
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([visible] * q.shape[2]),
        block_sizes=pallas.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    # Padding is a separate segment, so every query attends to itself at least.
    segments = mask.astype(jnp.int32)
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    with jax.named_scope(f"runs{_tiles(padded // block, block, window)}"):
        mixed = jax.vmap(kernel)(*heads_first, pallas.SegmentIds(segments, segments))
    return mixed.swapaxes(1, 2)[:, :length]


def per_device(
    function: Callable[..., Array], q: Array, k: Array, v: Array, rows: tuple
) -> Array:
    """function(q, k, v, rows) on each device's rows and heads, under shard_map.

    Key-value heads are repeated if there are fewer than shards of the axis `tensor`. A
    mesh axis that does not divide the rows or the query heads is not used.

    Args:
        function: takes local arrays and returns an array shaped like q.
        q, k, v: [B, L, heads, head_dim].
        rows: arrays whose first axis is B.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(q, k, v, rows)
    parts = sharding.parts_of("tensor")
    if q.shape[2] % parts == 0:
        times = parts // math.gcd(parts, k.shape[2])
        k, v = (jnp.repeat(x, times, axis=2) if times > 1 else x for x in (k, v))
    batch, _, heads, _ = sharding.spec(q.shape, BATCH, None, "tensor", None)
    qkv_spec = PartitionSpec(batch, None, heads, None)
    rows_spec = jax.tree.map(lambda _: PartitionSpec(batch), rows)
    return jax.shard_map(
        function,
        in_specs=(qkv_spec, qkv_spec, qkv_spec, rows_spec),
        out_specs=qkv_spec,
        check_vma=False,
    )(q, k, v, rows)


def _tiles(blocks: int, block: int, window: int | None) -> str:
    """_RUN_ALL: the tiles that run and all tiles, by which `plan` counts FLOPs."""
    reach = blocks if window is None else -(-(window - 1) // block) + 1
    wide = min(reach, blocks)
    run = wide * (wide + 1) // 2 + (blocks - wide) * wide
    return f"_{run}_{blocks * wide}"


def _take(x: Array, order: Array) -> Array:
    """x[b, order[b, l]], for an order that is a permutation of every row."""
    places = x.at[jnp.arange(x.shape[0])[:, None], order]
    return places.get(unique_indices=True, mode="promise_in_bounds")
