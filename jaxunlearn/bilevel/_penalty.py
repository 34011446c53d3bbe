# SPDX-License-Identifier: Apache-2.0
"""Value-function penalties: first-order methods that penalise the lower level's gap.

Both levels become one problem, min F(x, y) + lambda (G(x, y) - v(x)), with the value
function v(x) = min_y G(x, y). The gradient of v is that of G at its minimiser z, so
these methods need no derivative through the inner loop and no second derivative.
"""

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks
from jaxunlearn.bilevel import _common
from jaxunlearn.bilevel._common import Direction, Hypergradient, Objective
from jaxunlearn.typing import Array, PyTree


def f2sa(
    upper: Objective,
    lower: Objective,
    x: PyTree,
    y: PyTree,
    *,
    strength: float | Array,
    tx: optax.GradientTransformation | None = None,
    steps: int = 0,
    z: PyTree | None = None,
) -> Hypergradient:
    """F2SA: fully first-order hypergradient, the gradient of the penalised upper level.

    With lambda = strength, z = argmin_y G(x, y) and
    y_lambda = argmin_y F(x, y) / lambda + G(x, y), each after `steps` updates of `tx`,

        dx = grad_x F(x, y_lambda) + lambda (grad_x G(x, y_lambda) - grad_x G(x, z)).

    If G is strongly convex in y and both solves are exact, this is the gradient of
    min_y F + lambda (G - v), and its distance to the hypergradient of F(x, y*(x)) is
    O(1 / lambda). Errors of the solves and rounding errors are multiplied by lambda:
    |dx - exact| is about c / lambda + lambda (|e_y| + |e_z| + eps |grad_x G|), with a
    constant c of the problem. In float32 a strength above 1e3 is rarely useful.

    One step of the algorithm is one call with a small number of `steps`, y and z from
    `found` of the previous call and an increasing strength; pass dx to an optimizer.

    Args:
        upper: F, (x, y) -> scalar.
        lower: G, (x, y) -> scalar, bounded below in y.
        x: tree of floats.
        y: initial value of y_lambda.
        strength: lambda, > 0; it may be traced.
        tx: optimizer of both inner loops. Their objectives are on the scale of G, so
            the same learning rate works for every strength.
        steps: updates in each loop, >= 0. With 0, y and z are used as they are, for
            example if you run the two loops yourself on batches.
        z: initial value of z; y if None.
    Returns:
        A Hypergradient with found "y" (y_lambda) and "z", and these stats: `upper`,
        F(x, y_lambda); `lower`, G(x, z); `gap`, G(x, y_lambda) - G(x, z) (if negative,
        z is not a minimiser); `y_residual` and `z_residual`, the norms of the gradients
        that the loops should bring to 0.
    Raises:
        ValueError, TypeError: if strength <= 0, an objective is not a scalar, a leaf is
            not a float, z is not like y, or steps > 0 without tx.
    References: Kwon et al. 2023, https://arxiv.org/abs/2301.10945
    """
    owner = "bilevel.f2sa"
    x, y, z = _common.arrays(x), _common.arrays(y), _common.arrays(z)
    _common.levels(owner, x, y, upper=upper, lower=lower)
    _common.same(owner, y, z=z)
    _common.inner(owner, tx, steps)
    _checks.positive(owner, strength=strength)
    z = y if z is None else z

    def penalised(y):
        above, below = upper(x, y), lower(x, y)
        return above / jnp.asarray(strength).astype(above.dtype) + below

    if steps:
        z = _common.solve(lambda z: lower(x, z), z, tx, steps)
        y = _common.solve(penalised, y, tx, steps)
    both = (0, 1)
    above, (f_x, f_y) = jax.value_and_grad(upper, both)(x, y)
    below, (g_x, g_y) = jax.value_and_grad(lower, both)(x, y)
    value, (v_x, v_z) = jax.value_and_grad(lower, both)(x, z)
    dx = _common.add(f_x, strength, _common.add(g_x, -1.0, v_x))
    stats = {
        "upper": above,
        "lower": value,
        "gap": below - value,
        "y_residual": _common.norm(_common.add(g_y, 1.0 / jnp.asarray(strength), f_y)),
        "z_residual": _common.norm(v_z),
    }
    return Hypergradient(_common.like(dx, x), {"y": y, "z": z}, stats)


def pbgd(
    upper: Objective,
    lower: Objective,
    x: PyTree,
    y: PyTree,
    *,
    strength: float | Array,
    tx: optax.GradientTransformation | None = None,
    steps: int = 0,
    z: PyTree | None = None,
) -> Direction:
    """V-PBGD: gradient of F + lambda (G - v) with respect to x and y.

        dx = grad_x F(x, y) + lambda (grad_x G(x, y) - grad_x G(x, z))
        dy = grad_y F(x, y) + lambda grad_y G(x, y)

    where z is the result of `steps` updates on G(x, .). Descent along this direction
    solves the penalised problem, which approaches the bi-level problem as lambda grows.
    If G does not depend on x, dy is the update of `combine.penalty`.

    Args:
        upper, lower: F and G, (x, y) -> scalar.
        x, y: trees of floats.
        strength: lambda, > 0. dy grows with it, so use smaller learning rates for a
            larger strength.
        tx: optimizer of the inner loop.
        steps: updates of z, >= 0; with 0, z is used as it is.
        z: initial value of z; y if None.
    Returns:
        A Direction with these stats: `upper` and `lower`, both at y; `gap`,
        G(x, y) - G(x, z); `z_residual`, the norm of grad_y G(x, z).
    Raises:
        ValueError, TypeError: as `f2sa`, and if steps=0 without z.
    References: Shen and Chen 2023, https://arxiv.org/abs/2302.05185
    """
    owner = "bilevel.pbgd"
    _checks.positive(owner, strength=strength)
    x, y, z = _lower_solution(owner, upper, lower, x, y, tx, steps, z)
    (f_x, f_y), (q_x, q_y), stats = _gradients(upper, lower, x, y, z)
    dx, dy = _common.add(f_x, strength, q_x), _common.add(f_y, strength, q_y)
    return Direction(_common.like(dx, x), _common.like(dy, y), z, stats)


def bome(
    upper: Objective,
    lower: Objective,
    x: PyTree,
    y: PyTree,
    *,
    eta: float | Array = 0.5,
    barrier: str = "norm",
    tx: optax.GradientTransformation | None = None,
    steps: int = 0,
    z: PyTree | None = None,
) -> Direction:
    """BOME: the direction closest to grad F that reduces the lower gap fast enough.

    With q(x, y) = G(x, y) - G(x, z), where z is constant, and gradients with respect to
    (x, y),

        xi = max(0, (phi - <grad F, grad q>) / |grad q|^2)
        (dx, dy) = grad F + xi grad q

    so that <d, grad q> >= phi, where phi = eta |grad q|^2 ("norm") or eta q ("gap").
    There is no strength to choose. If G does not depend on x, dy is the update of
    combine.blur(gamma=eta, constraint="inequality").

    Args:
        upper, lower: F and G, (x, y) -> scalar.
        x, y: trees of floats.
        eta: rate at which the gap decreases, >= 0 (the paper's default is 0.5).
        barrier: "norm" or "gap", the choice of phi.
        tx: optimizer of the inner loop.
        steps: updates of z, >= 0; with 0, z is used as it is.
        z: initial value of z; y if None, as in the paper.
    Returns:
        A Direction with the stats of `pbgd`, and `xi`, which is 0 if grad q vanishes.
    Raises:
        ValueError, TypeError: as `pbgd`; if eta < 0 or the barrier is unknown.
    References: Liu et al. 2022, https://arxiv.org/abs/2209.08709
    """
    owner = "bilevel.bome"
    _checks.not_negative(owner, eta=eta)
    _checks.one_of(owner, ("norm", "gap"), barrier=barrier)
    x, y, z = _lower_solution(owner, upper, lower, x, y, tx, steps, z)
    f, q, stats = _gradients(upper, lower, x, y, z)
    square, along = _common.vdot(q, q), _common.vdot(f, q)
    rate = jnp.asarray(eta).astype(square.dtype)
    gap = stats["gap"].astype(square.dtype)
    phi = rate * (square if barrier == "norm" else gap)
    nonzero = square > 0
    xi = jnp.maximum((phi - along) / jnp.where(nonzero, square, 1), 0)
    xi = jnp.where(nonzero, xi, 0)
    dx, dy = _common.add(f, xi, q)
    stats = stats | {"xi": xi}
    return Direction(_common.like(dx, x), _common.like(dy, y), z, stats)


def _lower_solution(owner, upper, lower, x, y, tx, steps, z):
    """(x, y, z) as arrays, checked, with z after the inner loop."""
    x, y, z = _common.arrays(x), _common.arrays(y), _common.arrays(z)
    _common.levels(owner, x, y, upper=upper, lower=lower)
    _common.same(owner, y, z=z)
    _common.inner(owner, tx, steps)
    if steps == 0 and z is None:
        raise ValueError(
            f"{owner} needs an inner loop or z, got steps=0 and z=None. Pass tx and "
            "steps, or a minimiser z of the lower level."
        )
    z = y if z is None else z
    if steps:
        z = _common.solve(lambda z: lower(x, z), z, tx, steps)
    return x, y, jax.lax.stop_gradient(z)


def _gradients(upper, lower, x, y, z):
    """(grad F, grad q, stats), with gradients with respect to (x, y)."""
    both = (0, 1)
    above, f = jax.value_and_grad(upper, both)(x, y)
    below, (g_x, g_y) = jax.value_and_grad(lower, both)(x, y)
    value, (v_x, v_z) = jax.value_and_grad(lower, both)(x, z)
    q = (_common.add(g_x, -1.0, v_x), g_y)
    stats = {"upper": above, "lower": below, "gap": below - value}
    return f, q, stats | {"z_residual": _common.norm(v_z)}
