# SPDX-License-Identifier: Apache-2.0
"""Values in a user's file that are no texts: errors name file, line and column."""

import csv
import json
import warnings

import numpy as np
import pytest

from jaxunlearn import data
from jaxunlearn.data import files
from tests import tiny

GOOD = {"question": "a", "answer": "b"}
BAD = {
    "null": "null",
    "number": "42",
    "nan": "NaN",
    "list": '["a", "b"]',
    "object": '{"a": 1}',
    "surrogate": '"cut \\ud83d"',
}


def jsonl(folder, column, text):
    row = "{" + ", ".join(
        f'"{name}": {text if name == column else json.dumps(value)}'
        for name, value in GOOD.items()
    )
    path = folder / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{row}}}\n")
    return path


@pytest.mark.parametrize("column", ["question", "answer"])
@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_value_that_is_no_text_is_named_by_file_line_and_column(
    tmp_path, column, text
):
    path = jsonl(tmp_path, column, text)
    rows = files.read_rows(path, ("question", "answer"))
    with pytest.raises(ValueError, match=f"'{column}'") as error:
        data.columns(rows, "question", "answer")
    assert f"{path}, line 3" in str(error.value)
    with pytest.raises(ValueError, match=f"'{column}'") as error:
        names = dict(prompt="question", answer="answer", max_length=8)
        data.drop_long(rows, tiny.tiny_tokenizer(), **names)
    assert f"{path}, line 3" in str(error.value)


def test_rows_without_a_file_are_named_by_their_number():
    rows = [GOOD, GOOD | {"answer": None}]
    with pytest.raises(ValueError, match=r"row 1: .*'answer', got None"):
        data.columns(rows, "question", "answer")
    with pytest.raises(KeyError, match="row 1"):
        data.columns([GOOD, {"question": "a"}], "answer")


@pytest.mark.parametrize("value", [None, 42, float("nan"), ["a"], "cut \ud83d"])
def test_encode_names_the_row_and_the_argument(value):
    tokenizer = tiny.tiny_tokenizer()
    with pytest.raises(ValueError, match="answers.* in row 1"):
        data.encode(tokenizer, ["a", "b"], ["c", value])
    with pytest.raises(ValueError, match="prompts.* in row 0"):
        data.encode(tokenizer, [value, "b"])
    with pytest.raises(ValueError, match="Row 0"):
        data.encoded([{"prompt": value}], tokenizer, length=4, answer=None)[0]


def test_an_answer_that_nothing_predicts_is_refused():
    tokenizer = tiny.tiny_tokenizer()
    joined = dict(prompt_format=data.PromptFormat(separator=""))
    with pytest.raises(ValueError, match="'' and answer 'x' in row 1"):
        data.encode(tokenizer, ["a", ""], ["c", "x"], **joined)
    table = data.encode(tokenizer, ["a", "<s>"], ["c", "x"], **joined)
    assert table["answer"].sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    "value", ["9" * 5000, "[" * 100_000 + "]" * 100_000], ids=["digits", "depth"]
)
def test_values_that_python_cannot_read_are_named(tmp_path, value):
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('{"q": 1}\n{"q": ' + value + "}\n")
    whole.write_text('[{"q": 1},\n{"q": 2}, {"q": ' + value + "}]")
    for path, place in ((lines, "line 2"), (whole, "row 2")):
        with pytest.raises(ValueError, match=place) as error:
            files.read_rows(path, ("q",))
        assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="line 2"):
        data.open_jsonl(lines)[1]


def test_a_field_of_a_csv_may_hold_a_book(tmp_path):
    path, limit = tmp_path / "a.csv", csv.field_size_limit()
    book = "word " * 40_000
    path.write_text(f'text,source\n"{book}\nend",book\n\nshort,\n')
    rows = files.read_rows(path, ("text",))
    assert [row["text"] for row in rows] == [f"{book}\nend", "short"]
    assert rows.lines == [3, 5]
    assert csv.field_size_limit() == limit


def test_a_corrupt_page_of_parquet_is_named_with_its_column(tmp_path):
    arrow, parquet = (
        pytest.importorskip(f"pyarrow{name}") for name in ("", ".parquet")
    )
    path = tmp_path / "a.parquet"
    texts = [f"a text of some length {i}" for i in range(200)]
    parquet.write_table(arrow.table({"q": texts, "n": np.arange(200)}), path)
    content = bytearray(path.read_bytes())
    content[60:160] = b"\xff" * 100
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="'q'") as error:
        files.read_rows(path, ("q",))
    assert str(path) in str(error.value) and "'n'" not in str(error.value)
    parquet.write_table(arrow.table({"q": ["a", None]}), path)
    with pytest.raises(ValueError, match="row 1: .*'q'"):
        data.columns(files.read_rows(path), "q")


def test_one_text_is_not_a_list_of_texts():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = data.PromptFormat(chat=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in (
            lambda: data.encode(tokenizer, "ab"),
            lambda: data.encode(tokenizer, ["a", "b"], "ab"),
            lambda: data.encode(tokenizer, "ab", prompt_format=chat),
            lambda: data.render(tokenizer, "ab", prompt_format=chat),
            lambda: data.render(tokenizer, ["a", "b"], "ab"),
            lambda: data.render(tokenizer, ["a", "b"], "ab", chat),
            # An iterator would be used up by the check of its values.
            lambda: data.encode(tokenizer, iter(["a", "b"])),
            lambda: data.encode(tokenizer, iter(["a", "b"]), prompt_format=chat),
            lambda: data.encode(tokenizer, ["a", "b"], (x for x in "ab")),
        ):
            with pytest.raises(TypeError, match="list"):
                call()
    with pytest.raises(TypeError, match="one text"):
        data.encode_text(tokenizer, ["a", "b"], length=2)
    with pytest.raises((TypeError, ValueError), match="system"):
        chat = data.PromptFormat(chat=True, system=["b"])
        data.encode(tokenizer, ["a"], prompt_format=chat)
