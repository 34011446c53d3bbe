# SPDX-License-Identifier: Apache-2.0
"""A chain whose gradient of one term loses its leading directions at every step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, _directions, trees
from jaxunlearn.combine import _common
from jaxunlearn.typing import Array, Params, PyTree


class CollapseState(NamedTuple):
    """Attributes:
    count: int32[], steps taken.
    stats: {"removed": float32[]}, of the last step: 1 - |filtered|^2 / |gradient|^2
        over all matrices.
    average: float32 tree like the params, the moving average of the term's gradient.
    basis: leaf path -> (u [..., in, k], factors [..., k], v [..., out, k]).
    inner: the state of the inner chain.
    """

    count: Array
    stats: dict[str, Array]
    average: Params
    basis: dict[str, tuple[Array, Array, Array]]
    inner: PyTree


def collapse(
    inner: optax.GradientTransformation,
    *,
    term: str = "forget",
    basis: str | None = None,
    rank: int,
    momentum: float = 0.9,
    refresh: int = 1,
    sides: str = "both",
    power: float = 1.0,
    method: str = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Filters one term's gradient as `edits.collapse` does, then runs a chain.

        tx = combine.collapse(
            optax.chain(combine.weighted_sum(), optax.sgd(1e-3)), rank=48
        )

    The directions are those of a moving average of the gradient of `basis`,

        m <- momentum m + (1 - momentum) g_basis

    found anew every `refresh` steps. RepSelect's multi-epoch form filters in this way
    the inputs and output gradients of every kernel, which equals filtering the gradient
    on both sides.

    Args:
        inner: the full chain from {term: gradients} to an update, its combiner first.
        term: the term whose gradient is filtered.
        basis: the term whose directions are filtered, None for `term`; with "retain"
            and power inf the forget gradient loses what retained answers share.
        rank: k, number of directions, >= 1. Where a side of a matrix is at most k, or
            the average has fewer directions, all that there are are filtered.
        momentum: of the average, in [0, 1).
        refresh: number of steps for which a basis is used, >= 1.
        sides, power, method: as of edits.collapse.
    Returns:
        A transformation like `inner`; its state is a CollapseState. Leaves that are not
        matrices, such as scales and biases, pass unchanged.
    Raises:
        ValueError: if a setting is out of range; in init, if no leaf is a matrix.
            KeyError: in update, if a term has no gradients.
    References: https://arxiv.org/abs/2606.17168, https://arxiv.org/abs/2509.11816
    """
    owner = "combine.collapse"
    _checks.positive_int(owner, rank=rank, refresh=refresh)
    _checks.one_of(owner, _directions.SIDES, sides=sides)
    _checks.one_of(owner, _directions.METHODS, method=method)
    if not power > 0:
        raise ValueError(f"{owner} needs power > 0 (inf removes), got power={power}.")
    if not 0 <= momentum < 1:
        raise ValueError(f"{owner} needs momentum in [0, 1), got momentum={momentum}.")
    inner = optax.with_extra_args_support(inner)
    basis = term if basis is None else basis

    def found(tree):
        def of(x):
            exact = _directions.is_exact(x.shape, rank, method)
            u, s, v = _directions.leading(x, min(rank, *x.shape[-2:]), exact)
            # Directions of rounding alone are removed; their factor would be arbitrary.
            smallest = 1e-6 * s[..., :1]
            factors = _directions.factors(jnp.maximum(s, smallest), power)
            return u, factors, v

        return {path: of(x) for path, x in _matrices(tree).items()}

    def init(params):
        if not _matrices(params):
            raise ValueError(
                f"{owner} needs params with a kernel [..., in, out], got leaves "
                f"{_checks.listed(trees.paths(params))}. Train kernels."
            )
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        empty = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(found, zeros)
        )
        stats = {"removed": jnp.zeros([], jnp.float32)}
        return CollapseState(
            jnp.zeros([], jnp.int32), stats, zeros, empty, inner.init(params)
        )

    def update(grads, state, params=None, **extra):
        _common.has_terms(owner, grads, tuple(dict.fromkeys((term, basis))))
        _common.same_trees(owner, {term: grads[term], **grads})
        average = jax.tree.map(
            lambda m, g: momentum * m + (1 - momentum) * g.astype(jnp.float32),
            state.average,
            grads[basis],
        )
        directions = jax.lax.cond(
            state.count % refresh == 0, lambda: found(average), lambda: state.basis
        )

        def filtered(path, g):
            if path not in directions:
                return g
            return _directions.filtered(g, *directions[path], sides).astype(g.dtype)

        new = trees.map_with_path(filtered, grads[term])
        before, after = (
            trees.scaled_norm(_matrices(tree)) for tree in (grads[term], new)
        )
        left = after / jnp.where(before > 0, before, 1.0)
        stats = {"removed": jnp.where(before > 0, 1 - left**2, 0.0)}
        grads = {**grads, term: new}
        updates, new = inner.update(grads, state.inner, params, **extra)
        count = optax.safe_increment(state.count)
        return updates, CollapseState(count, stats, average, directions, new)

    return optax.GradientTransformationExtraArgs(init, update)


def _matrices(tree: Params) -> dict[str, Array]:
    return {
        path: x
        for path, x in trees.paths(tree).items()
        if _directions.is_matrix(path, x)
    }
