# SPDX-License-Identifier: Apache-2.0
"""Projections: idempotent over tasks, only new directions train, exact folds only."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import sharding, stats, trees, wrap
from jaxunlearn.io import hf
from tests import tiny

BOTH = {"attention_out": (0,), "mlp_out": (2, 1)}


def logits(model, params, batch):
    run = jax.jit(lambda p, b: model.unembed(p, model.apply(p, b).hidden))
    return run(params, batch)


def drawn(model, places, count=2, seed=0):
    rng = np.random.default_rng(seed)
    return {
        site: rng.normal(size=(len(layers), count, model.sites[site].units))
        for site, layers in places.items()
    }


def projected(places=BOTH, tasks=3, **settings):
    base, params = tiny.tiny_model(**settings)
    model = wrap.projection(base, places)
    for task in range(tasks):
        params = wrap.add_projection(model, params, drawn(model, places, seed=task))
    return base, model, params


def test_three_tasks_are_one_idempotent_projection_of_their_union():
    _, model, params = projected()
    basis = wrap.projection_basis(params)["mlp_out"]
    assert basis.shape[1] == 6
    eye = np.eye(basis.shape[-1])
    for index, q in enumerate(np.asarray(basis, np.float64)):
        p = eye - q.T @ q
        assert np.abs(p @ p - p).max() < 1e-6
        tasks = [drawn(model, BOTH, seed=t)["mlp_out"][index] for t in range(3)]
        assert np.abs(np.concatenate(tasks) @ p).max() < 1e-5
    # What a task takes does not change with the tasks after it.
    first = wrap.projection_basis(projected(tasks=1)[2])["mlp_out"]
    assert_allclose(basis[:, :2], first, atol=1e-6)
    read = jax.jit(partial(model.apply, taps={"mlp_out": (2, 1)}))
    values = read(params, tiny.tiny_batch()).taps
    # Taps give the value after edits.
    left = jnp.einsum("nbld,nrd->nblr", values["mlp_out"], basis)
    assert np.abs(left).max() < 1e-5 * np.abs(values["mlp_out"]).max() + 1e-6


def test_params_without_directions_give_the_original_model():
    base, model, params = projected(tasks=1)
    plain = {k: x for k, x in params.items() if k != "projection"}
    batch = tiny.tiny_batch()
    assert_array_equal(logits(model, plain, batch), logits(base, plain, batch))
    gap = logits(model, params, batch) - logits(base, plain, batch)
    assert np.abs(gap).max() > 1e-3


def test_only_new_directions_train_and_gradients_equal_differences():
    _, model, params = projected(tasks=2)
    train, rest = trees.split(params, wrap.PROJECTION)
    assert sorted(trees.paths(train)) == [
        "projection/attention_out/new",
        "projection/mlp_out/new",
    ]
    batch = tiny.tiny_batch()

    @jax.jit
    def loss(train):
        return jnp.mean(jnp.square(logits(model, trees.merge(train, rest), batch)))

    grads = jax.jit(jax.grad(loss))(train)
    step = jax.tree.map(lambda g: g / jnp.linalg.norm(g), grads)
    both = map(jax.tree.leaves, (grads, step))
    slope = sum(jnp.sum(g * s) for g, s in zip(*both, strict=True))
    ends = [
        loss(jax.tree.map(lambda x, s, h=h: x + h * s, train, step))
        for h in (0.05, -0.05)
    ]
    assert_allclose((ends[0] - ends[1]) / 0.1, slope, rtol=0.05)


@pytest.mark.parametrize(
    "site", ["attention_in", "attention", "attention_out", "mlp_in", "mlp", "mlp_out"]
)
def test_folded_params_give_the_logits_of_the_projected_model(site):
    biases = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
    base, model, params = projected({site: (2, 0)}, tasks=2, **biases)
    params = trees.map_with_path(
        lambda p, x: x + 0.1 if p.endswith("bias") else x, params
    )
    folded = wrap.fold_projection(model, params)
    assert "projection" not in folded
    batch = tiny.tiny_batch()
    expected = logits(model, params, batch)
    assert_allclose(logits(base, folded, batch), expected, atol=1e-4)
    plain = {k: x for k, x in params.items() if k != "projection"}
    assert np.abs(logits(base, plain, batch) - expected).max() > 1e-3


def test_the_rules_replicate_directions_on_every_device():
    _, model, params = projected(tasks=2)
    for path in trees.paths(params):
        axes = sharding.axes_of(path, model.rules)
        assert (axes == ()) == bool(re.match("projection/|.*/scale", path))


def test_decoding_with_a_cache_includes_the_projection():
    base, model, params = projected(tasks=1)
    batch = tiny.tiny_batch()
    cache = model.init_cache(*batch["tokens"].shape)
    hidden, _ = jax.jit(model.decode)(params, batch, cache)
    expected = jax.jit(model.apply)(params, batch).hidden
    real = np.asarray(batch["mask"])
    assert_allclose(hidden[real], expected[real], atol=1e-4)


def test_directions_find_what_only_the_forget_set_has():
    rng = np.random.default_rng(0)
    shared, specific = np.linalg.qr(rng.normal(size=(32, 2)))[0].T

    def moments(*parts):
        rows = sum(rng.normal(size=(500, 1)) * x for x in parts)
        rows = rows + 0.01 * rng.normal(size=(500, 32))
        mean, second = rows.mean(0)[None], (rows.T @ rows)[None] / 500
        return stats.Moments(jnp.int32(500), jnp.array(mean), jnp.array(second))

    forget, retain = moments(3 * shared, specific), moments(3 * shared)
    pca = wrap.initial_directions(forget, 1, kind="pca")[0, 0]
    contrast = wrap.initial_directions(forget, 1, retain=retain, num_protected=1)
    assert abs(pca @ shared) > 0.95 and abs(contrast[0, 0] @ specific) > 0.95
    again = wrap.initial_directions(
        forget, 1, retain=retain, num_protected=1, basis=contrast
    )
    assert abs(again[0, 0] @ specific) < 0.05
    assert np.abs(again @ contrast.mT).max() < 1e-6


def test_moments_are_those_of_real_tokens_of_all_batches():
    model, params = tiny.tiny_model()
    batches = [tiny.tiny_batch(seed=seed) for seed in (0, 1)]
    got = stats.moments(model, params, batches, {"mlp_out": (2, 0)})["mlp_out"]
    read = jax.jit(partial(model.apply, taps={"mlp_out": (2, 0)}))
    taps = [np.asarray(read(params, b).taps["mlp_out"]) for b in batches]
    rows = np.concatenate(
        [tap[:, b["mask"]] for tap, b in zip(taps, batches, strict=True)], axis=1
    )
    assert int(got.count) == rows.shape[1]
    assert_allclose(got.mean, rows.mean(1), atol=1e-5)
    second = np.einsum("ntd,nte->nde", rows, rows) / rows.shape[1]
    assert_allclose(got.second, second, atol=1e-5)


def test_the_folded_model_opens_in_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base, model, params = projected(tasks=2)
    hf.save(base, wrap.fold_projection(model, params), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = tiny.tiny_batch()
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(np.asarray(batch["tokens"])),
            attention_mask=torch.tensor(np.asarray(batch["mask"]).astype(int)),
        ).logits.numpy()
    real = np.asarray(batch["mask"])
    assert_allclose(out[real], logits(model, params, batch)[real], atol=1e-4)


def _fold(site, **settings):
    _, model, params = projected({site: (0,)}, tasks=1, **settings)
    wrap.fold_projection(model, params)


def _fold_beside_lora():
    base, params = tiny.tiny_model()
    low = wrap.lora(base, pattern=r".*/down/kernel", rank=2)
    model = wrap.projection(low, {"mlp_out": (0,)})
    params = wrap.add_lora(low, params, jax.random.key(0))
    params = wrap.add_projection(model, params, drawn(model, {"mlp_out": (0,)}))
    wrap.fold_projection(model, params)


def _fold_nothing():
    base, params = tiny.tiny_model()
    wrap.fold_projection(wrap.projection(base, {"mlp_out": (0,)}), params)


def _save_unfolded():
    _, model, params = projected(tasks=1)
    hf.save(model, params, "never-written")


def _add(change):
    base, params = tiny.tiny_model()
    model = wrap.projection(base, {"mlp_out": (0, 1)})
    wrap.add_projection(model, params, {"mlp_out": change(base.config.width)})


def _directions(count, value=0.0, tokens=1):
    second = jnp.eye(8)[None] + value
    wrap.initial_directions(
        stats.Moments(jnp.int32(tokens), second[:, 0], second), count, kind="pca"
    )


def _wrap(places):
    wrap.projection(tiny.tiny_model()[0], places)


def _moments(batches, places):
    stats.moments(*tiny.tiny_model(), batches, places)


REFUSED = {
    "site": (lambda: _wrap({"mlp_outs": (0,)}), "Did you mean 'mlp_out'"),
    "layer": (lambda: _wrap({"mlp_out": (3,)}), r"layers of 0 to 2 .* \[3\]"),
    "layer-twice": (lambda: _wrap({"mlp_out": (1, 1)}), "each once"),
    "many": (lambda: _add(lambda d: np.ones((2, d + 1, d))), "directions at 'mlp_out'"),
    "shape": (lambda: _add(lambda d: np.ones((1, 2, d))), r"got shape \(1, 2,"),
    "same": (lambda: _add(lambda d: np.ones((2, 2, d))), "not in the span"),
    "nan": (lambda: _add(lambda d: np.full((2, 1, d), np.nan)), "finite directions"),
    "stream": (lambda: _fold("block"), "the residual stream or a norm is between"),
    "norms": (lambda: _fold("mlp_out", post_norms=True), "or a norm is between"),
    "lora": (_fold_beside_lora, "LoRA leaves at 'blocks/mlp/down/kernel'"),
    "no-task": (_fold_nothing, "params with directions, got none"),
    "unfolded": (_save_unfolded, "unexpected: 'projection/"),
    "free": (lambda: _directions(9), "got num_directions=9"),
    "nan-moments": (lambda: _directions(1, jnp.nan), "NaN or infinity"),
    "no-token": (lambda: _directions(1, tokens=0), "got count=0"),
    "empty": (lambda: _moments([], {"mlp_out": (0,)}), "at least one real token"),
    "no-layer": (
        lambda: _moments([tiny.tiny_batch()], {"mlp_out": (3,)}),
        r"layers 0 to 2, got \[3\]",
    ),
    "no-site": (lambda: _moments([], {"out": (0,)}), "needs site to be one of"),
}


@pytest.mark.parametrize("call, match", REFUSED.values(), ids=REFUSED)
def test_impossible_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
