# SPDX-License-Identifier: Apache-2.0
"""Unrolled differentiation: reverse-mode differentiation through the inner loop.

It is the reference for the other methods on small problems, and the only method for
variables on which a minimiser does not depend: learning rates, gamma of BLUR, the
number of steps.
"""

from collections.abc import Callable

import jax
import optax

from jaxunlearn import _checks
from jaxunlearn.bilevel import _common
from jaxunlearn.bilevel._common import Hypergradient, Objective
from jaxunlearn.typing import Array, PyTree


def unrolled(
    upper: Objective,
    lower: Objective,
    x: PyTree,
    y: PyTree,
    *,
    tx: optax.GradientTransformation,
    steps: int,
    truncate: int | None = None,
) -> Hypergradient:
    """Gradient of F(x, y_K(x)) with respect to x; y_K is y after K steps on G.

    It is exact for those K steps, whether or not they converge; the initial y is a
    constant. For gradient descent with learning rate a on a mu-strongly convex G, it
    differs from the hypergradient at the minimiser by O((1 - a mu)^K), and with
    `truncate=T` by O((1 - a mu)^T).

    Memory: each differentiated step stores y and the optimizer state, and is recomputed
    in the backward pass: T (|y| + |state|), and the activations of one step. Time: K
    gradients forward, and about 3 T backward.

    Args:
        upper, lower: F and G, (x, y) -> scalar; G twice differentiable.
        x: tree of floats.
        y: initial value of the inner loop.
        tx: a differentiable optimizer. Those with a line search (optax.lbfgs) are not.
        steps: K >= 1.
        truncate: T, differentiate the last T steps only, 1 <= T <= K; None for all.
    Returns:
        A Hypergradient with found "y" (y_K), and these stats: `upper`, F(x, y_K);
        `gradient`, |grad_y G(x, y_K)|, which is 0 at a minimiser.
    Raises:
        ValueError, TypeError: if steps or truncate is out of range, an objective is not
            a scalar, a leaf is not a float, or tx is not an optax transformation.
    References: Maclaurin, Duvenaud and Adams 2015, https://arxiv.org/abs/1502.03492;
        Franceschi et al. 2017, https://arxiv.org/abs/1703.01785;
        truncation: Shaban et al. 2019, https://arxiv.org/abs/1810.10667
    """
    owner = "bilevel.unrolled"
    x, y = _common.arrays(x), _common.arrays(y)
    _common.levels(owner, x, y, upper=upper, lower=lower)
    _checks.positive_int(owner, steps=steps)
    _common.inner(owner, tx, steps)

    def step(x, state):
        y, inner = state
        grads = jax.grad(lower, argnums=1)(x, y)
        updates, inner = tx.update(grads, inner, y)
        return optax.apply_updates(y, updates), inner

    result = unrolled_steps(
        lambda x, state: upper(x, state[0]),
        step,
        x,
        (y, tx.init(y)),
        steps=steps,
        truncate=truncate,
    )
    last = result.found["state"][0]
    gradient = _common.norm(jax.grad(lower, argnums=1)(x, last))
    return Hypergradient(result.dx, {"y": last}, result.stats | {"gradient": gradient})


def unrolled_steps(
    upper: Callable[[PyTree, PyTree], Array],
    step: Callable[[PyTree, PyTree], PyTree],
    x: PyTree,
    state: PyTree,
    *,
    steps: int,
    truncate: int | None = None,
) -> Hypergradient:
    """`unrolled` for any update rule: gradient of upper(x, state_K) with respect to x.

    state_{k+1} = step(x, state_k), and x may be anything that a step uses, such as the
    gamma of combine.blur, whose update is not the gradient of a function.

    Args:
        upper: (x, state) -> scalar.
        step: (x, state) -> state of the same shapes and dtypes, differentiable in both.
        x: tree of floats.
        state: initial state, any tree; it may have integer leaves.
        steps, truncate: as `unrolled`.
    Returns:
        A Hypergradient with found "state" and the stat `upper`.
    Raises:
        ValueError, TypeError: as `unrolled`.
    """
    owner = "bilevel.unrolled"
    _checks.positive_int(owner, steps=steps)
    last = steps if truncate is None else truncate
    _checks.positive_int(owner, truncate=last)
    if last > steps:
        raise ValueError(
            f"{owner} needs truncate <= steps, got truncate={last} and steps={steps}. "
            "Leave it out to differentiate every step."
        )
    x = _common.arrays(x)

    def run(x, state, length):
        # Inside a scan, prevent_cse is not needed.
        checkpointed = jax.checkpoint(step, prevent_cse=False)

        def body(state, _):
            return checkpointed(x, state), None

        return jax.lax.scan(body, state, None, length=length)[0]

    state = run(x, state, steps - last)

    def objective(x):
        final = run(x, state, last)
        return upper(x, final), final

    (value, final), dx = jax.value_and_grad(objective, has_aux=True)(x)
    return Hypergradient(dx, {"state": final}, {"upper": value})
