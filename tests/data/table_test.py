# SPDX-License-Identifier: Apache-2.0
import collections
import itertools

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxunlearn.data import table
from tests import tiny

PROMPTS = ["The capital of France is", "In Bosnia and Herzegovina, the capital is"]
ANSWERS = ["Paris", "Sarajevo"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


def numbered(count):
    return {"row": np.arange(count), "tokens": np.arange(count * 3).reshape(count, 3)}


def drawn(batches, count):
    return [batch["row"] for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("side", table.PADDING_SIDES)
def test_encode_marks_the_answer_and_pads_one_side(tokenizer, side):
    t = table.encode(tokenizer, PROMPTS, ANSWERS, padding_side=side)
    assert (
        t["tokens"].dtype == np.int32 and t["mask"].dtype == t["answer"].dtype == bool
    )
    assert t["tokens"].shape == t["mask"].shape == t["answer"].shape
    assert t["tokens"].shape[1] % table.ROUND_TO == 0
    for row in range(2):
        real = t["tokens"][row][t["mask"][row]]
        text = f"{PROMPTS[row]} {ANSWERS[row]}"
        assert real.tolist() == tokenizer(text)["input_ids"]
        answer = t["tokens"][row][t["answer"][row]]
        assert tokenizer.decode(answer).strip() == ANSWERS[row]
        assert t["mask"][row][t["answer"][row]].all()
        edge = t["mask"][row][0 if side == "right" else -1]
        assert edge
    lengths = t["mask"].sum(1)
    assert lengths[0] != lengths[1]  # ragged
    steps = np.diff(t["mask"].astype(int), axis=1)
    assert ((steps <= 0) if side == "right" else (steps >= 0)).all()


def test_encode_uses_the_joint_tokens_where_a_merge_crosses_the_boundary():
    # "ab cd" became one token: tokenising apart would shift the answer.
    tokenizer = tiny.tiny_tokenizer(["ab cd"] * 20, split_words=False)
    t = table.encode(tokenizer, ["xab"], ["cdx"])
    joint = tokenizer("xab cdx", return_offsets_mapping=True)
    ids, offsets = joint["input_ids"], joint["offset_mapping"]
    crossing = [i for i, (a, b) in enumerate(offsets) if a < 3 < b]
    assert crossing  # the premise
    assert t["tokens"][0][t["mask"][0]].tolist() == ids
    assert_array_equal(np.flatnonzero(t["answer"][0]), range(crossing[0], len(ids)))


def test_encode_marks_every_byte_of_a_letter_beyond_ascii(tokenizer):
    t = table.encode(tokenizer, ["The capital of Moldova is"], ["Chișinău"])
    answer = t["tokens"][0][t["answer"][0]]
    assert tokenizer.decode(answer).strip() == "Chișinău"


def test_encode_includes_leading_special_tokens_and_drops_trailing_ones():
    tokenizer = tiny.tiny_tokenizer(template="<s> $A </s>")
    t = table.encode(tokenizer, PROMPTS, ANSWERS)
    ids = t["tokens"][0][t["mask"][0]].tolist()
    assert ids[0] == tokenizer.convert_tokens_to_ids("<s>")
    assert tokenizer.convert_tokens_to_ids("</s>") not in ids
    assert not t["answer"][:, 0].any()
    text = table.encode_text(tokenizer, " ".join(PROMPTS * 9), length=8)
    assert (text["tokens"][:, 0] == ids[0]).all() and not text["answer"][:, 0].any()
    assert text["answer"][:, 1:].all() and text["mask"].all()


def test_encode_of_prompts_alone_answers_with_the_mask(tokenizer):
    t = table.encode(tokenizer, PROMPTS, padding_side="left", length=40)
    assert t["tokens"].shape == (2, 40)
    assert_array_equal(t["answer"], t["mask"])
    assert t["mask"][:, -1].all()


def test_encode_names_the_row_that_is_too_long(tokenizer):
    tokens = len(tokenizer(f"{PROMPTS[1]} {ANSWERS[1]}")["input_ids"])
    with pytest.raises(
        ValueError, match=rf"row 1 has {tokens}: .*Set length to {tokens}"
    ):
        table.encode(tokenizer, PROMPTS, ANSWERS, length=tokens - 1)


def test_encode_refuses_what_cannot_be_paired(tokenizer):
    with pytest.raises(ValueError, match="2 prompts and 1 answers"):
        table.encode(tokenizer, PROMPTS, ["Paris"])
    with pytest.raises(ValueError, match="row 1 .*has ' '. Remove the row"):
        table.encode(tokenizer, PROMPTS, ["Paris", " "])
    with pytest.raises(TypeError, match="list of texts as prompts"):
        table.encode(tokenizer, "The capital of France is")
    with pytest.raises(TypeError, match="fast tokenizer"):
        table.encode(object(), PROMPTS)


def test_encode_text_cuts_into_full_rows(tokenizer):
    text = "The river flows to the sea, and the city stands at the river. " * 20
    ids = tokenizer(text)["input_ids"]
    t = table.encode_text(tokenizer, text, length=16)
    assert t["tokens"].shape == (len(ids) // 16, 16) and t["mask"].all()
    assert t["tokens"].ravel().tolist() == ids[: t["tokens"].size]
    with pytest.raises(ValueError, match="at least one row of length=64"):
        table.encode_text(tokenizer, "Too short.", length=64)


@pytest.mark.parametrize("count, size", [(10, 4), (3, 8), (8, 8), (7, 1)])
def test_batches_see_every_row_equally_often(count, size):
    source = table.batches(numbered(count), size, seed=3)
    seen = collections.Counter()
    for batch in itertools.islice(source, 23):
        assert batch["row"].shape == (size,) and batch["tokens"].shape == (size, 3)
        assert_array_equal(batch["tokens"][:, 0], batch["row"] * 3)
        seen.update(batch["row"].tolist())
        counts = [seen[row] for row in range(count)]
        assert max(counts) - min(counts) <= 1


def test_batches_are_reproducible_and_shuffled():
    first = drawn(table.batches(numbered(50), 10, seed=1), 10)
    again = drawn(table.batches(numbered(50), 10, seed=1), 10)
    other = drawn(table.batches(numbered(50), 10, seed=2), 10)
    assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(np.ravel(first[:5]), np.ravel(first[5:]))  # reshuffled


@pytest.mark.parametrize("skip", [1, 5, 12])
def test_batches_resume_by_skip(skip):
    full = drawn(table.batches(numbered(11), 4, seed=0), 20)
    rest = drawn(table.batches(numbered(11), 4, seed=0, skip=skip), 20 - skip)
    assert_array_equal(full[skip:], rest)


def test_batches_stop_after_their_epochs():
    batches = [b["row"] for b in table.batches(numbered(10), 4, seed=0, epochs=2)]
    assert [len(rows) for rows in batches] == [4] * 5
    assert sorted(np.concatenate(batches)) == sorted([*range(10)] * 2)
    assert len(list(table.batches(numbered(10), 4, seed=0, epochs=1))) == 3


def test_streams_join_by_name_and_resume():
    tables = {"forget": numbered(6), "retain": numbered(9)}
    sizes = {"forget": 2, "retain": 4}
    full = list(itertools.islice(table.streams(tables, sizes, seed=5), 8))
    rest = list(itertools.islice(table.streams(tables, sizes, seed=5, skip=3), 5))
    for a, b in zip(full[3:], rest, strict=True):
        assert set(a) == {"forget", "retain"}
        for name in a:
            assert a[name]["row"].shape == (sizes[name],)
            assert_array_equal(a[name]["row"], b[name]["row"])


def test_the_shards_of_all_processes_form_the_batch():
    tables = {"forget": numbered(7), "retain": numbered(5)}
    sizes = {"forget": 4, "retain": 2}
    full = table.streams(tables, sizes, seed=3, skip=1)
    shards = [
        table.streams(tables, sizes, seed=3, skip=1, shard=(i, 2)) for i in (0, 1)
    ]
    for batch, *parts in itertools.islice(zip(full, *shards, strict=True), 4):
        for stream, columns in batch.items():
            for name, column in columns.items():
                pieces = [part[stream][name] for part in parts]
                assert len(pieces[0]) == len(pieces[1]) == sizes[stream] // 2
                np.testing.assert_array_equal(column, np.concatenate(pieces))


def test_eval_batches_of_all_shards_form_the_batch():
    (batch,) = table.eval_batches(numbered(5), 6)
    parts = [next(table.eval_batches(numbered(5), 6, shard=(i, 3))) for i in range(3)]
    for name, column in batch.items():
        joined = np.concatenate([part[name] for part in parts])
        full = np.tile(column, 3) if name == "valid" else column
        np.testing.assert_array_equal(joined, full)
    with pytest.raises(ValueError, match="4 processes divide, got batch_size=6"):
        table.eval_batches(batch, 6, shard=(0, 4))


def test_invalid_shards_are_errors():
    tables = {"forget": numbered(4)}
    with pytest.raises(
        ValueError, match="batch_size=3 for 'forget'. Change the batch size"
    ):
        table.streams(tables, 3, seed=0, shard=(0, 2))
    with pytest.raises(ValueError, match="0 <= index < number, got shard=.2, 2."):
        table.streams(tables, 4, seed=0, shard=(2, 2))


def test_streams_of_equal_tables_shuffle_apart():
    tables = {"forget": numbered(40), "retain": numbered(40)}
    batch = next(table.streams(tables, 40, seed=0))
    assert not np.array_equal(batch["forget"]["row"], batch["retain"]["row"])


def test_an_empty_forget_set_is_named_when_called():
    tables = {"retain": numbered(4), "forget": numbered(0)}
    with pytest.raises(ValueError, match=r"The forget set is empty: .*Check the file"):
        table.streams(tables, 2, seed=0)
    with pytest.raises(ValueError, match="is empty"):
        table.batches({}, 2, seed=0)
    with pytest.raises(ValueError, match="is empty"):
        table.eval_batches(numbered(0), 2)


def test_streams_and_batches_name_bad_arguments():
    with pytest.raises(KeyError, match="Give a batch size for every stream"):
        table.streams({"forget": numbered(4)}, {"retain": 2}, seed=0)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        table.batches(numbered(4), 0, seed=0)
    with pytest.raises(ValueError, match="columns of one length, got a 1, b 2"):
        table.batches({"a": np.zeros(1), "b": np.zeros(2)}, 1, seed=0)


@pytest.mark.parametrize("count, size", [(7, 3), (6, 3), (2, 5)])
def test_eval_batches_return_every_row_once_in_order(count, size):
    batches = list(table.eval_batches(numbered(count), size))
    assert all(batch["row"].shape == (size,) for batch in batches)
    rows = np.concatenate([batch["row"][batch["valid"]] for batch in batches])
    assert_array_equal(rows, np.arange(count))


@pytest.mark.parametrize("side", table.PADDING_SIDES)
def test_concat_equals_encoding_together(tokenizer, side):
    length = {}
    parts = [
        table.encode(tokenizer, [p], [a], padding_side=side)
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    length = {part["tokens"].shape[1] for part in parts}
    assert len(length) == 2
    joined = table.concat(parts, padding_side=side)
    full = table.encode(tokenizer, PROMPTS, ANSWERS, padding_side=side)
    for name in ("mask", "answer"):
        assert_array_equal(joined[name], full[name])
    assert_array_equal(joined["tokens"][joined["mask"]], full["tokens"][full["mask"]])
    with pytest.raises(ValueError, match="same columns"):
        table.concat([parts[0], numbered(2)])


def test_check_length_names_row_length_and_positions(tokenizer):
    t = table.encode(tokenizer, PROMPTS, ANSWERS, length=64)
    longest = int(t["mask"].sum(1).max())
    table.check_length(t, longest)  # padding does not count
    with pytest.raises(
        ValueError,
        match=rf"at most {longest - 1} tokens .*row 1 has {longest} .*Shorten",
    ):
        table.check_length(t, longest - 1)
