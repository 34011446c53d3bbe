# SPDX-License-Identifier: Apache-2.0
"""Symmetric answers to gradients that conflict: PCGrad and MGDA.

Neither gives a term priority, which is where `blur` differs. Both need only the
products of the terms' gradients, so each is one pass over the leaves, a small problem
in as many numbers as there are terms, and one mixed sum.

    tx = optax.chain(combine.pcgrad(), optax.adamw(1e-5))
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, sharding, trees
from jaxunlearn.combine import _common
from jaxunlearn.typing import Array, PyTree, Rules


class ConflictState(NamedTuple):
    """Attributes:
    count: int32[], steps taken.
    stats: float32[] scalars of the last step: `cosine`, the lowest between two terms
        (0 beside a vanishing one), and `factor/<term>`, what its gradient was
        multiplied by.
    """

    count: Array
    stats: dict[str, Array]


def pcgrad(
    terms: Sequence[str] = ("forget", "retain"), *, seed: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradients once each has lost what opposes another one.

    Every g_i, in turn and as it stands, loses its part along each other g_j that it
    opposes: where <g_i, g_j> < 0, g_i <- g_i - <g_i, g_j> / |g_j|^2 g_j. The update is
    the sum of what is left. A term without an opponent keeps its gradient.

    Args:
        terms: the terms, two or more.
        seed: of the order in which each term meets the others, drawn anew every step
            as in the paper; None takes the order of `terms`. With two terms it makes no
            difference.
    Returns:
        A transformation from {term: gradients} to one tree in the dtype of the first
        term; the state is a ConflictState.
    Raises:
        ValueError: if fewer than two terms are named, one twice, or, in update, if
            surplus terms came. KeyError: in update, if a term has no gradients.
    References: Yu et al. 2020, https://arxiv.org/abs/2001.06782, algorithm 1
    """

    def solve(gram, sizes, count):
        number = len(terms)
        orders = jnp.tile(jnp.arange(number), (number, 1))
        if seed is not None:
            key = jax.random.fold_in(jax.random.key(seed), count)
            orders = jax.random.permutation(key, orders, axis=1, independent=True)
        squares = jnp.diagonal(gram)
        alive = squares > 0

        def project(i, order):
            def meet(position, own):
                j = order[position]
                along = own @ gram[:, j]
                clash = alive[j] & (j != i) & (along < 0)
                part = jnp.where(clash, along, 0) / jnp.where(alive[j], squares[j], 1)
                return own.at[j].add(-part)

            return jax.lax.fori_loop(
                0, number, meet, jnp.eye(number, dtype=gram.dtype)[i]
            )

        return sizes @ jnp.stack([project(i, orders[i]) for i in range(number)])

    return _combiner("pcgrad", tuple(terms), solve)


def mgda(
    terms: Sequence[str] = ("forget", "retain"),
    *,
    normalize: bool = False,
    iterations: int = 50,
) -> optax.GradientTransformationExtraArgs:
    """The shortest vector among the convex mixtures of the terms' gradients.

    min |sum_k a_k g_k|^2 over a_k >= 0, sum a_k = 1. To first order a step against it
    raises no term's loss; it vanishes where no such step exists, at a Pareto point. By
    Frank-Wolfe with exact line search, which is exact after one step for two terms.

    Args:
        terms: the terms, two or more.
        normalize: mixes g_k / |g_k| instead, so that a term with a short gradient does
            not take all the weight. The paper's code finds its weights so too ("l2"),
            but then gives them to the g_k themselves, which may raise a term's loss.
        iterations: of Frank-Wolfe, >= 1; each costs a product with a matrix of as many
            rows as there are terms.
    Returns:
        A transformation from {term: gradients} to one tree in the dtype of the first
        term; the state is a ConflictState.
    Raises:
        ValueError: if fewer than two terms are named, one twice, iterations < 1, or, in
            update, if surplus terms came. KeyError: in update, if a term has no
            gradients.
    References: Desideri 2012; Sener and Koltun 2018, https://arxiv.org/abs/1810.04650,
        algorithm 2
    """
    _checks.positive_int("mgda", iterations=iterations)

    def solve(gram, sizes, count):
        del count
        norms = jnp.sqrt(jnp.diagonal(gram))
        if normalize:  # what a unit of each weight is in units of sizes
            lengths = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
        else:
            largest = jnp.max(sizes)
            lengths = sizes / jnp.where(largest > 0, largest, 1)
        products = lengths[:, None] * gram * lengths[None, :]

        def step(_, weights):
            slopes = products @ weights
            vertex = jnp.zeros_like(weights).at[jnp.argmin(slopes)].set(1)
            way = vertex - weights
            curve, fall = way @ products @ way, -(way @ slopes)
            far = jnp.where(curve > 0, fall / jnp.where(curve > 0, curve, 1), 0)
            return weights + jnp.clip(far, 0, 1) * way

        shortest = jnp.argmin(jnp.diagonal(products))
        start = jnp.zeros_like(lengths).at[shortest].set(1)
        weights = jax.lax.fori_loop(0, iterations, step, start)
        return weights * (lengths if normalize else sizes)

    return _combiner("mgda", tuple(terms), solve)


def _combiner(owner: str, terms: tuple[str, ...], solve):
    """A combiner whose factors follow from the terms' products; `solve` maps (products
    of gradients divided by their sizes, sizes, count) to factors of those gradients."""
    if len(set(terms)) < max(2, len(terms)):
        raise ValueError(
            f"{owner} needs two or more different terms, got {_checks.listed(terms)}."
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

    A size is the largest entry of a gradient, so that no square leaves float32's range;
    both are 0 for a gradient that vanishes.
    """
    paths = trees.paths(gradients[0])
    if not paths:
        raise ValueError(f"{owner} needs gradients, got a tree without leaves.")
    columns = [
        list(x) for x in zip(*(jax.tree.leaves(g) for g in gradients), strict=True)
    ]
    dtype = _common.widest([x for column in columns for x in column])
    sizes = jnp.stack(
        [
            jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in column])
            for column in columns
        ]
    ).max(axis=0)
    normal = sizes >= jnp.finfo(dtype).tiny  # the reciprocal of a subnormal is inf
    inverse = jnp.where(normal, 1 / jnp.where(normal, sizes, 1), 0)
    number = len(gradients)
    pairs = [(i, j) for i in range(number) for j in range(i, number)]

    def dots(_, *leaves):
        scaled = [a * x.astype(dtype) for a, x in zip(inverse, leaves, strict=True)]
        return [jnp.sum(scaled[i] * scaled[j]) for i, j in pairs]

    leaves = dict(zip(paths, columns, strict=True))
    (sums,) = sharding.sums(dots, leaves, [range(len(columns))], rules)
    upper = (
        jnp.zeros((number, number), dtype).at[tuple(zip(*pairs, strict=True))].set(sums)
    )
    gram = jnp.where(jnp.tri(number, dtype=jnp.bool_), upper.T, upper)
    return inverse, gram, jnp.where(normal, sizes, 0)
