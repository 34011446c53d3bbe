# SPDX-License-Identifier: Apache-2.0
"""A filter of a gradient's leading singular directions, which all tasks share."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _directions, trees
from jaxunlearn.edits import _quantize, _task_vector
from jaxunlearn.typing import Array, Params


def collapse(
    gradient: Params,
    rank: int,
    *,
    basis: Params | None = None,
    sides: str = "both",
    power: float = 1.0,
    method: str = "auto",
) -> Params:
    """Shrinks the leading singular directions of every matrix of a gradient.

    Let B have the singular values s_1 >= s_2 >= ... and the singular vectors u_i and
    v_i, and let k be `rank`. Each of the first k directions is multiplied by

        f_i = (s_k / s_i)^power

    on the input side, the output side, or both, and everything else stays:

        G' = (1 - sum_i (1 - f_i) u_i u_i^T) G (1 - sum_i (1 - f_i) v_i v_i^T)

    If B is the gradient itself and both sides are filtered, the singular values s_i
    with i <= k become s_i (s_k / s_i)^(2 power). RepSelect updates weights along the
    result with power 1: s_i becomes s_k^2 / s_i. The large directions of a gradient
    serve every task, so an attacker's few steps restore exactly them. With power inf
    the directions are removed: a forget gradient without the leading directions of the
    *retain* gradient changes retained answers less.

    Args:
        gradient: a tree of kernels [..., in, out] (and embeddings), None in the places
            of other leaves, such as stats.gradient gives for a split of the params.
            Leading axes (layers, experts) stack matrices that are filtered one by one.
        rank: k, number of directions to shrink, >= 1.
        basis: a tree like gradient whose directions are shrunk, B; None for the
            gradient itself. On a mesh it is placed as the gradient is.
        sides: "both", "in" (the rows of a kernel [in, out]) or "out".
        power: how strongly, > 0: 1 is RepSelect's soft form, 2 its quadratic form, inf
            its hard form.
        method: how the directions are found. "exact": an SVD. "randomized": a random
            subspace of k + 8 directions with 4 power iterations, which is much faster
            for k far below the width. "auto": exact where the smaller side of the
            matrix is at most 2 k.
    Returns:
        A tree like gradient, with its dtypes and sharding; computed in float32.
    Raises:
        ValueError: if a setting is out of range, the trees differ, a leaf is no stack
            of matrices, or a matrix of B has fewer than k directions with a singular
            value above rounding (a matrix of zeros is left as it is).
    References: https://arxiv.org/abs/2606.17168
    """
    owner = "collapse"
    _checks.positive_int(owner, rank=rank)
    _checks.one_of(owner, _directions.SIDES, sides=sides)
    _checks.one_of(owner, _directions.METHODS, method=method)
    if not power > 0:
        raise ValueError(f"{owner} needs power > 0 (inf removes), got power={power}.")
    if basis is not None:
        _task_vector.check_same(owner, gradient, basis=basis)
    _check_matrices(owner, gradient)
    shared = {} if basis is None else trees.paths(basis)

    def leaf(path, x):
        b = _unsplit(shared.get(path, x))
        exact = _directions.is_exact(b.shape, rank, method)
        u, s, v = _directions.leading(b, rank, exact)
        _check_rank(path, s, b.shape, rank, basis is not None)
        factors = _directions.factors(s, power)
        new = _directions.filtered(_unsplit(x), u, factors, v, sides)
        return _quantize.placed(new.astype(x.dtype), x)

    return trees.map_with_path(leaf, gradient)


def _check_matrices(owner: str, tree: Params) -> None:
    """Raises ValueError unless every leaf is a stack of matrices."""
    for path, x in trees.paths(tree).items():
        if not _directions.is_matrix(path, x):
            raise ValueError(
                f"{owner} needs matrices [..., in, out], got the leaf {path!r} of "
                f"shape {x.shape}. Take the kernels alone: trees.split(params, "
                "r'.*/mlp/.*kernel')."
            )


def _unsplit(x: Array) -> Array:
    """x with every matrix on one device: a stack is divided over all devices where
    their number divides it, else each device gets the complete leaf."""
    place = getattr(x, "sharding", None)
    if isinstance(x, jax.core.Tracer) or not isinstance(place, jax.NamedSharding):
        return x
    mesh = place.mesh
    stacked = x.ndim > 2 and x.shape[0] % mesh.size == 0
    spec = jax.P(mesh.axis_names) if stacked else jax.P()
    return jax.device_put(x, jax.NamedSharding(mesh, spec))


def _check_rank(path: str, s: Array, shape, rank: int, separate: bool) -> None:
    if isinstance(s, jax.core.Tracer):
        return
    what = "the basis" if separate else "the gradient"
    s = jax.device_get(s).reshape(-1, s.shape[-1])
    smallest = max(shape[-2:]) * float(jnp.finfo(jnp.float32).eps) * s[:, :1]
    found = (s > smallest).sum(axis=1)
    short = [i for i, n in enumerate(found) if s[i, 0] > 0 and n < rank]
    if short:
        raise ValueError(
            f"collapse needs a rank of at most that of {what}, got rank={rank} and "
            f"{found[short[0]]} directions in matrix {short[0]} of {path!r}, of shape "
            f"{tuple(shape[-2:])}. Lower rank, or take more rows."
        )
