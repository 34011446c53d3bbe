# SPDX-License-Identifier: Apache-2.0
"""Value-function penalties: the lower level's optimality as a penalty, first order.

Both levels become one problem, min F(x, y) + lambda (G(x, y) - v(x)) with the value
function v(x) = min_y G(x, y), whose gradient is that of G at its minimiser z: no
derivative passes through the inner loop and no second derivative is taken.
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
    """Fully first-order hypergradient: the gradient of the penalised upper level.

    With lambda = strength, z = argmin_y G(x, y) and
    y_lambda = argmin_y F(x, y) / lambda + G(x, y), each after `steps` updates of `tx`,

        dx = grad_x F(x, y_lambda) + lambda (grad_x G(x, y_lambda) - grad_x G(x, z)).

    If G is strongly convex in y and both solves are exact, this is the gradient of
    min_y F + lambda (G - v), and its distance to the hypergradient of F(x, y*(x)) is
    O(1 / lambda). Errors of the solves enter multiplied by lambda, and so does
    rounding: |dx - exact| is about c / lambda + lambda (|e_y| + |e_z| + eps |grad_x G|)
    with a constant c of the problem. In float32 a strength beyond 1e3 seldom pays.

    The step of the algorithm is one call with few `steps`, y and z from `found` of the
    call before, a strength that grows, and dx handed to an optimizer.

    Args:
        upper: F, (x, y) -> scalar.
        lower: G, (x, y) -> scalar, bounded below in y.
        x: tree of floats.
        y: where the search for y_lambda starts.
        strength: lambda, > 0; a traced scalar is fine.
        tx: optimizer of both inner loops. Their objectives are scaled like G, so one
            learning rate serves every strength.
        steps: updates of each loop, >= 0. With 0, y and z are taken as they are, for
            those who run the two chains themselves, on batches say.
        z: where the search for z starts; y if None.
    Returns:
        A Hypergradient; found: "y" (y_lambda) and "z"; stats: `upper` F(x, y_lambda),
        `lower` G(x, z), `gap` G(x, y_lambda) - G(x, z) (negative: z is not solved),
        `y_residual` and `z_residual`, the norms of the gradients that the loops should
        have brought to 0.
    Raises:
        ValueError, TypeError: if strength <= 0, an objective is not a scalar, a leaf is
            not a float, z is not like y, or the loop lacks its optimizer.
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
    """V-PBGD: the gradient of F + lambda (G - v) over both variables at (x, y).

        dx = grad_x F(x, y) + lambda (grad_x G(x, y) - grad_x G(x, z))
        dy = grad_y F(x, y) + lambda grad_y G(x, y)

    with z after `steps` updates on G(x, .). Descending it to the end solves the
    penalised problem, whose distance to the bi-level one falls with lambda. Where G
    does not depend on x, dy is the update of `combine.penalty`.

    Args:
        upper, lower: F and G, (x, y) -> scalar.
        x, y: trees of floats.
        strength: lambda, > 0. dy grows with it, so learning rates must shrink with it.
        tx: optimizer of the inner loop.
        steps: updates of z, >= 0; with 0, z is taken as it is.
        z: where the search starts; y if None.
    Returns:
        A Direction; stats: `upper`, `lower` (both at y), `gap` G(x, y) - G(x, z), and
        `z_residual`, the norm of grad_y G(x, z).
    Raises:
        ValueError, TypeError: as `f2sa`, and if with steps=0 there is no z.
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
    """BOME: the direction closest to grad F along which the lower gap shrinks enough.

    With q(x, y) = G(x, y) - G(x, z), z held fixed, and gradients over (x, y) together,

        xi = max(0, (phi - <grad F, grad q>) / |grad q|^2)
        (dx, dy) = grad F + xi grad q

    so that <d, grad q> >= phi, where phi = eta |grad q|^2 ("norm") or eta q ("gap"). No
    strength has to be chosen. Where G does not depend on x, dy is the update of
    combine.blur(gamma=eta, constraint="inequality").

    Args:
        upper, lower: F and G, (x, y) -> scalar.
        x, y: trees of floats.
        eta: rate at which the gap is to shrink, >= 0 (the paper's default is 0.5).
        barrier: "norm" or "gap", the choice of phi.
        tx: optimizer of the inner loop.
        steps: updates of z, >= 0; with 0, z is taken as it is.
        z: where the search starts; y if None, as in the paper.
    Returns:
        A Direction; stats as `pbgd`, and `xi`. Where grad q vanishes, xi is 0.
    Raises:
        ValueError, TypeError: as `pbgd`, if eta < 0 or the barrier is unknown.
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
    used = square > 0
    xi = jnp.maximum((phi - along) / jnp.where(used, square, 1), 0)
    xi = jnp.where(used, xi, 0)
    dx, dy = _common.add(f, xi, q)
    stats = stats | {"xi": xi}
    return Direction(_common.like(dx, x), _common.like(dy, y), z, stats)


def _lower_solution(owner, upper, lower, x, y, tx, steps, z):
    """x, y and z as arrays, z solved for, once all is known to fit."""
    x, y, z = _common.arrays(x), _common.arrays(y), _common.arrays(z)
    _common.levels(owner, x, y, upper=upper, lower=lower)
    _common.same(owner, y, z=z)
    _common.inner(owner, tx, steps)
    if steps == 0 and z is None:
        raise ValueError(
            f"{owner} needs an inner loop or z, got steps=0 without z, where the gap "
            "would be 0. Give tx and steps, or a z that you solved for."
        )
    z = y if z is None else z
    if steps:
        z = _common.solve(lambda z: lower(x, z), z, tx, steps)
    return x, y, jax.lax.stop_gradient(z)


def _gradients(upper, lower, x, y, z):
    """grad F and grad q over (x, y), and what is worth reporting."""
    both = (0, 1)
    above, f = jax.value_and_grad(upper, both)(x, y)
    below, (g_x, g_y) = jax.value_and_grad(lower, both)(x, y)
    value, (v_x, v_z) = jax.value_and_grad(lower, both)(x, z)
    q = (_common.add(g_x, -1.0, v_x), g_y)
    stats = {"upper": above, "lower": below, "gap": below - value}
    return f, q, stats | {"z_residual": _common.norm(v_z)}
