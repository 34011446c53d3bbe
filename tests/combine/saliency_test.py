# SPDX-License-Identifier: Apache-2.0
"""SURE: its mask equals NumPy's percentile, and nothing outside it changes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import combine, sharding, trees
from jaxunlearn.combine import _saliency

SHAPES = {
    "embed": {"embedding": (12, 8)},
    "blocks": {"kernel": (2, 8, 16), "bias": (2, 16), "norm": {"scale": (2, 8)}},
    "out": {"kernel": (8, 4)},
}
RULES = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"blocks/kernel", (None, "fsdp", "tensor")),
    (r"blocks/bias", (None, "tensor")),
    (r".*", ()),
)
HEADS = [(r"blocks/kernel", (None, 4)), (r"bias", (4,)), *combine.ROWS]


def tree(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(size * rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradients(size=1.0):
    return {"forget": tree(1, size), "retain": tree(2, size)}


def scores(g, unit):
    """(score of the unit of each entry, scores of all units), in NumPy."""
    g = jax.tree.map(lambda x: np.asarray(x, np.float64), g)
    kernel, heads = g["blocks"]["kernel"], not isinstance(unit, str)
    over = {
        "row": {"embed": 1, "kernel": 1, "out": 0, "vector": ()},
        "module": {"embed": (0, 1), "kernel": (1, 2), "out": (0, 1), "vector": 1},
        "weight": {"embed": (), "kernel": (), "out": (), "vector": ()},
    }["row" if heads else unit]
    norm = lambda x, a: np.sqrt(np.sum(x**2, axis=a, keepdims=True))  # noqa: E731
    blocks = {
        "kernel": norm(kernel, over["kernel"]),
        "bias": norm(g["blocks"]["bias"], over["vector"]),
        "norm": {"scale": norm(g["blocks"]["norm"]["scale"], over["vector"])},
    }
    units = {
        "embed": {"embedding": norm(g["embed"]["embedding"], over["embed"])},
        "blocks": blocks,
        "out": {"kernel": norm(g["out"]["kernel"], over["out"])},
    }
    each = units
    if heads:
        head = norm(kernel.reshape(2, 8, 4, 4), (1, 3))[..., 0]
        bias = norm(g["blocks"]["bias"].reshape(2, 4, 4), 2)[..., 0]
        units = {**units, "blocks": {**blocks, "kernel": head, "bias": bias}}
        spread = {"kernel": np.repeat(head, 4, 2), "bias": np.repeat(bias, 4, 1)}
        each = {**units, "blocks": {**blocks, **spread}}
    pool = np.concatenate([np.ravel(x) for x in jax.tree.leaves(units)])
    entries = jax.tree.map(lambda s, x: np.broadcast_to(s, x.shape), each, g)
    return entries, pool


def moved(update):
    return jax.tree.map(lambda x: np.asarray(x) != 0, update)


def plain(**kwargs):
    return combine.saliency(combine.weighted_sum(), **kwargs)


@pytest.mark.parametrize(
    ("unit", "percentile"),
    [("row", 0), ("row", 37.5), ("row", 90.0), ("row", 100), ("module", 50)]
    + [("weight", 99.0), (HEADS, 80)],
    ids=str,
)
def test_the_mask_matches_numpys_percentile(unit, percentile):
    grads, tx = gradients(), plain(unit=unit, percentile=percentile)
    update, state = jax.jit(tx.update)(grads, tx.init(tree(0)))
    entries, pool = scores(grads["forget"], unit)
    gamma = np.percentile(pool, percentile)
    expected = jax.tree.map(lambda s: s >= gamma - 1e-6, entries)
    jax.tree.map(assert_array_equal, moved(update), expected)
    total = jax.tree.map(jnp.add, grads["forget"], grads["retain"])
    jax.tree.map(
        lambda u, t, m: assert_array_equal(u, np.where(m, t, 0)),
        *(update, total, expected),
    )
    kept = np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected)]).mean()
    assert_allclose(state.stats["kept"], kept, rtol=1e-6)
    assert_allclose(state.stats["threshold"], pool[pool >= gamma - 1e-6].min(), 1e-6)
    assert state.mask == ()


@pytest.mark.parametrize("count", [1, 2, 7, 1001])
def test_the_threshold_is_exactly_one_of_the_scores(count):
    """Compared with a sort. 99.9 % of 1000 is rank 999; in floats it is above."""
    rng = np.random.default_rng(0)
    g = np.float32(rng.normal(size=count) * 10.0 ** rng.integers(-30, 30, size=count))
    for percentile, rank in [(0, 0), (7, 0.07), (50, 0.5), (99.9, 0.999), (100, 1)]:
        tx = plain(unit="weight", percentile=percentile)
        stats = tx.update({"forget": {"w": jnp.asarray(g)}}, tx.init(None))[1].stats
        index = int(np.ceil(np.round(rank * (count - 1), 6)))
        assert stats["threshold"] == np.sort(np.abs(g))[index]


def test_rows_by_hand_and_ties_are_all_updated():
    kernel = jnp.array([[3.0, 0.0, 0.0, 3.0], [4.0, 5.0, 1.0, 4.0]])
    tx = plain(percentile=50)
    update, state = tx.update({"forget": {"kernel": kernel}}, tx.init(None))
    assert_array_equal(update["kernel"], kernel * jnp.array([1.0, 1, 0, 1]))
    assert state.stats["threshold"] == 5 and state.stats["kept"] == 0.75


def test_counts_above_16_bits_are_carried():
    """Counts are compared in two halves of 16 bits."""
    x = jnp.arange(300_000, dtype=jnp.float32).reshape(3, 1000, 100)
    tx = plain(unit="weight", percentile=75)
    stats = jax.jit(tx.update)({"forget": {"w": x}}, tx.init(None))[1].stats
    assert stats["threshold"] == 225_000  # ceil(0.75 * 299_999)


def test_digits_of_counts_do_not_overflow_on_large_meshes():
    """126 layers on 4096 devices, each layer with 65535 entries below the threshold."""
    layers, devices = 126, 4096
    digits = _saliency._digits(jnp.full(layers, 65535, jnp.int32))
    upper, lower = _saliency._carried(jnp.stack(digits) * jnp.int32(devices))
    assert (int(upper) << 16) + int(lower) == layers * devices * 65535


@pytest.mark.parametrize("unit", ["row", "module"])
def test_a_selection_of_layers_has_the_units_of_the_kernel(unit):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 8, 16)), jnp.float32)
    chosen, _ = trees.split({"mlp": {"kernel": kernel}}, "mlp/kernel@0,2")
    whole = {"mlp": {"kernel": kernel[jnp.array([0, 2])]}}
    tx = plain(unit=unit, percentile=60)
    found, expected = (tx.update({"forget": g}, tx.init(g)) for g in (chosen, whole))
    assert_array_equal(*(jax.tree.leaves(x[0])[0] for x in (found, expected)))
    assert found[1].stats == expected[1].stats


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scores_are_finite_if_squares_overflow_float32(size):
    tx = plain(percentile=80)
    masks = [
        moved(jax.jit(tx.update)(gradients(s), tx.init(None))[0]) for s in (1.0, size)
    ]
    jax.tree.map(assert_array_equal, *masks)


def sparse(seed, rows):
    g = np.zeros((4, 6), np.float32)
    g[:, rows] = np.random.default_rng(seed).normal(size=(4, len(rows)))
    return {
        "forget": {"kernel": jnp.asarray(g)},
        "retain": {"kernel": jnp.ones((4, 6))},
    }


def steps(tx, masks=((0, 1, 2), (3, 4, 5))):
    """The params before, between and after two steps with different salient columns."""
    params = {"kernel": jnp.ones((4, 6))}
    state, seen = tx.init(params), [params["kernel"]]
    for seed, rows in enumerate(masks):
        update, state = jax.jit(tx.update)(sparse(seed, rows), state, params)
        params = optax.apply_updates(params, update)
        seen.append(params["kernel"])
    return seen, state


OPTIMIZER = optax.chain(combine.weighted_sum(), optax.adamw(0.1, weight_decay=0.5))


def test_momentum_and_weight_decay_do_not_change_masked_entries():
    with jax.numpy_dtype_promotion("standard"):
        (zero, one, two), _ = steps(combine.saliency(OPTIMIZER, percentile=60))
        leaky = steps(combine.saliency(OPTIMIZER, percentile=60, apply_to="grad"))[0]
    assert_array_equal(np.any(one != zero, 0), [1, 1, 1, 0, 0, 0])
    assert_array_equal(np.any(two != one, 0), [0, 0, 0, 1, 1, 1])
    assert np.all(leaky[2][:, :3] != leaky[1][:, :3])


def test_once_keeps_the_first_steps_mask():
    with jax.numpy_dtype_promotion("standard"):
        tx = combine.saliency(OPTIMIZER, percentile=60, refresh="once")
        (zero, one, two), state = steps(tx)
    assert_array_equal(state.mask["kernel"], [[1, 1, 1, 0, 0, 0]])
    assert_array_equal(np.any(two != zero, 0), [1, 1, 1, 0, 0, 0])
    assert np.all(two[:, :3] != one[:, :3]) and state.count == 2


def test_as_released_masks_nothing_and_counts_the_forget_gradient_twice():
    grads, weights = gradients(), {"forget": -1.0, "retain": 3.0}
    tx = combine.saliency(combine.weighted_sum(weights), compat="released")
    update, state = jax.jit(tx.update)(grads, tx.init(tree(0)))
    jax.tree.map(
        lambda u, f, r: assert_allclose(u, -2 * f + 3 * r, rtol=1e-5, atol=1e-6),
        *(update, grads["forget"], grads["retain"]),
    )
    assert 0 < state.stats["kept"] < 0.5


def test_inner_blur_satisfies_its_identity_on_updated_entries():
    grads = gradients()
    tx = combine.saliency(combine.blur(gamma=0.3), percentile=70)
    update, _ = jax.jit(tx.update)(grads, tx.init(tree(0)))
    dot = lambda a, b: sum(map(jnp.vdot, *map(jax.tree.leaves, (a, b))))  # noqa: E731
    low = jax.tree.map(
        lambda g, m: jnp.where(m, g, 0.0), grads["forget"], moved(update)
    )
    assert_allclose(dot(update, low), 0.3 * dot(low, low), rtol=1e-4)


@pytest.mark.parametrize(
    ("unit", "refresh"),
    [
        pytest.param("row", "step", marks=pytest.mark.slow, id="row"),
        pytest.param("weight", "step", marks=pytest.mark.slow, id="weight"),
        pytest.param(HEADS, "once", id="heads_once"),
        pytest.param("weight", "once", id="weight_once"),
    ],
)
def test_on_a_mesh_by_rules_it_is_the_same_mask(unit, refresh):
    grads, params = gradients(), tree(0)
    tx = plain(unit=unit, percentile=70, refresh=refresh)
    expected, after = jax.jit(tx.update)(grads, tx.init(params), params)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    state = sharding.create(tx.init, mesh, RULES, params)
    split = {
        n: jax.device_put(g, sharding.by_rules(g, mesh, RULES))
        for n, g in grads.items()
    }
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(partial(tx.update, rules=RULES)).lower(split, state).compile()
        )
        update, new = compiled(split, state)
    jax.tree.map(assert_array_equal, moved(update), moved(expected))
    jax.tree.map(partial(assert_allclose, rtol=1e-6), update, expected)
    for name, value in new.stats.items():
        assert_allclose(value, after.stats[name], rtol=1e-6)
    if refresh == "once":
        jax.tree.map(assert_array_equal, new.mask, after.mask)
    if unit == "weight":  # no leaf is gathered
        text = compiled.as_text()
        assert "all-gather" not in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"percentile": 101}, r"percentile in \[0, 100\], got percentile=101"),
        ({"percentile": float("nan")}, r"percentile in \[0, 100\]"),
        ({"unit": "rows"}, "unit to be one of.*Did you mean 'row'"),
        ({"refresh": "never"}, "refresh to be one of 'step', 'once'"),
        ({"apply_to": "grads"}, "apply_to to be one of"),
        ({"compat": "paper"}, "compat to be one of None, 'released'"),
        ({"unit": [("embed/.*", ())]}, "rule of unit for every leaf.*'blocks/bias'"),
        ({"unit": [(".*", (1, 1, 1))]}, "at most 2 sizes .*'blocks/bias'"),
        ({"unit": [(".*", (5,))]}, r"divide the shape \(2, 16\) of 'blocks/bias'"),
    ],
)
def test_bad_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        plain(**settings).update(gradients(), plain().init(None))


def test_a_missing_term_is_an_error():
    with pytest.raises(KeyError, match="saliency.*'forget', but there is 'retain'"):
        plain().update({"retain": tree(2)}, plain().init(None))
