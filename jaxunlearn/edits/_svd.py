# SPDX-License-Identifier: Apache-2.0
"""Value units of attention in singular directions, the function unchanged.

Between the values of a head and the output projection nothing bends, so that any basis
of that space computes the same. In this one units are ordered by how much they carry:

    turned = edits.svd_values(model, params)
    found = stats.activity(model, turned, batches, ("attention",))["attention"]

and `prune_units` then takes away singular directions instead of coordinates.
"""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, trees
from jaxunlearn.edits import _quantize
from jaxunlearn.typing import Array, Model, Params

_SITE = "attention"
_ZERO = 1e-6  # of a head's largest singular value: no value comes through below


def svd_values(model: Model, params: Params) -> Params:
    """Turns each value head into the singular basis of values times output kernel.

    For value head g with its kernel V [in, size] and the rows O [size, heads * out] of
    all query heads that read it, V O = u s w^T gives

        V <- u s^(1/2)    O <- s^(1/2) w^T

    without that product being made: thin QR of V and O^T, then an SVD of [size, size].
    A bias b of the values becomes (b O w) s^(-1/2); as attention's weights add up to 1
    it is a constant behind the output kernel, and stays that one. Directions of s = 0
    keep rows of length 1 in O, so that the bias still reaches it.

    Args:
        model: whose site `attention` names the two kernels (models.make).
        params: its parameters.
    Returns:
        A tree like params, in its dtypes and shards; units of a head by falling s.
    Raises:
        ValueError: if the model has no such site, there are LoRA's leaves beside the
            kernels, or a side is shorter than a head. KeyError: if they are missing.
    Paper and code: the released code takes the SVD for each query head, which grouped
        values do not allow, and an inverse of the whole output kernel for the bias.
    References: https://arxiv.org/abs/2403.01267
    """
    owner = "svd_values"
    site = model.sites.get(_SITE)
    if site is None or site.reader is None or len(site.writers) != 1:
        raise ValueError(
            f"{owner} needs a model whose site {_SITE!r} has one kernel before and one "
            f"behind it, got sites {_checks.listed(model.sites)}. Use models.make."
        )
    (values,), outs = site.writers, site.reader
    leaves = trees.paths(params)
    fix = "Give the params of this model, merged if they were split."
    _checks.has_keys(owner, "leaves", (values, outs), leaves, fix)
    bias = values.removesuffix("kernel") + "bias"
    for path in (values, outs):
        if path.removesuffix("kernel") + "lora_a" in leaves:
            raise ValueError(
                f"{owner} needs plain params, got LoRA's leaves beside {path!r}. Merge "
                "them first (wrap.merge_lora)."
            )
    heads, size = site.grouping
    v, o = leaves[values], leaves[outs]
    if v.shape[1] < size or heads * o.shape[2] < size:
        raise ValueError(
            f"{owner} needs kernels at least as wide as a head of {size}, got "
            f"{v.shape} and {o.shape}."
        )
    turned = _turn(v, o, leaves.get(bias), heads, size)
    new = dict(zip((values, outs, bias), turned, strict=True))

    def leaf(path, x):
        if path not in new or new[path] is None:
            return x
        return _quantize.placed(new[path].astype(x.dtype), x)

    return trees.map_with_path(leaf, params)


def _turn(v: Array, o: Array, b: Array | None, heads: int, size: int):
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
