# SPDX-License-Identifier: Apache-2.0
"""Trees of parameters: leaf paths, splitting by pattern, and float32 products.

A path joins the keys of a leaf with `/`, as in `blocks/mlp/down/kernel`. Each half of a
split has None in the places of the other half. JAX treats None as an empty subtree, so
gradients and optimizer state exist only for the half that trains.

A leaf that stacks layers can be split by layer: `blocks/mlp/down/kernel@5,6,7` trains
three layers of [N, ...]. In place of the leaf the training half has {"layers:5,6,7":
[3, ...]}, the other half has the complete leaf, and `merge` puts the layers into it.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.typing import Array, Params, PyTree

LAYERS = "layers:"  # the first characters of the key of a leaf's chosen layers


def paths(tree: PyTree) -> dict[str, Array]:
    """Path -> leaf, in the tree's order."""
    return {
        _path(keys): leaf
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def map_with_path(
    function: Callable[..., PyTree], tree: PyTree, *rest: PyTree
) -> PyTree:
    """jax.tree.map of a function that also gets the path: f(path, leaf, *leaves)."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: function(_path(keys), *leaves), tree, *rest
    )


def split(params: Params, pattern: str) -> tuple[Params, Params]:
    """Splits params into the leaves whose full path matches `pattern`, and the others.

    Args:
        params: nested dict of arrays.
        pattern: regular expression matched against the full path; r".*" matches every
            leaf. With `@` and layers after it, as in r"blocks/mlp/down/kernel@5,6,7",
            only these entries of axis 0 of the matching leaves.
    Returns:
        (matching, rest), each with the structure of params and None where a leaf is in
        the other. Chosen layers are copied; `rest` has the complete leaf.
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

    def chosen_part(path, x):
        if not compiled.fullmatch(path):
            return None
        return _take(path, x, layers) if chosen else x

    matching = map_with_path(chosen_part, params)
    rest = map_with_path(
        lambda p, x: None if compiled.fullmatch(p) and not chosen else x, params
    )
    return matching, rest


def merge(first: Params, second: Params | None) -> Params:
    """The params of both halves of a split; `second=None` is an empty half.

    Raises:
        ValueError: if both halves have the same leaf.
    """
    if second is None:
        return first

    def choose(a, b):
        if _sliced(a) or _sliced(b):
            return _put(a, b) if _sliced(a) else _put(b, a)
        if a is not None and b is not None:
            raise ValueError(
                "trees.merge needs halves without a common leaf, got one in both. Use "
                "the two halves of one trees.split."
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


def scaled_norm(tree: PyTree) -> Array:
    """`norm` of entries whose squares may leave the range of float32: float32[].

    Entries are divided by the largest before they are squared, in a second pass over
    the leaves. In float32 the square of 1e-23 is 0 and that of 1e20 is inf.
    """
    sizes = [jnp.max(jnp.abs(x)).astype(jnp.float32) for x in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack([*sizes, jnp.float32(0)]))
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale * norm(jax.tree.map(lambda x: x.astype(jnp.float32) / scale, tree))


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))


def _take(path, x, layers: str):
    """{"layers:5,6,7": those entries of axis 0}, of an array or of its shape."""
    indices = [int(i) for i in layers.split(",") if i.strip().isdecimal()]
    valid = sorted(set(indices)) == indices and len(indices) == layers.count(",") + 1
    if not valid or not x.shape or indices[-1] >= x.shape[0]:
        raise ValueError(
            f"trees.split needs ascending layer indices below the first axis of "
            f"{path!r}, shape {x.shape}, such as @0,1, got @{layers}."
        )
    key = LAYERS + ",".join(map(str, indices))
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = (len(indices), *x.shape[1:])
        return {key: jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)}
    return {key: jnp.concatenate([x[i : i + 1] for i in indices])}


def _put(chosen, leaf):
    """The complete leaf with the chosen layers in place."""
    ((key, values),) = chosen.items()
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    # Concatenated, as a scatter would first copy the leaf: a model that stops early
    # reads only the pieces that it needs.
    pieces, last = [], 0
    for row, i in enumerate(int(i) for i in key.removeprefix(LAYERS).split(",")):
        pieces += [leaf[last:i], values[row : row + 1]]
        last = i + 1
    return jnp.concatenate([*pieces, leaf[last:]])


def _sliced(x: PyTree) -> bool:
    return isinstance(x, dict) and len(x) == 1 and next(iter(x)).startswith(LAYERS)


def _path(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
