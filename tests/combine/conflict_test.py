# SPDX-License-Identifier: Apache-2.0
"""PCGrad and MGDA: values by hand, and the properties stated in the papers."""

from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from jaxunlearn import combine, sharding
from tests import tiny

NAMES = ("a", "b", "c")
# Made once: jit compiles each of their update functions once.
PCGRAD_OF_TWO = combine.pcgrad(NAMES[:2])
MGDA_OF_THREE = combine.mgda(NAMES, num_iterations=400)


def run(tx, *vectors, steps=1):
    """The last update and state for gradients split into two leaves."""
    grads = {
        name: {"x": jnp.asarray(v[:1]), "y": jnp.asarray(v[1:])}
        for name, v in zip(NAMES, np.array(vectors, np.float32), strict=False)
    }
    state = tx.init(grads["a"])
    for _ in range(steps):
        update, state = jax.jit(tx.update)(grads, state)
    return np.concatenate([update["x"], update["y"]]), state


def draws(terms):
    entries = st.floats(-10, 10, width=32).map(lambda x: round(x, 2))
    vector = st.lists(entries, min_size=4, max_size=4)
    return st.tuples(*[vector] * terms)


def test_pcgrad_by_hand():
    # <a, b> = -1: a becomes a + b / 2 = (1/2, 1/2), and b becomes b + a = (0, 1).
    update, state = run(combine.pcgrad(NAMES[:2]), [1.0, 0.0], [-1.0, 1.0])
    assert_allclose(update, [0.5, 1.5], rtol=1e-6)
    assert_allclose(state.stats["cosine"], -(0.5**0.5), rtol=1e-6)
    assert_allclose(state.stats["factor/a"], 2.0, rtol=1e-6)  # 1 + 1
    assert_allclose(state.stats["factor/b"], 1.5, rtol=1e-6)


def test_pcgrad_does_not_change_gradients_that_agree():
    update, _ = run(combine.pcgrad(NAMES), [1.0, 0.0], [1.0, 1.0], [0.0, 2.0])
    assert_allclose(update, [2.0, 3.0], rtol=1e-6)


def numpy_pcgrad(vectors, orders):
    total = np.zeros(len(vectors[0]))
    for i, order in enumerate(orders):
        projected = np.array(vectors[i], float)
        for j in order:
            other = np.array(vectors[j], float)
            if j != i and projected @ other < 0:
                projected = projected - (projected @ other) / (other @ other) * other
        total += projected
    return total


def test_pcgrad_of_three_terms_depends_on_the_order_of_projections():
    vectors = np.random.default_rng(5).normal(size=(3, 2))
    update, _ = run(combine.pcgrad(NAMES), *vectors)
    assert_allclose(update, numpy_pcgrad(vectors, [(0, 1, 2)] * 3), rtol=1e-5)
    every = [
        numpy_pcgrad(vectors, [p, q, r])
        for p in permutations(range(3))
        for q in permutations(range(3))
        for r in permutations(range(3))
    ]
    tx = combine.pcgrad(NAMES, key=jax.random.key(2))
    seen = {tuple(np.round(run(tx, *vectors, steps=n)[0], 4)) for n in range(1, 9)}
    assert len(seen) > 1  # the order is drawn at every step
    for update in seen:
        assert min(np.abs(update - e).max() for e in every) < 1e-3


@given(draws(2))
@settings(max_examples=40, deadline=None)
def test_pcgrad_of_two_never_opposes_either(vectors):
    update, _ = run(PCGRAD_OF_TWO, *vectors)
    for vector in np.array(vectors):
        bound = 1e-4 * (1 + np.linalg.norm(update) * np.linalg.norm(vector))
        assert update @ vector >= -bound


def test_mgda_by_hand():
    # The nearest point of the segment from (2, 0) to (0, 1) is (0.4, 0.8).
    update, state = run(combine.mgda(NAMES[:2]), [2.0, 0.0], [0.0, 1.0])
    assert_allclose(update, [0.4, 0.8], rtol=1e-6)
    assert_allclose(state.stats["factor/a"], 0.2, rtol=1e-6)
    # For unit vectors it is the midpoint.
    update, _ = run(combine.mgda(NAMES[:2], normalize=True), [2.0, 0.0], [0.0, 1.0])
    assert_allclose(update, [0.5, 0.5], rtol=1e-6)


def test_mgda_is_zero_at_a_pareto_point():
    update, _ = run(combine.mgda(NAMES[:2]), [3.0, 0.0], [-1.0, 0.0])
    assert_allclose(update, 0.0, atol=1e-6)


@given(draws(3))
@settings(max_examples=40, deadline=None)
def test_mgda_is_a_convex_combination_that_raises_no_loss(vectors):
    """At the minimum <u, g_k> >= |u|^2 for every k."""
    update, state = run(MGDA_OF_THREE, *vectors)
    largest = max(1e-3, max(np.linalg.norm(v) for v in np.array(vectors)))
    for vector in np.array(vectors):
        assert update @ vector >= update @ update - 2e-2 * largest**2
    factors = [float(state.stats[f"factor/{name}"]) for name in NAMES]
    if all(np.any(v) for v in vectors):
        assert min(factors) >= 0 and abs(sum(factors) - 1) < 1e-3


@pytest.mark.parametrize("make", [combine.pcgrad, combine.mgda])
@pytest.mark.slow
def test_on_a_mesh_by_rules_it_is_the_same_and_gathers_nothing(make):
    """Some leaves are sharded; replicated ones must count once."""
    model, params = tiny.tiny_model(qkv_bias=True, width=32, vocab=64)
    forget = jax.tree.map(jnp.cos, params)
    grads = {"forget": forget, "retain": jax.tree.map(lambda x: x - 0.1, params)}
    tx, mesh = make(), sharding.make_mesh(data=2, fsdp=2, tensor=2)
    expected, after = tx.update(grads, tx.init(params))
    assert after.stats["cosine"] < 0  # they conflict
    both = (dict.fromkeys(grads, sharding.by_rules(params, mesh, model.rules)),)

    def update(grads):
        return tx.update(grads, tx.init(params), rules=model.rules)

    with jax.set_mesh(mesh):
        compiled = jax.jit(update, in_shardings=both).lower(grads).compile()
        found = compiled(grads)
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-5), found[0], expected)
    for name, value in found[1].stats.items():
        assert_allclose(value, after.stats[name], rtol=1e-5)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("make", [combine.pcgrad, combine.mgda])
@pytest.mark.parametrize("names", [("a",), ("a", "a"), ()])
def test_two_different_terms_are_needed(make, names):
    with pytest.raises(ValueError, match="terms to be two or more"):
        make(names)
