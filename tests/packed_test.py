# SPDX-License-Identifier: Apache-2.0
"""Packed rows give the values of separate rows, and shared tokens run once."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import _packed, attacks, evaluate, wrap
from tests import tiny

KINDS = {
    "plain": {},
    "windows": dict(windows=(4, None, 2), attention_softcap=5.0),
    "learned positions": dict(rope=None, positions=40, norm="layer"),
    "dynamic, short rows": dict(
        rope=tiny.LONGROPE.__class__(kind="dynamic", factor=2.0, original_positions=40)
    ),
}


def families(rows=23, length=24, seed=0):
    """A ragged table in which many rows begin alike, padded on both sides.

    Some rows are beginnings of others, two are equal, one has no answer and one has
    masked tokens between its real ones.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32, (rows, length)).astype(np.int32)
    mask, answer = np.zeros((2, rows, length), np.bool_)
    stems = rng.integers(0, 32, (4, length))
    for i in range(rows):
        size = int(rng.integers(2, 17))
        begin = int(rng.integers(0, length - size))
        text = stems[i % 4, :size].copy()
        text[-(i % 3 + 1) :] = rng.integers(0, 32, i % 3 + 1) if i % 5 else text[-1]
        tokens[i, begin : begin + size] = text
        mask[i, begin : begin + size] = True
        answer[i, begin + size // 2 : begin + size] = True
    tokens[7], mask[7], answer[7] = tokens[3], mask[3], answer[3]
    answer[4] = False
    mask[5, 10], answer[5] = False, True
    return {"tokens": tokens, "mask": mask, "answer": answer}


def separately(model):
    return model._replace(packs=None)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_scores_equal_those_of_separate_rows(kind):
    model, params = tiny.tiny_model(**KINDS[kind])
    table = families()
    assert _packed.supports(model, table)
    assert not _packed.supports(separately(model), table)
    packed = evaluate.token_scores(model, params, table, batch_size=8)
    expected = evaluate.token_scores(separately(model), params, table, batch_size=8)
    assert_array_equal(packed.where, expected.where)
    assert_array_equal(packed.hits, expected.hits)
    assert_allclose(packed.logps, expected.logps, rtol=1e-5, atol=1e-5)
    assert_allclose(packed.standardised, expected.standardised, rtol=1e-5, atol=1e-5)
    assert [x.dtype for x in packed] == [x.dtype for x in expected]


def test_each_shared_token_is_in_the_rows_once():
    stem, count = [5, 6, 7, 8, 9, 10], 6
    tokens = np.asarray([[*stem, 20 + i, 1] for i in range(count)], np.int32)
    mask = np.ones(tokens.shape, np.bool_)
    where = np.zeros((count, 7), np.bool_)
    where[:, 5:] = True  # the last two tokens are answers
    found = _packed.pack(tokens, mask, where)
    # One stem, and of every row the token that predicts the last one.
    assert found.rows["mask"].sum() == len(stem) + count
    assert_array_equal(found.rows["tokens"][0, : len(stem)], stem)
    assert_array_equal(found.rows["ends"][0, : len(stem)], len(stem) + count)
    assert_array_equal(found.rows["positions"][0][found.rows["mask"][0]][6:], 6)
    assert len(found.targets) == where.sum()
    assert_array_equal(np.sort(found.sources), np.flatnonzero(where))


@pytest.mark.parametrize("width", [16, 40, 128])
def test_every_node_sees_exactly_the_tokens_before_it(width, monkeypatch):
    monkeypatch.setattr(_packed, "WIDTH", width)
    table = families(rows=40)
    tokens, mask = table["tokens"], table["mask"]
    where = (table["answer"] & mask)[:, 1:] & mask[:, :-1]
    found = _packed.pack(tokens, mask, where)
    rows = found.rows
    assert rows["tokens"].shape[1] == max(width, 16)
    assert len(found.targets) == where.sum()
    index = np.arange(rows["tokens"].shape[1])
    for state, target, source in zip(
        found.states, found.targets, found.sources, strict=True
    ):
        row, column = divmod(int(source), where.shape[1])
        before = tokens[row, : column + 1][mask[row, : column + 1]]
        at, node = divmod(int(state), rows["tokens"].shape[1])
        sees = (index <= node) & (node < rows["ends"][at]) & rows["mask"][at]
        assert_array_equal(rows["tokens"][at][sees], before)
        assert_array_equal(rows["positions"][at][sees], np.arange(len(before)))
        assert target == tokens[row, column + 1]
    assert rows["mask"].sum() < mask.sum()  # something was shared


def test_rows_are_nearly_full():
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 60, 400)
    tokens = rng.integers(0, 10**6, (400, 60)).astype(np.int32)
    mask = np.arange(60) < lengths[:, None]
    found = _packed.pack(tokens, mask, mask[:, 1:])
    assert found.rows["mask"].mean() > 0.97
    assert found.rows["mask"].sum() >= lengths.sum() - 400


def test_a_model_with_another_apply_and_long_rows_run_separately():
    model, _ = tiny.tiny_model()
    table = families()
    other = model._replace(apply=lambda *args, **rest: model.apply(*args, **rest))
    assert not _packed.supports(other, table)
    assert not _packed.supports(model, table | {"image": table["tokens"]})
    changing, _ = tiny.tiny_model(rope=tiny.LONGROPE)
    assert table["mask"].sum(1).max() > LONG
    assert not _packed.supports(changing, table)
    short = {name: x[:, :LONG] for name, x in table.items()}
    assert _packed.supports(changing, short)
    kernel = model.config.__class__(**{**vars(model.config), "attention": "splash"})
    assert _packed.supports(tiny.models.make(kernel), table) is False


LONG = tiny.LONGROPE.original_positions


def test_wrapped_models_are_packed_too():
    model, params = tiny.tiny_model()
    table = families()
    lora = wrap.lora(model, pattern=r"blocks/.*/kernel", rank=2)
    added = wrap.add_lora(lora, params, jax.random.key(1))
    added = jax.tree.map(lambda x: x + 0.05, added)
    prompts = {name: table[name][:4] for name in ("tokens", "mask")}
    others = {name: table[name][4:8] for name in ("tokens", "mask")}
    steered = attacks.steer(model, params, forget=prompts, retain=others, layers=(1,))
    for wrapped, its_params in ((lora, added), steered):
        assert _packed.supports(wrapped, table)
        found, _ = evaluate.answer_logps(wrapped, its_params, table)
        expected, _ = evaluate.answer_logps(separately(wrapped), its_params, table)
        assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        before, _ = evaluate.answer_logps(model, params, table)
        assert np.abs(found - before).max() > 1e-2


def test_choices_are_the_same_with_and_without_packing():
    tokenizer = tiny.tiny_tokenizer()
    model, params = tiny.tiny_model(vocab=400)
    names = ["Paris", "Nairobi", "the sea"]
    options = [names[i % 3 :] + names[: i % 3] for i in range(8)]
    prompts = [f"{x} is" for x in ("France", "A dog", "The city", "Kenya")] * 2
    found = evaluate.choose(model, params, tokenizer, prompts, options)
    expected = evaluate.choose(separately(model), params, tokenizer, prompts, options)
    assert_array_equal(found, expected)
    assert len(set(found.tolist())) > 1
