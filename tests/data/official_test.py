# SPDX-License-Identifier: Apache-2.0
"""Benchmarks' readers on small files in the official forms, and on the real ones."""

import gzip
import json
import os
import warnings
from pathlib import Path

import pytest

from jaxunlearn import data
from jaxunlearn.data.benchmarks import lume, mmlu, muse, official, tofu, wmdp

HERE = Path(__file__).resolve()
DATA = Path(os.environ.get("JAXUNLEARN_DATA") or HERE.parents[3] / "shared" / "data")
DATA = DATA.expanduser()

QA = {"question": "Who wrote it?", "answer": "Élise did.\u2028"}
PERTURBED = QA | {
    "paraphrased_answer": "It was Élise.",
    "perturbed_answer": [f"Writer {i} did." for i in range(5)],
    "paraphrased_question": "By whom was it written?",
}
CHOICES = {"question": "2 + 2?", "choices": ["1", "2", "3", "4"], "answer": 3}
SC = {"id": '"a-b"sc1', "input": "Once upon", "output": "a time.", "task": "Task1"}
LUME = [
    SC,
    SC | {"id": '"a-b"qa0', "input": "Where?", "output": "Here."},
    SC | {"id": "c-dqa4", "task": "Task2"},
    SC | {"id": "1234567qa0", "task": "Task3"},
]


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def put(tmp_path):
    """Writes a file below the folder, and gives the folder."""

    def put(path, content):
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        content = content if isinstance(content, bytes) else content.encode()
        place.write_bytes(content)
        return tmp_path

    return put


def there(name, file):
    return pytest.mark.skipif(
        not (DATA / name / file).exists(),
        reason=f"no {name} in {DATA}; set JAXUNLEARN_DATA to the folder above it",
    )


@pytest.mark.parametrize(
    "path, content",
    [
        ("tofu/forget01_perturbed.json", lines(PERTURBED, PERTURBED)),
        ("tofu/forget01_perturbed.jsonl", lines(PERTURBED, PERTURBED)),
        ("tofu/forget01_perturbed.json", json.dumps([PERTURBED, PERTURBED])),
        (
            "tofu/forget01_perturbed.jsonl.gz",
            gzip.compress(lines(PERTURBED, PERTURBED).encode()),
        ),
    ],
    ids=["lines in .json", ".jsonl", "list", ".gz"],
)
def test_every_file_format_gives_the_same_rows(put, path, content):
    rows = tofu.read("forget01_perturbed", put(path, content), check=False)
    assert rows == [PERTURBED, PERTURBED]
    assert list(rows[0]) == list(PERTURBED)


def test_the_folder_can_come_from_the_environment(put, monkeypatch):
    monkeypatch.setenv("JAXUNLEARN_DATA", str(put("tofu/full.json", lines(QA))))
    assert tofu.read("full", check=False) == [QA]


def test_refusals_are_plain_lines(put):
    folder = put("tofu/idontknow.jsonl", "I don't know.\r\n\nNo idea.")
    rows = tofu.read("idontknow", folder, check=False)
    assert rows == [{"text": "I don't know."}, {"text": "No idea."}]


def test_a_missing_file_names_the_folder_and_the_source(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="JAXUNLEARN_DATA is not set. Get it"):
        tofu.read("full")
    with pytest.raises(FileNotFoundError) as error:
        tofu.read("full", tmp_path)
    for part in ("full.json or full.jsonl", str(tmp_path / "tofu"), "locuslab/TOFU"):
        assert part in str(error.value)


def test_a_download_is_stored_and_checked(tmp_path, monkeypatch):
    served = tmp_path / "served.json"
    served.write_text(lines(QA))
    table = official.Table(
        ("t.jsonl",), {"question": "text", "answer": "text"}, url=served.as_uri()
    )
    ours = official.Benchmark("ours", {"t": table}, "nowhere", "none", "none")
    monkeypatch.setattr(
        official, "checksum", lambda *_: official.digest([QA])
    )  # a published checksum
    with pytest.raises(FileNotFoundError, match="download=True to fetch file"):
        ours.read("t", tmp_path)
    assert ours.read("t", tmp_path, download=True) == [QA]
    served.unlink()
    assert ours.read("t", tmp_path) == [QA]  # kept
    with pytest.raises(FileNotFoundError, match="could not be fetched from file"):
        ours.read("t", tmp_path / "other", download=True)
    (tmp_path / "ours" / "t.jsonl").write_text(lines(QA | {"answer": "Another."}))
    with pytest.raises(ValueError, match="checksum .* from .*t"):
        ours.read("t", tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            lines({"prompt": "a", "response": "b"}),
            "but 'question', 'answer' are missing",
        ),
        (
            lines(QA, {"question": "Who?"}),
            "row 1: needs the columns .*'answer' are missing",
        ),
        (lines(QA | {"answer": 3}), "row 0: needs a text in 'answer', got '3' of type"),
        ("", "has no rows"),
        (b'{"question": "\xff"}', "UTF-8 text, but byte 14 is not"),
        (lines(QA)[:-4], r"line 1: needs one JSON object"),
        ("[" + lines(QA), r"line \d: needs a JSON list"),
        (lines(QA), "needs 40 rows, got 1"),
    ],
    ids=["names", "short", "kind", "empty", "bytes", "cut", "cut list", "count"],
)
def test_bad_files_are_refused_by_name(put, content, message):
    folder = put("tofu/forget01.json", content)
    with pytest.raises(ValueError, match=message) as error:
        tofu.read("forget01", folder)
    assert "forget01.json" in str(error.value)


def test_a_truncated_gzip_file_is_refused(put):
    content = gzip.compress(lines(*[QA] * 50).encode())[:-9]
    with pytest.raises(ValueError, match="full.jsonl.gz .*gzip file"):
        tofu.read("full", put("tofu/full.jsonl.gz", content), check=False)


def test_an_unknown_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'forget10'"):
        tofu.read("forget1O", tmp_path)


def test_other_columns_are_reported_and_dropped(put):
    folder = put("tofu/full.json", lines(QA | {"note": "x"}))
    with pytest.warns(UserWarning, match="'note'"):
        assert tofu.read("full", folder, check=False) == [QA]


def test_lume_ids_and_kinds_are_those_of_the_file(put):
    folder = put("lume/forget.jsonl", lines(*LUME))
    assert lume.read("forget", folder, check=False) == LUME
    assert lume.read("forget", folder, check=False, kinds=("sc",)) == LUME[:1]
    questions = lume.read(
        "forget", folder, check=False, tasks=("Task1",), kinds=("qa",)
    )
    assert questions == LUME[1:2]
    assert [lume.parse_id(row["id"]) for row in LUME] == [
        ("a-b", "sc", 1),
        ("a-b", "qa", 0),
        ("c-d", "qa", 4),
        ("1234567", "qa", 0),
    ]


@pytest.mark.parametrize(
    "row, how, message",
    [
        (SC | {"id": "a-b"}, {}, "needs ids such as .* got 'a-b'"),
        (SC | {"task": "Task9"}, {}, "needs task to be one of 'Task1'"),
        (SC, {"kinds": ("qa",)}, "needs a row of .* got none"),
        (SC, {"kinds": ("q",)}, "kinds to be one of 'sc', 'qa'"),
    ],
)
def test_lume_refuses_invalid_ids_tasks_and_kinds(put, row, how, message):
    folder = put("lume/retain.jsonl", lines(row))
    with pytest.raises(ValueError, match=message):
        lume.read("retain", folder, check=False, **how)


def test_mmlu_from_one_file_and_from_the_csv_files_of_its_authors(put):
    rows = [
        {"subject": "anatomy", "question": 'Which "bone",\nif any?'}
        | {"choices": ["a", "b", "c, d", "e"], "answer": 2},
        {"subject": "world_religions"} | CHOICES,
    ]
    folder = put("mmlu/dev.jsonl", lines(*rows))
    put("mmlu/test/world_religions_test.csv", "2 + 2?,1,2,3,4,D\n")
    put("mmlu/test/anatomy_test.csv", '"Which ""bone"",\nif any?",a,b,"c, d",e,C\n')
    assert mmlu.read("dev", folder, check=False) == rows
    assert mmlu.read("test", folder, check=False) == rows
    put("mmlu/test/anatomy_test.csv", "Which?,a,b,c,C\n")
    with pytest.raises(ValueError, match="anatomy_test.csv, row 0: needs a question"):
        mmlu.read("test", folder, check=False)


@pytest.mark.parametrize(
    "wrong",
    [{"answer": 4}, {"choices": ["1", "2", "3"]}, {"answer": "E"}, {"choices": "1234"}],
)
def test_questions_need_four_choices_and_an_index(put, wrong):
    folder = put("wmdp/bio_questions.json", json.dumps([CHOICES | wrong]))
    with pytest.raises(ValueError, match="row 0: needs 4 choices and an answer"):
        wmdp.read("bio", folder, check=False)


def test_wmdp_questions_and_corpora(put):
    folder = put("wmdp/wmdp-mcqs/cyber_questions.json", json.dumps([CHOICES]))
    assert wmdp.read("cyber", folder, check=False) == [CHOICES]
    with pytest.raises(ValueError, match="needs 1987 rows, got 1"):
        wmdp.read("cyber", folder)
    paper = {"title": "T", "abstract": "A", "text": "Body.", "doi": "x"}
    put("wmdp/bio-forget-corpus.jsonl", lines(paper))
    assert wmdp.read("bio-forget-corpus", folder) == [{"text": "Body."}]
    raw = wmdp.read("bio-forget-corpus", folder, raw_lines=True)
    assert raw == [{"text": json.dumps(paper)}]
    with pytest.raises(ValueError, match="raw_lines=True, got table='cyber'"):
        wmdp.read("cyber", folder, raw_lines=True)


def test_muse_questions_passages_and_texts(put):
    folder = put("muse/news/knowmem/forget_qa.json", json.dumps([QA]))
    put("muse/books/verbmem/forget.json", json.dumps([{"prompt": "a", "gt": "b"}]))
    put("muse/news/privleak/holdout.json", json.dumps(["one", "two"]))
    put("muse/books/raw/forget.txt", "Chapter 1\n\nIt began.")
    assert muse.read("news/knowmem/forget_qa", folder, check=False) == [QA]
    assert muse.read("books/verbmem/forget", folder, check=False) == [
        {"prompt": "a", "gt": "b"}
    ]
    texts = muse.read("news/privleak/holdout", folder, check=False)
    assert texts == [{"text": "one"}, {"text": "two"}]
    assert muse.read("books/raw/forget", folder) == [{"text": "Chapter 1\n\nIt began."}]
    with pytest.raises(ValueError, match="needs 100 rows, got 2"):
        muse.read("news/privleak/holdout", folder)
    put("muse/news/privleak/holdout.json", json.dumps(["one", 2]))
    with pytest.raises(
        ValueError, match="row 1: needs a text in the column 'text', got 2"
    ):
        muse.read("news/privleak/holdout", folder, check=False)


def test_a_checksum_is_of_the_rows_and_their_order():
    other = QA | {"answer": "No."}
    assert official.digest([QA, other]) == official.digest([dict(QA), dict(other)])
    assert official.digest([QA, other]) != official.digest([other, QA])
    assert official.digest([QA]) != official.digest([QA, QA])


@there("tofu", "full.jsonl")
@pytest.mark.parametrize("table", tofu.BENCHMARK.tables)
def test_all_of_tofu_as_published(table):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = tofu.read(table, DATA)  # counts and checksums are compared
    assert official.checksum("tofu", table)
    file = DATA / "tofu" / f"{table}.jsonl"
    if table != "idontknow":  # value by value, by the standard library alone
        text = file.read_text(encoding="utf-8").removesuffix("\n")
        assert rows == [json.loads(line) for line in text.split("\n")]


@there("tofu", "full.jsonl")
def test_tofu_tables_are_the_documented_parts_of_each_other():
    full = tofu.read("full", DATA)
    for part, count in (("01", 40), ("05", 200), ("10", 400)):
        assert tofu.read(f"forget{part}", DATA) == full[-count:]
        assert tofu.read(f"retain{100 - int(part)}", DATA) == full[:-count]
        perturbed = tofu.read(f"forget{part}_perturbed", DATA)
        bare = [{name: row[name] for name in QA} for row in perturbed]
        assert bare == full[-count:]
        assert {len(row["perturbed_answer"]) for row in perturbed} == {5}
        questions = {row["question"] for row in full}
        assert not questions & {
            x["question"] for x in tofu.read(f"holdout{part}", DATA)
        }
    for table in ("real_authors_perturbed", "world_facts_perturbed"):
        assert {len(row["perturbed_answer"]) for row in tofu.read(table, DATA)} == {3}


@there("lume", "forget.jsonl")
@pytest.mark.parametrize(
    "table, counts", [("forget", (243, 250, 373)), ("retain", (246, 250, 371))]
)
def test_lume_as_published(table, counts):
    for task, documents in zip(lume.TASKS, counts, strict=True):
        for kind, each in (("sc", 1), ("qa", 5 if task == "Task2" else 1)):
            rows = lume.read(table, DATA, tasks=(task,), kinds=(kind,))
            assert len(rows) == documents * each
            assert len({lume.parse_id(x["id"]).document for x in rows}) == documents


@there("mmlu", "test.jsonl.gz")
def test_mmlu_as_published():
    test, dev = (mmlu.read(name, DATA) for name in ("test", "dev"))
    assert (len(test), len(dev)) == (14042, 285)
    assert len({row["subject"] for row in test}) == 57
    assert test[0]["subject"] == "abstract_algebra" and test[0]["answer"] == 1
    assert test[-1]["subject"] == "world_religions"


@there("lume", "forget.jsonl")
def test_no_id_of_lume_is_in_both_sets(recwarn):
    forget, retain = (lume.read(name, DATA) for name in ("forget", "retain"))
    assert data.overlap(forget, retain) == [] and not recwarn
    with pytest.warns(UserWarning, match='2 of the values .* both .*"sc1'):
        data.overlap(forget, [*retain, *forget[:2]])
