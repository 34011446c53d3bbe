# SPDX-License-Identifier: Apache-2.0
"""Attention with grouped key-value heads, and the choice of its implementation."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import sharding
from jaxunlearn.models import _kernels
from jaxunlearn.models._config import DecoderConfig
from jaxunlearn.typing import Array


def for_sequences(
    config: DecoderConfig, mask: Array, positions: Array
) -> Callable[..., Callable[..., Array]]:
    """The function (window or None, layer index) -> attend(q, k, v), without a cache.

    Args:
        config: `attention` names the implementation, see `_kernels.choose`.
        mask: [B, L] bool, True at real tokens.
        positions: [B, L] int32, the index of each token among the real ones.
    """
    name = _kernels.choose(config)
    if name == "xla":
        return _plain(config, causal(mask), positions)
    # A kernel needs a static window, but the layer's index is traced: one branch of a
    # switch for each distinct window.
    windows = [
        None if w is None or w >= mask.shape[1] else w
        for w in config.windows or (None,) * config.layers
    ]
    distinct = list(dict.fromkeys(windows))
    settings = {"scale": config.attention_scale or config.head_dim**-0.5}
    if name == "cudnn":
        function, rows = _kernels.cudnn, _kernels.real_first(mask)
    elif name == "tokamax":
        function, rows = _kernels.tokamax, _kernels.real_first(mask)
        settings["softcap"] = config.attention_softcap
    else:
        function, rows = _kernels.splash, mask
        settings["softcap"] = config.attention_softcap
        settings["interpret"] = sharding.platform() == "cpu"

    def branch(window, q, k, v):
        attention = partial(function, window=window, **settings)
        return _kernels.per_device(attention, q, k, v, rows)

    branches = [partial(branch, window) for window in distinct]

    def kernel(window, index):
        if len(distinct) == 1:
            return branches[0]
        which = jnp.array([distinct.index(w) for w in windows])[index]
        return partial(jax.lax.switch, which, branches)

    return kernel


def for_trees(
    config: DecoderConfig, mask: Array, positions: Array, ends: Array
) -> Callable[..., Callable[..., Array]]:
    """As `for_sequences`, for rows that hold several sequences; see decoder.apply."""
    index = jnp.arange(mask.shape[1])
    visible = causal(mask) & (index[None, :, None] < ends[:, None, :])
    return _plain(config, visible, positions)


def _plain(config, visible, positions):
    distance = positions[:, :, None] - positions[:, None, :]

    def attends(window, index):
        return partial(
            attend,
            visible=visible if window is None else visible & (distance < window),
            scale=config.attention_scale,
            softcap=config.attention_softcap,
        )

    return attends


def causal(mask: Array) -> Array:
    """[B, L, L] bool from a token mask [B, L]: real tokens at or before each query."""
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
        visible: [B, L, S] bool, the keys that each query attends to. A query without
            any (padding) gets a finite mean of v.
        scale: factor on q k^T; 1 / sqrt(head_dim) if None.
        softcap: c, if scaled scores x become c * tanh(x / c) (Gemma 2).
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
    # With "blkgd" as output XLA transposes v first, which takes six times as long as
    # the product on CPUs.
    mixed = jnp.einsum("bkgls,bskd->bkgld", weights, v)
    return jnp.moveaxis(mixed, 3, 1).reshape(batch, length, heads, size)
