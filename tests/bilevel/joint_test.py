# SPDX-License-Identifier: Apache-2.0
"""The two methods that update both levels together: V-PBGD and BOME."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import bilevel, combine
from tests.bilevel import ridge

pytestmark = pytest.mark.slow  # nearly every test compiles a model

RATE = 1.0 / np.linalg.eigvalsh(ridge.hessian())[-1]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def pbgd(x, y, **options):
    return bilevel.pbgd(ridge.upper, ridge.lower, x, y, **options)


def bome(x, y, **options):
    return bilevel.bome(ridge.upper, ridge.lower, x, y, **options)


def gradients(x, y, z):
    """(grad F, grad q) with respect to (x, y), flattened."""

    def gap(x, y):
        return ridge.lower(x, y) - ridge.lower(x, z)

    both = (jax.grad(f, argnums=(0, 1))(x, y) for f in (ridge.upper, gap))
    return [flat(pair) for pair in both]


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_pbgd_is_the_gradient_of_the_penalised_objective():
    x, y, z = ridge.x(), ridge.tree(np.arange(6.0)), ridge.tree(ridge.solution())
    found = pbgd(x, y, strength=7.0, z=z)
    f, q = gradients(x, y, z)
    assert_allclose(flat((found.dx, found.dy)), f + 7.0 * q, rtol=1e-10)
    assert_allclose(
        found.stats["gap"], ridge.lower(x, y) - ridge.lower(x, z), rtol=1e-10
    )
    assert found.stats["z_residual"] < 1e-12


def test_pbgd_at_a_stationary_y_equals_f2sa():
    x, z = ridge.x(), ridge.tree(ridge.solution())
    strength = 20.0
    h = ridge.hessian() + ridge.C.T @ ridge.C / strength
    rows = np.exp(ridge.X_ROWS)
    b = ridge.A.T @ (rows * ridge.B) + ridge.C.T @ ridge.D / strength
    y = ridge.tree(np.linalg.solve(h, b))
    found = pbgd(x, y, strength=strength, z=z)
    expected = bilevel.f2sa(ridge.upper, ridge.lower, x, y, strength=strength, z=z)
    assert_allclose(flat(found.dy), 0.0, atol=1e-10)
    assert_allclose(flat(found.dx), flat(expected.dx), rtol=1e-12)
    assert expected.stats["y_residual"] < 1e-12


@pytest.mark.parametrize("barrier", ["norm", "gap"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_bome_reduces_the_gap_at_rate_eta(barrier, eta, wrap):
    x, y = ridge.x(), ridge.tree(np.arange(6.0) - 2.0)
    run = partial(bome, eta=eta, barrier=barrier, tx=optax.sgd(RATE), steps=3)
    found = wrap(run)(x, y)
    f, q = gradients(x, y, found.z)
    gap = float(ridge.lower(x, y) - ridge.lower(x, found.z))
    phi = eta * (q @ q if barrier == "norm" else gap)
    d = flat((found.dx, found.dy))
    assert_allclose(d @ q, max(phi, f @ q), rtol=1e-10)
    assert_allclose(d, f + float(found.stats["xi"]) * q, rtol=1e-10)
    assert found.stats["xi"] >= 0


def test_if_the_lower_level_ignores_x_they_equal_the_combiners():
    x, y = ridge.x(), ridge.tree(np.arange(6.0) - 2.0)

    def lower(x, y):
        return ridge.lower(ridge.x(), y) + 0.0 * jnp.sum(x["rows"])

    grads = {
        "retain": jax.grad(ridge.upper, argnums=1)(x, y),
        "forget": jax.grad(lower, argnums=1)(x, y),
    }
    z = ridge.tree(ridge.solution())
    blur = combine.blur(gamma=0.3, constraint="inequality")
    penalty = combine.penalty(strength=5.0)

    def bare(x, y):  # BOME's products are over (x, y): F must not move x either
        return ridge.upper(ridge.x(), y) + 0.0 * jnp.sum(x["rows"])

    for tx, found in (
        (blur, bilevel.bome(bare, lower, x, y, eta=0.3, z=z)),
        (penalty, bilevel.pbgd(bare, lower, x, y, strength=5.0, z=z)),
    ):
        expected, _ = tx.update(grads, tx.init(y))
        assert_allclose(flat(found.dy), flat(expected), rtol=1e-6)
        assert_allclose(flat(found.dx), 0.0, atol=1e-12)


def test_without_a_gap_bome_is_the_upper_gradient():
    x, z = ridge.x(), ridge.tree(ridge.solution())

    def lower(x, y):
        return jnp.sum(x["rows"]) + 0.0 * jnp.sum(y["a"])

    found = bilevel.bome(ridge.upper, lower, x, z, z=z)
    assert found.stats["xi"] == 0
    expected = jax.grad(ridge.upper, argnums=(0, 1))(x, z)
    assert_allclose(flat((found.dx, found.dy)), flat(expected), rtol=1e-12)


@pytest.mark.parametrize(
    ("direction", "rate"),
    [(partial(bome, eta=0.5), 0.02), (partial(pbgd, strength=30.0), 0.003)],
    ids=["bome", "pbgd"],
)
def test_descent_reaches_the_bilevel_solution(direction, rate):
    inner = dict(tx=optax.sgd(RATE), steps=5)

    # With a constant rate BOME stops at a distance proportional to it: its penalty
    # grows as the gap closes, until the steps overshoot.
    def step(carry, decay):
        x, y, z = carry
        found = direction(x, y, z=z, **inner)
        x, y = (
            jax.tree.map(lambda a, d: a - decay * rate * d, *pair)
            for pair in ((x, found.dx), (y, found.dy))
        )
        return (x, y, found.z), found.stats["gap"]

    start = (ridge.x(), ridge.y(), ridge.y())
    decays = jnp.linspace(1.0, 0.05, 3000)
    (x, y, _), gaps = jax.jit(partial(jax.lax.scan, step))(start, decays)
    rows, pull = np.asarray(x["rows"]), float(x["ridge"])
    begin = np.linalg.norm(ridge.closed_form())
    ends = [
        ridge.value(rows + s, pull) for s in 1e-5 * np.vstack([np.eye(16), -np.eye(16)])
    ]
    slope = (np.array(ends[:16]) - np.array(ends[16:])) / 2e-5
    assert np.linalg.norm(slope) < 0.02 * begin
    assert 0 <= gaps[-1] < 0.01 * gaps[0]
    best = ridge.tree(ridge.solution(rows, pull))
    assert np.linalg.norm(flat(y) - flat(best)) < 0.1 * np.linalg.norm(flat(best))
