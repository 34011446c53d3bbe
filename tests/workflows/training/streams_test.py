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


def made(pairs=(), **data):
    streams_ = {k: COMMON | v for k, v in data.items()}
    config = ConfigDict({"data": streams_, "prompt_format": {}})
    for name, stream in config.data.items():
        settings.check_stream(name, dict(stream))
    model, _ = tiny.tiny_model(vocab=400)
    found = streams.read(config, model, tiny.tiny_tokenizer(), pairs=pairs)
    if pairs:
        return {name: (stream.rows, stream.ids) for name, stream in found.items()}
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


def test_chats_with_the_tokenizers_template(write, monkeypatch):
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


def test_running_text_is_cut_into_full_rows(write, tmp_path):
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
    with pytest.raises(
        ValueError, match="row 0: needs a text in the column 'answer', got 3"
    ):
        made(forget=stream | {"folder": str(tmp_path)})


PAIR = [("alternate", "forget")]


def pair_files(write, forget, alternate, **more):
    return {
        name: {"source": "file", "path": write(f"{name}.jsonl", rows)} | more
        for name, rows in (("forget", forget), ("alternate", alternate))
    }


def test_pairs_are_matched_by_id_and_dropped_together(write):
    other = [row | {"answer": f"Not {row['id']}."} for row in reversed(ROWS)]
    other[1] = other[1] | {"answer": "I do not know. " * 9}  # id 2
    forget = [ROWS[0] | {"answer": "the city " * 20}, *ROWS[1:]]
    given = pair_files(write, forget, [*other, ROWS[0] | {"id": "9"}], long="drop")
    with pytest.warns(UserWarning, match="2 of 4 pairs"):
        got = made(PAIR, **given)
    assert got["forget"][1] == got["alternate"][1] == ["1", "3"]
    tokenizer = tiny.tiny_tokenizer()
    texts = {
        name: [
            tokenizer.decode(row[mask])
            for row, mask in zip(table["tokens"], table["mask"], strict=True)
        ]
        for name, (table, _) in got.items()
    }
    for number, row in zip("13", range(2), strict=True):
        start = f"The capital of Land {number} is "
        assert texts["forget"][row] == f"{start}Town {number}."
        assert texts["alternate"][row] == f"{start}Not {number}."
    with pytest.raises(ValueError, match="'alternate' .* but '0' have none"):
        made(PAIR, **pair_files(write, forget, other[:3]))
    with pytest.raises(ValueError, match="unique ids, got 4 ids in 5 rows"):
        made(PAIR, **pair_files(write, ROWS, [*ROWS, ROWS[0]]))


def test_pairs_without_ids_need_the_same_prompts(write):
    bare = [{k: v for k, v in row.items() if k != "id"} for row in ROWS]
    got = made(PAIR, **pair_files(write, bare, bare))
    assert got["forget"][1] == [row["prompt"] for row in ROWS]
    swapped = [bare[0], bare[2], bare[1], bare[3]]
    with pytest.raises(ValueError, match="row 1, .*Land 2 .*alternate.jsonl, line 2"):
        made(PAIR, **pair_files(write, bare, swapped))
    with pytest.raises(ValueError, match="row 3, .*no such row in 'alternate'"):
        made(PAIR, **pair_files(write, bare, bare[:3]))


def test_both_answers_may_be_columns_of_one_file(write):
    path = write("rows.jsonl", [row | {"other": "Nowhere."} for row in ROWS])
    given = {"source": "file", "path": path}
    got = made(PAIR, forget=given, alternate=given | {"answer": "other"})
    assert got["forget"][1] == got["alternate"][1] == list("0123")
    forget, alternate = (got[name][0]["tokens"] for name in ("forget", "alternate"))
    assert (forget != alternate).any()


def test_ids_outside_the_vocabulary_are_refused(write, monkeypatch):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[NEW]"]})
    monkeypatch.setattr(tiny, "tiny_tokenizer", lambda: tokenizer)
    small = len(tokenizer) - 1
    model, params = tiny.tiny_model(vocab=small)
    monkeypatch.setattr(tiny, "tiny_model", lambda **_: (model, params))
    path = write("a.jsonl", [*ROWS[:2], ROWS[2] | {"prompt": "[NEW] Who?"}])
    with pytest.raises(ValueError, match=f"'forget' .*got {small} .*in row 2 "):
        made(forget={"source": "file", "path": path})
    lazy = made(forget={"source": "jsonl", "path": path, "lazy": True})["forget"]
    assert lazy[1]["mask"].any()
    with pytest.raises(ValueError, match=f"Row 2 of the source: .*got {small} "):
        lazy[2]
