# SPDX-License-Identifier: Apache-2.0
"""Trees of parameters: leaf paths, splitting by pattern, and float32 products.

A path joins the keys to a leaf with `/`, as in `blocks/mlp/down/kernel`. A split leaves
None in the places of the other half, which JAX treats as an empty subtree, so gradients
and optimizer state exist only for the half that trains.

Leaves that stack layers can be split by layer: `blocks/mlp/down/kernel@5,6,7` trains
three layers of [N, ...]. The training half holds {"layers:5,6,7": [3, ...]} in the
leaf's place, the other half the whole leaf, and `merge` puts the layers into it.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.typing import Array, Params, PyTree

LAYERS = "layers:"  # how the key of a leaf's chosen layers begins


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
            leaf. With `@` and layers after it, as in r"blocks/mlp/down/kernel@5,6,7",
            only these entries of axis 0 of the matching leaves.
    Returns:
        (matching, rest), each with the structure of params and None where a leaf is in
        the other. Layers are copied out of their leaf, which stays whole in `rest`.
    Raises:
        ValueError: if no leaf matches, or it does not have these layers.
    """
    pattern, chosen, layers = pattern.partition("@")
    compiled = re.compile(pattern)
    if not any(compiled.fullmatch(path) for path in paths(params)):
        raise ValueError(
            f"trees.split needs a pattern that matches a leaf, got {pattern!r}; the "
            f"leaves are {_checks.listed(paths(params))}."
        )

    def ours(path, x):
        if not compiled.fullmatch(path):
            return None
        return _take(path, x, layers) if chosen else x

    matching = map_with_path(ours, params)
    rest = map_with_path(
        lambda p, x: None if compiled.fullmatch(p) and not chosen else x, params
    )
    return matching, rest


def merge(first: Params, second: Params | None) -> Params:
    """Puts the two halves of a split together again; `second=None` is an empty half.

    Raises:
        ValueError: if both halves hold the same leaf.
    """
    if second is None:
        return first

    def choose(a, b):
        if _sliced(a) or _sliced(b):
            return _put(a, b) if _sliced(a) else _put(b, a)
        if a is not None and b is not None:
            raise ValueError(
                "trees.merge needs disjoint halves, but both hold a leaf. Use split."
            )
        return b if a is None else a

    return jax.tree.map(
        choose, first, second, is_leaf=lambda x: x is None or _sliced(x)
    )


def vdot(a: PyTree, b: PyTree) -> Array:
    """Inner product over all leaves, accumulated in float32: float32[]."""
    products = jax.tree.map(_dot, a, b)
    return sum(jax.tree.leaves(products), start=jnp.float32(0))


def norm(tree: PyTree) -> Array:
    """Euclidean norm over all leaves, accumulated in float32: float32[]."""
    return jnp.sqrt(vdot(tree, tree))


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))


def _take(path, x, layers: str):
    """{"layers:5,6,7": those entries of axis 0}, of an array or of its shape."""
    indices = [int(i) for i in layers.split(",") if i.strip().isdecimal()]
    few = sorted(set(indices)) == indices and len(indices) == layers.count(",") + 1
    if not few or not x.shape or indices[-1] >= x.shape[0]:
        raise ValueError(
            f"trees.split needs layers of {path!r}, of shape {x.shape}, as whole "
            f"numbers that rise, such as @0,1, got @{layers}."
        )
    key = LAYERS + ",".join(map(str, indices))
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = (len(indices), *x.shape[1:])
        return {key: jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)}
    return {key: jnp.concatenate([x[i : i + 1] for i in indices])}


def _put(chosen, whole):
    """The whole leaf with its chosen layers in place."""
    ((key, values),) = chosen.items()
    if isinstance(whole, jax.ShapeDtypeStruct):
        return whole
    # Pieces put beside each other: a model that stops early then reads no other piece,
    # where a scatter would copy the whole leaf first.
    pieces, last = [], 0
    for row, i in enumerate(int(i) for i in key.removeprefix(LAYERS).split(",")):
        pieces += [whole[last:i], values[row : row + 1]]
        last = i + 1
    return jnp.concatenate([*pieces, whole[last:]])


def _sliced(x: PyTree) -> bool:
    return isinstance(x, dict) and len(x) == 1 and next(iter(x)).startswith(LAYERS)


def _path(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
