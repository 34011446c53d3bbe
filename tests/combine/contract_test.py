# SPDX-License-Identifier: Apache-2.0
"""The contract of all combiners. A new combiner is one row of COMBINERS."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxunlearn import combine

VALUES = {"forget": jnp.float32(3.0), "retain": jnp.float32(2.0)}


def primal_dual():
    """primal_dual with the losses that make_step would pass."""
    tx = combine.primal_dual(epsilon=1.5, initial_dual=2.0)

    def update(grads, state, params=None, *, values=VALUES, **extra):
        return tx.update(grads, state, params, values=values, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


ramp = optax.linear_schedule(0.0, 1.0, 10)
COMBINERS = {
    "weighted_sum": partial(combine.weighted_sum, {"forget": -0.5, "retain": 2.0}),
    "weighted_sum_plain": combine.weighted_sum,
    "weighted_sum_schedule": partial(
        combine.weighted_sum, {"forget": ramp, "retain": 1.0}
    ),
    "penalty": partial(combine.penalty, strength=3.0),
    "penalty_schedule": partial(combine.penalty, strength=ramp),
    "primal_dual": primal_dual,
    "blur": combine.blur,
    "blur_schedule": partial(combine.blur, gamma=ramp),
    "blur_upper": partial(combine.blur, upper="forget", lower="retain", gamma=0.3),
    "blur_inequality": partial(combine.blur, constraint="inequality", xi_max=2.0),
    "blur_leaf": partial(combine.blur, scope="leaf"),
    "blur_groups": partial(combine.blur, scope=["block/.*"]),
    "pcgrad": combine.pcgrad,
    "pcgrad_key": partial(combine.pcgrad, key=jax.random.key(1)),
    "mgda": combine.mgda,
    "mgda_normalize": partial(combine.mgda, normalize=True),
    "agree": combine.agree,
    "collapse": lambda: combine.collapse(combine.blur(), rank=3),
    "saliency": lambda: combine.saliency(combine.blur(), percentile=50),
}
each = pytest.mark.parametrize("make", COMBINERS.values(), ids=COMBINERS)
# Other settings of a combiner in this table; some promises are slow for them.
VARIANTS = {x for x in COMBINERS for base in COMBINERS if x.startswith(f"{base}_")}


@cache
def jitted(make):
    """A combiner and its update, jitted once for all tests."""
    tx = make()
    return tx, jax.jit(tx.update)


SHAPES = {
    "embed": (16, 8),
    "block": {"kernel": (2, 8, 24), "bias": (2, 24)},
    "norm": (8,),
}
SPECS = {
    "embed": P("data", "model"),
    "block": {"kernel": P(None, "data", "model"), "bias": P()},
    "norm": P("model"),
}


def tree(seed, dtype=jnp.float32, size=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(size * rng.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradients(**kwargs):
    return {"forget": tree(1, **kwargs), "retain": tree(2, **kwargs)}


def shapes(x):
    return jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype).name), x)


def assert_trees_close(a, b, **kwargs):
    assert shapes(a) == shapes(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


@each
def test_state_has_count_and_float32_stats_of_fixed_keys_from_init_on(make):
    abstract = jax.eval_shape(make().init, tree(0))
    state = make().init(tree(0))
    assert shapes(abstract) == shapes(state)
    assert state.count.dtype == jnp.int32 and state.count == 0
    assert all(x.dtype == jnp.float32 and x == 0 for x in state.stats.values())
    _, after = jax.eval_shape(make().update, gradients(), abstract, tree(0))
    assert shapes(after) == shapes(state)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(
            COMBINERS[name],
            dtype,
            id=f"{dtype}-{name}",
            marks=[pytest.mark.slow]
            if dtype == "bfloat16" and name in VARIANTS
            else [],
        )
        for dtype in ("float32", "bfloat16")
        for name in COMBINERS
    ],
)
def test_output_is_one_tree_like_the_params_and_jit_equals_eager(make, dtype):
    tx, run = jitted(make)
    grads, state = gradients(dtype=dtype), tx.init(tree(0))
    update, after = tx.update(grads, state, tree(0))
    assert shapes(update) == shapes(tree(0, dtype=dtype))
    assert after.count == 1
    found = run(grads, state, tree(0))
    close = {"rtol": 2e-2} if dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-6}
    assert_trees_close(found[0], update, **close)
    assert_trees_close(found[1].stats, after.stats, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("zero", [("forget",), ("retain",), ("forget", "retain")])
def test_zero_gradients_are_safe(make, zero):
    (tx, run), grads = jitted(make), gradients()
    grads |= {name: jax.tree.map(jnp.zeros_like, grads[name]) for name in zero}
    update, state = run(grads, tx.init(tree(0)), tree(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((update, state)))
    if len(zero) == 2:
        assert not any(np.any(x) for x in jax.tree.leaves(update))


@each
@pytest.mark.parametrize("size", [1.0, 1e-22, 1e22], ids=["plain", "tiny", "huge"])
@pytest.mark.slow
def test_sharded_equals_unsharded(make, size):
    """Eight devices; leaves are sharded over two axes, over one axis, or replicated."""
    tx, grads = make(), gradients(size=size)
    plain = jax.jit(tx.update)(grads, tx.init(tree(0)))
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    layout = jax.tree.map(
        partial(NamedSharding, mesh), SPECS, is_leaf=lambda x: isinstance(x, P)
    )
    split = {name: jax.device_put(g, layout) for name, g in grads.items()}
    update, state = jax.jit(tx.update)(split, tx.init(tree(0)))
    assert_trees_close(update, plain[0], rtol=1e-5, atol=1e-5 * size)
    for name, value in state.stats.items():
        np.testing.assert_allclose(value, plain[1].stats[name], rtol=1e-5, atol=1e-5)
    assert not update["embed"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            make, marks=[pytest.mark.slow] if name in VARIANTS else [], id=name
        )
        for name, make in COMBINERS.items()
    ],
)
def test_it_works_first_in_a_chain_with_extra_arguments(make):
    tx = optax.chain(make(), optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    params = tree(0)
    state = tx.init(params)
    values = {"forget": jnp.float32(1), "retain": jnp.float32(2)}
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, values=values, another=values))
    with jax.numpy_dtype_promotion("standard"):  # adamw itself needs it
        for _ in range(2):
            update, state = step(gradients(), state, params)
            params = optax.apply_updates(params, update)
    assert shapes(params) == shapes(tree(0))
    assert state[0].count == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@each
def test_missing_and_surplus_terms_and_other_trees_are_errors(make):
    tx, grads = make(), gradients()
    state = tx.init(tree(0))
    if make is not combine.weighted_sum:
        with pytest.raises(KeyError, match="terms 'forget', but there is 'retain'"):
            tx.update({"retain": grads["retain"]}, state)
        with pytest.raises(ValueError, match="'idk' too.*weighted_sum"):
            tx.update({**grads, "idk": grads["retain"]}, state)
    with pytest.raises(ValueError, match="one shape"):
        tx.update({**grads, "forget": jax.tree.map(lambda x: x[:1], tree(1))}, state)
    with pytest.raises(ValueError, match="one structure, got '"):
        tx.update({**grads, "forget": {"embed": grads["forget"]["embed"]}}, state)


@each
def test_none_leaves_of_a_split_stay_none(make):
    grads = {name: {**g, "embed": None} for name, g in gradients().items()}
    update, _ = make().update(grads, make().init(grads["retain"]))
    assert update["embed"] is None and update["norm"].shape == (8,)
