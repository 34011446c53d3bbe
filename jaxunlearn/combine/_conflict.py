# SPDX-License-Identifier: Apache-2.0
"""Symmetric combiners for conflicting gradients: PCGrad and MGDA.

Neither gives a term priority; `blur` does. Both need only the inner products of the
terms' gradients: one pass over the leaves for the products, a small problem with one
unknown per term, and one weighted sum.

    tx = optax.chain(combine.pcgrad(), optax.adamw(1e-5))
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, _precision, sharding, trees
from jaxunlearn.combine import _common
from jaxunlearn.typing import Array, PRNGKey, PyTree, Rules


class ConflictState(NamedTuple):
    """Attributes:
    count: int32[], steps taken.
    stats: float32[] scalars of the last step: `cosine`, the lowest between two terms
        (0 if one gradient vanishes), and `factor/<term>`, the factor of its gradient.
    """

    count: Array
    stats: dict[str, Array]


def pcgrad(
    terms: Sequence[str] = ("forget", "retain"), *, key: PRNGKey | None = None
) -> optax.GradientTransformationExtraArgs:
    """PCGrad: sum of the gradients, each projected where it opposes another.

    For each i and each other j in turn: if the current g_i has <g_i, g_j> < 0, then
    g_i <- g_i - <g_i, g_j> / |g_j|^2 g_j, with the original g_j. The update is the sum
    of the resulting g_i. A gradient that opposes no other is not changed.

    Args:
        terms: the terms, two or more.
        key: draws, at every step, the order in which each term is projected against
            the others, as in the paper. None uses the order of `terms`. With two terms
            the order makes no difference.
    Returns:
        A transformation from {term: gradients} to one tree in the dtype of the first
        term; the state is a ConflictState.
    Raises:
        ValueError: if `terms` has fewer than two different names; in update, if there
            are surplus terms. KeyError: in update, if a term has no gradients.
    References: Yu et al. 2020, https://arxiv.org/abs/2001.06782, algorithm 1
    """

    def solve(gram, sizes, count):
        num_terms = len(terms)
        orders = jnp.tile(jnp.arange(num_terms), (num_terms, 1))
        if key is not None:
            step_key = jax.random.fold_in(key, count)
            orders = jax.random.permutation(step_key, orders, axis=1, independent=True)
        squares = jnp.diagonal(gram)
        nonzero = squares > 0

        def project(i, order):
            def remove(position, weights):  # g_i is the sum of weights times gradients
                j = order[position]
                along = weights @ gram[:, j]
                opposed = nonzero[j] & (j != i) & (along < 0)
                part = jnp.where(opposed, along, 0)
                return weights.at[j].add(-part / jnp.where(nonzero[j], squares[j], 1))

            start = jnp.eye(num_terms, dtype=gram.dtype)[i]
            return jax.lax.fori_loop(0, num_terms, remove, start)

        return sizes @ jnp.stack([project(i, orders[i]) for i in range(num_terms)])

    return _combiner("pcgrad", tuple(terms), solve)


def mgda(
    terms: Sequence[str] = ("forget", "retain"),
    *,
    normalize: bool = False,
    num_iterations: int = 50,
) -> optax.GradientTransformationExtraArgs:
    """MGDA: the shortest convex combination of the terms' gradients.

    Solves min |sum_k a_k g_k|^2 over a_k >= 0, sum a_k = 1, by Frank-Wolfe with exact
    line search; for two terms one iteration is exact. To first order, a step against
    the result raises no term's loss. It vanishes at a Pareto-stationary point, where
    there is no such step.

    Args:
        terms: the terms, two or more.
        normalize: combines g_k / |g_k| instead, so that a term with a small gradient
            does not get all the weight. The paper's code computes its weights in this
            way too ("l2"), but applies them to the g_k, which can raise a term's loss.
        num_iterations: of Frank-Wolfe, >= 1; each multiplies a matrix with one row per
            term by a vector.
    Returns:
        A transformation from {term: gradients} to one tree in the dtype of the first
        term; the state is a ConflictState.
    Raises:
        ValueError: if `terms` has fewer than two different names or num_iterations < 1;
            in update, if there are surplus terms. KeyError: in update, if a term has no
            gradients.
    References: Desideri 2012; Sener and Koltun 2018, https://arxiv.org/abs/1810.04650,
        algorithm 2
    """
    _checks.positive_int("mgda", num_iterations=num_iterations)

    def solve(gram, sizes, count):
        del count
        norms = jnp.sqrt(jnp.diagonal(gram))
        if normalize:
            lengths = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
        else:
            largest = jnp.max(sizes)
            lengths = sizes / jnp.where(largest > 0, largest, 1)
        products = lengths[:, None] * gram * lengths[None, :]

        def step(_, weights):
            slopes = products @ weights
            vertex = jnp.zeros_like(weights).at[jnp.argmin(slopes)].set(1)
            move = vertex - weights
            curvature, descent = move @ products @ move, -(move @ slopes)
            curved = curvature > 0
            step_size = jnp.where(curved, descent / jnp.where(curved, curvature, 1), 0)
            return weights + jnp.clip(step_size, 0, 1) * move

        shortest = jnp.argmin(jnp.diagonal(products))
        start = jnp.zeros_like(lengths).at[shortest].set(1)
        weights = jax.lax.fori_loop(0, num_iterations, step, start)
        return weights * (lengths if normalize else sizes)

    return _combiner("mgda", tuple(terms), solve)


def _combiner(owner: str, terms: tuple[str, ...], solve):
    """A combiner that computes its factors from the inner products of the gradients.

    `solve` maps (products of the gradients divided by their sizes, sizes, count) to the
    factors of the divided gradients.
    """
    if len(set(terms)) < max(2, len(terms)):
        raise ValueError(
            f"{owner} needs terms to be two or more different names, got "
            f"{_checks.listed(terms)}."
        )

    def init(params):
        del params
        names = ("cosine", *(f"factor/{name}" for name in terms))
        stats = {name: jnp.zeros([], jnp.float32) for name in names}
        return ConflictState(jnp.zeros([], jnp.int32), stats)

    def update(grads, state, params=None, *, rules=None, **extra):
        del params, extra
        _common.exactly(owner, grads, terms)
        chosen = {name: grads[name] for name in terms}
        _common.same_trees(owner, chosen)
        inverse, gram, sizes = _products(owner, list(chosen.values()), rules)
        factors = solve(gram, sizes, state.count)

        def mix(*leaves):
            wide = [a * x.astype(a.dtype) for a, x in zip(inverse, leaves, strict=True)]
            return _common.mix(wide, factors).astype(leaves[0].dtype)

        norms = jnp.sqrt(jnp.diagonal(gram))
        both = norms[:, None] * norms[None, :]
        cosines = jnp.where(both > 0, gram / jnp.where(both > 0, both, 1), 0)
        apart = cosines[jnp.triu_indices(len(terms), 1)]
        shown = {"cosine": jnp.min(apart)}
        shown |= {
            f"factor/{n}": f * a
            for n, f, a in zip(terms, factors, inverse, strict=True)
        }
        stats = {name: value.astype(jnp.float32) for name, value in shown.items()}
        count = optax.safe_increment(state.count)
        return jax.tree.map(mix, *chosen.values()), ConflictState(count, stats)

    return optax.GradientTransformationExtraArgs(init, update)


def _products(
    owner: str, gradients: list[PyTree], rules: Rules | None
) -> tuple[Array, Array, Array]:
    """(1 / size, products [K, K] of the gradients divided by their sizes, sizes [K]).

    The size of a gradient is its largest entry, so that squares stay in the range of
    float32. Size and 1 / size are 0 for a gradient that vanishes.
    """
    paths = trees.paths(gradients[0])
    if not paths:
        raise ValueError(f"{owner} needs gradients, got a tree without leaves.")
    columns = [
        list(x) for x in zip(*(jax.tree.leaves(g) for g in gradients), strict=True)
    ]
    dtype = _precision.widest([x for column in columns for x in column])
    sizes = jnp.stack(
        [
            jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in column])
            for column in columns
        ]
    ).max(axis=0)
    normal = sizes >= jnp.finfo(dtype).tiny  # 1 / a subnormal number is inf
    inverse = jnp.where(normal, 1 / jnp.where(normal, sizes, 1), 0)
    num_terms = len(gradients)
    pairs = [(i, j) for i in range(num_terms) for j in range(i, num_terms)]

    def dots(_, *leaves):
        scaled = [a * x.astype(dtype) for a, x in zip(inverse, leaves, strict=True)]
        return [jnp.sum(scaled[i] * scaled[j]) for i, j in pairs]

    leaves = dict(zip(paths, columns, strict=True))
    (sums,) = sharding.sums(dots, leaves, [range(len(columns))], rules)
    upper = (
        jnp.zeros((num_terms, num_terms), dtype)
        .at[tuple(zip(*pairs, strict=True))]
        .set(sums)
    )
    gram = jnp.where(jnp.tri(num_terms, dtype=jnp.bool_), upper.T, upper)
    return inverse, gram, jnp.where(normal, sizes, 0)
