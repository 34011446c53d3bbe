# SPDX-License-Identifier: Apache-2.0
"""What the combiners share: reading the terms, schedules, and a mixed sum of leaves."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.typing import Array, PyTree

Schedule = Callable[[Array], Array]


def at(value: float | Array | Schedule, count: Array, dtype=jnp.float32) -> Array:
    """The value of a number or a schedule at this step, as a scalar array."""
    return jnp.asarray(value(count) if callable(value) else value).astype(dtype)


def pair(
    owner: str, grads: Mapping[str, PyTree], upper: str, lower: str
) -> tuple[PyTree, PyTree]:
    """The gradients of the two levels, once their names and shapes are known to fit."""
    exactly(owner, grads, (upper, lower))
    same_trees(owner, {upper: grads[upper], lower: grads[lower]})
    return grads[upper], grads[lower]


def exactly(owner: str, grads: Mapping[str, PyTree], names: Sequence[str]) -> None:
    """Raises unless gradients came for the named terms, no fewer and no more."""
    has_terms(owner, grads, names)
    surplus = [name for name in grads if name not in names]
    if surplus:
        raise ValueError(
            f"{owner} combines {_checks.listed(names)}, but gradients came for "
            f"{_checks.listed(surplus)} too. Add those losses inside one of the terms, "
            "or combine with weighted_sum and a weight for each."
        )


def has_terms(owner: str, grads: Mapping[str, PyTree], names: Sequence[str]) -> None:
    """Raises unless gradients came for the named terms."""
    if not isinstance(grads, Mapping):
        raise TypeError(
            f"{owner} needs a mapping from term to gradients, got "
            f"{type(grads).__name__}. Put the combiner first in the chain."
        )
    fix = "Rename the terms or the combiner's arguments."
    _checks.has_keys(owner, "the gradients of terms", names, grads, fix)


def same_trees(owner: str, grads: Mapping[str, PyTree]) -> None:
    """Raises ValueError unless all terms have gradients of one structure and shape."""
    (first, tree), *others = grads.items()
    for name, other in others:
        if jax.tree.structure(tree) != jax.tree.structure(other):
            raise ValueError(
                f"{owner} needs gradients of one tree, but those of {first!r} and "
                f"{name!r} differ: {jax.tree.structure(tree)} and "
                f"{jax.tree.structure(other)}."
            )
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
            _checks.same_shape(owner, **{first: a, name: b})


def mix(leaves: Sequence[Array], factors: Sequence[Array | None]) -> Array:
    """Sum of factor * leaf (None: 1) in float32 or wider, cast to the first's dtype."""
    dtype = widest(leaves)
    total = None
    for leaf, factor in zip(leaves, factors, strict=True):
        part = leaf.astype(dtype)
        part = part if factor is None else factor.astype(dtype) * part
        total = part if total is None else total + part
    return total.astype(leaves[0].dtype)


def widest(leaves: Sequence[Array]) -> jnp.dtype:
    """The dtype to compute in: that of the widest leaf, and at least float32."""
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def different(owner: str, upper: str, lower: str) -> None:
    """Raises ValueError if both levels name one term."""
    if upper == lower:
        raise ValueError(
            f"{owner} needs two terms, got {upper!r} for both upper and lower."
        )
