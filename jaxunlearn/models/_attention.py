# SPDX-License-Identifier: Apache-2.0
"""Attention with grouped key-value heads: the one function every decoder block
calls."""

import jax
import jax.numpy as jnp

from jaxunlearn.typing import Array


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
    return jnp.einsum("bkgls,bskd->blkgd", weights, v).reshape(
        batch, length, heads, size
    )
