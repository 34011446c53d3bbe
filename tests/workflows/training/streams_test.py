# SPDX-License-Identifier: Apache-2.0
"""Streams from users' files and benchmarks' tables, and what is wrong with them."""

import json
import warnings

import pytest
from ml_collections import ConfigDict

from jaxunlearn.workflows.training import settings, streams
from tests import tiny
from tests.data.official_test import LUME, lines

ROWS = [
    {"id": str(i), "prompt": f"The capital of Land {i} is", "answer": f"Town {i}."}
    for i in range(4)
]
COMMON = {"rows": 2, "length": 32}


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(lines(*rows), encoding="utf-8")
        return str(path)

    return write


def made(**data):
    streams_ = {k: COMMON | v for k, v in data.items()}
    config = ConfigDict({"data": streams_, "prompt_format": {}})
    for name, stream in config.data.items():
        settings.check_stream(name, dict(stream))
    found = streams.read(config, tiny.tiny_model()[0], tiny.tiny_tokenizer())
    return {name: stream.rows for name, stream in found.items()}


def test_files_and_tables_become_streams(write, tmp_path):
    csv = tmp_path / "retain.csv"
    csv.write_text("question,reply\nWhat is it?,A test.\n")
    write("lume/forget.jsonl", LUME)
    table = {"source": "benchmark", "name": "lume", "table": "forget"}
    columns = {"prompt": "input", "answer": "output"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = made(
            forget=table | columns | {"folder": str(tmp_path), "check": False},
            retain={"source": "file", "path": str(csv)}
            | {"prompt": "question", "answer": "reply"},
        )
    assert got["forget"]["tokens"].shape == (4, 32)
    assert got["retain"]["tokens"].shape == (1, 32)


def test_chats_of_the_tokenizers_own_template(write, monkeypatch):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    monkeypatch.setattr(tiny, "tiny_tokenizer", lambda: tokenizer)
    long = ROWS[0] | {"prompt": "The capital of " * 40}
    path = write("forget.jsonl", [long, *ROWS[1:]])
    stream = {"source": "file", "path": path, "long": "drop"}
    stream["prompt_format"] = {"chat": True}
    with pytest.warns(UserWarning, match="1 of 4 rows have more than 40 tokens"):
        got = made(forget=stream | {"length": 40})["forget"]
    row = got["tokens"][0]
    assert tokenizer.decode(row[got["mask"][0]]) == (
        "[The capital of Land 1 is][Town 1.]"
    )
    assert tokenizer.decode(row[got["answer"][0]]) == "Town 1.]"


def test_running_text_is_cut_into_whole_rows(write, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    texts = [f"The river {i} flows to the sea, and on." for i in range(9)]
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    (tmp_path / "plain.txt").write_text("\n\n".join(texts))
    (tmp_path / "wmdp").mkdir()
    rows = [{"text": text} for text in texts]
    write("wmdp/cyber-forget-corpus.jsonl", rows)
    corpus = {"source": "benchmark", "name": "wmdp", "table": "cyber-forget-corpus"}
    got = made(
        plain={"source": "file", "path": str(tmp_path / "plain.txt"), "answer": ""},
        named={"source": "file", "path": write("rows.jsonl", rows), "answer": ""},
        forget=corpus | {"folder": str(tmp_path), "answer": "", "check": False},
    )
    for rows in got.values():
        assert rows["tokens"].reshape(-1).tolist() == ids[: len(ids) // 32 * 32]
        assert rows["answer"].all() and rows["tokens"].shape[1] == 32
    with pytest.raises(ValueError, match="at least one row of length=32"):
        (tmp_path / "plain.txt").write_text("Short.")
        made(
            plain={"source": "file", "path": str(tmp_path / "plain.txt")}
            | {"answer": ""}
        )


def test_ids_in_both_streams_are_reported(write):
    forget = {"source": "file", "path": write("forget.jsonl", ROWS)}
    retain = {"source": "file", "path": write("retain.jsonl", ROWS[2:])}
    with pytest.warns(UserWarning, match="2 of the values of 'id' .*both.*'2', '3'"):
        made(forget=forget, retain=retain)
    lines_alone = {
        name: s | {"source": "jsonl"}
        for name, s in (("forget", forget), ("retain", retain))
    }
    with pytest.warns(UserWarning, match="2 of the values of 'id' .*both.*'2', '3'"):
        made(**lines_alone)
    bare = [{k: row[k] for k in ("prompt", "answer")} for row in ROWS]
    retain["path"] = write("bare.json", bare[3:])
    with pytest.warns(UserWarning, match="1 of the values of 'prompt' .*Land 3 is"):
        made(forget=forget, retain=retain)


def test_rows_over_the_length_are_refused_or_counted(write):
    long = ROWS[0] | {"prompt": "The capital of " * 40}
    stream = {"source": "file", "path": write("forget.jsonl", [long, *ROWS[1:]])}
    with pytest.raises(ValueError, match="1 of 4 rows are too long"):
        made(forget=stream)
    with pytest.warns(UserWarning, match="1 of 4 rows have more than 32 tokens"):
        got = made(forget=stream | {"long": "drop"})
    assert len(got["forget"]["tokens"]) == 3


@pytest.mark.parametrize(
    "stream, message",
    [
        ({"source": "benchmark", "name": "tofuu"}, "Did you mean 'tofu'"),
        ({"source": "file", "path": "a.jsonl", "long": "cut"}, "'refuse', 'drop'"),
        ({"source": "file", "path": "a.doc"}, "a file that ends in"),
        ({"source": "file", "pth": "a.txt"}, "Did you mean 'path'"),
    ],
)
def test_wrong_streams_are_refused(stream, message):
    with pytest.raises(ValueError, match=message):
        made(forget=stream)


def test_columns_without_texts_are_refused(tmp_path):
    (tmp_path / "wmdp").mkdir()
    row = {"question": "2 + 2?", "choices": ["1", "2", "3", "4"], "answer": 3}
    (tmp_path / "wmdp" / "bio_questions.json").write_text(json.dumps([row]))
    stream = {"source": "benchmark", "name": "wmdp", "table": "bio", "check": False}
    with pytest.raises(ValueError, match="text in the column 'answer', got 3 in row 0"):
        made(forget=stream | {"folder": str(tmp_path)})
