# SPDX-License-Identifier: Apache-2.0
"""BLUR: a bi-level update that gives the lower objective priority over the upper one.

Unlearning is posed as min r(theta) subject to theta in argmin f: among all parameters
that have forgotten, find those with the lowest retain loss. Each step removes from the
retain gradient its component along the forget gradient, so that forgetting is unchanged
to first order, and adds gamma times the forget gradient.

    tx = optax.chain(combine.blur(gamma=0.1), optax.adamw(1e-5))
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, _precision, sharding, trees
from jaxunlearn.combine import _common
from jaxunlearn.typing import Array, Rules

# A sum of squares outside this range may have lost terms to float32 underflow or
# overflow, and is computed again on rescaled gradients. The lower bound is where 1e11
# squares of 1e-38, the smallest normal number, begin to matter.
_SAFE_SQUARES = (1e-20, 1e37)

_STATS = ("upper_norm", "lower_norm", "cosine", "xi", "gate", "finite")


class BlurState(NamedTuple):
    """Attributes:
    count: int32[], steps taken; a step with non-finite gradients is not counted.
    stats: float32[] scalars of the last step, under the keys
        upper_norm, lower_norm: Euclidean norms of the two gradients, inf where not
            finite;
        cosine: of the angle between them, 0 if either vanishes (with two lower terms
            this is an estimate and can exceed 1);
        xi: the factor of the lower gradient. With several groups, their mean weighted
            by |g_lower|^2: <u - g_upper, g_lower> / |g_lower|^2 over all leaves;
        gate: 1 if the lower gradient was used, else 0; the mean over groups;
        finite: 1 if every number was finite, else 0; the update is then zero.
    """

    count: Array
    stats: dict[str, Array]


class _Products(NamedTuple):
    """Inner products of a group, each as scale * scale * product (all scalars)."""

    upper_scale: Array
    lower_scale: Array
    upper: Array  # <h, h> / upper_scale^2
    both: Array  # <h, l> / (upper_scale lower_scale)
    lower: Array  # <l, l> / lower_scale^2, <a, b> of two halves


def blur(
    *,
    upper: str = "retain",
    lower: str | tuple[str, str] = "forget",
    gamma: float | Array | _common.Schedule = 1.0,
    constraint: str = "equality",
    scope: str | Sequence[str] = "global",
    rel_tol: float = 1e-8,
    abs_tol: float = 1e-30,
    xi_max: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bi-level unlearning direction: h + (gamma - <h, l> / <l, l>) l.

    Here h = g_upper, l = g_lower, rho is their cosine, xi is the factor of l, and the
    update u is the vector closest to h with <u, l> = gamma |l|^2. Guarantees in exact
    arithmetic, where the gate is open:

        <u, l> = gamma |l|^2
        <u, h> = |h|^2 (1 - rho^2) + gamma <h, l>
        |u|^2  = |h|^2 (1 - rho^2) + gamma^2 |l|^2
        |u|   <= |h| + gamma |l|
        constraint="inequality": <u, l> = max(gamma |l|^2, <h, l>), xi = max(xi, 0)

    They hold for the update that this transformation returns, before Adam rescales it.
    With several groups they hold for each group separately; with two lower terms, up to
    the difference between the two gradients. They do not hold where `xi_max` clips xi.

    | gradients | update | stats |
    | --- | --- | --- |
    | l = 0, |l| <= rel_tol |h| or |l| <= abs_tol | h | gate 0, xi 0 |
    | h = 0 | gamma l | gate 1, xi gamma, cosine 0 |
    | parallel | gamma l | cosine +-1 |
    | norms of 1e-25 or 1e25 | as above; products are rescaled | |
    | any nan or inf | 0 | finite 0, gate 0, xi 0 |

    Products accumulate in float32 (float64 for float64 gradients), as three plain sums
    per group. Only if the sum of squares of some group is outside [1e-20, 1e37] are the
    products computed again, on gradients divided by their largest entries.

    Args:
        upper: term that is minimised among the solutions of the lower level.
        lower: term that has priority. A pair of terms (a, b) holds its gradients on
            disjoint halves of the rows (terms.halves): l is their mean and |l|^2 is
            estimated by <a, b>, which is unbiased. With one term, E |l|^2 is |E l|^2
            plus the variance, so on small batches too little is projected. With a pair
            the gate closes where <a, b> <= 0, and a third gradient tree is stored.
        gamma: rate of the lower level, a number or a schedule of the step, >= 0.
        constraint: "equality", as in the paper, makes <u, l> equal to gamma |l|^2;
            "inequality" allows more, if h gives more (the dynamic barrier of BOME).
        scope: "global", one xi for all leaves; "leaf", one for each leaf; or regular
            expressions: a leaf joins the first that matches its whole path, and the
            leaves that match none form one more group.
        rel_tol: the lower gradient is not used if |l| <= rel_tol |h|.
        abs_tol: nor if |l| <= abs_tol.
        xi_max: bound on |xi|; None for no bound.
    Returns:
        A transformation from {upper: gradients, lower: gradients} to one tree in the
        dtype of the upper gradients. Its `update` also takes `rules`, which give the
        sharding of the gradients on a mesh (make_step passes them): all products then
        cost one all-reduce of [groups, 3]. It also takes `metric`, a tree of factors
        per entry that multiply the gradients before the products (from `adam_metric`).
        The state is a `BlurState`; a step that finds stats["finite"] == 0 should leave
        parameters and moments unchanged.
    Raises:
        ValueError: if gamma < 0, a tolerance is negative, xi_max <= 0, constraint or
            scope is unknown, or the names are equal; in update, if there are surplus
            terms, the trees differ or a pattern matches no leaf. KeyError: in update,
            if a level has no gradients.
    Paper and code:
        - WMDP's g_f + alpha (g_r - <g_r, g_f> / |g_f|^2 g_f) is
          optax.chain(blur(gamma=1 / alpha), optax.scale(alpha)). Under Adam the factor
          alpha cancels except in eps: alpha = 800 is gamma = 0.00125 and eps / 800.
        - `BLO_forget_upper` is blur(upper="forget", lower="retain"); `Pen` is
          `penalty`.
        - The released code divides by |l|^2 without a guard (at 0 MUSE fails and WMDP
          gives nan) or tests for exactly 0 (TOFU). Here a relative gate closes.
        - It computes products in bfloat16, and clips before the projection, which has
          no effect. Here products are float32, and clipping after the combiner acts on
          u.
        - TOFU's code uses only the gradient of the last microbatch. Here the caller
          passes gradients of the full batch.
        - The convergence theorem is for plain gradient descent and bounded losses. It
          covers neither Adam nor gradient ascent as the lower objective.
    References: https://arxiv.org/abs/2506.08164 (BLUR),
        https://arxiv.org/abs/2209.08709 (BOME)
    """
    _checks.not_negative("blur", gamma=gamma, rel_tol=rel_tol, abs_tol=abs_tol)
    _checks.one_of("blur", ("equality", "inequality"), constraint=constraint)
    if xi_max is not None:
        _checks.positive("blur", xi_max=xi_max)
    if isinstance(scope, str):
        _checks.one_of("blur", ("global", "leaf"), scope=scope)
    lowers = (lower,) if isinstance(lower, str) else tuple(lower)
    if len(lowers) not in (1, 2) or len({upper, *lowers}) != 1 + len(lowers):
        raise ValueError(
            f"blur needs different terms, got upper={upper!r} and lower={lower!r}. "
            "Name one term for upper, and one or two others for lower."
        )

    def init(params):
        del params
        zeros = {name: jnp.zeros([], jnp.float32) for name in _STATS}
        return BlurState(jnp.zeros([], jnp.int32), zeros)

    def update(grads, state, params=None, *, rules=None, metric=None, **extra):
        del params, extra
        _common.exactly("blur", grads, (upper, *lowers))
        _common.same_trees("blur", {name: grads[name] for name in (upper, *lowers)})
        g_upper = grads[upper]
        highs, structure = jax.tree.flatten(g_upper)
        lows = [jax.tree.leaves(grads[name]) for name in lowers]
        if not highs:
            raise ValueError("blur needs gradients, got a tree without leaves.")
        paths = trees.paths(g_upper)
        groups = _groups(paths, scope)
        columns = [list(x) for x in zip(highs, *lows, strict=True)]
        if metric is not None:
            dtype = _precision.widest(sum(columns, []))
            scaled = [
                [s.astype(dtype) * x.astype(dtype) for x in column]
                for s, column in zip(jax.tree.leaves(metric), columns, strict=True)
            ]
        leaves = dict(zip(paths, columns if metric is None else scaled, strict=True))
        products = _products(leaves, groups, rules)
        factors, gates, finite = [], [], jnp.bool_(True)
        for p in products:
            rate = _common.at(gamma, state.count, p.both.dtype)
            xi, gate = _xi(p, rate, constraint, rel_tol, abs_tol, xi_max)
            finite &= _finite(p) & jnp.isfinite(xi)
            factors.append(xi)
            gates.append(gate)
        new = [None] * len(highs)
        for group, xi in zip(groups, factors, strict=True):
            for i in group:
                u = _common.mix(columns[i], (None, *[xi / len(lowers)] * len(lowers)))
                new[i] = jnp.where(finite, u, jnp.zeros_like(u))
        stats = _stats(products, factors, gates, finite)
        count = jnp.where(finite, optax.safe_increment(state.count), state.count)
        return jax.tree.unflatten(structure, new), BlurState(count, stats)

    return optax.GradientTransformationExtraArgs(init, update)


def _groups(leaves: dict[str, Array], scope: str | Sequence[str]) -> list[list[int]]:
    """For each group, the indices of the leaves that share one xi."""
    if scope == "global":
        return [list(range(len(leaves)))]
    if scope == "leaf":
        return [[i] for i in range(len(leaves))]
    groups = [[] for _ in range(len(scope) + 1)]
    for i, path in enumerate(leaves):
        matching = (k for k, rule in enumerate(scope) if re.fullmatch(rule, path))
        groups[next(matching, len(scope))].append(i)
    for rule, group in zip(scope, groups, strict=False):
        if not group:
            raise ValueError(
                "blur needs each pattern in scope to match a leaf that no earlier "
                f"pattern matches, got {rule!r}. The leaves are "
                f"{_checks.listed(leaves)}."
            )
    return [group for group in groups if group]


def _products(
    leaves: dict[str, list[Array]], groups: list[list[int]], rules: Rules | None
) -> list[_Products]:
    """The products of each group; of rescaled gradients if squares leave the range.

    One sum of products over each leaf is the fastest form on a CPU: XLA reads the leaf
    in place and adds in blocks, so a sum of 1e8 float32 squares has seven digits.
    """
    dtype = _precision.widest([x for column in leaves.values() for x in column])

    def plain(_, high, *lows):
        high, lows = high.astype(dtype), [x.astype(dtype) for x in lows]
        squares = jnp.sum(lows[0] * lows[-1])
        return jnp.sum(high * high), jnp.sum(high * _mean(lows)), squares

    products = sharding.sums(plain, leaves, groups, rules)
    ones = jnp.ones([len(groups), 2], dtype)
    low, high = _SAFE_SQUARES
    squares = products[:, ::2]
    safe = jnp.all((squares >= low) & (squares <= high))

    def rescaled():
        with jax.named_scope("rare"):  # jaxunlearn.plan does not count this branch
            return _rescaled(leaves, groups, rules, dtype)

    scales, products = jax.lax.cond(safe, lambda: (ones, products), rescaled)
    return [_Products(*scales[k], *products[k]) for k in range(len(groups))]


def _rescaled(
    leaves: dict[str, list[Array]],
    groups: list[list[int]],
    rules: Rules | None,
    dtype: jnp.dtype,
) -> tuple[Array, Array]:
    """(largest entries [groups, 2], products [groups, 3] of the gradients divided by
    them)."""
    columns = [
        [jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in column]
        for column in leaves.values()
    ]
    largest = [jnp.stack([x[0], jnp.maximum(x[1], x[-1])]) for x in columns]
    scales = jnp.stack(
        [jnp.max(jnp.stack([largest[i] for i in g]), axis=0) for g in groups]
    )
    # The reciprocal of a subnormal number, or of 0, is inf.
    normal = scales >= jnp.finfo(dtype).tiny
    inverse = jnp.where(normal, 1.0 / jnp.where(normal, scales, 1.0), 0.0)
    group_of = {i: k for k, group in enumerate(groups) for i in group}

    def dots(i, high, *lows):
        # One reduction of three values does not store the scaled leaves; three plain
        # sums would. It adds one number at a time, so it only reduces the last axis.
        a, b = inverse[group_of[i]]
        high, lows = a * high.astype(dtype), [b * x.astype(dtype) for x in lows]
        values = (high * high, high * _mean(lows), lows[0] * lows[-1])
        zero = jnp.zeros([], dtype)
        axes = (high.ndim - 1,) if high.ndim else ()
        rows = jax.lax.reduce(values, (zero,) * 3, _add_triples, axes)
        return [jnp.sum(row) for row in rows]

    return scales, sharding.sums(dots, leaves, groups, rules)


def _mean(lows: Sequence[Array]) -> Array:
    return lows[0] if len(lows) == 1 else 0.5 * (lows[0] + lows[1])


def _add_triples(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _finite(p: _Products) -> Array:
    return jnp.isfinite(jnp.stack(p)).all()


def _norms(p: _Products) -> tuple[Array, Array]:
    # <a, b> of two halves may be negative.
    lower = jnp.sqrt(jnp.maximum(p.lower, 0))
    return p.upper_scale * jnp.sqrt(p.upper), p.lower_scale * lower


def _xi(
    p: _Products,
    gamma: Array,
    constraint: str,
    rel_tol: float,
    abs_tol: float,
    xi_max: float | None,
) -> tuple[Array, Array]:
    """(xi, gate) of a group. No branch of a `where` is nan."""
    upper_norm, lower_norm = _norms(p)
    gate = (lower_norm > rel_tol * upper_norm) & (lower_norm > abs_tol) & _finite(p)
    ratio = jnp.where(gate, p.upper_scale, 0.0) / jnp.where(gate, p.lower_scale, 1.0)
    along = jnp.where(gate, p.both, 0.0) / jnp.where(gate, p.lower, 1.0)
    xi = gamma - ratio * along
    if constraint == "inequality":
        xi = jnp.maximum(xi, 0.0)
    if xi_max is not None:
        xi = jnp.clip(xi, -xi_max, xi_max)
    return jnp.where(gate, xi, 0.0), gate


def _stats(
    products: list[_Products], factors: list[Array], gates: list[Array], finite: Array
) -> dict[str, Array]:
    """The stats over all groups; norms that may overflow are not squared."""
    norms = [_norms(p) for p in products]
    upper_norm, upper_shares = _join([pair[0] for pair in norms])
    lower_norm, lower_shares = _join([pair[1] for pair in norms])
    cosine = xi = jnp.zeros([], jnp.float32)
    shares = zip(products, factors, upper_shares, lower_shares, strict=True)
    for p, factor, a, b in shares:
        size = jnp.sqrt(p.upper) * jnp.sqrt(jnp.maximum(p.lower, 0))
        inside = finite & (size > 0)
        angle = jnp.where(inside, p.both, 0.0) / jnp.where(inside, size, 1.0)
        cosine += a * b * angle.astype(jnp.float32)
        xi += b * b * factor.astype(jnp.float32)
    return {
        "upper_norm": upper_norm,
        "lower_norm": lower_norm,
        "cosine": jnp.where(finite, cosine, 0.0),
        "xi": jnp.where(finite, xi, 0.0),
        "gate": jnp.where(finite, jnp.mean(jnp.stack(gates).astype(jnp.float32)), 0.0),
        "finite": finite.astype(jnp.float32),
    }


def _join(norms: list[Array]) -> tuple[Array, Array]:
    """(norm of the norms, inf if one is not finite; each norm divided by it)."""
    stack = jnp.stack([norm.astype(jnp.float32) for norm in norms])
    finite = jnp.isfinite(stack).all()
    stack = jnp.where(finite, stack, 0.0)
    largest = jnp.max(stack)
    safe = jnp.where(largest > 0, largest, 1.0)
    norm = largest * jnp.sqrt(jnp.sum((stack / safe) ** 2))
    shares = stack / jnp.where(norm > 0, norm, 1.0)
    return jnp.where(finite, norm, jnp.inf), shares
