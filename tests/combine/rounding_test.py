# SPDX-License-Identifier: Apache-2.0
"""Params below float32: what rounding swallows, and both ways not to lose it."""

import dataclasses
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxunlearn as ju
from jaxunlearn import combine, losses, recipes, sharding, terms
from jaxunlearn._step import SWALLOWED
from jaxunlearn.io import checkpoint
from jaxunlearn.typing import Frozen, Total
from tests import tiny

RATE, STEPS, SIZE = 1e-5, 60, 4096
RULES = ((r".*kernel", ("fsdp",)), (r".*", ()))
RESUMED = 20


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """optax's Adam relies on promotions that these tests forbid elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@dataclasses.dataclass(frozen=True)
class Slope:
    """A term whose gradient is 1 for each entry of the kernel."""

    reads: tuple = ("forget",)
    needs_ref: bool = False

    def __call__(self, params, streams, ref, key):
        total = jnp.sum(params["blocks"]["kernel"].astype(jnp.float32))
        return Total(total, jnp.int32(1)), {}


def start(dtype="bfloat16"):
    values = np.random.default_rng(0).uniform(0.01, 0.03, SIZE)
    return {"blocks": {"kernel": jnp.asarray(values, jnp.bfloat16).astype(dtype)}}


def chain(rounding="nearest"):
    tx = optax.chain(combine.weighted_sum(), optax.adamw(RATE, weight_decay=0.0))
    return combine.with_rounding(tx, rounding)


@pytest.fixture(scope="module")
def trained():
    """Rounding -> (state, metrics) after STEPS steps, and "float32"."""
    found = {}
    for rounding in ("float32", *combine.ROUNDINGS):
        plain = rounding == "float32"
        tx = chain("nearest" if plain else rounding)
        step = jax.jit(ju.make_step({"forget": Slope()}, tx))
        params = start("float32" if plain else "bfloat16")
        state = ju.init_state(params, tx, jax.random.key(0))
        for number in range(STEPS):
            state, metrics = step(state, {"forget": {}}, Frozen())
            if number + 1 == RESUMED:
                found[rounding, RESUMED] = state
        found[rounding] = state, metrics
        found[rounding, "step"] = step
    return found


def moved(state):
    """Mean change of an entry, in updates of RATE."""
    change = (
        state.params["blocks"]["kernel"].astype(jnp.float32)
        - start("float32")["blocks"]["kernel"]
    )
    return float(change.mean() / RATE)


def test_updates_below_a_step_of_the_dtype_are_lost_only_to_nearest(trained):
    assert_allclose(moved(trained["float32"][0]), -STEPS, rtol=1e-3)
    assert moved(trained["nearest"][0]) == 0
    assert_allclose(moved(trained["masters"][0]), -STEPS, rtol=0.02)
    assert_allclose(moved(trained["stochastic"][0]), -STEPS, rtol=0.02)
    masters = trained["masters"][0].opt_state.masters["blocks/kernel"]
    wanted = trained["float32"][0].params["blocks"]["kernel"]
    assert_allclose(masters, wanted, rtol=1e-6)
    assert_array_equal(
        trained["masters"][0].params["blocks"]["kernel"], masters.astype(jnp.bfloat16)
    )


def test_the_share_that_rounding_swallowed_is_a_metric(trained):
    assert SWALLOWED not in trained["float32"][1]  # and costs float32 params nothing
    assert trained["nearest"][1][SWALLOWED] == 1
    for rounding in ("stochastic", "masters"):
        assert trained[rounding][1][SWALLOWED] == 0
        assert trained[rounding][0].params["blocks"]["kernel"].dtype == jnp.bfloat16
        moments = optax.tree_utils.tree_get(trained[rounding][0].opt_state, "nu")
        assert moments["blocks"]["kernel"].dtype == jnp.float32


def test_stochastic_rounding_draws_neighbours_and_other_draws_each_step(trained):
    state = trained["stochastic"][0]
    again, _ = trained["stochastic", "step"](state, {"forget": {}}, Frozen())
    before, after = (
        x.params["blocks"]["kernel"].astype(jnp.float32) for x in (state, again)
    )
    steps = jnp.abs(after - before) / jnp.spacing(before.astype(jnp.bfloat16))
    assert set(np.unique(np.round(steps.astype(jnp.float32), 3))) <= {0.0, 0.5, 1.0}
    for dtype in (jnp.bfloat16, jnp.float16):
        tx = combine.with_rounding(optax.sgd(1.0), "stochastic")
        params = {"a": jnp.full(SIZE, -1.0, dtype), "b": jnp.zeros(3)}
        wanted = {"a": jnp.full(SIZE, 1e-4, dtype), "b": jnp.ones(3)}
        updates, _ = tx.update(wanted, tx.init(params), params)
        assert_allclose(updates["a"].mean(), -1e-4, rtol=0.3)
        assert_array_equal(updates["b"], -1.0)


@pytest.mark.parametrize("rounding", ["stochastic", "masters"])
def test_a_mesh_and_a_checkpoint_change_nothing(trained, rounding, tmp_path):
    mesh = sharding.make_mesh(fsdp=8)
    tx = chain(rounding)
    fresh = partial(ju.init_state, tx=tx)
    state = sharding.create(fresh, mesh, RULES, start(), key=jax.random.key(0))
    places = {x.sharding.spec for x in jax.tree.leaves(state) if x.size == SIZE}
    assert places == {jax.P("fsdp")}
    step = sharding.jit_step(ju.make_step({"forget": Slope()}, tx), mesh, RULES, state)
    for _ in range(RESUMED):
        state, metrics = step(state, {"forget": {}}, Frozen())
    assert metrics[SWALLOWED] == 0
    assert_array_equal(
        state.params["blocks"]["kernel"],
        trained[rounding, RESUMED].params["blocks"]["kernel"],
    )
    saved = checkpoint.open(tmp_path)
    checkpoint.save(saved, RESUMED, state)
    checkpoint.wait(saved)
    state = checkpoint.restore(saved, jax.eval_shape(lambda x: x, state)).state
    checkpoint.close(saved)
    for _ in range(STEPS - RESUMED):
        state, _ = step(state, {"forget": {}}, Frozen())
    jax.tree.map(assert_array_equal, state.params, trained[rounding][0].params)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["float32", *combine.ROUNDINGS])
def test_a_model_forgets_in_bfloat16_as_in_float32(rounding, forgotten):
    share, swallowed = forgotten(rounding)
    if rounding == "nearest":
        assert share < 0.5 and swallowed > 0.3
    else:
        assert_allclose(share, 1.0, atol=0.1)


@pytest.fixture(scope="module")
def forgotten():
    """rounding -> (the rise of the loss of forgotten rows relative to that in float32,
    the share of the last update that was swallowed)."""
    model, params = tiny.tiny_model(layers=1)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    batch = tiny.tiny_batch()
    term = terms.on_logps(losses.ascent, model, "forget", reduce="token")
    tx = optax.chain(combine.weighted_sum(), optax.adamw(1e-4, weight_decay=0.0))
    recipe = recipes.Recipe({"forget": term}, tx)
    rises = {}

    def rise(rounding):
        wide = rounding == "float32"
        dtype, how = ("float32", "nearest") if wide else ("bfloat16", rounding)
        kept = jax.tree.map(lambda x: x.astype(dtype), params)
        step, state, frozen = recipe.setup(model, kept, rounding=how)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            _, log = ju.fit(step, state, [{"forget": batch}] * 40, frozen, steps=40)
        warned = [str(x.message) for x in found if SWALLOWED in str(x.message)]
        assert len(warned) == (rounding == "nearest") and "bfloat16" in "".join(
            warned or ["bfloat16"]
        )
        return log[0]["forget/loss"] - log[-1]["forget/loss"], log[-1]

    def get(rounding):
        for name in ("float32", rounding):
            if name not in rises:
                rises[name] = rise(name)
        change, entry = rises[rounding]
        return change / rises["float32"][0], entry.get(SWALLOWED, 0.0)

    return get


def test_an_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="rounding='up'"):
        combine.with_rounding(optax.sgd(1.0), "up")
    with pytest.raises(ValueError, match="seed"):
        combine.with_rounding(optax.sgd(1.0), "stochastic", seed=-1)
    params = start()
    tx = chain("masters")
    with pytest.raises(ValueError, match="with_rounding needs params"):
        tx.update({"x": params}, tx.init(params))
