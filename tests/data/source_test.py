# SPDX-License-Identifier: Apache-2.0
"""Rows that are decoded and encoded when they are read."""

import json

import grain
import numpy as np
import pytest
from array_record.python import array_record_module
from numpy.testing import assert_array_equal

from jaxunlearn import data
from jaxunlearn.data import loader, source, table
from tests import tiny

PAIRS = [
    ("The capital of France is", "Paris"),
    ("The capital of Italy is", "Rome"),
    ("The city is", "Paris"),
    ("The river of Italy is", "the river"),
]
ROWS = [{"prompt": prompt, "answer": answer} for prompt, answer in PAIRS]
LINES = [json.dumps(row) for row in ROWS]


def as_list(folder):
    return ROWS


def as_jsonl(folder):
    (folder / "rows.jsonl").write_text("\n\n".join(LINES))
    return data.open_jsonl(folder / "rows.jsonl", ("prompt", "answer"))


def as_array_record(folder):
    path = str(folder / "rows.array_record")
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for line in LINES:
        writer.write(line.encode())
    writer.close()
    return source.mapped(grain.sources.ArrayRecordDataSource(path), json.loads)


@pytest.mark.parametrize("texts", [as_list, as_jsonl, as_array_record])
def test_rows_encoded_when_read_equal_those_of_the_table(texts, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    prompts, answers = zip(*PAIRS, strict=True)
    full = {"forget": table.encode(tokenizer, prompts, answers, length=24)}
    lazy = {"forget": data.encoded(texts(tmp_path), tokenizer, length=24)}
    wanted, batches = data.streams(full, 3, seed=0), loader.streams(lazy, 3, seed=0)
    for _ in range(4):
        want, found = next(wanted)["forget"], next(batches)["forget"]
        assert found.keys() == want.keys()
        for name in want:
            assert_array_equal(found[name], want[name], strict=True)
    batches.close()


def test_a_row_that_cannot_be_encoded_is_named():
    tokenizer = tiny.tiny_tokenizer()
    rows = [*ROWS, {"question": "Where?"}]
    lazy = data.encoded(rows, tokenizer, length=2)
    with pytest.raises(source.BadRow, match="Row 0 of the source.*at most length=2"):
        lazy[0]
    with pytest.raises(source.BadRow, match="Row 4.*'prompt'.*the row has 'question'"):
        lazy[4]
    with pytest.raises(source.BadRow, match="Row 0 of the source: Expecting"):
        source.mapped([b"{"], json.loads)[0]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "The", "answer": None}, "needs texts, got None .* for 'answer'"),
        ({"prompt": 3, "answer": "Paris"}, "needs texts, got 3 .* for 'prompt'"),
        ("prompt and answer", "needs rows that are dicts, got str"),
    ],
)
def test_a_field_that_is_not_a_text_is_named(row, message):
    lazy = data.encoded([*ROWS, row], tiny.tiny_tokenizer(), length=8)
    with pytest.raises(source.BadRow, match=f"Row 4 of the source: .*{message}"):
        lazy[4]


def test_columns_are_added_to_rows():
    extra = {"ref_logps": np.array([1.0, 2.0], np.float32)}
    lazy = table.with_columns([{"x": 0}, {"x": 1}], extra)
    assert len(lazy) == 2 and lazy[1] == {"x": 1, "ref_logps": 2.0}
    found = table.select(lazy, [1, 0])
    assert_array_equal(found["ref_logps"], extra["ref_logps"][::-1], strict=True)
    assert set(table.with_columns({"x": np.arange(2)}, extra)) == {"x", "ref_logps"}
