# SPDX-License-Identifier: Apache-2.0
"""Relearning recovers facts that are merely hidden, none that were never learned."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxunlearn import attacks, trees, wrap
from jaxunlearn.attacks import _retrain
from tests import tiny
from tests.attacks.towns import CHANCE, RATE


def relearn(world, params, steps, **kwargs):
    known = world.encode(world.trained)
    return attacks.relearn(
        world.model,
        params,
        known,
        steps=steps,
        batch_size=18,
        learning_rate=RATE,
        **kwargs,
    )


def test_it_recovers_hidden_facts_and_none_that_were_never_learned(world):
    ask = world.accuracy
    both = world.trained + world.asked
    assert ask(world.knows, both) > 0.95
    assert ask(world.hides, both) == 0.0

    def knows(state, _):
        return ask(state.params, world.trained) > 0.9

    after, log = relearn(world, world.hides, 60, hooks=[knows])
    assert len(log) < 60 and log[-1]["known/loss"] < log[0]["known/loss"] / 2
    assert ask(after, world.asked) > 3 * CHANCE  # hidden facts come back
    for params in (world.knows, world.hides, after):
        assert ask(params, world.never) < 2 * CHANCE  # these were never there


def test_the_params_given_are_left_as_they_were(world):
    before = jax.tree.map(np.array, world.hides)
    after, log = relearn(world, world.hides, 2)
    jax.tree.map(assert_array_equal, world.hides, before)  # nor were they donated
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after, world.hides)
    assert all(jax.tree.leaves(moved))  # every parameter trains
    assert [entry["step"] for entry in log] == [0, 1]
    assert {"known/loss", "known/nll", "seconds"} <= set(log[0])


def test_the_seed_decides_the_order_of_the_rows(world):
    seen = []
    losses = [
        relearn(world, world.hides, 2, seed=seed, hooks=[lambda *x: seen.append(x)])[1]
        for seed in (0, 0, 1)
    ]
    first, same, other = ([entry["known/loss"] for entry in log] for log in losses)
    assert first == same
    assert first != other
    assert len(seen) == 6  # hooks are called


def test_a_bar_is_shown_if_asked_for(world, capsys):
    relearn(world, world.hides, 2, progress=True)
    assert "2/2" in capsys.readouterr().err
    relearn(world, world.hides, 2)
    assert capsys.readouterr().err == ""


def test_no_known_facts_is_an_error(world):
    empty = {name: x[:0] for name, x in world.encode(world.trained).items()}
    with pytest.raises(ValueError, match="The known set is empty"):
        attacks.relearn(world.model, world.hides, empty, steps=1)


def test_lora_recovers_them_too_and_leaves_plain_params(world):
    known = world.encode(world.trained)
    after, _ = attacks.relearn(
        world.model,
        world.hides,
        known,
        steps=60,
        batch_size=18,
        learning_rate=3e-3,
        rank=4,
    )
    assert jax.tree.structure(after) == jax.tree.structure(world.hides)
    assert world.accuracy(after, world.asked) > 3 * CHANCE
    assert world.accuracy(after, world.never) < 2 * CHANCE
    moved = trees.paths(
        jax.tree.map(lambda a, b: bool((a != b).any()), after, world.hides)
    )
    kernels = {p for p in moved if p.startswith("blocks/") and p.endswith("/kernel")}
    assert {path for path, yes in moved.items() if yes} == kernels
    with pytest.raises(ValueError, match="pattern that matches a kernel"):
        attacks.relearn(world.model, after, known, steps=1, rank=2, pattern="none")


@pytest.fixture
def projected():
    """A decoder from which two tasks took directions."""
    base, params = tiny.tiny_model()
    model = wrap.projection(base, {"mlp_out": (0, 2)})
    for rows in np.random.default_rng(0).normal(size=(2, 2, 2, 16)):
        params = wrap.add_projection(params, model, {"mlp_out": rows})
    known = {name: np.asarray(x) for name, x in tiny.tiny_batch(8).items()}
    return model, params, known


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_weights_move_behind_projections_that_stand_still(projected, rank):
    model, params, known = projected
    how = dict(steps=2, batch_size=4, learning_rate=1e-2, rank=rank)
    queries = r"blocks/attention/[qv]/kernel"
    after, _ = attacks.relearn(model, params, known, pattern=queries, **how)
    jax.tree.map(assert_array_equal, after["projection"], params["projection"])
    assert sorted(after) == sorted(params)
    q = (x["blocks"]["attention"]["q"]["kernel"] for x in (after, params))
    assert np.abs(np.subtract(*map(np.asarray, q))).max() > 1e-4


def test_retraining_leaves_projections_too(projected, monkeypatch):
    model, params, known = projected
    seen = []

    def ask(model, train, rest, asked, size):
        seen.append((train, rest))
        return np.zeros((1, 3, 4))

    monkeypatch.setattr(_retrain, "_ask", ask)
    asked = {"right": np.zeros(3, int)}
    how = dict(rates=(1e-2,), epochs=1, warmup=1)
    attacks.retrain(model, params, known, asked, **how)
    (before, _), (train, rest) = seen
    assert not [path for path in trees.paths(train) if path.startswith("projection")]
    assert_array_equal(
        rest["projection"]["mlp_out"]["new"], params["projection"]["mlp_out"]["new"]
    )
    q = (x["blocks"]["attention"]["q"]["kernel"] for x in (train, before))
    assert (np.asarray(next(q)) != np.asarray(next(q))).any()
