# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import pytest

from jaxunlearn.data import prose


@pytest.fixture(scope="module")
def texts():
    return prose.prose()


def test_there_is_enough_of_both_and_they_are_disjoint(texts):
    train, held = texts
    # About 4.5 characters a token: 40 rows of 64 to train on, 4,000 held out.
    assert len(train) > 5 * 40 * 64 and len(held) > 5 * 4000
    paragraphs = [text.split("\n\n") for text in texts]
    assert not set(paragraphs[0]) & set(paragraphs[1])
    for side in paragraphs:
        assert len(side) == len(set(side))


def test_markup_code_and_tables_are_gone(texts):
    for text in texts:
        for mark in (">>>", "::=", "+--", "|  ", "****", "====", "\n "):
            assert mark not in text


def test_the_split_is_the_same_in_every_process(texts):
    code = "from jaxunlearn.data import prose; print(prose.prose()[1][:99])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        encoding="utf-8",
        env={
            "PYTHONHASHSEED": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONUTF8": "1",
        },
    ).stdout
    assert out.strip("\n") == texts[1][:99]


def test_a_paragraph_is_joined_and_unmarked():
    block = (
        'The *name* of a "module" is a name, and the quote-\ndelimited text is "a b".'
    )
    assert prose.paragraphs(block) == [
        'The name of a module is a name, and the quote-delimited text is "a b".'
    ]
    code = "   x = 1\n   y = 2\n\nfor_stmt ::= a b c d e f g h i j k l m."
    assert prose.paragraphs(code) == []


def test_a_python_without_the_reference_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match="pydoc_data.topics"):
        prose.prose()
