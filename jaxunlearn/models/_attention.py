# SPDX-License-Identifier: Apache-2.0
"""Attention with grouped key-value heads: the one function every decoder block
calls, and what stands behind it on each platform."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import sharding
from jaxunlearn.models import _kernels
from jaxunlearn.models._config import DecoderConfig
from jaxunlearn.typing import Array


def over_whole(
    config: DecoderConfig, mask: Array, positions: Array
) -> Callable[..., Callable[..., Array]]:
    """(window or None, layer index) -> attend(q, k, v), over whole sequences.

    Args:
        config: `attention` says which kernel runs, see `_kernels.choose`.
        mask: [B, L] bool, True at real tokens.
        positions: [B, L] int32, each token's place among the real ones.
    """
    name = _kernels.choose(config)
    if name == "xla":
        sees = causal(mask)
        distance = positions[:, :, None] - positions[:, None, :]

        def plain(window, index):
            near = sees if window is None else sees & (distance < window)
            return partial(
                attend,
                visible=near,
                scale=config.attention_scale,
                softcap=config.attention_softcap,
            )

        return plain
    # A kernel's window is static, a layer's index is not: one branch for each window.
    windows = [
        None if w is None or w >= mask.shape[1] else w
        for w in config.windows or (None,) * config.layers
    ]
    kinds = list(dict.fromkeys(windows))
    settings = {"scale": config.attention_scale or config.head_dim**-0.5}
    if name == "cudnn":
        function, rows = _kernels.cudnn, _kernels.fronted(mask)
    else:
        function, rows = _kernels.splash, mask
        settings["softcap"] = config.attention_softcap
        settings["interpret"] = sharding.platform() == "cpu"

    def branch(window, q, k, v):
        own = partial(function, window=window, **settings)
        return _kernels.per_device(own, q, k, v, rows)

    branches = [partial(branch, window) for window in kinds]

    def kernel(window, index):
        if len(kinds) == 1:
            return branches[0]
        kind = jnp.array([kinds.index(w) for w in windows])[index]
        return partial(jax.lax.switch, kind, branches)

    return kernel


def causal(mask: Array) -> Array:
    """Who may see whom: [B, L, L] bool from a token mask [B, L], real tokens at or
    before."""
    length = mask.shape[1]
    return jnp.tril(jnp.ones((length, length), jnp.bool_))[None] & mask[:, None, :]


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    visible: Array,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """softmax(scale * q k^T) v with a float32 softmax.

    Args:
        q: [B, L, H, head_dim].
        k: [B, S, K, head_dim]; each of the K heads serves H / K query heads.
        v: [B, S, K, head_dim].
        visible: [B, L, S] bool. A query that sees nothing (padding) gets a finite mean
            of v.
        scale: 1 / sqrt(head_dim) if None.
        softcap: c where scaled scores x become c * tanh(x / c) (Gemma 2).
    Returns:
        [B, L, H, head_dim] in v's dtype.
    """
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], size)
    scores = jnp.einsum("blkgd,bskd->bkgls", q, k, preferred_element_type=jnp.float32)
    scores = scores * (size**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(visible[:, None, None], scores, lowest)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    # Asked for "blkgd", XLA would turn v around, six times the product's time on CPUs.
    mixed = jnp.einsum("bkgls,bskd->bkgld", weights, v)
    return jnp.moveaxis(mixed, 3, 1).reshape(batch, length, heads, size)
