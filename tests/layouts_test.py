# SPDX-License-Identifier: Apache-2.0
"""Where the optimizer's state and a block's products are: other devices, the host."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jaxunlearn as ju
from jaxunlearn import combine, recipes, sharding, terms, trees
from tests import tiny

SETTINGS = dict(width=32, heads=8, kv_heads=8, head_dim=4, hidden=32, vocab=64)
ROWS = 8


def streams():
    forget, retain = (tiny.tiny_batch(ROWS, 12, seed=i, vocab=64) for i in (0, 1))
    forget["ref_logps"] = jnp.linspace(-9.0, -3.0, ROWS, dtype=jnp.float32)
    return {"forget": forget, "retain": retain}


def recipe_and_model():
    model, params = tiny.tiny_model(**SETTINGS)
    return recipes.openunlearning.npo(model, learning_rate=1e-3), model, params


def steps(mesh, count=2, **more):
    """The state after some steps, by the settings of Recipe.setup."""
    recipe, model, params = recipe_and_model()
    step, state, frozen = recipe.setup(model, params, mesh=mesh, **more)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(count):
            state, _ = step(state, streams(), frozen)
    return state


@pytest.fixture(scope="module")
def on_one_device():
    return steps(None).params


def same(state, wanted, atol=1e-5):
    jax.tree.map(partial(assert_allclose, rtol=0, atol=atol), state.params, wanted)


def test_zero_splits_moments_over_data_axes_and_copies_params(on_one_device):
    _, model, _ = recipe_and_model()
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    state = steps(mesh, rules=sharding.zero(model.rules))
    same(state, on_one_device)
    found = {p: x for p, x in trees.paths(state).items() if p.endswith("mlp/up/kernel")}
    assert len(found) == 3
    for path, x in found.items():
        moment = path.startswith("opt_state/")
        rows = ("data", "fsdp") if moment else None
        assert x.sharding.spec == P(None, rows, "tensor")
        assert x.addressable_shards[0].data.shape == (3, 8 if moment else 32, 16)


def test_the_optimizers_state_waits_in_the_hosts_memory(on_one_device):
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    state = steps(mesh, host=sharding.HOST)
    same(state, on_one_device)
    kinds = {p: x.sharding.memory_kind for p, x in trees.paths(state).items()}
    for path, x in trees.paths(state).items():
        away = path.startswith("opt_state/") and x.ndim > 0
        assert kinds[path] == ("pinned_host" if away else "device"), path
    recipe, model, params = recipe_and_model()
    step = sharding.jit_step(
        ju.make_step(recipe.terms, recipe.tx), mesh, model.rules, state
    )
    with pytest.raises(ValueError, match="jit_step needs a state that is placed"):
        step(state, streams(), ju.Frozen())
    with pytest.raises(ValueError, match="needs mesh with rules and host"):
        recipe.setup(model, params, host=sharding.HOST)


def gradient(remat):
    model, params = tiny.tiny_model(**SETTINGS, remat=remat)
    term = terms.on_logps(ju.losses.nll, model, "retain", reduce="token")

    def loss(params, batch):
        total, _ = term(params, {"retain": batch}, None, jax.random.key(0))
        return total.mean()

    return jax.jit(jax.grad(loss)), params, streams()["retain"]


def test_offloaded_products_give_the_same_gradient():
    found, wanted = (
        function(params, batch)
        for function, params, batch in (gradient("offload"), gradient("full"))
    )
    jax.tree.map(partial(assert_allclose, rtol=1e-4, atol=1e-6), found, wanted)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_offloading_lowers_for_accelerators(platform):
    function, params, batch = gradient("offload")
    lowered = function.trace(params, batch).lower(lowering_platforms=(platform,))
    assert '_xla_buffer_placement = "pinned_host"' in lowered.as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_the_step_with_host_memory_and_small_moments_lowers(platform, moments):
    model, params = tiny.tiny_model(**(SETTINGS | dict(width=64, hidden=128)))
    recipe = recipes.openunlearning.npo(model)
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    tx = combine.with_moments(recipe.tx, moments)
    fresh = partial(ju.init_state, tx=tx, key=jax.random.key(0))
    state = jax.eval_shape(fresh, shapes)
    places = sharding.by_rules(state, mesh, model.rules, sharding.HOST)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        *(state, places),
    )
    step = ju.make_step(recipe.terms, tx)
    step = sharding.jit_step(step, mesh, model.rules, state, host=sharding.HOST)
    with jax.numpy_dtype_promotion("standard"):
        traced = step.trace(state, streams(), ju.Frozen())
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count('_xla_buffer_placement = "device"') >= 2 * 9
    assert ("xi8>" in text) == (moments == "int8")
