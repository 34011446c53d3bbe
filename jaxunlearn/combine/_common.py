# SPDX-License-Identifier: Apache-2.0
"""Helpers of the combiners: checks of the terms, schedules, and weighted sums."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision
from jaxunlearn.typing import Array, PyTree

Schedule = Callable[[Array], Array]


def at(value: float | Array | Schedule, count: Array, dtype=jnp.float32) -> Array:
    """The value of a number or a schedule at step `count`, as a scalar array."""
    return jnp.asarray(value(count) if callable(value) else value).astype(dtype)


def pair(
    owner: str, grads: Mapping[str, PyTree], upper: str, lower: str
) -> tuple[PyTree, PyTree]:
    """(upper, lower) gradients, after a check of their names and shapes."""
    exactly(owner, grads, (upper, lower))
    same_trees(owner, {upper: grads[upper], lower: grads[lower]})
    return grads[upper], grads[lower]


def exactly(owner: str, grads: Mapping[str, PyTree], names: Sequence[str]) -> None:
    """Raises unless `grads` has exactly the named terms."""
    has_terms(owner, grads, names)
    surplus = [name for name in grads if name not in names]
    if surplus:
        raise ValueError(
            f"{owner} needs gradients of the terms {_checks.listed(names)} only, got "
            f"{_checks.listed(surplus)} too. Join those losses with one of the terms "
            "(terms.joint), or use weighted_sum with a weight for each."
        )


def has_terms(owner: str, grads: Mapping[str, PyTree], names: Sequence[str]) -> None:
    """Raises unless `grads` has all named terms."""
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
                f"{owner} needs gradients of one structure, got {first!r} with "
                f"{jax.tree.structure(tree)} and {name!r} with "
                f"{jax.tree.structure(other)}. Differentiate all terms with respect to "
                "the same params."
            )
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
            _checks.same_shape(owner, **{first: a, name: b})


def mix(leaves: Sequence[Array], factors: Sequence[Array | None]) -> Array:
    """Sum of factor * leaf (None: 1) in float32 or wider, cast to the first's dtype."""
    dtype = _precision.widest(leaves)
    total = None
    for leaf, factor in zip(leaves, factors, strict=True):
        part = leaf.astype(dtype)
        part = part if factor is None else factor.astype(dtype) * part
        total = part if total is None else total + part
    return total.astype(leaves[0].dtype)


def different(owner: str, upper: str, lower: str) -> None:
    """Raises ValueError if both levels are the same term."""
    if upper == lower:
        raise ValueError(f"{owner} needs two different terms, got {upper!r} twice.")
