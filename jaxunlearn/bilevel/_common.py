# SPDX-License-Identifier: Apache-2.0
"""Helpers of all methods: results, checks, the inner loop, and tree algebra.

Products and sums are computed in float32, or in float64 if a leaf is float64. The code
must run under strict dtype promotion, so every factor is cast to the dtype of its leaf.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, _precision
from jaxunlearn.typing import Array, PyTree

Objective = Callable[[PyTree, PyTree], Array]
"""(x, y) -> scalar; x is the variable of the upper level, y of the lower level."""


class Hypergradient(NamedTuple):
    """An approximate gradient of F(x, y*(x)) with respect to x.

    Attributes:
        dx: the gradient, like x.
        found: solutions of inner problems, like y, by names that each method documents.
            Pass them to the next call for a warm start.
        stats: scalars: values of the objectives, and how accurate the solutions are.
    """

    dx: PyTree
    found: dict[str, PyTree]
    stats: dict[str, Array]


class Direction(NamedTuple):
    """One descent direction for both levels together.

    Attributes:
        dx: like x; subtract it, or pass it to an optimizer as the gradient.
        dy: like y.
        z: like y, the approximate solution of the lower level that was used.
        stats: scalars: values of the objectives, and how accurate z is.
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
    """The inner loop: `steps` updates of y by an optax optimizer, in one lax.scan.

    The result is differentiable with respect to everything that `loss` closes over, if
    the optimizer is differentiable. The optimizer state is initialised at the start.
    Optimizers with a line search (optax.lbfgs) get the value, the gradient and the
    function.

    Args:
        loss: y -> scalar, or (y, batch) -> scalar with `batches`.
        y: initial value.
        tx: the optimizer.
        steps: number of updates, >= 0.
        batches: arrays with a leading axis of length `steps`, one slice for each step;
            None if the loss takes no batch.
    Returns:
        y after the last update.
    Raises:
        TypeError, ValueError: if steps is not a whole number >= 0, tx is not an optax
            transformation, or the leading axis of a batch is not `steps`.
    """
    _optimizer("bilevel.solve", tx, steps)
    for leaf in jax.tree.leaves(batches):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != steps:
            raise ValueError(
                f"bilevel.solve needs batches with a leading axis of steps={steps}, "
                f"got an array of shape {jnp.shape(leaf)}. Stack one batch per step."
            )
    tx = optax.with_extra_args_support(tx)

    def update(carry, batch):
        y, state = carry
        args = () if batches is None else (batch,)

        def value_fn(y):
            return loss(y, *args)

        value, grads = jax.value_and_grad(value_fn)(y)
        updates, state = tx.update(
            grads, state, y, value=value, grad=grads, value_fn=value_fn
        )
        return (optax.apply_updates(y, updates), state), None

    (y, _), _ = jax.lax.scan(update, (y, tx.init(y)), batches, length=steps)
    return y


def levels(owner: str, x: PyTree, y: PyTree, **objectives: Objective) -> None:
    """Raises unless x and y are trees of floats and each objective returns a scalar."""
    for name, tree in (("x", x), ("y", y)):
        leaves = jax.tree.leaves(tree)
        if not leaves:
            raise ValueError(f"{owner} needs {name} with at least one leaf, got none.")
        for leaf in leaves:
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(
                    f"{owner} needs floating-point leaves in {name}, got "
                    f"{jnp.result_type(leaf)}. Close over constants instead."
                )
    for name, objective in objectives.items():
        came = jax.eval_shape(objective, x, y)
        shape, dtype = getattr(came, "shape", None), getattr(came, "dtype", None)
        if shape != () or not jnp.issubdtype(dtype, jnp.floating):
            what = type(came).__name__ if shape is None else f"{dtype}{list(shape)}"
            raise ValueError(
                f"{owner} needs {name}(x, y) to return a float scalar, got {what}. "
                "Average the loss, and return nothing else."
            )


def same(owner: str, y: PyTree, **others: PyTree) -> None:
    """Raises ValueError unless each tree is None or has y's structure and shapes."""
    for name, other in others.items():
        if other is None:
            continue
        if jax.tree.structure(other) != jax.tree.structure(y):
            raise ValueError(
                f"{owner} needs {name} with the structure of y, "
                f"{jax.tree.structure(y)}, got {jax.tree.structure(other)}."
            )
        for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(other), strict=True):
            _checks.same_shape(owner, **{"y": a, name: b})


def inner(owner: str, tx: Any, steps: int) -> None:
    """Raises unless steps is >= 1 with an optimizer, or 0."""
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
    """The tree with leaves in float32, or float64 where they are float64."""
    return jax.tree.map(_precision.at_least_float32, tree)


def like(tree: PyTree, template: PyTree) -> PyTree:
    """The tree in the template's dtypes."""
    return jax.tree.map(lambda a, b: a.astype(jnp.result_type(b)), tree, template)


def add(a: PyTree, factor: Array | float, b: PyTree) -> PyTree:
    """a + factor * b in at least float32."""

    def leaf(a, b):
        dtype = _precision.widest([a, b])
        return a.astype(dtype) + jnp.asarray(factor).astype(dtype) * b.astype(dtype)

    return jax.tree.map(leaf, a, b)


def vdot(a: PyTree, b: PyTree) -> Array:
    """Inner product over all leaves, in float32, or float64 if a leaf is float64."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    dtype = _precision.widest([leaf for pair in pairs for leaf in pair])
    dots = [jnp.sum(x.astype(dtype) * y.astype(dtype)) for x, y in pairs]
    return sum(dots[1:], start=dots[0])


def norm(tree: PyTree) -> Array:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(vdot(tree, tree))


def arrays(tree: PyTree) -> PyTree:
    """The tree with arrays as leaves, so that a Python float can be a variable."""
    return jax.tree.map(jnp.asarray, tree)
