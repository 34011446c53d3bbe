# SPDX-License-Identifier: Apache-2.0
"""Implicit differentiation of the lower level: one linear solve, never a Hessian.

At a minimiser y of G(x, .) with a positive definite Hessian H = grad_yy G(x, y), the
implicit function theorem gives

    d/dx F(x, y*(x)) = grad_x F - grad_xy G w,   (H + damping I) w = grad_y F.

H is only ever multiplied with vectors, each product a forward derivative of the
gradient: two to three times a gradient's time, and no more than twice its memory.
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
    curvature: Array  # least <v, A v> / <v, v> met, inf if none was
    products: Array


def implicit_cg(
    upper: Objective,
    lower: Objective,
    x: PyTree,
    y: PyTree,
    *,
    damping: float | Array,
    tol: float = 1e-6,
    iterations: int = 100,
    w: PyTree | None = None,
    product: Product | None = None,
) -> Hypergradient:
    """Implicit hypergradient, the linear system solved by conjugate gradients.

    The loop is our own rather than jax.scipy.sparse.linalg.cg, of which it has the
    iterates, because that one reports neither how far it came nor what it met: here a
    direction along which the curvature is not positive is noticed, and the solve stops
    before it. By Sylvester's law such a direction shows up exactly when the system is
    not positive definite on the space that was searched.

    Args:
        upper, lower: F and G, (x, y) -> scalar; G twice differentiable.
        x: tree of floats.
        y: an approximate minimiser of G(x, .), solved for beforehand: the formula
            holds at minimisers only.
        damping: added to the diagonal of H, >= 0. 0 is exact where H is positive
            definite; away from minimisers the Hessians of networks are not, and it must
            exceed the size of their most negative eigenvalue. It biases dx by
            O(damping).
        tol: stop once |A w - grad_y F| <= tol |grad_y F|, > 0.
        iterations: products at most, >= 1; one more checks the residual.
        w: where to start, such as `found["w"]` of the call before; zeros if None.
        product: v -> H v in place of the Hessian's, such as `gauss_newton`.
    Returns:
        A Hypergradient; found: "w"; stats: `upper`; `residual`, |A w - grad_y F| over
        |grad_y F|, computed anew at the end; `curvature`, the least <v, A v> / <v, v>
        met (inf if none was); `iterations`; `converged`, bool: residual <= 2 tol and
        curvature > 0; and `gradient`, |grad_y G|, 0 at a minimiser. Where `converged`
        is False dx is the best that was found: do not step by it unseen.
    Raises:
        ValueError, TypeError: for a number out of range, an objective that is not a
            scalar, leaves that are no floats, or w not like y.
    References: Pedregosa 2016, https://arxiv.org/abs/1602.02355;
        Rajeswaran et al. 2019, https://arxiv.org/abs/1909.04630
    """
    owner = "bilevel.implicit_cg"
    _checks.positive(owner, tol=tol)
    _checks.positive_int(owner, iterations=iterations)

    def solver(matrix, b, start):
        return _cg(matrix, b, start, tol, iterations)

    limit = 2 * tol  # rounding may part the loop's residual from the true one
    return _implicit(owner, upper, lower, x, y, damping, limit, w, product, solver)


def implicit_neumann(
    upper: Objective,
    lower: Objective,
    x: PyTree,
    y: PyTree,
    *,
    damping: float | Array,
    rate: float | Array,
    terms: int = 20,
    tol: float = 1e-2,
    product: Product | None = None,
) -> Hypergradient:
    """Implicit hypergradient by a truncated Neumann series.

    With A = H + damping I and J = terms,

        w = rate * sum over j < J of (I - rate A)^j grad_y F,

    which converges to A^-1 grad_y F iff 0 < rate < 2 / (largest eigenvalue of A), and
    equals the unrolled derivative of J steps of gradient descent at a minimiser. What
    is left over is known exactly: grad_y F - A w = (I - rate A)^J grad_y F.

    Args:
        upper, lower, x, y, damping, product: as `implicit_cg`.
        rate: a > 0; the learning rate at which gradient descent on G converges is safe.
        terms: J >= 1, one product each.
        tol: what counts as converged, > 0.
    Returns:
        A Hypergradient; found: "w"; stats as `implicit_cg`, with `residual` and
        `converged` (residual <= tol and curvature > 0) from the identity above. A
        residual above 1 means that the series diverges: take a smaller rate, or more
        damping.
    Raises:
        ValueError, TypeError: as `implicit_cg`.
    References: Lorraine, Vicol and Duvenaud 2020, https://arxiv.org/abs/1911.02590
    """
    owner = "bilevel.implicit_neumann"
    _checks.positive(owner, rate=rate, tol=tol)
    _checks.positive_int(owner, terms=terms)

    def solver(matrix, b, start):
        del start
        return _neumann(matrix, b, rate, terms)

    return _implicit(owner, upper, lower, x, y, damping, tol, None, product, solver)


def hessian_product(lower: Objective, x: PyTree, y: PyTree) -> Product:
    """v -> grad_yy G(x, y) v, the forward derivative of the gradient along v.

    Args:
        lower: G, (x, y) -> scalar.
        x, y: where the Hessian is taken.
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
    """v -> J^T L J v for G(y) = loss(outputs(y)): the Hessian without its second part.

    J is the derivative of the outputs (logits, say) and L the Hessian of the loss over
    them. With a convex loss it is positive semi-definite everywhere, so that any
    damping > 0 makes the system solvable where the Hessian's is not.

    Args:
        outputs: y -> tree of outputs.
        loss: outputs -> scalar, convex.
        y: where it is taken.
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
    """Conjugate gradients on matrix(w) = b, cut off before curvature <= 0."""
    r = _common.add(b, -1.0, matrix(start))
    square = _common.vdot(r, r)
    goal = tol * tol * _common.vdot(b, b)
    first = (start, r, r, square, jnp.full_like(square, jnp.inf), jnp.int32(0))

    def going(state):
        _, _, _, square, curvature, count = state
        return (square > goal) & (count < iterations) & (curvature > 0)

    def iterate(state):
        w, r, p, square, curvature, count = state
        image = matrix(p)
        bend = _common.vdot(p, image)
        seen = bend / _common.vdot(p, p)
        fine = bend > 0
        alpha = jnp.where(fine, square / jnp.where(fine, bend, 1), 0)
        w, r = _common.add(w, alpha, p), _common.add(r, -alpha, image)
        new = _common.vdot(r, r)
        p = _common.add(r, new / square, p)
        return w, r, p, new, jnp.minimum(curvature, seen), count + 1

    w, _, _, _, curvature, count = jax.lax.while_loop(going, iterate, first)
    residual = _common.norm(_common.add(b, -1.0, matrix(w)))
    return _Solution(w, residual, curvature, count)


def _neumann(matrix, b, rate, terms) -> _Solution:
    """The sum, and the norm of the first power that it leaves out."""
    zeros = jax.tree.map(jnp.zeros_like, b)
    start = (zeros, b, jnp.full_like(_common.vdot(b, b), jnp.inf))

    def add_term(state, _):
        total, v, curvature = state
        image = matrix(v)
        square = _common.vdot(v, v)
        used = square > 0
        seen = _common.vdot(v, image) / jnp.where(used, square, 1)
        seen = jnp.where(used, seen, jnp.inf)
        total = _common.add(total, 1.0, v)
        v = _common.add(v, -jnp.asarray(rate), image)
        return (total, v, jnp.minimum(curvature, seen)), None

    (total, left, curvature), _ = jax.lax.scan(add_term, start, None, length=terms)
    w = jax.tree.map(lambda a: jnp.asarray(rate).astype(a.dtype) * a, total)
    return _Solution(w, _common.norm(left), curvature, jnp.int32(terms))
