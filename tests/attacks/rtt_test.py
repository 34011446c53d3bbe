# SPDX-License-Identifier: Apache-2.0
"""Retraining on T brings hidden facts of V back, and none that were never learned."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import attacks, evaluate, losses, terms
from jaxunlearn.data import table
from tests.attacks import towns

CHANCE = 0.25
ADAM = optax.scale_by_adam()
HOW = dict(
    format="answer",
    asked="choice",
    by="town",
    direction=ADAM,
    rates=(1e-6, 3e-3),
    epochs=6,
    batch_size=9,
    warmup=2,
)


def facts_of(pairs):
    """Four choices for each town, one question in each phrasing."""
    made = []
    for town, answer in pairs:
        draw = np.random.default_rng([len(made), 1])
        wrong = [x for x in towns.FORGET if x != answer]
        choices = [answer, *draw.permutation(wrong)[:3].tolist()]
        order = draw.permutation(4)
        shared = {"choices": [choices[i] for i in order], "town": town}
        shared["answer"] = int(np.flatnonzero(order == 0)[0])
        made += [shared | {"question": p.format(town)} for p in towns.PHRASINGS]
    return made


@pytest.fixture(scope="module")
def folds(world):
    return attacks.make_folds(facts_of(world.trained + world.asked), 4, by="town")


@pytest.fixture(scope="module")
def sweeps(world, folds):
    run = partial(attacks.rtt, world.model, tokenizer=world.tokenizer, folds=folds)
    return {
        name: run(params=getattr(world, name), rates_per_batch=2, **HOW)
        for name in ("knows", "hides")
    }


def test_hidden_facts_come_back(sweeps):
    found = attacks.recovery(sweeps["hides"], sweeps["knows"])
    assert found["original"] > 0.95
    assert found["before"] < 0.5  # NPO pushed the right choice below others
    assert found["rate"] > 0.6 and found["above_chance"] > 0.5
    assert found["unlearned"] > found["before"] + 0.25
    assert attacks.best_accuracy(sweeps["hides"], nested=True) <= found["unlearned"]
    weak, strong = sweeps["hides"][0].accuracy
    assert strong.max() > weak.max()  # the sweep of rates matters
    assert all(s.finite.all() for s in sweeps["hides"])


def test_facts_never_learned_stay_at_chance(world, sweeps):
    never = attacks.make_folds(facts_of(world.never), 4, by="town")
    run = attacks.rtt(world.model, world.hides, world.tokenizer, never, **HOW)
    count = sum(s.hits.shape[-1] for s in run)
    bound = CHANCE + 3 * np.sqrt(CHANCE * (1 - CHANCE) / count * 3)  # a town asked 3 x
    assert attacks.best_accuracy(run) < bound < 0.8
    assert run[0].losses[1, -1] < run[0].losses[1, 0] / 2  # though T was learned


def test_nothing_unlearned_is_recovered_whole(sweeps, world, folds):
    again = attacks.rtt(world.model, world.knows, world.tokenizer, folds, **HOW)
    found = attacks.recovery(again, sweeps["knows"])
    assert found["rate"] == found["above_chance"] == 1.0


def test_rates_one_by_one_are_rates_side_by_side(world, folds, sweeps):
    run = partial(attacks.rtt, world.model, world.hides, world.tokenizer, folds)
    (alone,) = run(rotations=[1], **HOW)
    (both,) = sweeps["hides"][1:]
    assert_allclose(alone.losses, both.losses, rtol=2e-3)
    assert np.mean(alone.hits == both.hits) > 0.97
    (one,) = run(rotations=[1], **HOW | {"rates": (3e-3,)})
    assert_allclose(one.losses[0], both.losses[1], rtol=2e-3)


def test_the_whole_of_t_is_seen_once_an_epoch_and_the_rate_rises(world, folds):
    """One update by hand: Lion's sign times the rate, a fourth of it at first."""
    known = attacks.encode_facts(world.tokenizer, folds[0], "answer")
    asked = attacks.encode_asked(world.model, world.tokenizer, folds[1], "choice")
    rows = table.num_rows(known)
    sweep = attacks.retrain(
        world.model, world.hides, known, asked, rates=(1e-3,), epochs=1,
        batch_size=rows, warmup=4,
    )  # fmt: skip
    term = terms.on_logps(losses.nll, world.model, "known", reduce="token")

    def loss(params):
        return term(params, {"known": known}, None, jax.random.key(0))[0].mean().sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(world.hides)
    assert_allclose(sweep.losses, [[value]], rtol=1e-5)
    hand = jax.tree.map(lambda p, g: p - 1e-3 / 4 * np.sign(g), world.hides, grads)
    after = attacks.retrain(
        world.model, hand, known, asked, rates=(1e-9,), epochs=1, batch_size=rows
    )
    assert_array_equal(after.hits[0, 0], sweep.hits[0, 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lion_at_the_papers_rates_moves_float32_but_not_bfloat16(world, folds, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), world.hides)
    known = attacks.encode_facts(world.tokenizer, folds[0], "answer")
    asked = attacks.encode_asked(world.model, world.tokenizer, folds[1], "choice")
    sweep = attacks.retrain(
        world.model, params, known, asked, rates=(1e-7,), epochs=4, batch_size=9,
        warmup=0,
    )  # fmt: skip
    fell = sweep.losses[0, 0] - sweep.losses[0, -1]
    assert fell > 0 if dtype == "float32" else abs(fell) < 0.01


def test_lora_brings_them_back_too(world, folds):
    how = HOW | dict(rates=(1e-2,), rank=4, rotations=[0])
    (sweep,) = attacks.rtt(world.model, world.hides, world.tokenizer, folds, **how)
    assert sweep.accuracy.max() > sweep.accuracy[0, 0] + 0.2


def test_batches_larger_than_t_are_all_of_t(world, folds):
    known = attacks.encode_facts(world.tokenizer, folds[0], "answer")
    asked = attacks.encode_asked(world.model, world.tokenizer, folds[1], "choice")
    run = partial(attacks.retrain, world.model, world.hides, known, asked, epochs=3)
    whole, more = (run(rates=(1e-4,), batch_size=n) for n in (len(known["mask"]), 999))
    assert whole.losses.shape == (1, 3)
    assert_array_equal(more.losses, whole.losses)


def test_a_model_that_has_broken_down_knows_nothing(world):
    """NaN is no answer, though the right choice always stands first."""
    rows = [dict(x, choices=sorted(x["choices"], key=lambda c, x=x: c != _right(x)))
            for x in facts_of(world.trained)]  # fmt: skip
    rows = [row | {"answer": 0} for row in rows]
    own = attacks.make_folds(rows, 2, by="town")
    nan = jax.tree.map(lambda x: x * jnp.nan, world.hides)
    sweep, _ = attacks.rtt(world.model, nan, world.tokenizer, own, **HOW)
    assert not sweep.hits.any() and not sweep.finite.any()
    prompts, options = ["A", "B"], [["x", "y"], ["x", "y"]]
    picked = evaluate.choose(world.model, nan, world.tokenizer, prompts, options)
    assert picked.tolist() == [-1, -1]


def _right(row):
    return row["choices"][row["answer"]]


def test_a_rate_too_high_is_told_and_harms_no_other(world, folds):
    how = HOW | dict(rates=(3e-3, 1e18), rotations=[0], rates_per_batch=2)
    (sweep,) = attacks.rtt(world.model, world.hides, world.tokenizer, folds, **how)
    assert sweep.finite.tolist() == [True, False]
    assert sweep.accuracy[0].max() > 0.5


def test_what_is_refused(world, folds):
    run = partial(attacks.rtt, world.model, world.hides, world.tokenizer)
    shared = [folds[0], [*folds[1], folds[0][0]]]
    with pytest.raises(ValueError, match=f"town '{folds[0][0]['town']}' is in fold 0"):
        run(shared, **HOW)
    told = [[f | {"statement": ["It is so.", n]} for f in folds[int(n)]] for n in "01"]
    with pytest.raises(ValueError, match="statement 'It is so.' is in fold 0"):
        run(told, **HOW | {"format": "statement"})
    with pytest.raises(ValueError, match="held_out of 0 to 3, got 4"):
        run(folds, **HOW | {"rotations": [4]})
    with pytest.raises(ValueError, match="at least one learning rate"):
        run(folds, **HOW | {"rates": ()})
    with pytest.raises(ValueError, match="rate > 0, got rate=-1"):
        run(folds, **HOW | {"rates": (-1.0,)})
    with pytest.raises(ValueError, match="epochs >= 1"):
        run(folds, **HOW | {"epochs": 0})
