# SPDX-License-Identifier: Apache-2.0
"""Pieces of edits that resist relearning: collapse, the largest step, perturb."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import edits


def matrix(values, rows=12, columns=8, seed=0):
    """A matrix with these singular values, and its singular vectors."""
    rng = np.random.default_rng(seed)
    k = len(values)
    u = np.linalg.qr(rng.normal(size=(rows, k)))[0]
    v = np.linalg.qr(rng.normal(size=(columns, k)))[0]
    return (u * values) @ v.T, u, v


S = np.array([8.0, 4.0, 2.0, 1.0, 0.5])
G, U, V = matrix(S)


def gradient(g=G):
    return {"kernel": jnp.asarray(g, jnp.float32)}


@pytest.mark.parametrize(
    ("sides", "power", "expected"),
    [
        ("both", 1.0, [0.5, 1.0, 2.0, 1.0, 0.5]),  # s_k^2 / s_i with s_k = 2
        ("in", 1.0, [2.0, 2.0, 2.0, 1.0, 0.5]),  # s_k
        ("out", 1.0, [2.0, 2.0, 2.0, 1.0, 0.5]),
        ("both", 2.0, [2**4 / 8**3, 2**4 / 4**3, 2.0, 1.0, 0.5]),  # s_k^4 / s_i^3
        ("both", float("inf"), [0.0, 0.0, 0.0, 1.0, 0.5]),
    ],
)
def test_the_closed_form_of_the_directions_of_the_gradient(sides, power, expected):
    found = edits.collapse(gradient(), 3, sides=sides, power=power)["kernel"]
    assert_allclose(found, (U * expected) @ V.T, atol=1e-5)


def test_directions_of_a_separate_basis_are_removed_and_others_stay():
    other, u, v = matrix([3.0, 2.0], seed=1)
    found = edits.collapse(gradient(), 2, basis=gradient(other), power=float("inf"))
    left, right = np.eye(12) - u @ u.T, np.eye(8) - v @ v.T
    assert_allclose(found["kernel"], left @ G @ right, atol=1e-5)


def test_stacked_matrices_are_filtered_one_by_one_and_zeros_stay():
    stack = np.stack([G, 3 * G, 0 * G])
    found = edits.collapse(gradient(stack), 3)["kernel"]
    alone = edits.collapse(gradient(), 3)["kernel"]
    assert_allclose(found, np.stack([alone, 3 * alone, 0 * alone]), atol=1e-5)


def test_the_randomised_method_finds_the_directions_of_the_exact_one():
    rng = np.random.default_rng(0)
    values = 10.0 * 0.8 ** np.arange(40)
    x = gradient(matrix(values, 60, 48)[0] + 1e-3 * rng.normal(size=(60, 48)))
    exact = edits.collapse(x, 6, method="exact")["kernel"]
    assert_allclose(edits.collapse(x, 6)["kernel"], exact, atol=2e-3)


def test_a_sharded_gradient_gives_the_values_of_one_device():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    place = jax.NamedSharding(mesh, P("fsdp", "tensor"))
    found = edits.collapse(jax.device_put(gradient(), place), 3)["kernel"]
    assert found.sharding.is_equivalent_to(place, 2)
    assert_allclose(found, edits.collapse(gradient(), 3)["kernel"], atol=1e-5)


def test_a_rank_over_that_of_the_gradient_names_the_matrix():
    stack = gradient(np.stack([G, matrix([1.0, 1.0])[0]]))
    with pytest.raises(ValueError, match="rank=3 and 2 directions in matrix 1 of 'k"):
        edits.collapse(stack, 3)
    with pytest.raises(ValueError, match="rank of at most that of the basis"):
        edits.collapse(gradient(), 3, basis=gradient(matrix([1.0, 1.0])[0]))


@pytest.mark.parametrize(
    ("tree", "kwargs", "words"),
    [
        ({"norm": {"scale": jnp.ones((2, 4))}}, {}, "norm/scale"),
        (gradient(), {"basis": gradient(G[:4])}, "basis"),
        (gradient(), {"power": 0.0}, "power"),
        (gradient(), {"sides": "left"}, "sides"),
    ],
)
def test_bad_arguments_of_collapse(tree, kwargs, words):
    with pytest.raises(ValueError, match=words):
        edits.collapse(tree, 2, **kwargs)


PARAMS = {"w": jnp.array([1.0, 2.0])}


def quadratic(curvature):
    """Damage of PARAMS + scale * 1, as a small step of a model has it."""
    return lambda params: curvature * float((params["w"][0] - 1.0) ** 2)


def step(scale):
    return edits.add(PARAMS, {"w": jnp.ones(2)}, scale=scale)


@pytest.mark.parametrize("curvature", [1e-8, 1.0, 1e8])
def test_a_quadratic_damage_needs_few_evaluations(curvature):
    found = edits.largest_step(step, quadratic(curvature), 0.01)
    assert 0.95 * 0.01 <= found.divergence <= 0.01
    assert_allclose(found.params["w"], 1 + np.array([0, 1]) + found.scale, rtol=1e-6)
    assert len(found.trials) <= 8


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x if x < 0.5 else float("nan"),
        lambda x: np.expm1(20 * x**3),
        lambda x: 0.0 if x < 0.3 else 5 * (x - 0.3),
        lambda x: 0.01 * (x > 1e-4) * x**0.2,
    ],
    ids=["nan", "steep", "flat", "slow"],
)
def test_other_damages_are_met_within_the_evaluations(damage):
    found = edits.largest_step(step, lambda p: damage(float(p["w"][0]) - 1), 0.008)
    assert 0.95 * 0.008 <= found.divergence <= 0.008
    assert len(found.trials) <= 20


def test_a_jump_over_the_budget_gives_the_largest_step_below_it():
    found = edits.largest_step(
        step, lambda p: float(p["w"][0] - 1 >= 0.25), 0.5, max_evaluations=25
    )
    assert 0.24 < found.scale < 0.25 and len(found.trials) == 25


def test_a_budget_that_no_step_meets_and_an_edit_without_effect_are_refused():
    with pytest.raises(ValueError, match="budget=0.1 and a divergence of 7"):
        edits.largest_step(step, lambda p: 7.0, 0.1)
    with pytest.raises(ValueError, match="update is not zero"):
        edits.largest_step(step, lambda p: 0.0, 0.1)
    with pytest.raises(ValueError, match="budget"):
        edits.largest_step(step, lambda p: 0.0, 0.0)


def test_perturb_shrinks_vectors_and_draws_xavier_noise_for_matrices():
    params = {"kernel": jnp.ones((2, 200, 100)), "norm": {"scale": jnp.ones((2, 8))}}
    new = edits.perturb(params, jax.random.key(0), shrink=0.25, noise=0.5)
    assert_array_equal(new["norm"]["scale"], np.full((2, 8), 0.75))
    noise = (np.asarray(new["kernel"]) - 0.75) / 0.25 / 0.5
    bound = np.sqrt(6 / 300)
    assert np.abs(noise).max() <= bound * 1.001
    assert_allclose(noise.std(), bound / np.sqrt(3), rtol=0.02)
    same = edits.perturb(params, jax.random.key(0), shrink=0.0)
    jax.tree.map(assert_array_equal, same, params)
    with pytest.raises(ValueError, match="shrink=2"):
        edits.perturb(params, jax.random.key(0), shrink=2)
