# SPDX-License-Identifier: Apache-2.0
"""Rows that belong together: paired once, and then drawn in one order everywhere."""

from functools import partial

import jax
import numpy as np
import pytest

import jaxunlearn as ju
from jaxunlearn import data, recipes
from jaxunlearn.data import loader, table
from tests import tiny

ROWS = 10


def encoded(seed, prompts=7, rows=ROWS, length=12):
    """Rows of one prompt each and an answer that differs by the seed."""
    tokens = np.random.default_rng(prompts).integers(1, 32, (rows, 12))[:, :length]
    answers = np.random.default_rng(seed).integers(1, 32, (rows, length))
    mask = np.ones((rows, length), bool)
    answer = mask & (np.arange(length) >= 6)
    tokens = np.where(answer, answers, tokens).astype(np.int32)
    columns = {"tokens": tokens, "mask": mask, "answer": answer}
    return columns | {"ref_logps": np.full(rows, -9.0, np.float32)}


@pytest.fixture(scope="module")
def tables():
    both = data.paired({"forget": encoded(1), "alternate": encoded(2, length=9)})
    return {**both, "retain": encoded(3, prompts=8, rows=7)}


def torn(batch):
    """How many rows of `alternate` have another prompt than that of `forget`."""
    pair = [batch[name]["tokens"][:, :6] for name in ("forget", "alternate")]
    return int((pair[0] != pair[1]).any(1).sum())


@pytest.mark.parametrize("streams", [data.streams, loader.streams])
def test_pairs_stay_together_over_epochs_restarts_and_hosts(tables, streams):
    drawn = streams(tables, 4, seed=3)
    steps = [next(drawn) for _ in range(8)]  # more than three epochs
    assert sum(map(torn, steps)) == 0
    retain = [batch["retain"]["tokens"] for batch in steps]
    alone = data.streams({"retain": tables["retain"]}, 4, seed=3)
    for batch in retain:  # the other stream has its usual order
        np.testing.assert_array_equal(batch, next(alone)["retain"]["tokens"])
    for index in range(2):
        part = next(streams(tables, 4, seed=3, shard=(index, 2)))
        assert torn(part) == 0
        rows = part["alternate"]["tokens"]
        np.testing.assert_array_equal(
            rows, steps[0]["alternate"]["tokens"][2 * index : 2 * index + 2]
        )
    if streams is data.streams:
        later = next(streams(tables, 4, seed=3, skip=5))
    else:
        later = streams(tables, 4, seed=3)
        later.set_state(drawn.get_state() | {"batches": 5})
        later = next(later)
    for name in tables:
        np.testing.assert_array_equal(later[name]["tokens"], steps[5][name]["tokens"])


def test_the_order_does_not_depend_on_the_order_of_the_dict(tables):
    first = next(data.streams(tables, 4, seed=0))
    other = next(data.streams(dict(reversed(tables.items())), 4, seed=0))
    for name in tables:
        np.testing.assert_array_equal(first[name]["tokens"], other[name]["tokens"])


def test_tables_with_the_same_ids_are_drawn_in_one_order():
    ids = {"id": np.arange(ROWS)}
    named = {"forget": encoded(1) | ids, "alternate": encoded(2) | ids}
    drawn = data.streams(named, 4, seed=0)
    assert sum(torn(next(drawn)) for _ in range(5)) == 0


def test_sources_are_paired(tables):
    lists = {
        name: [{k: x[row] for k, x in encoded(seed).items()} for row in range(ROWS)]
        for name, seed in (("forget", 1), ("alternate", 2))
    }
    paired = data.paired(lists)
    paired["forget"] = table.with_columns(paired["forget"], {"new": np.zeros(ROWS)})
    assert torn(next(data.streams(paired, 8, seed=0))) == 0
    with pytest.raises(ValueError, match="row 3 of 'forget' and 'alternate'"):
        data.paired(lists | {"alternate": lists["alternate"][:3] + lists["forget"][:7]})
    hidden = {k: data.mapped(x, lambda row: row) for k, x in paired.items()}
    with pytest.raises(ValueError, match="'pair' of 'forget'"):
        next(data.streams(hidden, 4, seed=0))


def test_rows_that_do_not_belong_together_are_refused(tables):
    forget, alternate = encoded(1), encoded(2)
    with pytest.raises(ValueError, match="forget 10, alternate 9"):
        data.paired({"forget": forget, "alternate": table.select(alternate, range(9))})
    order = [0, 1, 3, 2, *range(4, ROWS)]
    mixed = table.select(alternate, order)
    with pytest.raises(ValueError, match="row 2 of 'forget' and 'alternate'"):
        data.paired({"forget": forget, "alternate": mixed})
    ids = {"forget": list("abcdefghij"), "alternate": list("abdcefghij")}
    with pytest.raises(ValueError, match="row 2 .* 'c' and 'd'"):
        data.paired({"forget": forget, "alternate": alternate}, ids=ids)
    names = {name: {"id": np.array(list(x))} for name, x in ids.items()}
    with pytest.raises(ValueError, match="row 2"):
        data.paired(
            {
                "forget": forget | names["forget"],
                "alternate": mixed | names["alternate"],
            }
        )
    ids["alternate"] = ids["forget"]
    assert set(data.paired({"forget": forget, "alternate": mixed}, ids=ids)) == set(ids)
    bare = {
        name: {"tokens": x["tokens"], "mask": x["mask"]}
        for name, x in (("forget", forget), ("alternate", alternate))
    }
    with pytest.raises(ValueError, match="row 0"):  # no prompt to compare
        data.paired(bare)
    with pytest.raises(ValueError, match="two or more"):
        data.paired({"forget": forget})
    changed = tables | {"alternate": table.select(tables["alternate"], range(1, ROWS))}
    with pytest.raises(ValueError, match="'forget' and 'alternate'"):
        data.streams(changed, 4, seed=0)
    with pytest.raises(ValueError, match="batch_size .* got 4 and 2"):
        data.streams(tables, dict(forget=4, alternate=2, retain=4), seed=0)


def test_rows_that_are_long_in_one_answer_are_dropped_from_both():
    tokenizer = tiny.tiny_tokenizer()
    rows = [
        {
            "prompt": f"Q {i}",
            "answer": "the city of " * (20 if i == 2 else 1),
            "alternate": "I do not know " * (6 if i == 4 else 1),
        }
        for i in range(6)
    ]
    both = ("answer", "alternate")
    with pytest.warns(UserWarning, match="2 of 6"):
        fit = data.drop_long(rows, tokenizer, max_length=20, answer=both)
    assert [row["prompt"] for row in fit] == ["Q 0", "Q 1", "Q 3", "Q 5"]
    with pytest.warns(UserWarning):
        apart = {
            column: data.drop_long(rows, tokenizer, max_length=20, answer=column)
            for column in both
        }
    made = {
        column: data.encode(tokenizer, *data.columns(each, "prompt", column))
        for column, each in apart.items()
    }
    with pytest.raises(ValueError, match="row 2"):
        data.paired(made)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_dpo_refuses_batches_that_are_not_pairs(tables, num_microbatches):
    model, params = tiny.tiny_model(layers=1, remat="none")
    recipe = recipes.openunlearning.dpo(model, learning_rate=1e-3)
    assert recipe.pairs() == [("alternate", "forget")]
    assert "pair" in recipe.reads()["alternate"]
    with jax.numpy_dtype_promotion("standard"):
        setup = partial(recipe.setup, num_microbatches=num_microbatches)
        step, state, frozen = setup(model, params)
        state, log = ju.fit(
            step, state, data.streams(tables, 4, seed=0), frozen, steps=2
        )
    assert np.isfinite(log[-1]["total/loss"])
    batch = next(data.streams(tables, 4, seed=0))
    swapped = {k: x[::-1] for k, x in batch["alternate"].items()}
    with pytest.raises(ValueError, match="row 0 of 'forget'"):
        ju.fit(step, state, [batch | {"alternate": swapped}], frozen, steps=3)
    bare = {k: dict(x) for k, x in batch.items()}
    for each in bare.values():
        each.pop("pair", None)
    with pytest.raises(KeyError, match="'pair'.*data.paired"):
        ju.fit(step, state, [bare], frozen, steps=3)


def test_ids_outside_the_vocabulary_are_refused_by_fit():
    model, params = tiny.tiny_model(layers=1, remat="none")
    recipe = recipes.openunlearning.ascent(model)
    rows = encoded(1)
    rows["tokens"][7, 2] = 32
    rows["mask"][1, 11] = False
    rows["tokens"][1, 11] = 99  # padding may be anything
    with jax.numpy_dtype_promotion("standard"):
        step, state, frozen = recipe.setup(model, params)
    with pytest.raises(ValueError, match="got 32 in row 7 at position 2"):
        ju.fit(step, state, [{"forget": rows}], frozen, steps=1)


def test_a_loop_without_fit_gets_nan_for_torn_pairs(tables):
    model, params = tiny.tiny_model(layers=1, remat="none")
    recipe = recipes.openunlearning.dpo(model)
    value = jax.jit(
        lambda batch: ju.term_gradients(
            recipe.terms, params, batch, ju.Frozen(), jax.random.key(0)
        )[0]["total"]
    )
    batch = next(data.streams(tables, 4, seed=0))
    assert np.isfinite(value(batch))
    batch["alternate"] = batch["alternate"] | {"pair": batch["forget"]["pair"][::-1]}
    assert np.isnan(value(batch))
