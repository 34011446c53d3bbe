# SPDX-License-Identifier: Apache-2.0
"""Attention kernels of single platforms: cuDNN's on GPUs, Pallas' splash on TPUs.

Neither makes an array of scores, [B, H, L, L]. Both see what `_attention.attend` sees
in the same call, for real tokens: a padded query sees something else, finite, that no
real token reads. Neither partitions by itself under jit, so on a mesh each device runs
its own rows and heads under shard_map.

Splash in bfloat16 rounds the scaled queries once more than XLA's form does. In float32
a TPU multiplies with its default precision, as in XLA's form.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import backend
from jax.sharding import PartitionSpec

from jaxunlearn import sharding
from jaxunlearn.models._config import DecoderConfig
from jaxunlearn.sharding import BATCH
from jaxunlearn.typing import Array

_BLOCKS = (512, 256, 128)  # tokens of a tile; what splash can do is a multiple of 128
_BEST = {"tpu": "splash", "gpu": "cudnn"}


def choose(config: DecoderConfig) -> str:
    """Which kernel a call runs, or "xla": what config.attention says or "auto" finds.

    The platform is that of the mesh of the caller's `jax.set_mesh`, described machines
    included, else that of jax's default device.

    Raises:
        ValueError: if a kernel that was asked for by name cannot do what is needed.
    """
    platform = sharding.platform()
    if config.attention == "auto":
        best = _BEST.get(platform, "xla")
        return "xla" if _lacks(best, config, platform) else best
    if lack := _lacks(config.attention, config, platform):
        needed, came = lack
        raise ValueError(
            f"attention={config.attention!r} needs {needed}, got {came}. Change that, "
            "or set attention='auto', which takes XLA's form where a kernel cannot run."
        )
    return config.attention


def _lacks(kernel: str, config: DecoderConfig, platform: str) -> tuple[str, str] | None:
    """(what a kernel needs, what came) where it cannot run, else None."""
    if kernel == "xla":
        return None
    parts, dtype = sharding.parts_of("context"), config.compute_dtype
    if parts > 1:
        return "whole sequences", f"a mesh with context={parts}"
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

    cuDNN knows padding as a length, so tokens are brought to the front of their row and
    back. That also makes the window count real tokens, wherever padding is.

    Args:
        q: [B, L, H, head_dim] bfloat16 or float16.
        k, v: [B, L, K, head_dim].
        order: from `fronted`.
        scale: factor on the scores.
        window: how many tokens back a query sees; None for all.
    Returns:
        [B, L, H, head_dim].
    """
    forth, back, lengths = order
    q, k, v = (_rows(x, forth) for x in (q, k, v))
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
    return _rows(mixed, back)


def fronted(mask: Array) -> tuple[Array, Array, Array]:
    """(order [B, L] that brings real tokens to the front, its inverse, how many
    there are, at least 1) of a token mask."""
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
    """Splash attention, for one device. A length that 128 does not divide is padded.

    Tiles are as long as 512, 256 or 128 divides the length: multiples of 512 run best.

    Args:
        q: [B, L, H, head_dim].
        k, v: [B, L, K, head_dim].
        mask: [B, L] bool, True at real tokens. With a window these must follow one
            another, as tokens between are counted too.
        scale: factor on the scores.
        softcap: c where scaled scores x become c * tanh(x / c).
        window: how many tokens back a query sees; None for all.
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
    whole = length + padding
    block = next(size for size in _BLOCKS if whole % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    sizes = {f"block_{name}": block for name in (*names, "q_dq", "kv_dq")}
    if window is None:
        sees = pallas.CausalMask((whole, whole))
    else:
        sees = pallas.LocalMask((whole, whole), (window - 1, 0), 0)
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([sees] * q.shape[2]),
        block_sizes=pallas.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    # Padding is a segment of its own: every query sees itself at least.
    segments = mask.astype(jnp.int32)
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    with jax.named_scope(f"runs{_share(whole // block, block, window)}"):
        mixed = jax.vmap(kernel)(*heads_first, pallas.SegmentIds(segments, segments))
    return mixed.swapaxes(1, 2)[:, :length]


def per_device(
    function: Callable[..., Array], q: Array, k: Array, v: Array, rows: tuple
) -> Array:
    """function(q, k, v, rows) on the rows and heads of each device of the mesh.

    Where there are fewer key-value heads than parts of the axis tensor, each is
    repeated. An axis that does not divide the rows or the query heads is left out.

    Args:
        function: of local arrays, whose result is like q.
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
    wide = PartitionSpec(batch, None, heads, None)
    own = jax.tree.map(lambda _: PartitionSpec(batch), rows)
    return jax.shard_map(
        function, in_specs=(wide, wide, wide, own), out_specs=wide, check_vma=False
    )(q, k, v, rows)


def _share(blocks: int, block: int, window: int | None) -> str:
    """Tiles that run and all tiles of splash's grid, for the plan to count FLOPs."""
    reach = blocks if window is None else -(-(window - 1) // block) + 1
    wide = min(reach, blocks)
    run = wide * (wide + 1) // 2 + (blocks - wide) * wide
    return f"_{run}_{blocks * wide}"


def _rows(x: Array, order: Array) -> Array:
    """x[b, order[b, l]], for an order that names every token once."""
    places = x.at[jnp.arange(x.shape[0])[:, None], order]
    return places.get(unique_indices=True, mode="promise_in_bounds")
