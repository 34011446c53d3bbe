# SPDX-License-Identifier: Apache-2.0
"""Every recipe runs on a tiny decoder and forgets."""

import jax
import jax.numpy as jnp
import pytest

import jaxunlearn as ju
from jaxunlearn import evaluate, recipes, trees, wrap
from tests import tiny

SHALLOW = {
    "rmu.wmdp": {"layers": (0, 1)},
    "blur.rmu": {"layers": (0, 1)},
    "openunlearning.rmu": {"layer": 1},
}
# What falls where it is not the forget loss: SimNPO and the weighted ascents hardly
# push what a random model does not know, and their values rise as their weights fall.
BY_NLL = {"openunlearning.simnpo", "openunlearning.wga", "openunlearning.satimp"}
STRONG = {
    "openunlearning.simnpo": {"beta": 0.5, "gamma": 1.0},
    "openunlearning.satimp": {"beta1": 0.1, "gamma": 1.0},
}
NAMES = [n for n in recipes.by_name() if not n.startswith("finetune")]


def streams():
    column = {"ref_logps": -jnp.arange(6.0, 10.0), "pair": jnp.arange(4)}
    return {
        "forget": tiny.tiny_batch() | column,
        "alternate": tiny.tiny_batch(seed=5) | column,
        "update": tiny.tiny_batch(seed=7),
        "retain": tiny.tiny_batch(length=9, side="left", seed=1),
    }


def run(name, model=None, steps=8):
    """(state, log, recipe, frozen params) after a few steps of a decoder or `model`."""
    model, params = model or tiny.tiny_model(remat="none")
    settings = SHALLOW.get(name, {}) | STRONG.get(name, {})
    if name.startswith("mrp"):
        model = wrap.projection(model, {"mlp_out": (0, 2)})
        rows = {name: [streams()[name]] for name in ("forget", "retain")}
        params = recipes.mrp.begin(model, params, **rows, num_protected=3)
    rates = {"learning_rate": 0.05 if name.startswith("mrp") else 1e-3}
    recipe = recipes.by_name(name)(model, **rates, **settings)
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        step, state, frozen = recipe.setup(model, params)
        data = [streams()] * steps
        return (*ju.fit(step, state, data, frozen, steps=steps), recipe, frozen.params)


QUICK = ("blur.npo", "rmu.wmdp", "sure.npo")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_a_few_steps_lower_the_forget_loss(name):
    reads_activations = "rmu" in name or name.startswith("mrp")
    _, log, _, _ = run(name, None if reads_activations else tiny.bigram_model())
    first, last = log[0], log[-1]
    if name in BY_NLL:
        assert last["total/forget/nll"] > first["total/forget/nll"] + 0.02
        return
    keys = ("forget/loss", "total/forget/loss", "total/loss")
    key = next(key for key in keys if key in first)
    assert last[key] < first[key]


def test_rmu_moves_three_kernels_of_the_chosen_layers_only():
    _, params = tiny.tiny_model(remat="none")
    state, _, recipe, rest = run("rmu.wmdp", steps=2)
    assert list(trees.paths(state.params)) == ["blocks/mlp/down/kernel/layers:0,1"]
    merged = trees.paths(trees.merge(state.params, rest))
    for path, before in trees.paths(params).items():
        moved = jnp.any(merged[path] != before)
        assert bool(moved) == (path == "blocks/mlp/down/kernel"), path
    down = "blocks/mlp/down/kernel"
    assert not jnp.any(merged[down][2:] != trees.paths(params)[down][2:])


@pytest.mark.parametrize(
    "name", ["sure.npo", pytest.param("sure.graddiff", marks=pytest.mark.slow)]
)
def test_sure_moves_only_rows_that_the_mask_keeps(name):
    _, params = tiny.tiny_model(remat="none")
    state, log, _, _ = run(name, steps=1)
    kept = {"sure.npo": 0.1, "sure.graddiff": 0.01}[name]
    (share,) = (v for k, v in log[0].items() if k.endswith("/kept"))
    assert 0 < share < 3 * kept
    before, after = params["blocks"]["mlp"]["up"], state.params["blocks"]["mlp"]["up"]
    moved = jnp.any(before["kernel"] != after["kernel"], axis=1)  # by output unit
    assert float(jnp.mean(moved)) < 5 * kept


def test_layers_that_the_model_lacks_are_refused():
    model, _ = tiny.tiny_model(remat="none")
    for name in SHALLOW:
        with pytest.raises(ValueError, match="layers from 0 to 2, got layers="):
            recipes.by_name(name)(model)


def test_a_task_vector_forgets_what_finetuning_learned():
    from jaxunlearn import edits

    model, params = tiny.tiny_model(remat="none")
    state, _, _, rest = run("openunlearning.task_vector")
    tuned = trees.merge(state.params, rest)
    batch = streams()["forget"]
    before, after = (
        evaluate.answer_logps(model, p, batch)[0].sum()
        for p in (params, edits.task_vector(params, tuned, scale=2.0))
    )
    assert after < before - 1
