# SPDX-License-Identifier: Apache-2.0
"""BLUR in Adam's metric: the guarantee holds for the step that Adam takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import combine, sharding
from tests import tiny

GAMMA, B2, EPS = 0.3, 0.9, 1e-3


def chain(**settings):
    blur = combine.blur(gamma=GAMMA, **settings)
    return optax.chain(blur, optax.adam(0.1, b1=0.0, b2=B2, eps=EPS))


def draw(seed, size=1.0):
    rng = np.random.default_rng(seed)
    spread = 10.0 ** rng.uniform(
        -3, 1, size=6
    )  # otherwise both metrics would be similar
    x = (size * spread * rng.normal(size=6)).astype(np.float32)
    return {"a": jnp.asarray(x[:2]), "b": jnp.asarray(x[2:].reshape(2, 2))}


def flat(tree):
    leaves = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def grads(step, size=1.0):
    return {"forget": draw(2 * step, size), "retain": draw(2 * step + 1, size)}


@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_the_preconditioned_step_has_rate_gamma(size):
    tx = combine.adam_metric(chain(), b2=B2, eps=EPS)
    state = tx.init(draw(0))
    with jax.numpy_dtype_promotion("standard"):  # optax.adam itself needs it
        for step in range(4):
            g = grads(step, size)
            nu, count = flat(state[1][0].nu), int(state[1][0].count)
            _, state = jax.jit(tx.update)(g, state)
            high, low = flat(g["retain"]), flat(g["forget"])
            u = high + float(state[0].stats["xi"]) * low
            p = np.sqrt(nu / (1 - B2**count)) + EPS if count else np.ones(6)
            wanted = GAMMA * (low @ (low / p))
            assert_allclose(u @ (low / p), wanted, rtol=1e-4, atol=1e-4 * abs(wanted))
            if count and size == 1:  # without adam_metric it does not hold
                plain = high + (GAMMA - high @ low / (low @ low)) * low
                assert abs(plain @ (low / p) - wanted) > 1e-2 * abs(wanted)


def test_at_the_first_step_it_equals_blur():
    g, plain = grads(0), chain(scope="leaf")
    tx = combine.adam_metric(plain, b2=B2, eps=EPS)
    with jax.numpy_dtype_promotion("standard"):
        found, expected = (t.update(g, t.init(draw(0))) for t in (tx, plain))
    jax.tree.map(partial(assert_allclose, rtol=1e-6), found, expected)


@pytest.mark.slow
def test_on_a_mesh_by_rules_it_is_the_same():
    model, params = tiny.tiny_model(qkv_bias=True, width=32, vocab=64)
    tx = combine.adam_metric(chain(), b2=B2, eps=EPS)
    g = {"forget": jax.tree.map(jnp.cos, params), "retain": params}
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(g, tx.init(params), params)
        expected, after = tx.update(g, state, params)
        split = {
            k: jax.device_put(x, sharding.by_rules(x, mesh, model.rules))
            for k, x in g.items()
        }
        with jax.set_mesh(mesh):
            found = jax.jit(partial(tx.update, rules=model.rules))(split, state, params)
    jax.tree.map(partial(assert_allclose, rtol=1e-4, atol=1e-5), found[0], expected)
    for name, value in found[1][0].stats.items():
        assert_allclose(value, after[0].stats[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (optax.chain(combine.weighted_sum(), optax.adam(0.1)), "one blur, got 0"),
        (optax.chain(combine.blur(), optax.sgd(0.1)), "one Adam, got 0"),
        (optax.chain(combine.blur(), optax.adam(0.1), optax.adam(0.1)), "Adam, got 2"),
        (
            optax.chain(
                combine.blur(), optax.masked(optax.adam(0.1), {"a": True, "b": False})
            ),
            "Adam over all leaves",
        ),
    ],
)
def test_a_chain_without_one_blur_and_one_adam_is_refused(inner, message):
    with pytest.raises(ValueError, match=message):
        combine.adam_metric(inner).init(draw(0))


@pytest.mark.parametrize("wrong", [{"b2": 1.0}, {"b2": 0.0}, {"eps": 0.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"adam_metric needs .*{next(iter(wrong))}"):
        combine.adam_metric(chain(), **wrong)
