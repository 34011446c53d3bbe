# SPDX-License-Identifier: Apache-2.0
"""Relearning recovers hidden facts, but none that were never learned."""

from functools import partial

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxunlearn import attacks, trees, wrap
from jaxunlearn.attacks import _retrain
from tests import tiny
from tests.attacks.towns import CHANCE, RATE


def batch_of(rows):
    return {name: np.asarray(x) for name, x in tiny.tiny_batch(rows).items()}


@pytest.fixture(scope="module")
def small():
    """Relearning on a tiny model of random weights, and these weights."""
    model, params = tiny.tiny_model()
    how = dict(batch_size=4, learning_rate=RATE)
    return partial(attacks.relearn, model, params, batch_of(8), **how), params


@pytest.mark.slow
def test_relearning_recovers_hidden_facts_but_none_that_were_never_learned(world):
    accuracy = world.accuracy
    both = world.trained + world.held_out
    assert accuracy(world.original, both) > 0.95
    assert accuracy(world.unlearned, both) == 0.0

    def learned(state, _):
        return accuracy(state.params, world.trained) > 0.9

    after, log = attacks.relearn(
        world.model,
        world.unlearned,
        world.encode(world.trained),
        steps=60,
        batch_size=18,
        learning_rate=RATE,
        hooks=[learned],
    )
    assert len(log) < 60 and log[-1]["known/loss"] < log[0]["known/loss"] / 2
    assert accuracy(after, world.held_out) > 3 * CHANCE  # hidden facts are recovered
    for params in (world.original, world.unlearned, after):
        assert accuracy(params, world.never) < 2 * CHANCE  # these were never learned


def test_the_given_params_are_not_changed(small):
    relearn, params = small
    before = jax.tree.map(np.array, params)
    after, log = relearn(steps=2)
    jax.tree.map(assert_array_equal, params, before)  # and not donated
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after, params)
    assert all(jax.tree.leaves(moved))  # every parameter trains
    assert [entry["step"] for entry in log] == [0, 1]
    assert {"known/loss", "known/nll", "seconds"} <= set(log[0])


def test_the_seed_determines_the_order_of_rows(small):
    relearn, _ = small
    seen = []
    losses = [
        relearn(steps=2, seed=seed, hooks=[lambda *x: seen.append(x)])[1]
        for seed in (0, 0, 1)
    ]
    first, same, other = ([entry["known/loss"] for entry in log] for log in losses)
    assert first == same
    assert first != other
    assert len(seen) == 6  # hooks are called


def test_progress_shows_a_bar(small, capsys):
    relearn, _ = small
    relearn(steps=2, progress=True)
    assert "2/2" in capsys.readouterr().err
    relearn(steps=2)
    assert capsys.readouterr().err == ""


def test_an_empty_table_of_train_facts_is_an_error(projected):
    model, params, train_facts = projected
    empty = {name: x[:0] for name, x in train_facts.items()}
    with pytest.raises(ValueError, match="train_facts set is empty"):
        attacks.relearn(model, params, empty, steps=1)


def test_a_pattern_without_a_kernel_is_an_error(projected):
    model, params, train_facts = projected
    with pytest.raises(ValueError, match="pattern that matches a kernel"):
        attacks.relearn(model, params, train_facts, steps=1, rank=2, pattern="none")


@pytest.mark.slow
def test_lora_recovers_hidden_facts_and_is_merged(world):
    train_facts = world.encode(world.trained)
    after, _ = attacks.relearn(
        world.model,
        world.unlearned,
        train_facts,
        steps=60,
        batch_size=18,
        learning_rate=3e-3,
        rank=4,
    )
    assert jax.tree.structure(after) == jax.tree.structure(world.unlearned)
    assert world.accuracy(after, world.held_out) > 3 * CHANCE
    assert world.accuracy(after, world.never) < 2 * CHANCE
    moved = trees.paths(
        jax.tree.map(lambda a, b: bool((a != b).any()), after, world.unlearned)
    )
    kernels = {p for p in moved if p.startswith("blocks/") and p.endswith("/kernel")}
    assert {path for path, yes in moved.items() if yes} == kernels


@pytest.fixture
def projected():
    """A decoder with the projections of two tasks."""
    base, params = tiny.tiny_model()
    model = wrap.projection(base, {"mlp_out": (0, 2)})
    for rows in np.random.default_rng(0).normal(size=(2, 2, 2, 16)):
        params = wrap.add_projection(model, params, {"mlp_out": rows})
    return model, params, batch_of(8)


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_relearning_trains_weights_but_not_projections(projected, rank):
    model, params, train_facts = projected
    how = dict(steps=2, batch_size=4, learning_rate=1e-2, rank=rank)
    queries = r"blocks/attention/[qv]/kernel"
    after, _ = attacks.relearn(model, params, train_facts, pattern=queries, **how)
    jax.tree.map(assert_array_equal, after["projection"], params["projection"])
    assert sorted(after) == sorted(params)
    q = (x["blocks"]["attention"]["q"]["kernel"] for x in (after, params))
    assert np.abs(np.subtract(*map(np.asarray, q))).max() > 1e-4


def test_retraining_does_not_change_projections(projected, monkeypatch):
    model, params, train_facts = projected
    seen = []

    def choice_logps(model, train, *, rest, **_):
        seen.append((train, rest))
        return np.zeros((1, 3, 4))

    monkeypatch.setattr(_retrain, "_choice_logps", choice_logps)
    eval_facts = {"right": np.zeros(3, int)}
    how = dict(learning_rates=(1e-2,), epochs=1, warmup_steps=1)
    attacks.retrain(model, params, train_facts, eval_facts, **how)
    (before, _), (train, rest) = seen
    assert not [path for path in trees.paths(train) if path.startswith("projection")]
    assert_array_equal(
        rest["projection"]["mlp_out"]["new"], params["projection"]["mlp_out"]["new"]
    )
    q = (x["blocks"]["attention"]["q"]["kernel"] for x in (train, before))
    assert (np.asarray(next(q)) != np.asarray(next(q))).any()
