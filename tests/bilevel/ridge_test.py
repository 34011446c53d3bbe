# SPDX-License-Identifier: Apache-2.0
"""Every method against a hypergradient in closed form, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from jaxunlearn import bilevel
from tests.bilevel import ridge

pytestmark = pytest.mark.slow  # nearly every test compiles a model

RATE = 1.0 / np.linalg.eigvalsh(ridge.hessian())[-1]
SLOWER = 1.0 / np.linalg.eigvalsh(ridge.hessian() + ridge.C.T @ ridge.C)[-1]
STEPS = 250


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def cg(x, y, **options):
    options = dict(damping=0.0, tol=1e-12) | options
    return bilevel.implicit_cg(ridge.upper, ridge.lower, x, y, **options)


def neumann(x, y):
    return bilevel.implicit_neumann(
        ridge.upper, ridge.lower, x, y, damping=0.0, step_size=RATE, num_terms=STEPS
    )


def unrolled(x, y, **options):
    options = dict(tx=optax.sgd(RATE), steps=STEPS) | options
    return bilevel.unrolled(ridge.upper, ridge.lower, x, y, **options)


def f2sa(x, y, strength=1e7):
    return bilevel.f2sa(
        ridge.upper,
        ridge.lower,
        x,
        y,
        strength=strength,
        tx=optax.sgd(SLOWER),
        steps=STEPS,
    )


def best(dtype=jnp.float64):
    return ridge.tree(ridge.solution(), dtype)


STARTS = {cg: best, neumann: best, unrolled: ridge.y, f2sa: ridge.y}
forms = pytest.mark.parametrize("form", STARTS, ids=lambda form: form.__name__)


def test_the_closed_form_agrees_with_finite_differences():
    assert_allclose(ridge.closed_form(), ridge.differences(), rtol=0, atol=1e-8)


@forms
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_agrees_with_the_closed_form_and_finite_differences(form, wrap):
    found = wrap(form)(ridge.x(), STARTS[form]())
    assert_allclose(ridge.flat(found.dx), ridge.closed_form(), rtol=0, atol=1e-5)
    assert_allclose(ridge.flat(found.dx), ridge.differences(), rtol=0, atol=1e-5)
    assert_allclose(found.stats["upper"], ridge.value(), rtol=1e-6)


def test_the_error_of_f2sa_is_one_over_lambda():
    powers = np.arange(1, 7)
    run = jax.jit(f2sa)
    errors = [
        np.linalg.norm(
            ridge.flat(run(ridge.x(), ridge.y(), 10.0**k).dx) - ridge.closed_form()
        )
        for k in powers
    ]
    steps = np.diff(np.log10(errors))
    assert_allclose(steps, -1.0, atol=0.1)
    assert_allclose(steps[1:], -1.0, atol=0.02)


@pytest.mark.parametrize("steps", [20, 40])
def test_unrolled_is_exact_for_its_steps(steps):
    def value(x):
        rows, y = np.asarray(x), np.zeros(ridge.WIDTH)
        for _ in range(steps):
            error = ridge.A @ y - ridge.B
            pull = np.exp(ridge.X_RIDGE) * y
            y = y - RATE * (ridge.A.T @ (np.exp(rows) * error) + pull)
        error = ridge.C @ y - ridge.D
        return 0.5 * (error @ error + ridge.PULL * rows @ rows)

    expected = [
        (value(ridge.X_ROWS + shift) - value(ridge.X_ROWS - shift)) / 2e-5
        for shift in 1e-5 * np.eye(ridge.ROWS)
    ]
    found = unrolled(ridge.x(), ridge.y(), steps=steps)
    assert_allclose(found.dx["rows"], expected, rtol=0, atol=1e-8)


def test_the_error_of_truncation_grows_by_a_factor_per_step():
    exact = ridge.closed_form()
    errors = [
        np.linalg.norm(
            ridge.flat(unrolled(ridge.x(), ridge.y(), truncate=t).dx) - exact
        )
        for t in (5, 15, 25)
    ]
    least = np.linalg.eigvalsh(ridge.hessian())[0]
    bound = (1 - RATE * least) ** 10
    assert errors[1] < 1.5 * bound * errors[0]
    assert errors[2] < 1.5 * bound * errors[1]
    assert errors[2] > 1e-9  # truncation has an effect


def test_neumann_reports_its_residual():
    x, y = ridge.x(), best()
    found = bilevel.implicit_neumann(
        ridge.upper, ridge.lower, x, y, damping=0.2, step_size=RATE, num_terms=7
    )
    b = ridge.C.T @ (ridge.C @ ridge.solution() - ridge.D)
    w = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found.found["w"])])
    left = b - (ridge.hessian() + 0.2 * np.eye(ridge.WIDTH)) @ w
    expected = np.linalg.norm(left) / np.linalg.norm(b)
    assert_allclose(found.stats["residual"], expected, rtol=1e-9)
    assert expected > 1e-4


def test_damping_is_added_to_the_hessian():
    found = cg(ridge.x(), best(), damping=0.7)
    b = ridge.C.T @ (ridge.C @ ridge.solution() - ridge.D)
    w = np.linalg.solve(ridge.hessian() + 0.7 * np.eye(ridge.WIDTH), b)
    jax.tree.map(partial(assert_allclose, rtol=1e-9), found.found["w"], ridge.tree(w))


def test_cg_has_the_iterates_of_jax_scipy():
    y = best()
    product = bilevel.hessian_product(ridge.lower, ridge.x(), y)
    b = jax.grad(ridge.upper, argnums=1)(ridge.x(), y)
    for count in (1, 3):
        expected, _ = jax.scipy.sparse.linalg.cg(product, b, maxiter=count, tol=0.0)
        found = cg(ridge.x(), y, max_iterations=count)
        jax.tree.map(partial(assert_allclose, rtol=1e-9), found.found["w"], expected)
        assert found.stats["iterations"] == count
        assert not found.stats["converged"]


def test_a_warm_start_saves_products():
    cold = cg(ridge.x(), best())
    warm = cg(ridge.x(), best(), w=cold.found["w"])
    assert cold.stats["converged"] and warm.stats["converged"]
    assert cold.stats["iterations"] > 3
    assert warm.stats["iterations"] == 0


def test_a_warm_start_may_have_another_dtype():
    cold = cg(ridge.x(), best())
    rounded = jax.tree.map(lambda a: a.astype(jnp.float32), cold.found["w"])
    warm = cg(ridge.x(), best(), w=rounded)
    assert 0 < warm.stats["iterations"] <= cold.stats["iterations"]
    assert_allclose(ridge.flat(warm.dx), ridge.flat(cold.dx), atol=1e-9)


def test_a_direction_of_negative_curvature_is_reported():
    def saddle(x, y):
        return 0.5 * jnp.sum(jnp.asarray([1.0, -0.5]) * y * y) + jnp.sum(x * y)

    def plain(x, y):
        return y[0] + 0.1 * y[1] + 0.0 * x[0]

    x = y = jnp.zeros(2)
    # The Rayleigh quotients of b and of the solution are both positive here.
    found = bilevel.implicit_cg(plain, saddle, x, y, damping=0.0)
    assert found.stats["curvature"] < 0
    assert not found.stats["converged"]
    assert found.stats["residual"] > 0.01
    assert np.isfinite(found.dx).all()
    damped = bilevel.implicit_cg(plain, saddle, x, y, damping=0.6)
    assert damped.stats["converged"]
    series = bilevel.implicit_neumann(
        plain, saddle, x, y, damping=0.0, step_size=0.5, num_terms=30
    )
    assert series.stats["curvature"] < 0
    assert not series.stats["converged"]


def test_a_series_that_diverges_is_reported():
    found = bilevel.implicit_neumann(
        ridge.upper, ridge.lower, ridge.x(), best(), damping=0.0, step_size=3 * RATE
    )
    assert found.stats["residual"] > 1
    assert not found.stats["converged"]


def test_distance_from_a_minimum_is_reported():
    assert cg(ridge.x(), best()).stats["gradient"] < 1e-12
    far = jax.tree.map(lambda leaf: leaf + 1.0, best())
    assert cg(ridge.x(), far).stats["gradient"] > 1.0
    loose = bilevel.f2sa(
        ridge.upper,
        ridge.lower,
        ridge.x(),
        ridge.y(),
        strength=10.0,
        tx=optax.sgd(SLOWER),
        steps=1,
    )
    assert loose.stats["z_residual"] > 0.1
    assert loose.stats["y_residual"] > 0.1


def test_a_constant_upper_level_has_gradient_zero():
    def constant(x, y):
        return 0.0 * jnp.sum(y["a"]) + jnp.sum(x["rows"])

    found = bilevel.implicit_cg(constant, ridge.lower, ridge.x(), best(), damping=0.0)
    assert found.stats["converged"] and found.stats["residual"] == 0
    assert_allclose(found.dx["rows"], 1.0)


def test_gauss_newton_is_the_hessian_of_a_linear_model_and_semidefinite():
    def outputs(y):
        return jnp.asarray(ridge.A) @ jnp.concatenate([y["a"], y["b"][:, 0]])

    def loss(out):
        return 0.5 * jnp.sum((out - jnp.asarray(ridge.B)) ** 2)

    y = best()
    expected = ridge.A.T @ ridge.A
    product = bilevel.gauss_newton(outputs, loss, y)
    for column, unit in zip(expected, np.eye(ridge.WIDTH), strict=True):
        jax.tree.map(
            partial(assert_allclose, rtol=0, atol=1e-12),
            product(ridge.tree(unit)),
            ridge.tree(column),
        )
    bent = bilevel.gauss_newton(
        lambda y: jnp.sin(3.0 * outputs(y)), lambda out: 0.5 * jnp.sum(out**2), y
    )
    for unit in np.eye(ridge.WIDTH):
        image = bent(ridge.tree(unit))
        dots = jax.tree.map(lambda a, b: jnp.sum(a * b), ridge.tree(unit), image)
        assert sum(jax.tree.leaves(dots)) >= 0
    found = cg(ridge.x(), y, damping=np.exp(ridge.X_RIDGE), product=product)
    rows = np.linalg.solve(
        expected + np.exp(ridge.X_RIDGE) * np.eye(ridge.WIDTH),
        ridge.C.T @ (ridge.C @ ridge.solution() - ridge.D),
    )
    jax.tree.map(
        partial(assert_allclose, rtol=1e-9), found.found["w"], ridge.tree(rows)
    )


@pytest.mark.parametrize(
    ("tx", "steps"),
    [(optax.lbfgs(), 25), (optax.adam(0.05), 1500)],
    ids=["lbfgs", "adam"],
)
def test_the_inner_loop_takes_any_optimizer(tx, steps):
    with jax.numpy_dtype_promotion("standard"):  # Adam needs it
        found = jax.jit(
            lambda y: bilevel.solve(partial(ridge.lower, ridge.x()), y, tx, steps)
        )(ridge.y())
    jax.tree.map(partial(assert_allclose, rtol=0, atol=1e-5), found, best())


def test_the_inner_loop_reads_one_batch_per_step():
    rows = jnp.arange(4.0)
    found = bilevel.solve(
        lambda y, row: y * row, jnp.zeros([]), optax.sgd(1.0), 4, batches=rows
    )
    assert_allclose(found, -6.0)


@pytest.mark.slow
def test_every_method_gives_the_same_result_sharded():
    mesh = jax.make_mesh((8,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    cut, whole = P("all"), P()
    places = {"rows": cut, "ridge": whole}, {"a": whole, "b": cut}
    both = (ridge.upper, ridge.lower)
    inner = dict(tx=optax.sgd(SLOWER), steps=5)

    def wider(objective):
        """With four more entries in y, so that it can be sharded over eight devices."""

        def run(x, y):
            without_extra = {"a": y["a"], "b": y["b"][: ridge.WIDTH - ridge.SPLIT]}
            return objective(x, without_extra) + 0.5 * jnp.sum(y["b"][4:] ** 2)

        return run

    def forms(x, y):
        upper, lower = map(wider, both)
        return {
            "f2sa": bilevel.f2sa(upper, lower, x, y, strength=9.0, **inner),
            "pbgd": bilevel.pbgd(upper, lower, x, y, strength=9.0, **inner),
            "bome": bilevel.bome(upper, lower, x, y, **inner),
            "cg": bilevel.implicit_cg(upper, lower, x, y, damping=0.1),
            "neumann": bilevel.implicit_neumann(
                upper, lower, x, y, damping=0.1, step_size=RATE
            ),
            "unrolled": bilevel.unrolled(upper, lower, x, y, **inner),
        }

    b = jnp.arange(8.0)[:, None]
    x, y = ridge.x(), {"a": jnp.ones(2), "b": b}
    expected = jax.jit(forms)(x, y)
    place = jax.tree.map(lambda spec: NamedSharding(mesh, spec), places)
    came = jax.jit(forms)(*jax.device_put((x, y), place))
    assert not came["bome"].dy["b"].sharding.is_fully_replicated
    jax.tree.map(partial(assert_allclose, rtol=1e-9, atol=1e-9), came, expected)
