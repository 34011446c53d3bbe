# SPDX-License-Identifier: Apache-2.0
"""Trees of parameters: leaf paths, splitting by pattern, and float32 products.

A path joins the keys to a leaf with `/`, as in `blocks/mlp/down/kernel`. A split leaves
None in the places of the other half, which JAX treats as an empty subtree, so gradients
and optimizer state exist only for the half that trains.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.typing import Array, Params, PyTree


def paths(tree: PyTree) -> dict[str, Array]:
    """Every leaf by its path, in the tree's order."""
    return {
        _path(keys): leaf
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def map_with_path(
    function: Callable[..., PyTree], tree: PyTree, *rest: PyTree
) -> PyTree:
    """tree.map where the function also gets the leaf's path: f(path, leaf, *leaves)."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: function(_path(keys), *leaves), tree, *rest
    )


def split(params: Params, pattern: str) -> tuple[Params, Params]:
    """Splits params into the leaves whose whole path matches `pattern`, and the others.

    Args:
        params: nested dict of arrays.
        pattern: regular expression matched against the whole path; r".*" takes every
            leaf.
    Returns:
        (matching, rest), each with the structure of params and None where a leaf is in
        the other.
    Raises:
        ValueError: if no leaf matches.
    """
    compiled = re.compile(pattern)
    if not any(compiled.fullmatch(path) for path in paths(params)):
        raise ValueError(
            f"trees.split needs a pattern that matches a leaf, got {pattern!r}; the "
            f"leaves are {_checks.listed(paths(params))}."
        )
    matching = map_with_path(lambda p, x: x if compiled.fullmatch(p) else None, params)
    rest = map_with_path(lambda p, x: None if compiled.fullmatch(p) else x, params)
    return matching, rest


def merge(first: Params, second: Params | None) -> Params:
    """Puts the two halves of a split together again; `second=None` is an empty half.

    Raises:
        ValueError: if both halves hold the same leaf.
    """
    if second is None:
        return first

    def choose(a, b):
        if a is not None and b is not None:
            raise ValueError(
                "trees.merge needs disjoint halves, but both hold a leaf. Use split."
            )
        return b if a is None else a

    return jax.tree.map(choose, first, second, is_leaf=lambda x: x is None)


def vdot(a: PyTree, b: PyTree) -> Array:
    """Inner product over all leaves, accumulated in float32: float32[]."""
    products = jax.tree.map(_dot, a, b)
    return sum(jax.tree.leaves(products), start=jnp.float32(0))


def norm(tree: PyTree) -> Array:
    """Euclidean norm over all leaves, accumulated in float32: float32[]."""
    return jnp.sqrt(vdot(tree, tree))


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))


def _path(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
