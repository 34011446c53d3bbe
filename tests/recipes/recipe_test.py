# SPDX-License-Identifier: Apache-2.0
"""What every recipe offers: its name, the streams it reads, what trains, its setup."""

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxunlearn as ju
from jaxunlearn import recipes, sharding, terms, trees, wrap
from tests import tiny

KERNELS = r"blocks/(attention/q|mlp/down)/kernel"
ALL_LORA = [
    f"blocks/{place}/lora_{half}"
    for place in ("attention/q", "mlp/down")
    for half in "ab"
]
BEGIN = {"hidden": 16, "vocab": 64, "width": 16, "layers": 2}


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        yield


def streams(rows=4):
    ref_logps = -jnp.arange(6.0, 6.0 + rows)
    return {
        "forget": tiny.tiny_batch(rows=rows, vocab=64) | {"ref_logps": ref_logps},
        "retain": tiny.tiny_batch(rows=rows, vocab=64, seed=1),
    }


def with_lora(**settings):
    model, params = tiny.tiny_model(**(BEGIN | settings))
    low = wrap.lora(model, pattern=KERNELS, rank=2)
    return low, wrap.add_lora(low, params, jax.random.key(1))


def test_by_name_gives_one_recipe_or_all_of_them():
    assert recipes.by_name("blur.npo") is recipes.blur.npo
    names = recipes.by_name()
    assert names["openunlearning.ce_u"] is recipes.openunlearning.ce_u
    assert {"rmu.wmdp", "mrp.graddiff", "surgery.bilevel"} <= set(names)


def test_a_misspelt_name_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"blur\.npp.*blur\.npo"):
        recipes.by_name("blur.npp")


def test_an_unknown_setting_of_a_recipe_names_the_recipe_and_its_settings():
    model, _ = tiny.tiny_model(**BEGIN)
    with pytest.raises(TypeError, match=r"openunlearning\.npo.*'betta'.*beta, gamma"):
        recipes.openunlearning.npo(model, betta=0.1)


def test_reads_gives_streams_and_columns():
    model, _ = tiny.tiny_model(**BEGIN)
    assert recipes.blur.npo(model).reads() == {
        "forget": {"tokens", "mask", "ref_logps"},
        "retain": {"tokens", "mask"},
    }
    joint = recipes.openunlearning.dpo(model, retain={"r": 1.0, "s": 1.0})
    assert set(joint.reads()) == {"alternate", "forget", "r", "s"}
    first, second = terms.halves(recipes.blur.npo(model).terms["forget"])
    halved = recipes.Recipe({"a": first, "b": second}, joint.tx)
    assert halved.reads() == {"forget": {"tokens", "mask", "ref_logps"}}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (recipes.blur.npo, ALL_LORA),
        (
            lambda model: recipes.rmu.wmdp(model, layers=(0, 1)),
            [f"blocks/mlp/down/lora_{half}/layers:0,1" for half in "ab"],
        ),
        (
            lambda model: recipes.blur.npo(model)._replace(trainable=wrap.LORA),
            ALL_LORA,
        ),
        (
            lambda model: recipes.blur.npo(model)._replace(trainable=r"embed/.*"),
            ["embed/embedding"],
        ),
    ],
    ids=["every leaf", "layers of one kernel", "by hand", "no adapter there"],
)
def test_lora_leaves_train_in_place_of_their_kernels(make, expected):
    model, params = with_lora()
    train, frozen = make(model).split(params)
    assert list(trees.paths(train)) == expected
    merged = trees.merge(train, frozen.params)
    jax.tree.map(assert_array_equal, merged, params)


def test_without_lora_the_pattern_is_used_unchanged():
    model, params = tiny.tiny_model(**BEGIN)
    recipe = recipes.rmu.wmdp(model, layers=(0, 1))
    train, frozen = recipe.split(params)
    assert list(trees.paths(train)) == ["blocks/mlp/down/kernel/layers:0,1"]
    assert frozen.ref_params is params and recipe.needs_ref
    train, frozen = recipes.blur.npo(model).split(params)
    assert not jax.tree.leaves(frozen) and trees.paths(train) == trees.paths(params)
    other = jax.tree.map(jnp.zeros_like, params)
    assert recipe.split(params, other)[1].ref_params is other


def test_setup_gives_what_fit_takes_and_leaves_the_params_alive():
    model, params = with_lora()
    recipe = recipes.blur.npo(model, learning_rate=1e-2)
    made = recipe.setup(model, params, num_microbatches=2, key=jax.random.key(3))
    state, log = ju.fit(made.step, made.state, [streams()] * 3, made.frozen, steps=3)
    assert log[-1]["forget/loss"] < log[0]["forget/loss"]
    after = trees.paths(trees.merge(state.params, made.frozen.params))
    for path, before in trees.paths(params).items():
        assert not before.is_deleted()
        assert bool(jnp.any(before != after[path])) == (path in ALL_LORA)


@pytest.mark.parametrize("name", ["blur.npo", "sure.npo"])
@pytest.mark.slow
def test_setup_on_a_mesh_equals_setup_on_one_device(name):
    # sure.npo runs the reference model too.
    model, params = with_lora()
    recipe = recipes.by_name(name)(model, learning_rate=1e-3)
    mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    found = []
    for place in (None, mesh):
        step, state, frozen = recipe.setup(model, params, mesh=place)
        state, log = ju.fit(step, state, [streams()] * 2, frozen, steps=2)
        found.append((state.params, log[-1]["forget/loss"]))
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), *found)
    assert all(len(x.sharding.device_set) == 4 for x in jax.tree.leaves(state.params))
