# SPDX-License-Identifier: Apache-2.0
"""BLUR with two lower terms: noise does not reduce the projection."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import jaxunlearn as ju
from jaxunlearn import combine, losses, sharding, terms, trees
from tests import tiny

HALVES = ("a", "b")


def run(a, b, h, **settings):
    grads = {
        name: {
            "x": jnp.asarray(x[:1], jnp.float32),
            "y": jnp.asarray(x[1:], jnp.float32),
        }
        for name, x in (("a", a), ("b", b), ("retain", h))
    }
    tx = combine.blur(lower=HALVES, **settings)
    update, state = jax.jit(tx.update)(grads, tx.init(grads["a"]))
    return np.concatenate([update["x"], update["y"]]), state.stats


@pytest.mark.parametrize("size", [1.0, 1e-22, 1e22], ids=["plain", "tiny", "huge"])
def test_two_lower_terms_by_hand(size):
    # l = (2, 0), <a, b> = 3, <h, l> = 4: xi = 1/2 - 4/3.
    a, b, h = np.array([[2.0, 1.0], [2.0, -1.0], [2.0, 5.0]]) * size
    update, stats = run(a, b, h, gamma=0.5)
    assert_allclose(stats["xi"], 0.5 - 4 / 3, rtol=1e-6)
    assert_allclose(update / size, [2 + 2 * (0.5 - 4 / 3), 5.0], rtol=1e-6)
    assert_allclose(stats["lower_norm"] / size, 3**0.5, rtol=1e-6)


def test_equal_halves_give_the_result_of_one_term():
    a, h = np.random.default_rng(0).normal(size=(2, 5))
    update, stats = run(a, a, h, gamma=0.2)
    xi = 0.2 - h @ a / (a @ a)
    assert_allclose(stats["xi"], xi, rtol=1e-5)
    assert_allclose(update, h + xi * a, rtol=1e-5)


def test_opposed_halves_close_the_gate():
    update, stats = run([1.0, 0.0], [-2.0, 1.0], [3.0, 4.0])
    assert_allclose(update, [3.0, 4.0])
    assert stats["gate"] == 0 and stats["xi"] == 0 and stats["finite"] == 1


def test_the_product_of_halves_is_unbiased_under_noise():
    rng = np.random.default_rng(1)
    mean, width, draws = np.full(8, 1.0), 0.5, 3000
    a, b = mean + width * rng.normal(size=(2, draws, 8))
    grads = {"a": {"x": a}, "b": {"x": b}, "retain": {"x": np.tile(mean, (draws, 1))}}
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
    split = combine.blur(lower=HALVES)
    plain = combine.blur()

    def squares(g):
        whole = {
            "retain": g["retain"],
            "forget": jax.tree.map(lambda x, y: (x + y) / 2, g["a"], g["b"]),
        }
        both = split.update(g, split.init(g["a"]))[1].stats["lower_norm"]
        # The norm is 0 if <a, b> is negative, which is rare here.
        one = plain.update(whole, plain.init(g["a"]))[1].stats["lower_norm"]
        return both**2, one**2

    both, one = (np.mean(x) for x in jax.jit(jax.vmap(squares))(grads))
    assert abs(both - 8) < 0.15
    assert abs(one - (8 + 8 * width**2 / 2)) < 0.15  # the variance of the mean of two


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.slow
def test_on_a_mesh_by_rules_it_is_the_same_in_one_all_reduce(scope):
    model, params = tiny.tiny_model(qkv_bias=True, width=32, vocab=64)
    grads = {
        "a": jax.tree.map(jnp.cos, params),
        "b": jax.tree.map(lambda x: jnp.cos(x + 0.1), params),
        "retain": params,
    }
    tx, mesh = combine.blur(lower=HALVES, scope=scope), sharding.make_mesh(fsdp=8)
    expected = tx.update(grads, tx.init(params))
    both = (dict.fromkeys(grads, sharding.by_rules(params, mesh, model.rules)),)

    def update(grads):
        return tx.update(grads, tx.init(params), rules=model.rules)

    with jax.set_mesh(mesh):
        compiled = jax.jit(update, in_shardings=both).lower(grads).compile()
        found = compiled(grads)
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
    assert "all-gather" not in compiled.as_text()


def parts(model):
    a, b = terms.halves(terms.on_logps(losses.ascent, model, "forget"))
    retain = terms.on_logps(losses.nll, model, "retain", reduce="token")
    return {"a": a, "b": b, "retain": retain}


@pytest.mark.parametrize(
    "num_microbatches", [pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_halves_contain_each_row_once(num_microbatches):
    model, params = tiny.bigram_model()
    whole = terms.on_logps(losses.ascent, model, "forget")
    streams = {"forget": tiny.tiny_batch(8), "retain": tiny.tiny_batch(4, seed=1)}
    tx = optax.chain(combine.blur(lower=HALVES, gamma=0.1), optax.sgd(0.1))
    step = jax.jit(ju.make_step(parts(model), tx, num_microbatches=num_microbatches))
    state, metrics = step(
        ju.init_state(params, tx, jax.random.key(0)), streams, ju.Frozen()
    )
    key = jax.random.key(0)
    total = jax.jit(lambda p: whole(p, streams, None, key)[0].mean())(params)
    mean = (metrics["a/loss"] + metrics["b/loss"]) / 2
    assert_allclose(mean, total, rtol=1e-5)
    assert metrics["finite"] and int(state.step) == 1

    # Every second row of each microbatch, which takes every num_microbatches-th row.
    order = jnp.arange(8).reshape(-1, num_microbatches).T.ravel()
    rows = {"forget": jax.tree.map(lambda x: x[order], streams["forget"])}

    def mean_of(term, params):
        return term(params, rows, None, key)[0].mean()

    a, b = (
        jax.jit(jax.grad(partial(mean_of, parts(model)[name])))(params)
        for name in HALVES
    )
    product = trees.vdot(a, b)
    assert bool(metrics["combine/gate"]) and product > 0
    norm = jnp.sqrt(jnp.maximum(product, 0))
    assert_allclose(metrics["combine/lower_norm"], norm, rtol=1e-4)


def test_an_odd_number_of_rows_is_an_error():
    model, params = tiny.tiny_model()
    a, _ = terms.halves(terms.on_logps(losses.ascent, model, "forget"))
    with pytest.raises(ValueError, match="even number of rows of 'forget'.*got 3"):
        a(params, {"forget": tiny.tiny_batch(3)}, None, jax.random.key(0))


@pytest.mark.parametrize(
    "lower", ["retain", ("a", "a"), ("a", "b", "c"), ("retain", "a"), ()]
)
def test_equal_names_of_levels_are_refused(lower):
    with pytest.raises(ValueError, match="blur needs different terms, got"):
        combine.blur(lower=lower)
