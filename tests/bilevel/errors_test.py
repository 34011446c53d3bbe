# SPDX-License-Identifier: Apache-2.0
"""Invalid input is refused, and the dtypes of the variables are kept."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxunlearn import bilevel
from tests.bilevel import ridge

SGD = dict(tx=optax.sgd(0.1), steps=1)


def calls(upper=ridge.upper, lower=ridge.lower, **changed):
    """Every method by name, on float32 variables."""
    x, y = ridge.x(jnp.float32), ridge.y(jnp.float32)
    x, y = changed.get("x", x), changed.get("y", y)
    given = (upper, lower, x, y)
    return {
        "f2sa": partial(bilevel.f2sa, *given, strength=10.0, **SGD),
        "pbgd": partial(bilevel.pbgd, *given, strength=10.0, **SGD),
        "bome": partial(bilevel.bome, *given, **SGD),
        "cg": partial(bilevel.implicit_cg, *given, damping=0.1),
        "neumann": partial(
            bilevel.implicit_neumann, *given, damping=0.1, step_size=0.05, num_terms=3
        ),
        "unrolled": partial(bilevel.unrolled, *given, **SGD),
    }


FORMS = tuple(calls())
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
def test_an_objective_that_is_not_a_scalar_is_refused(form):
    def rows(x, y):
        return ridge.upper(x, y) * x["rows"]

    def pair(x, y):
        return ridge.lower(x, y), 0.0

    with pytest.raises(ValueError, match=r"upper\(x, y\).*float32\[16\].*Average"):
        calls(upper=rows)[form]()
    with pytest.raises(ValueError, match=r"lower\(x, y\).*tuple.*nothing else"):
        calls(lower=pair)[form]()


@every_form
def test_leaves_without_a_gradient_are_refused(form):
    x = ridge.x(jnp.float32) | {"seed": jnp.int32(1)}
    with pytest.raises(TypeError, match="floating-point leaves in x, got int32"):
        calls(x=x)[form]()
    with pytest.raises(ValueError, match="y with at least one leaf"):
        calls(y={})[form]()


@pytest.mark.parametrize(
    ("form", "options", "error", "match"),
    [
        ("f2sa", dict(strength=0.0), ValueError, "strength > 0, got strength=0.0"),
        ("pbgd", dict(strength=-1.0), ValueError, "strength > 0"),
        ("bome", dict(eta=-0.1), ValueError, "eta >= 0"),
        ("bome", dict(barrier="norms"), ValueError, "Did you mean 'norm'"),
        ("f2sa", dict(steps=-1), ValueError, "steps >= 0"),
        ("f2sa", dict(steps=2.0), TypeError, "whole number steps"),
        ("f2sa", dict(tx=None), TypeError, "optax transformation, got NoneType"),
        ("pbgd", dict(tx=None, steps=0), ValueError, "inner loop or z"),
        ("bome", dict(z={"a": jnp.zeros(2)}), ValueError, "z with the structure of y"),
        ("cg", dict(damping=-1.0), ValueError, "damping >= 0"),
        ("cg", dict(tol=0.0), ValueError, "tol > 0"),
        ("cg", dict(max_iterations=0), ValueError, "max_iterations >= 1"),
        (
            "cg",
            dict(w=ridge.y(jnp.float32)["a"]),
            ValueError,
            "w with the structure of y",
        ),
        ("neumann", dict(step_size=0.0), ValueError, "step_size > 0"),
        ("neumann", dict(num_terms=0), ValueError, "num_terms >= 1"),
        ("unrolled", dict(steps=0), ValueError, "steps >= 1"),
        ("unrolled", dict(steps=0, tx=None), ValueError, "steps >= 1"),
        ("unrolled", dict(truncate=0), ValueError, "truncate >= 1"),
        ("unrolled", dict(truncate=2), ValueError, "truncate <= steps"),
        ("unrolled", dict(tx="sgd"), TypeError, "optax transformation, got str"),
    ],
)
def test_numbers_out_of_range_are_refused(form, options, error, match):
    with pytest.raises(error, match=match):
        calls()[form](**options)


def test_batches_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"leading axis of steps=3.*\(2,\)"):
        bilevel.solve(
            lambda y, b: y * b,
            jnp.zeros([]),
            optax.sgd(0.1),
            3,
            batches=jnp.zeros(2),
        )


@every_form
def test_bfloat16_variables_get_bfloat16_gradients_solved_in_float32(form):
    x, y = ridge.x(jnp.bfloat16), ridge.tree(ridge.solution(), jnp.bfloat16)

    def wide(function, x, y):
        return function(*jax.tree.map(lambda a: a.astype(jnp.float32), (x, y)))

    given = dict(upper=partial(wide, ridge.upper), lower=partial(wide, ridge.lower))
    found = calls(**given, x=x, y=y)[form]()
    for leaf in jax.tree.leaves(found.dx):
        assert leaf.dtype == jnp.bfloat16 and jnp.isfinite(leaf).all()
    if form in ("cg", "neumann"):
        assert found.found["w"]["a"].dtype == jnp.float32
        assert found.stats["residual"].dtype == jnp.float32


def test_a_python_number_may_be_the_upper_variable():
    found = bilevel.implicit_cg(
        lambda x, y: (y - 1.0) ** 2, lambda x, y: (y - x) ** 2, 3.0, 3.0, damping=0.0
    )
    assert found.dx == pytest.approx(4.0)
