# SPDX-License-Identifier: Apache-2.0
"""Rotates the value units of attention to singular directions, the function unchanged.

There is no nonlinearity between the values of a head and the output projection, so any
basis of the value space computes the same function. In this basis units are ordered by
their singular values:

    rotated = edits.svd_values(model, params)
    found = stats.activity(model, rotated, batches, ("attention",))["attention"]

`prune_units` then removes singular directions instead of coordinates.
"""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, trees
from jaxunlearn.edits import _quantize
from jaxunlearn.typing import Array, Model, Params

_SITE = "attention"
_ZERO = 1e-6  # singular values below this fraction of a head's largest count as 0


def svd_values(model: Model, params: Params) -> Params:
    """Rotates each value head to the singular basis of values times output kernel.

    Let V [in, size] be the kernel of a value head, and O [size, heads * out] the rows
    of the output kernel for all query heads that read it. With the SVD V O = u s w^T,

        V <- u s^(1/2)    O <- s^(1/2) w^T

    The product V O is never formed: thin QR of V and O^T, then an SVD of [size, size].
    A bias b of the values becomes (b O w) s^(-1/2). Attention weights sum to 1, so its
    effect is a constant after the output kernel, which does not change. Directions with
    s = 0 keep rows of length 1 in O, so the bias has an effect through them.

    Args:
        model: one whose site `attention` names the two kernels (models.make).
        params: its parameters.
    Returns:
        A tree like params, with its dtypes and sharding; the units of each head are in
        order of decreasing s.
    Raises:
        ValueError: if the model has no such site, the kernels have LoRA leaves, or a
            side of a kernel is smaller than a head. KeyError: if a kernel is missing.
    Paper and code: the released code computes an SVD for each query head, which is not
        possible with grouped values, and inverts the full output kernel for the bias.
    References: https://arxiv.org/abs/2403.01267
    """
    owner = "svd_values"
    site = model.sites.get(_SITE)
    if site is None or site.reader is None or len(site.writers) != 1:
        raise ValueError(
            f"{owner} needs a model whose site {_SITE!r} is written by one kernel and "
            f"read by one, got sites {_checks.listed(model.sites)}. Use models.make."
        )
    (values,), outs = site.writers, site.reader
    leaves = trees.paths(params)
    fix = "Pass the params of this model, merged if they were split."
    _checks.has_keys(owner, "leaves", (values, outs), leaves, fix)
    bias = values.removesuffix("kernel") + "bias"
    for path in (values, outs):
        if path.removesuffix("kernel") + "lora_a" in leaves:
            raise ValueError(
                f"{owner} needs params without LoRA, got LoRA leaves for {path!r}. "
                "Merge them first (wrap.merge_lora)."
            )
    heads, size = site.grouping
    v, o = leaves[values], leaves[outs]
    if v.shape[1] < size or heads * o.shape[2] < size:
        raise ValueError(
            f"{owner} needs kernels at least as wide as a head of {size}, got shapes "
            f"{v.shape} and {o.shape}. Use prune_units without svd_values."
        )
    rotated = _rotate(v, o, leaves.get(bias), heads, size)
    new = dict(zip((values, outs, bias), rotated, strict=True))

    def leaf(path, x):
        if path not in new or new[path] is None:
            return x
        return _quantize.placed(new[path].astype(x.dtype), x)

    return trees.map_with_path(leaf, params)


def _rotate(v: Array, o: Array, b: Array | None, heads: int, size: int):
    layers, width, out = v.shape[0], v.shape[1], o.shape[2]
    v = v.astype(jnp.float32).reshape(layers, width, -1, size).swapaxes(1, 2)
    # [N, value heads, query heads of each, size, out] -> [..., size, heads * out]
    o = o.astype(jnp.float32).reshape(layers, -1, heads, size, out)
    o = o.swapaxes(2, 3).reshape(*v.shape[:2], size, heads * out)
    (q_v, r_v), (q_o, r_o) = (jnp.linalg.qr(x) for x in (v, o.mT))
    u, s, wt = jnp.linalg.svd(_matmul(r_v, r_o.mT))
    root = jnp.where(s > _ZERO * s[..., :1], jnp.sqrt(s), 1.0)
    new_v = _matmul(q_v, u * (s / root)[..., None, :])
    new_o = _matmul(root[..., None] * wt, q_o.mT)
    new_v = new_v.swapaxes(1, 2).reshape(layers, width, -1)
    new_o = new_o.reshape(*v.shape[:2], size, heads, out).swapaxes(2, 3)
    new_o = new_o.reshape(layers, -1, out)
    if b is None:
        return new_v, new_o, None
    b = b.astype(jnp.float32).reshape(*v.shape[:2], 1, size)
    b = _matmul(_matmul(b, r_o.mT), wt.mT) / root[..., None, :]
    return new_v, new_o, b.reshape(layers, -1)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
