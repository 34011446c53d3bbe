# SPDX-License-Identifier: Apache-2.0
"""Weighted ridge regression: a bi-level problem with a known hypergradient.

The lower level fits y to rows weighted by exp(x["rows"]), with the ridge
exp(x["ridge"]). The upper level is the error on other rows, with a term of its own in
x. y is cut into two leaves, as parameters are. NumPy has the answer in closed form.
"""

import jax.numpy as jnp
import numpy as np

ROWS, WIDTH, SPLIT = 16, 6, 2
_rng = np.random.default_rng(3)
A, B = _rng.normal(size=(ROWS, WIDTH)) / 2, _rng.normal(size=ROWS)
C, D = _rng.normal(size=(2 * ROWS, WIDTH)) / 4, _rng.normal(size=2 * ROWS)
X_ROWS, X_RIDGE = 0.5 * _rng.normal(size=ROWS), 0.3
PULL = 1.0  # weight of the penalty on x in the upper level


def x(dtype=jnp.float64):
    return {"rows": jnp.asarray(X_ROWS, dtype), "ridge": jnp.asarray(X_RIDGE, dtype)}


def y(dtype=jnp.float64):
    return {"a": jnp.zeros(SPLIT, dtype), "b": jnp.zeros((WIDTH - SPLIT, 1), dtype)}


def lower(x, y):
    flat, dtype = _flat(y), x["rows"].dtype
    error = jnp.asarray(A, dtype) @ flat - jnp.asarray(B, dtype)
    fit = jnp.sum(jnp.exp(x["rows"]) * error * error)
    return 0.5 * (fit + jnp.exp(x["ridge"]) * jnp.sum(flat * flat))


def upper(x, y):
    dtype = x["rows"].dtype
    error = jnp.asarray(C, dtype) @ _flat(y) - jnp.asarray(D, dtype)
    pull = jnp.sum(x["rows"] ** 2) + x["ridge"] ** 2
    return 0.5 * jnp.sum(error * error) + 0.5 * PULL * pull


def hessian(rows=X_ROWS, ridge=X_RIDGE):
    return A.T @ (np.exp(rows)[:, None] * A) + np.exp(ridge) * np.eye(WIDTH)


def solution(rows=X_ROWS, ridge=X_RIDGE):
    """The lower level's minimiser, [WIDTH]."""
    return np.linalg.solve(hessian(rows, ridge), A.T @ (np.exp(rows) * B))


def value(rows=X_ROWS, ridge=X_RIDGE):
    """The upper level at the lower level's minimiser."""
    error = C @ solution(rows, ridge) - D
    return 0.5 * error @ error + 0.5 * PULL * (rows @ rows + ridge**2)


def closed_form():
    """The hypergradient by the implicit function theorem, in NumPy: [ROWS + 1]."""
    best = solution()
    w = np.linalg.solve(hessian(), C.T @ (C @ best - D))
    rows = PULL * X_ROWS - np.exp(X_ROWS) * (A @ best - B) * (A @ w)
    return np.append(rows, PULL * X_RIDGE - np.exp(X_RIDGE) * best @ w)


def differences(step=1e-5):
    """The hypergradient by central differences of `value`: [ROWS + 1]."""
    found = []
    for shift in step * np.eye(ROWS + 1):
        ends = [
            value(X_ROWS + s * shift[:-1], X_RIDGE + s * shift[-1]) for s in (1, -1)
        ]
        found.append((ends[0] - ends[1]) / (2 * step))
    return np.array(found)


def flat(dx):
    """dx as one array, in the order of `closed_form`."""
    return np.append(np.asarray(dx["rows"]), np.asarray(dx["ridge"]))


def tree(vector, dtype=jnp.float64):
    """[WIDTH] as a tree like y."""
    vector = jnp.asarray(vector, dtype)
    return {"a": vector[:SPLIT], "b": vector[SPLIT:, None]}


def _flat(y):
    return jnp.concatenate([y["a"], y["b"][:, 0]])
