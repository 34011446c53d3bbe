# SPDX-License-Identifier: Apache-2.0
"""Rows in OpenUnlearning's way; token by token against the peer in tests/golden."""

import numpy as np
import pytest

from tests.golden.golden_families import openunlearning

IGNORE = openunlearning.IGNORE
TAGS = {
    "user_start_tag": "Q",
    "user_end_tag": "/",
    "asst_start_tag": "A",
    "asst_end_tag": ".",
}
OWN = {"apply_chat_template": True, "system_prompt": "s"}


class Letters:
    """A token a letter: its code; 1 begins and 2 ends a text."""

    eos_token_id = 2

    def __call__(self, text, *, truncation=False, max_length=None, **how):
        ids = ([1] if how.get("add_special_tokens", True) else []) + [*map(ord, text)]
        return {"input_ids": ids[:max_length] if truncation else ids}

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt, **more):
        assert not tokenize
        text = more.get("date_string", "")
        text += "".join(f"<{one['role'][0]}{one['content']}>" for one in messages)
        return text + ("<a" if add_generation_prompt else "")


def codes(text):
    return [*map(ord, text)]


def test_a_conversation_by_tags():
    row = openunlearning.chat(Letters(), ["x", "y"], ["1", "2"], template=TAGS)
    assert row["input_ids"] == [1, *codes("Qx/A1.Qy/A2"), 2]
    assert row["labels"] == [IGNORE] * 11 + [ord("2"), 2]
    assert row["attention_mask"] == [1] * 13


def test_the_tokenizers_template_is_not_cut():
    row = openunlearning.chat(Letters(), ["x"], ["1"], template=OWN, length=3)
    assert row["input_ids"] == [*codes("<ss><ux><a1>"), 2]
    assert row["labels"] == [IGNORE] * 10 + [*codes("1>"), 2]


def test_what_may_begin_a_conversation():
    tags = {**TAGS, "system_prompt_with_special_tokens": "S"}
    row = openunlearning.chat(Letters(), ["x"], ["1"], template=tags, length=4)
    assert row["input_ids"] == [1, *codes("SQx"), 2]
    assert row["labels"] == [IGNORE] * 4 + [2]
    template = {"apply_chat_template": True, "date_string": "d"}
    row = openunlearning.chat(Letters(), ["x"], ["1"], template=template)
    assert row["input_ids"] == [*codes("d<ux><a1>"), 2]


def test_a_row_to_generate_from():
    row = openunlearning.chat(Letters(), ["x"], ["1"], template=TAGS, generate=True)
    assert row["input_ids"] == [1, *codes("Qx/A")]
    assert row["labels"] == [1, *codes("Qx/A1"), 2]
    with pytest.raises(ValueError, match="row 0 has 7 labels for 5 tokens"):
        openunlearning.collate([row], pad_id=0)


def test_a_document():
    how = {"prefix": "ab", "length": 3, "insert_space": True}
    row = openunlearning.document(Letters(), "cdef", **how)
    assert row["input_ids"] == [1, *codes("ab cd")]
    assert row["labels"] == [IGNORE] * 3 + codes(" cd")
    bare = lambda text: {"input_ids": codes(text)}  # noqa: E731
    row = openunlearning.document(bare, "cdef", length=3)
    assert row["labels"] == [IGNORE, *codes("de")]
    row = openunlearning.document(Letters(), "cdef", **how, generate=True)
    assert row["input_ids"] == [1, *codes("ab")]
    assert row["labels"] == [IGNORE] * 3 + codes(" cd")


@pytest.mark.parametrize("hide", [False, True])
def test_collate_may_hide_end_tokens_that_fill(hide):
    rows = [
        {"input_ids": [5, 6, 2], "labels": [IGNORE, 6, 2]},
        {"input_ids": [7], "labels": [IGNORE]},
    ]
    table = openunlearning.collate(rows, pad_id=2, pad="left", hide_pad_id=hide)
    np.testing.assert_array_equal(table["tokens"], [[5, 6, 2], [2, 2, 7]])
    np.testing.assert_array_equal(table["mask"], [[1, 1, not hide], [0, 0, 1]])
    np.testing.assert_array_equal(table["answer"], [[0, 1, 1], [0, 0, 0]])
    assert [x.dtype for x in table.values()] == [np.int32, np.bool_, np.bool_]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: openunlearning.chat(Letters(), ["x"], [], template=TAGS),
            ValueError,
            "as many answers",
        ),
        (
            lambda: openunlearning.chat(Letters(), ["x"], ["1"], template={}),
            KeyError,
            "'user_start_tag'",
        ),
        (
            lambda: openunlearning.document(Letters(), "x", length=0),
            ValueError,
            "length >= 1",
        ),
        (lambda: openunlearning.collate([], pad_id=0), ValueError, "at least one row"),
        (
            lambda: openunlearning.collate(
                [{"input_ids": [1, 2], "labels": [IGNORE, 3]}], pad_id=0
            ),
            ValueError,
            "others than they",
        ),
        (
            lambda: openunlearning.collate([{}], pad_id=0, pad="both"),
            ValueError,
            "'left'",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
