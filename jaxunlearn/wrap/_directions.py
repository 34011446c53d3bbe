# SPDX-License-Identifier: Apache-2.0
"""Directions of a site's values: initial values for a projection, orthonormal bases."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.stats import Moments
from jaxunlearn.typing import Array

_KINDS = ("contrast", "pca")
_SAME = 1e-4  # of a direction's length: a smaller remainder is rounding error


def initial_directions(
    forget: Moments,
    num_directions: int,
    *,
    retain: Moments | None = None,
    kind: str = "contrast",
    num_protected: int = 64,
    basis: Array | None = None,
) -> Array:
    """Orthonormal initial directions for the projection of a task.

    `pca`: the top `num_directions` eigenvectors of the forget set's second moment C,
    uncentred. `contrast`: those of (I - B^T B) C (I - B^T B), where B are the top
    `num_protected` eigenvectors of the retain set's second moment, so that the
    directions which the retain set uses most are excluded. The directions of `basis`
    are removed from C first.

    Args:
        forget: of one site, from `stats.moments`.
        num_directions: directions in each layer, >= 1.
        retain: of the same site and layers, for `contrast`.
        kind: "contrast" or "pca".
        num_protected: number of protected eigenvectors of the retain set, less than
            half of the units.
        basis: [n layers, r, units], orthonormal; the directions of earlier tasks.
    Returns:
        [n layers, num_directions, units] float32.
    Raises:
        ValueError: if fewer directions than `num_directions` are free, the moments have
            no token or contain NaN or infinity, or `retain` is missing or of another
            shape.
    Paper and code: the released code takes the top directions of retain minus the span
        of the forget set, which is rounding noise if that set has as many tokens as the
        model has dimensions. It also reads the layer's input but projects its output.
        Here both are the same site.
    References: https://arxiv.org/abs/2508.15449
    """
    owner = "wrap.initial_directions"
    _checks.positive_int(
        owner, num_directions=num_directions, num_protected=num_protected
    )
    _checks.one_of(owner, _KINDS, kind=kind)
    if kind == "contrast" and retain is None:
        raise ValueError(
            f"{owner} needs retain moments for kind='contrast', got retain=None. Pass "
            "them, or kind='pca'."
        )
    used = [forget] if kind == "pca" else [forget, retain]
    for moments in used:
        if moments.second.shape != forget.second.shape:
            raise ValueError(
                f"{owner} needs moments of one site and the same layers, got shapes "
                f"{forget.second.shape} and {moments.second.shape}."
            )
        if not int(moments.count) or not bool(jnp.all(jnp.isfinite(moments.second))):
            raise ValueError(
                f"{owner} needs finite moments of at least one token, got count="
                f"{int(moments.count)} and NaN or infinity in a layer. Check batches "
                "and params."
            )
    units = forget.second.shape[-1]
    inside = jnp.zeros((len(forget.second), 0, units)) if basis is None else basis
    free = units - inside.shape[1]
    if kind == "contrast":
        if 2 * num_protected >= units:
            raise ValueError(
                f"{owner} needs num_protected below half of the {units} units, got "
                f"num_protected={num_protected}."
            )
        top = _top(_outside(retain.second, inside), min(num_protected, free))
        inside, free = jnp.concatenate([inside, top], axis=1), free - top.shape[1]
    if num_directions > free:
        raise ValueError(
            f"{owner} needs num_directions <= {free}, the free directions of {units} "
            f"units, got num_directions={num_directions}. Reduce it or num_protected."
        )
    # Where the set spans fewer than `num_directions`, eigh may return directions inside
    # the basis for equal eigenvalues; `orthonormal` moves them to its complement.
    return orthonormal(_top(_outside(forget.second, inside), num_directions), inside)


def orthonormal(new: Array, old: Array) -> Array:
    """Orthonormal rows that, together with `old`, have the span of `new` and `old`.

    Twice Gram-Schmidt against `old`, then QR in float32; differentiable in `new`.

    Args:
        new: [..., k, units].
        old: [..., r, units], orthonormal; r may be 0.
    Returns:
        [..., k, units] float32, orthogonal to `old`.
    """
    rows = new.astype(jnp.float32)
    for _ in range(2):
        rows = rows - _matmul(_matmul(rows, jnp.swapaxes(old, -1, -2)), old)
    return jnp.swapaxes(jnp.linalg.qr(jnp.swapaxes(rows, -1, -2))[0], -1, -2)


def independent(new: Array, old: Array) -> bool:
    """Whether no row of `new` is in the span of `old` and the other rows."""
    q = jnp.swapaxes(jnp.concatenate([old, new], axis=-2), -1, -2)
    length = jnp.linalg.norm(q, axis=-2, keepdims=True)
    singular = jnp.linalg.svd(q / jnp.maximum(length, 1e-30), compute_uv=False)
    return bool(jnp.all(length > 0) & jnp.all(singular > _SAME))


def project(values: Array, basis: Array) -> Array:
    """values - (values Q^T) Q for orthonormal rows Q [r, units], in float32."""
    wide = values.astype(jnp.float32)
    return (wide - _matmul(_matmul(wide, basis.mT), basis)).astype(values.dtype)


def _outside(second, basis):
    half = second - _matmul(_matmul(second, basis.mT), basis)
    return half - _matmul(basis.mT, _matmul(basis, half))


def _top(second, count):
    vectors = jnp.linalg.eigh((second + second.mT) / 2)[1]  # columns, ascending
    return jnp.flip(vectors[..., -count:], axis=-1).mT


def _matmul(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
