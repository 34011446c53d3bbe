# SPDX-License-Identifier: Apache-2.0
"""Implicit differentiation of the lower level: one linear solve, no explicit Hessian.

At a minimiser y of G(x, .) with a positive definite Hessian H = grad_yy G(x, y), the
implicit function theorem gives

    d/dx F(x, y*(x)) = grad_x F - grad_xy G w,   (H + damping I) w = grad_y F.

Only products of H with vectors are computed, each as a forward derivative of the
gradient. A product takes two to three times the time of a gradient, and at most twice
its memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.bilevel import _common
from jaxunlearn.bilevel._common import Hypergradient, Objective
from jaxunlearn.typing import Array, PyTree

Product = Callable[[PyTree], PyTree]
"""v -> H v, for v like y."""


class _Solution(NamedTuple):
    w: PyTree
    residual: Array  # norm of b - A w
    curvature: Array  # smallest <v, A v> / <v, v> of all directions v; inf if none
    products: Array


def implicit_cg(
    upper: Objective,
    lower: Objective,
    x: PyTree,
    y: PyTree,
    *,
    damping: float | Array,
    tol: float = 1e-6,
    max_iterations: int = 100,
    w: PyTree | None = None,
    product: Product | None = None,
) -> Hypergradient:
    """Implicit hypergradient; conjugate gradients solve the linear system.

    The loop has the iterates of jax.scipy.sparse.linalg.cg, which reports neither the
    residual nor the curvature. Here the solve stops before a direction in which the
    curvature is not positive. By Sylvester's law there is such a direction exactly if
    the system is not positive definite on the subspace that was searched.

    Args:
        upper, lower: F and G, (x, y) -> scalar; G twice differentiable.
        x: tree of floats.
        y: an approximate minimiser of G(x, .). Solve for it first, because the formula
            holds only at a minimiser.
        damping: added to the diagonal of H, >= 0. With 0 the result is exact if H is
            positive definite. Away from minimisers the Hessian of a network is not;
            damping must then exceed the absolute value of its most negative eigenvalue.
            It biases dx by O(damping).
        tol: stop when |A w - grad_y F| <= tol |grad_y F|, with A = H + damping I; > 0.
        max_iterations: maximum number of products, >= 1; one more product computes the
            residual.
        w: initial value, such as `found["w"]` of the previous call; zeros if None.
        product: v -> H v, to replace the Hessian, for example by `gauss_newton`.
    Returns:
        A Hypergradient with found "w" and these stats: `upper`; `residual`,
        |A w - grad_y F| / |grad_y F|, recomputed at the end; `curvature`, the smallest
        <v, A v> / <v, v> of all search directions (inf if there was none);
        `iterations`; `converged`, whether residual <= 2 tol and curvature > 0; and
        `gradient`, |grad_y G|, which is 0 at a minimiser. If `converged` is False, dx
        comes from the last iterate: check the stats before using it.
    Raises:
        ValueError, TypeError: if a number is out of range, an objective is not a
            scalar, a leaf is not a float, or w is not like y.
    References: Pedregosa 2016, https://arxiv.org/abs/1602.02355;
        Rajeswaran et al. 2019, https://arxiv.org/abs/1909.04630
    """
    owner = "bilevel.implicit_cg"
    _checks.positive(owner, tol=tol)
    _checks.positive_int(owner, max_iterations=max_iterations)

    def solver(matrix, b, start):
        return _cg(matrix, b, start, tol, max_iterations)

    limit = 2 * tol  # by rounding, the true residual may exceed that of the loop
    return _implicit(owner, upper, lower, x, y, damping, limit, w, product, solver)


def implicit_neumann(
    upper: Objective,
    lower: Objective,
    x: PyTree,
    y: PyTree,
    *,
    damping: float | Array,
    step_size: float | Array,
    num_terms: int = 20,
    tol: float = 1e-2,
    product: Product | None = None,
) -> Hypergradient:
    """Implicit hypergradient by a truncated Neumann series.

    With A = H + damping I and J = num_terms,

        w = step_size * sum over j < J of (I - step_size A)^j grad_y F,

    which converges to A^-1 grad_y F iff 0 < step_size < 2 / (largest eigenvalue of A).
    At a minimiser it equals the unrolled derivative of J steps of gradient descent. The
    residual is known exactly: grad_y F - A w = (I - step_size A)^J grad_y F.

    Args:
        upper, lower, x, y, damping, product: as `implicit_cg`.
        step_size: a > 0; the learning rate at which gradient descent on G converges is
            safe.
        num_terms: J >= 1; each costs one product.
        tol: largest residual that counts as converged, > 0.
    Returns:
        A Hypergradient with found "w" and the stats of `implicit_cg`; `residual` and
        `converged` (residual <= tol and curvature > 0) follow from the identity above.
        A residual above 1 means that the series diverges: use a smaller step_size or
        more damping.
    Raises:
        ValueError, TypeError: as `implicit_cg`.
    References: Lorraine, Vicol and Duvenaud 2020, https://arxiv.org/abs/1911.02590
    """
    owner = "bilevel.implicit_neumann"
    _checks.positive(owner, step_size=step_size, tol=tol)
    _checks.positive_int(owner, num_terms=num_terms)

    def solver(matrix, b, start):
        del start
        return _neumann(matrix, b, step_size, num_terms)

    return _implicit(owner, upper, lower, x, y, damping, tol, None, product, solver)


def hessian_product(lower: Objective, x: PyTree, y: PyTree) -> Product:
    """Hessian product v -> grad_yy G(x, y) v, by forward-over-reverse differentiation.

    Args:
        lower: G, (x, y) -> scalar.
        x, y: the point at which the Hessian is computed.
    Returns:
        A linear function of trees like y; v is cast to y's dtypes.
    """
    gradient = jax.grad(lower, argnums=1)

    def product(v):
        return jax.jvp(lambda y: gradient(x, y), (y,), (_common.like(v, y),))[1]

    return product


def gauss_newton(
    outputs: Callable[[PyTree], PyTree], loss: Callable[[PyTree], Array], y: PyTree
) -> Product:
    """Gauss-Newton product v -> J^T L J v for G(y) = loss(outputs(y)).

    J is the Jacobian of the outputs (such as logits) and L the Hessian of the loss with
    respect to them; the Hessian of G has a second part, which is left out. For a convex
    loss the product is positive semi-definite everywhere, so the system is solvable
    with every damping > 0, also where that of the Hessian is not.

    Args:
        outputs: y -> tree of outputs. A decoder on CPUs needs compute_dtype "float32",
            because its bfloat16 products have no forward mode.
        loss: outputs -> scalar, convex.
        y: the point at which it is computed.
    Returns:
        A linear function of trees like y, for `product=`.
    References: Schraudolph 2002, https://doi.org/10.1162/08997660260028683
    """

    def product(v):
        out, moved = jax.jvp(outputs, (y,), (_common.like(v, y),))
        curved = jax.jvp(jax.grad(loss), (out,), (moved,))[1]
        return jax.vjp(outputs, y)[1](curved)[0]

    return product


def _implicit(owner, upper, lower, x, y, damping, limit, w, product, solver):
    x, y, w = _common.arrays(x), _common.arrays(y), _common.arrays(w)
    _checks.not_negative(owner, damping=damping)
    _common.levels(owner, x, y, upper=upper, lower=lower)
    _common.same(owner, y, w=w)
    product = hessian_product(lower, x, y) if product is None else product

    def matrix(v):
        return _common.add(product(v), damping, v)

    above, (f_x, f_y) = jax.value_and_grad(upper, (0, 1))(x, y)
    b = _common.widen(f_y)
    start = jax.tree.map(jnp.zeros_like, b) if w is None else _common.like(w, b)
    solution = solver(matrix, b, start)

    def lower_x(y):
        return jax.grad(lower)(x, y)

    cross = jax.jvp(lower_x, (y,), (_common.like(solution.w, y),))[1]
    dx = _common.add(f_x, -1.0, cross)
    size = _common.norm(b)
    residual = solution.residual / jnp.where(size > 0, size, 1)
    stats = {
        "upper": above,
        "residual": residual,
        "curvature": solution.curvature,
        "iterations": solution.products,
        "converged": (residual <= limit) & (solution.curvature > 0),
        "gradient": _common.norm(jax.grad(lower, argnums=1)(x, y)),
    }
    return Hypergradient(_common.like(dx, x), {"w": solution.w}, stats)


def _cg(matrix, b, start, tol, iterations) -> _Solution:
    """Conjugate gradients for matrix(w) = b; stops before a curvature <= 0."""
    r = _common.add(b, -1.0, matrix(start))
    square = _common.vdot(r, r)
    goal = tol * tol * _common.vdot(b, b)
    first = (start, r, r, square, jnp.full_like(square, jnp.inf), jnp.int32(0))

    def unsolved(state):
        _, _, _, square, curvature, count = state
        return (square > goal) & (count < iterations) & (curvature > 0)

    def iterate(state):
        w, r, p, square, curvature, count = state
        image = matrix(p)
        bend = _common.vdot(p, image)
        new_curvature = bend / _common.vdot(p, p)
        convex = bend > 0
        alpha = jnp.where(convex, square / jnp.where(convex, bend, 1), 0)
        w, r = _common.add(w, alpha, p), _common.add(r, -alpha, image)
        new = _common.vdot(r, r)
        p = _common.add(r, new / square, p)
        return w, r, p, new, jnp.minimum(curvature, new_curvature), count + 1

    w, _, _, _, curvature, count = jax.lax.while_loop(unsolved, iterate, first)
    residual = _common.norm(_common.add(b, -1.0, matrix(w)))
    return _Solution(w, residual, curvature, count)


def _neumann(matrix, b, step_size, num_terms) -> _Solution:
    """The sum; its residual is the norm of the first term that is left out."""
    zeros = jax.tree.map(jnp.zeros_like, b)
    start = (zeros, b, jnp.full_like(_common.vdot(b, b), jnp.inf))

    def add_term(state, _):
        total, v, curvature = state
        image = matrix(v)
        square = _common.vdot(v, v)
        nonzero = square > 0
        new_curvature = _common.vdot(v, image) / jnp.where(nonzero, square, 1)
        new_curvature = jnp.where(nonzero, new_curvature, jnp.inf)
        total = _common.add(total, 1.0, v)
        v = _common.add(v, -jnp.asarray(step_size), image)
        return (total, v, jnp.minimum(curvature, new_curvature)), None

    (total, left, curvature), _ = jax.lax.scan(add_term, start, None, length=num_terms)
    w = jax.tree.map(lambda a: jnp.asarray(step_size).astype(a.dtype) * a, total)
    return _Solution(w, _common.norm(left), curvature, jnp.int32(num_terms))
