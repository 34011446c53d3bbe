# SPDX-License-Identifier: Apache-2.0
"""Retraining on T recovers hidden facts of V, but none that were never learned."""

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

pytestmark = pytest.mark.slow  # nearly every test compiles a model

CHANCE = 0.25
ADAM = optax.scale_by_adam()
HOW = dict(
    train_format="answer",
    eval_format="choice",
    by="town",
    direction=ADAM,
    learning_rates=(1e-6, 3e-3),
    epochs=6,
    batch_size=9,
    warmup_steps=2,
)


def facts_of(pairs):
    """Facts with four choices for each town, one fact for each phrasing."""
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
    return attacks.make_folds(facts_of(world.trained + world.held_out), 4, by="town")


@pytest.fixture(scope="module")
def sweeps(world, folds):
    run = partial(attacks.rtt, world.model, tokenizer=world.tokenizer, folds=folds)
    return {
        name: run(params=getattr(world, name), rates_per_batch=2, **HOW)
        for name in ("original", "unlearned")
    }


def test_hidden_facts_are_recovered(sweeps):
    found = attacks.recovery(unlearned=sweeps["unlearned"], original=sweeps["original"])
    assert found["original"] > 0.95
    assert found["before"] < 0.5  # NPO lowered the correct choice below others
    assert found["rate"] > 0.6 and found["above_chance"] > 0.5
    assert found["unlearned"] > found["before"] + 0.25
    assert attacks.best_accuracy(sweeps["unlearned"], nested=True) <= found["unlearned"]
    weak, strong = sweeps["unlearned"][0].accuracy
    assert strong.max() > weak.max()  # the learning rate matters
    assert all(s.finite.all() for s in sweeps["unlearned"])


def test_facts_never_learned_stay_at_chance(world, sweeps):
    never = attacks.make_folds(facts_of(world.never), 4, by="town")
    run = attacks.rtt(world.model, world.unlearned, world.tokenizer, never, **HOW)
    count = sum(s.hits.shape[-1] for s in run)
    # Three questions per town are not independent.
    bound = CHANCE + 3 * np.sqrt(CHANCE * (1 - CHANCE) / count * 3)
    assert attacks.best_accuracy(run) < bound < 0.8
    assert run[0].losses[1, -1] < run[0].losses[1, 0] / 2  # T was learned


def test_the_original_model_has_a_recovery_rate_of_one(sweeps, world, folds):
    again = attacks.rtt(world.model, world.original, world.tokenizer, folds, **HOW)
    found = attacks.recovery(unlearned=again, original=sweeps["original"])
    assert found["rate"] == found["above_chance"] == 1.0


def test_learning_rates_give_the_same_results_alone_and_batched(world, folds, sweeps):
    run = partial(attacks.rtt, world.model, world.unlearned, world.tokenizer, folds)
    (alone,) = run(rotations=[1], **HOW)
    (both,) = sweeps["unlearned"][1:]
    assert_allclose(alone.losses, both.losses, rtol=2e-3)
    assert np.mean(alone.hits == both.hits) > 0.97
    (one,) = run(rotations=[1], **HOW | {"learning_rates": (3e-3,)})
    assert_allclose(one.losses[0], both.losses[1], rtol=2e-3)


def test_an_epoch_uses_all_train_facts_and_the_rate_warms_up(world, folds):
    """One update by hand: the sign (Lion) times a quarter of the rate (warmup)."""
    train_facts = attacks.encode_facts(world.tokenizer, folds[0], "answer")
    eval_facts = attacks.encode_questions(
        world.model, world.tokenizer, folds[1], "choice"
    )
    rows = table.num_rows(train_facts)
    sweep = attacks.retrain(
        world.model, world.unlearned, train_facts, eval_facts,
        learning_rates=(1e-3,), epochs=1, batch_size=rows, warmup_steps=4,
    )  # fmt: skip
    term = terms.on_logps(losses.nll, world.model, "known", reduce="token")

    def loss(params):
        return (
            term(params, {"known": train_facts}, None, jax.random.key(0))[0]
            .mean()
            .sum()
        )

    value, grads = jax.jit(jax.value_and_grad(loss))(world.unlearned)
    assert_allclose(sweep.losses, [[value]], rtol=1e-5)
    hand = jax.tree.map(lambda p, g: p - 1e-3 / 4 * np.sign(g), world.unlearned, grads)
    after = attacks.retrain(
        world.model,
        hand,
        train_facts,
        eval_facts,
        learning_rates=(1e-9,),
        epochs=1,
        batch_size=rows,
    )
    assert_array_equal(after.hits[0, 0], sweep.hits[0, 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lion_at_the_papers_rates_moves_float32_but_not_bfloat16(world, folds, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), world.unlearned)
    train_facts = attacks.encode_facts(world.tokenizer, folds[0], "answer")
    eval_facts = attacks.encode_questions(
        world.model, world.tokenizer, folds[1], "choice"
    )
    run = partial(
        attacks.retrain, world.model, params, train_facts, eval_facts, epochs=4,
        learning_rates=(1e-7,), batch_size=9, warmup_steps=0,
    )  # fmt: skip
    if dtype == "float32":
        sweep = run()
    else:
        with pytest.warns(UserWarning, match="bfloat16 swallowed 100% of the update"):
            sweep = run()
    fell = sweep.losses[0, 0] - sweep.losses[0, -1]
    assert fell > 0 if dtype == "float32" else abs(fell) < 0.01


def test_lora_recovers_hidden_facts(world, folds):
    """Means over all folds; single folds of 18 questions differ widely."""
    how = HOW | dict(learning_rates=(1e-2,), rank=4, epochs=12, rotations=range(4))
    sweeps = attacks.rtt(world.model, world.unlearned, world.tokenizer, folds, **how)
    before = np.mean([sweep.accuracy[0, 0] for sweep in sweeps])
    assert attacks.best_accuracy(sweeps) > before + 0.2


def test_a_batch_size_above_the_number_of_facts_uses_all_facts(world, folds):
    train_facts = attacks.encode_facts(world.tokenizer, folds[0], "answer")
    eval_facts = attacks.encode_questions(
        world.model, world.tokenizer, folds[1], "choice"
    )
    run = partial(
        attacks.retrain, world.model, world.unlearned, train_facts, eval_facts, epochs=3
    )
    whole, more = (
        run(learning_rates=(1e-4,), batch_size=n)
        for n in (len(train_facts["mask"]), 999)
    )
    assert whole.losses.shape == (1, 3)
    assert_array_equal(more.losses, whole.losses)


def test_a_diverged_model_scores_zero(world):
    """NaN is not an answer, even if the correct choice is always the first."""
    rows = [dict(x, choices=sorted(x["choices"], key=lambda c, x=x: c != _right(x)))
            for x in facts_of(world.trained)]  # fmt: skip
    rows = [row | {"answer": 0} for row in rows]
    folds = attacks.make_folds(rows, 2, by="town")
    nan = jax.tree.map(lambda x: x * jnp.nan, world.unlearned)
    sweep, _ = attacks.rtt(world.model, nan, world.tokenizer, folds, **HOW)
    assert not sweep.hits.any() and not sweep.finite.any()
    prompts, options = ["A", "B"], [["x", "y"], ["x", "y"]]
    picked = evaluate.choose(world.model, nan, world.tokenizer, prompts, options)
    assert picked.tolist() == [-1, -1]


def _right(row):
    return row["choices"][row["answer"]]


def test_a_diverging_learning_rate_is_reported_and_does_not_affect_others(world, folds):
    how = HOW | dict(learning_rates=(3e-3, 1e18), rotations=[0], rates_per_batch=2)
    (sweep,) = attacks.rtt(world.model, world.unlearned, world.tokenizer, folds, **how)
    assert sweep.finite.tolist() == [True, False]
    assert sweep.accuracy[0].max() > 0.5


def test_invalid_arguments_are_refused(world, folds):
    run = partial(attacks.rtt, world.model, world.unlearned, world.tokenizer)
    shared = [folds[0], [*folds[1], folds[0][0]]]
    with pytest.raises(ValueError, match=f"town '{folds[0][0]['town']}' in fold 0"):
        run(shared, **HOW)
    shared_statements = [
        [f | {"statement": ["It is so.", n]} for f in folds[int(n)]] for n in "01"
    ]
    with pytest.raises(ValueError, match="statement 'It is so.' in fold 0"):
        run(shared_statements, **HOW | {"train_format": "statement"})
    with pytest.raises(ValueError, match="rotations from 0 to 3, .* got 4"):
        run(folds, **HOW | {"rotations": [4]})
    with pytest.raises(ValueError, match="at least one learning rate"):
        run(folds, **HOW | {"learning_rates": ()})
    with pytest.raises(ValueError, match="learning_rate=-1"):
        run(folds, **HOW | {"learning_rates": (-1.0,)})
    with pytest.raises(ValueError, match="epochs >= 1"):
        run(folds, **HOW | {"epochs": 0})
