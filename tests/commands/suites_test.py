# SPDX-License-Identifier: Apache-2.0
"""evaluate, attack and report on a run of a tiny model, and what they refuse."""

import json

import jax
import pytest
from click.testing import CliRunner

from jaxunlearn import data
from jaxunlearn.commands import _group
from jaxunlearn.io import hf
from jaxunlearn.workflows import run_folder
from jaxunlearn.workflows.attack import jobs
from jaxunlearn.workflows.evaluation import values
from tests import tiny

QUICK = ("--new-tokens", "3", "--batch-size", "8")
ATTACKS = ("--attacks", "prefix,relearn", "--steps", "1", *QUICK)


def facts(kind, count, first="prompt"):
    return [
        {first: f"The capital of Land {kind}{i} is", "answer": f"Town {i}."}
        for i in range(count)
    ]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an original model, two files of rows, and a finished run."""
    folder = tmp_path_factory.mktemp("suites")
    tokenizer = tiny.tiny_tokenizer()
    model, params = tiny.tiny_model(vocab=len(tokenizer), positions=64)
    hf.save(model, params, folder / "original", tokenizer=tokenizer)
    hf.save(model, params, folder / "bare")
    for name, count in (("forget", 6), ("retain", 4)):
        write_rows(folder / f"{name}.jsonl", facts(name[0], count))
    unlearned = jax.tree.map(lambda x: x * 1.1, params)
    make_run(folder / "run", folder, model, unlearned, tokenizer)
    return folder


def make_run(path, folder, model, params, tokenizer):
    run = run_folder.at(path)
    path.mkdir()
    hf.save(model, params, run.model, tokenizer=tokenizer)
    streams = {
        name: run_folder.Stream("file", str(folder / f"{name}.jsonl"))
        for name in ("forget", "retain")
    }
    record = run_folder.Record(
        action="forget",
        command="jaxunlearn forget --model m",
        original=str(folder / "original"),
        method="openunlearning.npo",
        arguments={},
        seed=3,
        streams=streams,
        prompt_format=data.PromptFormat(),
        versions={},
        config={},
    )
    run_folder.write(run, record)
    entries = [{"step": i, "forget/loss": 3.0 - i} for i in range(2)]
    write_rows(run.metrics, entries)


def run(*args):
    return CliRunner().invoke(_group.group, [str(x) for x in args])


def passes(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def refused(*args, words, status=2):
    result = run(*args)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error")]
    for word in words:
        assert str(word) in line, line
    return line


@pytest.fixture(scope="module")
def evaluated(place):
    with jax.numpy_dtype_promotion("standard"):
        return place / "run", passes("evaluate", place / "run", *QUICK)


def test_a_run_is_evaluated_before_and_after(place, evaluated):
    folder, result = evaluated
    for role, name in (("original", "original"), ("unlearned", "run")):
        evaluation = folder / "evaluation" / role
        about = json.loads((evaluation / "about.json").read_text())
        assert (about["name"], about["role"]) == (name, role)
        assert set(about["data"]) == {"forget", "retain"}
        assert about["settings"]["prompt_format"]["end"] == "auto"  # the run's
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["original", "unlearned"]
    (first, *_) = [x for x in lines if x.startswith("forget")]
    assert first.split()[1] == "probability" and first.count("[") == 2


def test_the_same_again_does_nothing_and_ctrl_c_resumes(
    place, evaluated, monkeypatch, tmp_path
):
    _, first = evaluated
    monkeypatch.setattr(values, "of_task", lambda *_, **__: pytest.fail("again"))
    again = passes("evaluate", place / "run", *QUICK)
    assert again.stdout == first.stdout and again.stderr.count("Nothing changed") == 2
    monkeypatch.undo()
    real, done = values.of_task, []

    def interrupted(model, params, tokenizer, task, *rest, **more):
        if task.name == "retain" and not done:
            done.append(task.name)
            raise KeyboardInterrupt
        return real(model, params, tokenizer, task, *rest, **more)

    monkeypatch.setattr(values, "of_task", interrupted)
    args = ["evaluate", place / "original", "--output", tmp_path, *QUICK]
    args += ["--forget", place / "forget.jsonl", "--retain", place / "retain.jsonl"]
    result = run(*args)
    assert result.exit_code == 130 and "resume" in result.stderr
    assert "forget: unchanged" in passes(*args).stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["tasks"]["retain"]


def test_a_retrained_evaluation_of_other_rows_is_refused(place, evaluated, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", facts("x", 3))
    unlearned = place / "run" / "evaluation" / "unlearned"
    args = ["--forget", other, "--retrained", unlearned, *QUICK]
    refused("evaluate", place / "run", *args, words=("forget", unlearned))


EVALUATE = ("evaluate", "original", "--output", "eval")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("evaluate",), ("model", "jaxunlearn evaluate runs/a")),
        (("attack",), ("model", "jaxunlearn attack runs/a")),
        (("report",), ("evaluation", "jaxunlearn report runs/a")),
        (("evaluate", "original"), ("--output",)),
        ((*EVALUATE,), ("task", "--forget")),
        ((*EVALUATE, "--forget", "columns.jsonl"), ("'prompt'", "columns.jsonl")),
        ((*EVALUATE, "--forget", "nowhere.jsonl"), ("nowhere.jsonl",)),
        ((*EVALUATE, "--tasks", "tofuu"), ("tofuu", "'tofu'")),
        ((*EVALUATE, "--set", "scor.length=8"), ("scor", "score.length")),
        ((*EVALUATE, "--role", "teacher"), ("role='teacher'",)),
        (("evaluate", "bare", "--output", "e", "--forget", "forget.jsonl"), ("bare",)),
        (("evaluate", "nomodel", "--output", "e", "--forget", "forget.jsonl"), ()),
        (("attack", "run", "--attacks", "relern"), ("relern", "'relearn'")),
        (("attack", "run", "--learning-rates", "1e-5,fast"), ("1e-5,fast",)),
        (("attack", "original", "--forget", "forget.jsonl"), ("--output",)),
        (("attack", "original", "--output", "card"), ("--forget",)),
        (("attack", "run", "--forget", "columns.jsonl"), ("'prompt'",)),
        (("attack", "run", "--set", "query.new=x"), ("query.new", "query.new_tokens")),
        (("report", "empty", "--output", "out"), ("empty", "jaxunlearn evaluate")),
        (("report", "nowhere", "--output", "out"), ("nowhere",)),
        (("report", "--card", "empty", "--output", "out"), ("none",)),
        (("report", "--run", "original", "--output", "out"), ("run.json",)),
    ],
)
def test_bad_uses_are_refused_in_one_line(place, monkeypatch, args, words):
    monkeypatch.chdir(place)
    (place / "empty").mkdir(exist_ok=True)
    write_rows(place / "columns.jsonl", [{"text": "x", "answer": "y"}])
    refused(*args, words=words)


def test_an_output_that_cannot_be_written_is_refused(
    place, evaluated, tmp_path, monkeypatch
):
    blocked = tmp_path / "file"
    blocked.write_text("")
    forget = ("--forget", place / "forget.jsonl", *QUICK)
    given = ("--output", blocked / "eval")
    refused("evaluate", place / "original", *forget, *given, words=("file",))
    refused("attack", place / "run", *given, words=("file",))
    refused("report", place / "run", *given, words=("file",))
    monkeypatch.setattr(hf, "load", lambda *_: pytest.fail("the weights were read"))
    given = ("--output", blocked / "model")
    refused("export", place / "run", *given, words=("file", "--output"))
    given = ("--format", "gguf", "--output", blocked / "model.gguf")
    refused("export", place / "run", *given, words=("file", "--output"))


def test_attack_prints_the_card_and_resumes(place, evaluated, monkeypatch):
    real, stopped = jobs.plan, []

    def plan(*args, **more):
        def cut(job):
            def stop(context):
                if not stopped:
                    stopped.append(job.name)
                    raise KeyboardInterrupt
                return job.run(context)

            return job._replace(run=stop) if job.name == "relearn" else job

        return [cut(job) for job in real(*args, **more)]

    monkeypatch.setattr(jobs, "plan", plan)
    folder = place / "run" / "attack"
    result = run("attack", place / "run", *ATTACKS)
    assert result.exit_code == 130 and (folder / "attacks" / "prefix.json").exists()
    written = (folder / "attacks" / "prefix.json").stat().st_mtime_ns
    result = passes("attack", place / "run", *ATTACKS)
    assert (folder / "attacks" / "prefix.json").stat().st_mtime_ns == written
    assert (folder / "card.md").read_text().strip() == result.stdout.strip()
    card = json.loads((folder / "card.json").read_text())
    names = [row["name"] for row in card["rows"]]
    assert names == ["original", "unlearned", "prefix", "relearn"]
    assert card["about"]["facts"] == {"forget": 6, "retain": 4}
    page = report_of(place / "run")
    assert "Robustness card: run" in page and "forget/loss" not in page


def report_of(folder):
    result = passes("report", folder)
    assert str(folder / "report" / "report.html") in result.stdout
    assert (folder / "report" / "training.png").exists()
    return (folder / "report" / "report.html").read_text()


def test_two_runs_share_their_original_in_a_report(place, evaluated, tmp_path):
    model, params, tokenizer = hf.load(place / "run" / "model")
    make_run(tmp_path / "b", place, model, params, tokenizer)
    passes("evaluate", tmp_path / "b", *QUICK)
    passes("report", place / "run", tmp_path / "b", "--output", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| original |" in text and "| run |" in text and "| b |" in text
    assert "original of" not in text


def test_a_missing_library_of_the_report_is_named(place, evaluated, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    words = ("jinja2", "jaxunlearn[hf]")
    refused("report", place / "run", words=words)
