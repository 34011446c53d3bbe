# SPDX-License-Identifier: Apache-2.0
"""MRP: defaults, trainable leaves, and topics that are removed one after another."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxunlearn as ju
from jaxunlearn import losses, terms, trees, wrap
from jaxunlearn.recipes import mrp
from tests import tiny

PLACES = {"mlp_out": (0, 2)}
RETAIN = tiny.tiny_batch(length=9, side="left", seed=1)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def small():
    base, params = tiny.tiny_model(remat="none")
    return base, params, wrap.projection(base, PLACES)


def begin(model, params, forget, **settings):
    settings = dict(num_protected=3) | settings
    return mrp.begin(model, params, forget=[forget], retain=[RETAIN], **settings)


def run(model, params, forget, steps=12, **settings):
    recipe = mrp.graddiff(model, **(dict(learning_rate=0.1) | settings))
    step, state, frozen = recipe.setup(model, params)
    data = [{"forget": forget, "retain": RETAIN}] * steps
    state, log = ju.fit(step, state, data, frozen, steps=steps)
    return trees.merge(state.params, frozen.params), log


def test_defaults_are_those_of_the_authors_code():
    _, *settings = inspect.signature(mrp.graddiff).parameters.values()
    found = {p.name: p.default for p in settings}
    assert found == {
        "alpha": 1.2,
        "cap": None,
        "learning_rate": 2e-4,
        "momentum": None,
        "clip": None,
        "retain": {"retain": 1.0},
    }
    assert inspect.signature(mrp.begin).parameters["num_directions"].default == 2


def test_a_step_is_sgd_on_minus_forget_plus_alpha_retain():
    _, params, model = small()
    forget = tiny.tiny_batch()
    params = begin(model, params, forget)
    train, rest = trees.split(params, wrap.PROJECTION)
    streams = {"forget": forget, "retain": RETAIN}

    def nll(train, stream):
        term = terms.on_logps(losses.nll, model, stream, reduce="token")
        whole = trees.merge(train, rest)
        return term(whole, streams, None, jax.random.key(0))[0].mean()

    @jax.jit
    @jax.grad
    def gradient(train):
        return -nll(train, "forget") + 1.2 * nll(train, "retain")

    slope = gradient(train)
    moved, _ = run(model, params, forget, steps=1, learning_rate=0.1)
    wanted = jax.tree.map(lambda x, g: x - 0.1 * g, train, slope)
    found, _ = trees.split(moved, wrap.PROJECTION)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), found, wanted)
    # The loss depends on the span alone, so nothing pulls along a row.
    rows, pull = (jax.tree.leaves(x)[0] for x in (train, slope))
    along = jnp.einsum("nku,nju->nkj", rows, pull)
    assert np.abs(along).max() < 1e-4 * np.abs(pull).max() + 1e-6


@pytest.mark.slow
def test_topics_are_removed_one_after_another_and_stay_removed():
    base, params, model = small()
    plain, bases = params, []
    for seed in (0, 5):
        forget = tiny.tiny_batch(seed=seed)
        params = begin(model, params, forget)
        params, log = run(model, params, forget)
        assert log[-1]["total/forget/nll"] > log[0]["total/forget/nll"] + 0.02
        assert log[-1]["total/loss"] < log[0]["total/loss"]
        bases.append(wrap.projection_basis(params)["mlp_out"])
    assert [q.shape for q in bases] == [(2, 2, 16), (2, 4, 16)]
    assert_allclose(bases[1][:, :2], bases[0], atol=1e-6)
    rest = {k: x for k, x in params.items() if k != "projection"}
    jax.tree.map(assert_array_equal, rest, plain)
    folded = wrap.fold_projection(model, params)
    batch = tiny.tiny_batch()
    assert_allclose(
        base.unembed(folded, base.apply(folded, batch).hidden),
        model.unembed(params, model.apply(params, batch).hidden),
        atol=1e-4,
    )


def test_initial_directions_are_orthogonal_to_earlier_and_protected_ones():
    _, params, model = small()
    forget = tiny.tiny_batch()
    first = begin(model, params, forget, num_directions=1)
    second = begin(model, first, forget, num_directions=1)
    before, new = (second["projection"]["mlp_out"][k] for k in ("old", "new"))
    assert_allclose(before, wrap.projection_basis(first)["mlp_out"], atol=1e-6)
    assert np.abs(jnp.einsum("nku,nju->nkj", before, new)).max() < 1e-5
    values = jax.jit(partial(model.apply, taps=PLACES))(first, RETAIN).taps["mlp_out"]
    values = np.asarray(values)[:, np.asarray(RETAIN["mask"])]
    for layer, rows in enumerate(values):
        top = np.linalg.svd(rows, full_matrices=False)[2][:3]
        assert np.abs(top @ np.asarray(new[layer]).T).max() < 1e-3
    pca = begin(model, params, forget, kind="pca")
    assert np.abs(pca["projection"]["mlp_out"]["new"]).max() > 0


@pytest.mark.slow
def test_a_cap_stops_the_ascent_and_a_clip_bounds_the_update():
    _, params, model = small()
    forget = tiny.tiny_batch()
    params = begin(model, params, forget)
    still, _ = run(model, params, forget, alpha=0.0, cap=1e-3)
    jax.tree.map(assert_array_equal, still, params)
    moved, _ = run(model, params, forget, steps=1, learning_rate=1.0, clip=0.01)
    gap = jax.tree.map(jnp.subtract, moved, params)
    assert_allclose(trees.norm(gap), 0.01, rtol=1e-3)


def test_begin_refuses_impossible_arguments():
    base, params, model = small()
    forget = tiny.tiny_batch()
    with pytest.raises(ValueError, match="a model from wrap.projection"):
        begin(base, params, forget)
    with pytest.raises(ValueError, match="at least one real token"):
        mrp.begin(model, params, forget=[], retain=[RETAIN])
    with pytest.raises(ValueError, match="num_protected below half of the 16 units"):
        mrp.begin(model, params, forget=[forget], retain=[RETAIN])
    with pytest.raises(ValueError, match="got num_directions=14"):
        begin(model, params, forget, num_directions=14)
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(ValueError, match="NaN or infinity"):
        begin(model, broken, forget)
