# SPDX-License-Identifier: Apache-2.0
"""BLUR: the guarantees of its docstring, golden vectors and degenerate inputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from jaxunlearn import combine

each_size = pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])


@partial(jax.jit, static_argnames=("lower_name", "config"))
def _run(forget, retain, gamma, lower_name, config):
    upper_name = "retain" if lower_name == "forget" else "forget"
    tx = combine.blur(upper=upper_name, lower=lower_name, gamma=gamma, **dict(config))
    return tx.update({"forget": forget, "retain": retain}, tx.init(retain))


def run(forget, retain, gamma=1.0, lower="forget", **config):
    return _run(forget, retain, gamma, lower, tuple(config.items()))


def split(vector):
    """Three leaves of different ranks out of 12 numbers."""
    v = jnp.asarray(vector, jnp.float32)
    return {"a": v[:6].reshape(2, 3), "b": {"c": v[6:11]}, "d": v[11]}


def flat(tree):
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in leaves])


# Forget, retain, keywords, direction, computed by hand.
VECTORS = {
    "lower": ((1, 0), (1, 1), {"gamma": 1.0}, (1, 1)),
    "lower_half": ((1, 0), (1, 1), {"gamma": 0.5}, (0.5, 1)),
    "upper": ((1, 0), (1, 1), {"gamma": 1.0, "lower": "retain"}, (1.5, 0.5)),
    "orthogonal": ((1, 0), (0, 1), {"gamma": 0.3}, (0.3, 1)),
    "parallel": ((1, 2), (-3, -6), {"gamma": 0.5}, (0.5, 1)),
    "no_forget": ((0, 0), (1, 1), {"gamma": 0.5}, (1, 1)),
    "no_retain": ((1, 0), (0, 0), {"gamma": 0.5}, (0.5, 0)),
    "neither": ((0, 0), (0, 0), {"gamma": 0.5}, (0, 0)),
    "gamma_zero": ((1, 0), (1, 1), {"gamma": 0.0}, (0, 1)),
    "agree": ((1, 0), (3, 1), {"gamma": 1.0}, (1, 1)),
    "agree_inequality": (
        *((1, 0), (3, 1), {"gamma": 1.0, "constraint": "inequality"}),
        (3, 1),
    ),
    "conflict_inequality": (
        *((1, 0), (-3, 1), {"gamma": 1.0, "constraint": "inequality"}),
        (1, 1),
    ),
    "bounded": ((1, 0), (-3, 1), {"gamma": 1.0, "xi_max": 2.5}, (-0.5, 1)),
}


@each_size
@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_golden_vectors_at_every_scale(vector, size):
    forget, retain, kwargs, expected = vector
    forget, retain = (
        jnp.float32(size) * jnp.array(x, jnp.float32) for x in (forget, retain)
    )
    update, state = run(forget, retain, **kwargs)
    assert_allclose(update / jnp.float32(size), expected, rtol=1e-6, atol=1e-6)
    assert state.stats["finite"] == 1
    size_of_lower = retain if kwargs.get("lower") == "retain" else forget
    assert state.stats["gate"] == float(np.any(size_of_lower))


def test_wmdp_form_is_a_scaled_blur():
    tx = optax.chain(combine.blur(gamma=1 / 2.0), optax.scale(2.0))
    grads = {"forget": jnp.array([1.0, 0.0]), "retain": jnp.array([1.0, 1.0])}
    assert_allclose(tx.update(grads, tx.init(grads["retain"]))[0], [1.0, 2.0])


# Gradients of any angle and of sizes 1e-3 to 1e3 of each other, at 1e-25, 1 or 1e25.
vectors = st.lists(st.integers(-50, 50), min_size=12, max_size=12).filter(any)
ratios = st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e3])
gammas = st.sampled_from([0.0, 1e-3, 0.1, 1.0, 7.5])
properties = settings(max_examples=60, deadline=None, derandomize=True)


@properties
@given(vectors, vectors, ratios, gammas, st.sampled_from([1.0, 1e-25, 1e25]))
def test_identities(f, r, ratio, gamma, size):
    """<u, g_f>, <u, g_r>, |u|^2 and the bound on |u|, relative to the terms' sizes."""
    forget, retain = split(np.array(f) * ratio * size), split(np.array(r) * size)
    update, state = run(forget, retain, gamma)
    g_f, g_r, u = flat(forget) / size, flat(retain) / size, flat(update) / size
    ff, fr, rr = g_f @ g_f, g_f @ g_r, g_r @ g_r
    part = rr - fr**2 / ff  # rr (1 - rho^2)
    nf, nr = np.sqrt(ff), np.sqrt(rr)
    big = nr + gamma * nf
    assert_allclose(u @ g_f, gamma * ff, rtol=1e-5, atol=3e-6 * nf * big)
    assert_allclose(u @ g_r, part + gamma * fr, rtol=1e-5, atol=3e-6 * nr * big)
    assert_allclose(u @ u, part + gamma**2 * ff, rtol=1e-5, atol=3e-6 * big**2)
    assert np.sqrt(u @ u) <= big * (1 + 1e-5)
    stats = {name: float(value) for name, value in state.stats.items()}
    assert stats["gate"] == stats["finite"] == 1
    assert_allclose(stats["cosine"], fr / (nf * nr), atol=1e-5)
    assert_allclose(stats["upper_norm"], nr * size, rtol=1e-5)
    assert_allclose(stats["lower_norm"], nf * size, rtol=1e-5)
    assert_allclose(stats["xi"], gamma - fr / ff, rtol=1e-4, atol=1e-5 * nr / nf)


@properties
@given(vectors, vectors, gammas)
def test_inequality_keeps_a_helpful_upper_gradient(f, r, gamma):
    update, state = run(split(f), split(r), gamma, constraint="inequality")
    g_f, g_r, u = flat(split(f)), flat(split(r)), flat(update)
    expected = max(gamma * (g_f @ g_f), g_f @ g_r)
    assert_allclose(u @ g_f, expected, rtol=1e-5, atol=1e-5 * np.abs(g_f).max() * 600)
    assert state.stats["xi"] >= 0


@properties
@given(vectors, vectors, gammas)
def test_forget_as_upper_is_the_same_rule_with_swapped_terms(f, r, gamma):
    swapped, _ = run(split(f), split(r), gamma, lower="retain")
    named, _ = run(split(r), split(f), gamma, lower="forget")
    assert_allclose(flat(swapped), flat(named), rtol=1e-6)
    g_r = flat(split(r))
    assert_allclose(
        flat(swapped) @ g_r, gamma * (g_r @ g_r), rtol=1e-5, atol=1e-5 * 600 * 50
    )


@properties
@given(vectors, vectors, gammas)
def test_leaf_scope_satisfies_the_identity_on_each_leaf(f, r, gamma):
    forget, retain = split(f), split(r)
    update, state = run(forget, retain, gamma, scope="leaf")
    leaves = [jax.tree.leaves(x) for x in (update, forget, retain)]
    open_gates = []
    for u, g_f, g_r in zip(*leaves, strict=True):
        u, g_f, g_r = (np.ravel(np.asarray(x, np.float64)) for x in (u, g_f, g_r))
        open_gates.append(bool(g_f.any()))
        if g_f.any():
            expected = gamma * (g_f @ g_f)
            assert_allclose(u @ g_f, expected, rtol=1e-5, atol=0.05)
        else:
            assert_allclose(u, g_r)
    assert_allclose(state.stats["gate"], np.mean(open_gates), rtol=1e-6)
    g_f, g_r, u = flat(forget), flat(retain), flat(update)
    xi = (u - g_r) @ g_f / (g_f @ g_f)
    assert_allclose(state.stats["xi"], xi, rtol=1e-4, atol=1e-4)
    cosine = g_f @ g_r / np.sqrt(g_f @ g_f * (g_r @ g_r))
    assert_allclose(state.stats["cosine"], cosine, atol=1e-5)


def test_groups_are_the_first_pattern_that_matches_and_the_rest():
    rng = np.random.default_rng(0)
    forget, retain = split(rng.normal(size=12)), split(rng.normal(size=12))
    update, _ = run(forget, retain, 0.3, scope=("a", "[ab].*"))
    groups = (["a"], ["b"], ["d"])
    for names in groups:
        u, f = (flat({k: x[k] for k in names}) for x in (update, forget))
        assert_allclose(u @ f, 0.3 * f @ f, rtol=1e-5)
    whole, _ = run(forget, retain, 0.3, scope=(".*",))
    assert_allclose(flat(whole), flat(run(forget, retain, 0.3)[0]), rtol=1e-6)
    with pytest.raises(ValueError, match="scope .* got 'nothing'"):
        run(forget, retain, 0.3, scope=("nothing",))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["forget", "retain"])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_non_finite_gradients_give_a_zero_update(bad, where, scope):
    grads = {"forget": split(np.arange(12.0)), "retain": split(np.ones(12))}
    grads[where]["b"]["c"] = grads[where]["b"]["c"].at[1].set(bad)
    update, state = run(**grads, scope=scope)
    assert not flat(update).any()
    stats = state.stats
    assert stats["finite"] == stats["gate"] == stats["xi"] == stats["cosine"] == 0
    good = "upper_norm" if where == "forget" else "lower_norm"
    other = "lower_norm" if where == "forget" else "upper_norm"
    assert np.isfinite(stats[good]) and np.isposinf(stats[other])
    assert state.count == 0


@pytest.mark.parametrize(
    ("forget", "gate"),
    [(1e-7, 1), (1e-9, 0), (0.0, 0), (1e-38, 0), (1e-45, 0)],
)
def test_the_gate_is_relative(forget, gate):
    """A lower gradient 1e8 times smaller than the upper one is not used."""
    for size in (1.0, 1e-20, 1e20):
        f = jnp.array([forget * size, 0.0], jnp.float32)
        update, state = run(f, jnp.array([size, size], jnp.float32), 0.5)
        assert state.stats["gate"] == gate
        expected = [0.0, 1.0] if gate else [1.0, 1.0]
        assert_allclose(update / jnp.float32(size), expected, atol=1e-5)


def test_gradients_of_very_different_norms():
    tiny, huge = jnp.array([1e-25, 1e-25]), jnp.array([1e25, 0.0])
    assert_allclose(run(tiny, huge)[0], huge)
    update, state = run(huge, tiny, 0.5)
    assert_allclose(update, [5e24, 0.0], atol=1e-24)
    assert all(np.isfinite(x) for x in state.stats.values())


def test_bfloat16_gradients_get_float32_products():
    """A product in bfloat16, or xi in bfloat16, would have an error of 4e-3."""
    rng = np.random.default_rng(0)
    f, r = (jnp.asarray(rng.normal(size=4096) + 0.2, jnp.bfloat16) for _ in range(2))
    update, state = run(f, r, 0.1)
    assert update.dtype == jnp.bfloat16
    f, r = np.asarray(f, np.float64), np.asarray(r, np.float64)
    assert_allclose(state.stats["xi"], 0.1 - f @ r / (f @ f), rtol=1e-5)
    exact = jnp.asarray(r + (0.1 - f @ r / (f @ f)) * f, jnp.bfloat16)
    wrong = np.asarray(exact, np.float32) != np.asarray(update, np.float32)
    assert wrong.mean() < 0.01  # only ties may be rounded differently


def test_the_output_has_the_upper_gradients_dtype():
    f, r = jnp.array([1.0, 0.0], jnp.float32), jnp.array([1.0, 1.0], jnp.bfloat16)
    assert run(f, r)[0].dtype == jnp.bfloat16
    assert run(f, r, lower="retain")[0].dtype == jnp.float32


def test_long_sums_keep_float32_precision():
    """4e6 equal squares: a sequential sum in float32 would lose digits."""
    ones = jnp.full((2000, 2000), 0.1, jnp.float32)
    stats = run(ones, ones, 0.5)[1].stats
    assert_allclose(stats["upper_norm"], 200.0, rtol=1e-6)
    assert_allclose(stats["xi"], -0.5, rtol=1e-6)


def test_the_rescaled_products_keep_their_precision_too():
    rng = np.random.default_rng(0)
    f, r = (rng.normal(size=(500, 2000)) + 0.5 for _ in range(2))
    stats = run(jnp.float32(f * 1e-25), jnp.float32(r * 1e-25), 0.5)[1].stats
    assert_allclose(stats["xi"], 0.5 - np.vdot(f, r) / np.vdot(f, f), rtol=1e-4)


def test_gamma_follows_a_schedule_and_counts_steps():
    grads = {"forget": jnp.array([1.0, 0.0]), "retain": jnp.array([0.0, 1.0])}
    tx = combine.blur(gamma=optax.linear_schedule(0.0, 1.0, 4))
    state = tx.init(grads["retain"])
    seen = []
    for _ in range(4):
        update, state = jax.jit(tx.update)(grads, state)
        seen.append(float(update[0]))
    assert_allclose(seen, [0.0, 0.25, 0.5, 0.75])
    assert state.count == 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gamma": -0.1}, "blur needs gamma >= 0, got gamma=-0.1"),
        ({"gamma": float("nan")}, "blur needs gamma >= 0"),
        ({"gamma": np.float32("inf")}, "blur needs gamma >= 0"),
        ({"rel_tol": -1.0}, "blur needs rel_tol >= 0"),
        ({"abs_tol": float("nan")}, "blur needs abs_tol >= 0"),
        ({"xi_max": 0.0}, "blur needs xi_max > 0"),
        ({"constraint": "equal"}, "constraint to be one of.*Did you mean 'equality'"),
        ({"scope": "leaves"}, "scope to be one of 'global', 'leaf'"),
    ],
)
def test_static_settings_out_of_range_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        combine.blur(**kwargs)


def test_microbatches_summed_before_the_projection_give_the_full_batch():
    rng = np.random.default_rng(0)
    micro = [
        {n: jnp.float32(rng.normal(size=8)) for n in ("forget", "retain")}
        for _ in "1234"
    ]
    mean = {n: sum(m[n] for m in micro) / 4 for n in ("forget", "retain")}
    whole = run(**mean)[0]
    each = sum(run(**m)[0] for m in micro) / 4
    g_f = mean["forget"]
    assert_allclose(jnp.vdot(whole, g_f), jnp.vdot(g_f, g_f), rtol=1e-5)
    assert not np.allclose(
        each, whole, atol=1e-2
    )  # the mean of projections is different


def test_simple_bilevel_quadratic():
    """min |x - (3, 5)|^2 / 2 subject to x in argmin (x_0 - 1)^2 / 2, which is (1, 5).

    The lower level is a valley, flat along x_1. BLUR with steps of T^-1/2 finds the
    best point of the valley; a sum with fixed weights stops between, at (1 + 3) / 2 for
    equal weights.
    """

    def solve(tx, steps=2000):
        tx = optax.chain(tx, optax.scale(-(steps**-0.5)))

        def step(carry, _):
            x, state = carry
            grads = {"forget": (x - 1.0) * jnp.array([1.0, 0.0])}
            grads["retain"] = x - jnp.array([3.0, 5.0])
            update, state = tx.update(grads, state)
            return (x + update, state), None

        x = jnp.array([-4.0, 0.0])
        return jax.lax.scan(step, (x, tx.init(x)), length=steps)[0][0]

    assert_allclose(solve(combine.blur(gamma=1.0)), [1.0, 5.0], atol=1e-3)
    assert_allclose(solve(combine.blur(gamma=0.2)), [1.0, 5.0], atol=1e-3)
    summed = solve(combine.weighted_sum({"forget": 1.0, "retain": 1.0}))
    assert_allclose(summed, [2.0, 5.0], atol=1e-3)
