# SPDX-License-Identifier: Apache-2.0
"""What every form shares: its results, its checks, the inner loop, and tree algebra.

Products and sums are taken in float32, or in float64 where a leaf is; strict dtype
promotion holds, so every factor is cast to its leaf.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks
from jaxunlearn.typing import Array, PyTree

Objective = Callable[[PyTree, PyTree], Array]
"""(x, y) -> scalar; x is the upper level's variable, y the lower level's."""


class Hypergradient(NamedTuple):
    """The gradient over x of F(x, y*(x)), as one method sees it.

    Attributes:
        dx: like x.
        found: what the method solved for, like y, under names that it documents: hand
            it back for a warm start.
        stats: scalars that say what was reached and how well it was solved.
    """

    dx: PyTree
    found: dict[str, PyTree]
    stats: dict[str, Array]


class Direction(NamedTuple):
    """One descent direction for both levels together.

    Attributes:
        dx: like x; subtract it, or hand it to an optimizer as the gradient.
        dy: like y.
        z: like y, the approximate lower solution that the direction leaned on.
        stats: scalars that say what was reached and how well it was solved.
    """

    dx: PyTree
    dy: PyTree
    z: PyTree
    stats: dict[str, Array]


def solve(
    loss: Callable[..., Array],
    y: PyTree,
    tx: optax.GradientTransformation,
    steps: int,
    *,
    batches: PyTree | None = None,
) -> PyTree:
    """The inner loop: `steps` updates of y by any optax optimizer, in one lax.scan.

    Differentiable in whatever `loss` closes over, as long as the optimizer is. A fresh
    optimizer state is made at the start. Optimizers that search along a line
    (optax.lbfgs) get the value, the gradient and the function.

    Args:
        loss: y -> scalar, or (y, batch) -> scalar with `batches`.
        y: where to start.
        tx: the optimizer.
        steps: how many updates, >= 0.
        batches: arrays with a leading axis of length `steps`, one slice a step; None
            if the loss needs none.
    Returns:
        y after the last update.
    Raises:
        TypeError, ValueError: if steps is not a whole number >= 0, tx is no optax
            transformation, or the batches are not `steps` long.
    """
    _optimizer("bilevel.solve", tx, steps)
    for leaf in jax.tree.leaves(batches):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != steps:
            raise ValueError(
                f"bilevel.solve needs batches with a leading axis of steps={steps}, "
                f"got an array of shape {jnp.shape(leaf)}. Stack one batch a step."
            )
    tx = optax.with_extra_args_support(tx)

    def update(carry, batch):
        y, state = carry
        given = () if batches is None else (batch,)

        def here(y):
            return loss(y, *given)

        value, grads = jax.value_and_grad(here)(y)
        updates, state = tx.update(
            grads, state, y, value=value, grad=grads, value_fn=here
        )
        return (optax.apply_updates(y, updates), state), None

    (y, _), _ = jax.lax.scan(update, (y, tx.init(y)), batches, length=steps)
    return y


def levels(owner: str, x: PyTree, y: PyTree, **objectives: Objective) -> None:
    """Raises unless x and y are trees of floats and each objective a scalar of them."""
    for name, tree in (("x", x), ("y", y)):
        leaves = jax.tree.leaves(tree)
        if not leaves:
            raise ValueError(f"{owner} needs {name} with at least one leaf, got none.")
        for leaf in leaves:
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(
                    f"{owner} needs floating-point leaves in {name}, got "
                    f"{jnp.result_type(leaf)}. Close over what has no gradient."
                )
    for name, objective in objectives.items():
        came = jax.eval_shape(objective, x, y)
        shape, dtype = getattr(came, "shape", None), getattr(came, "dtype", None)
        if shape != () or not jnp.issubdtype(dtype, jnp.floating):
            what = type(came).__name__ if shape is None else f"{dtype}{list(shape)}"
            raise ValueError(
                f"{owner} needs {name}(x, y) to return one float, got {what}. Average "
                "the loss inside, and return nothing beside it."
            )


def same(owner: str, y: PyTree, **others: PyTree) -> None:
    """Raises ValueError unless each other tree that is not None looks like y."""
    for name, other in others.items():
        if other is None:
            continue
        if jax.tree.structure(other) != jax.tree.structure(y):
            raise ValueError(
                f"{owner} needs {name} of y's structure {jax.tree.structure(y)}, got "
                f"{jax.tree.structure(other)}."
            )
        for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(other), strict=True):
            _checks.same_shape(owner, **{"y": a, name: b})


def inner(owner: str, tx: Any, steps: int) -> None:
    """Raises unless there is an inner loop: steps >= 1 with an optimizer, or 0."""
    if steps == 0 and tx is None and not isinstance(steps, bool):
        return
    _optimizer(owner, tx, steps)


def _optimizer(owner: str, tx: Any, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"{owner} needs a whole number steps, got steps={steps!r}.")
    _checks.not_negative(owner, steps=steps)
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"{owner} needs tx to be an optax transformation, got "
            f"{type(tx).__name__}. Try optax.sgd(0.1)."
        )


def widen(tree: PyTree) -> PyTree:
    """Leaves of at least float32."""
    return jax.tree.map(lambda a: a.astype(_wide(a)), tree)


def like(tree: PyTree, template: PyTree) -> PyTree:
    """The tree in the template's dtypes."""
    return jax.tree.map(lambda a, b: a.astype(jnp.result_type(b)), tree, template)


def add(a: PyTree, factor: Array | float, b: PyTree) -> PyTree:
    """a + factor * b in at least float32."""

    def leaf(a, b):
        dtype = _wide(a, b)
        return a.astype(dtype) + jnp.asarray(factor).astype(dtype) * b.astype(dtype)

    return jax.tree.map(leaf, a, b)


def vdot(a: PyTree, b: PyTree) -> Array:
    """Inner product over all leaves, in the dtype of the widest and at least
    float32."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    dtype = _wide(*(leaf for pair in pairs for leaf in pair))
    dots = [jnp.sum(x.astype(dtype) * y.astype(dtype)) for x, y in pairs]
    return sum(dots[1:], start=dots[0])


def norm(tree: PyTree) -> Array:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(vdot(tree, tree))


def arrays(tree: PyTree) -> PyTree:
    """Leaves as arrays, so that a Python float may stand for a scalar variable."""
    return jax.tree.map(jnp.asarray, tree)


def _wide(*leaves: Array) -> jnp.dtype:
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)
