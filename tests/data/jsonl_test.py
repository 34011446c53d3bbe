# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from jaxunlearn.data import capitals as facts
from jaxunlearn.data import jsonl


@pytest.fixture
def write(tmp_path):
    def write(text, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_rows_come_in_order_and_blank_lines_are_skipped(write):
    path = write('\ufeff{"a": 1}\n\n{"a": 2, "b": "x\u2028y"}\r\n  \n')
    assert jsonl.read_jsonl(path, ["a"]) == [{"a": 1}, {"a": 2, "b": "x\u2028y"}]
    assert list(jsonl.open_jsonl(path, ["a"])) == jsonl.read_jsonl(path, ["a"])


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"a": 1}\n\n{"a": 2,,}\n',
            r"rows\.jsonl, line 3: needs one JSON object, got",
        ),
        ('{"a": 1}\n{"a": ', r"rows\.jsonl, line 2: .*Correct or remove"),
        ('{"a": 1}\n[1, 2]\n', r"rows\.jsonl, line 2: needs a JSON object, got a list"),
        ('{"a": 1}\n{"b": 1}\n', r"line 2: needs 'a', but the row has 'b'\. Add"),
        ("\n \n", r"rows\.jsonl has no rows"),
        ("", r"rows\.jsonl has no rows"),
        (b'{"a": "\xff"}', r"needs to be UTF-8 text, but byte 7 is not"),
    ],
    ids=["malformed", "truncated", "list", "missing", "blank", "empty", "bytes"],
)
def test_bad_files_are_named_with_the_line(write, text, message):
    with pytest.raises(ValueError, match=message):
        jsonl.read_jsonl(write(text), ["a"])
    with pytest.raises(ValueError, match=message):
        list(jsonl.open_jsonl(write(text), ["a"]))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist\. Check"):
        jsonl.read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        jsonl.read_jsonl(tmp_path)


def test_facts_round_trip_from_the_packaged_form(write):
    rows = [
        {
            "country": fact.subject,
            "capital": fact.answer,
            "continent": fact.group,
            "aliases": list(fact.aliases),
        }
        for fact in facts.capitals()
    ]
    path = write("\n".join(json.dumps(row) for row in rows))
    assert facts.read_facts(path) == facts.capitals()


def test_facts_need_only_country_and_capital(write):
    path = write('{"country": "Freedonia", "capital": "Fredville"}')
    assert facts.read_facts(path) == [
        facts.Fact("Freedonia", "Fredville", ("Fredville",), "none")
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"country": "B"}', "line 2: needs 'capital'"),
        (
            '{"country": "B", "capital": 3}',
            "line 2: A fact needs a text 'capital', got 3",
        ),
        ('{"country": " ", "capital": "X"}', "line 2: A fact needs a 'country'"),
        ('{"country": "B", "capital": "X", "aliases": "Y"}', "line 2: .*list of texts"),
        ('{"country": "A", "capital": "X"}', "line 2: 'A' is already on line 1"),
    ],
)
def test_bad_facts_are_named_with_the_line(write, row, message):
    path = write('{"country": "A", "capital": "X"}\n' + row)
    with pytest.raises(ValueError, match=message):
        facts.read_facts(path)
