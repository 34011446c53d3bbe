# SPDX-License-Identifier: Apache-2.0
"""Directions of a site's values: where a projection begins, and orthonormal bases."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.stats import Moments
from jaxunlearn.typing import Array

_KINDS = ("contrast", "pca")
_SAME = 1e-4  # of a direction's length: what is left of it is rounding below this


def initial_directions(
    forget: Moments,
    count: int,
    *,
    retain: Moments | None = None,
    kind: str = "contrast",
    num_protected: int = 64,
    basis: Array | None = None,
) -> Array:
    """Orthonormal directions to begin a task's projection with.

    `pca`: the `count` top eigenvectors of the forget set's second moment, uncentred.
    `contrast`: the same of what is left of it outside the `num_protected` top eigenvectors B
    of the retain set's, (I - B^T B) C (I - B^T B), so that what the retain set uses
    most is not among them. Directions taken before are removed from C first.

    Args:
        forget: of one site, from `stats.moments`.
        num_directions: directions in each layer, >= 1.
        retain: of the same site and layers, for `contrast`.
        kind: "contrast" or "pca".
        num_protected: of the retain set's eigenvectors, less than half the units count.
        basis: [n layers, r, units], orthonormal; of earlier tasks.
    Returns:
        [n layers, count, units] float32.
    Raises:
        ValueError: if there are fewer free directions than asked for, the moments hold
            no token, NaN or infinity, or `retain` is missing or of other shape.
    Paper and code: the released code takes the top directions of retain minus forget,
        with the forget set's whole span, which is rounding noise once it has as many
        tokens as the model has dimensions; and it reads the layer's input while it
        projects its output. Here the sites are the same.
    References: https://arxiv.org/abs/2508.15449
    """
    owner = "wrap.initial_directions"
    _checks.positive_int(owner, count=count, num_protected=num_protected)
    _checks.one_of(owner, _KINDS, kind=kind)
    if kind == "contrast" and retain is None:
        raise ValueError(
            f"{owner} needs retain moments for kind='contrast', got None. Give them, "
            "or ask for kind='pca'."
        )
    used = [forget] if kind == "pca" else [forget, retain]
    for moments in used:
        if moments.second.shape != forget.second.shape:
            raise ValueError(
                f"{owner} needs moments of one site and its same layers, got shapes "
                f"{forget.second.shape} and {moments.second.shape}."
            )
        if not int(moments.count) or not bool(jnp.all(jnp.isfinite(moments.second))):
            raise ValueError(
                f"{owner} needs finite moments of at least one token, got count="
                f"{int(moments.count)} and NaN or infinity in some layer. Look at the "
                "batches and the params."
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
    if count > free:
        raise ValueError(
            f"{owner} needs count <= the {free} free directions of {units} units, got "
            f"count={count}. Ask for fewer, or spare fewer."
        )
    # Among equals, as where the set spans less than `count`, eigh may give directions
    # that were taken; the second step returns them to the complement.
    return orthonormal(_top(_outside(forget.second, inside), count), inside)


def orthonormal(new: Array, old: Array) -> Array:
    """Orthonormal rows that span, with `old`, what both span.

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
    """Whether no row of `new` lies in the span of `old` and the other rows."""
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
    vectors = jnp.linalg.eigh((second + second.mT) / 2)[1]  # columns, rising
    return jnp.flip(vectors[..., -count:], axis=-1).mT


def _matmul(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
