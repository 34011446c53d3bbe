# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation and attacks of a run join prompts and answers in one way."""

import json

import jax
import pytest

from jaxunlearn import data
from jaxunlearn.io import hf
from jaxunlearn.workflows import run_folder
from jaxunlearn.workflows.attack import config as attack
from jaxunlearn.workflows.attack import run as attack_run
from jaxunlearn.workflows.evaluation import benchmarks, of_run, tasks
from jaxunlearn.workflows.evaluation import config as evaluation
from jaxunlearn.workflows.evaluation import folder as folders
from jaxunlearn.workflows.training import run as training
from jaxunlearn.workflows.training import settings
from tests import chat_templates, tiny

LANDS = ("Peru", "Chad", "Oman", "Fiji", "Mali", "Cuba", "Iran", "Laos")
TOWNS = ("Lima", "Doha", "Rome", "Oslo", "Riga", "Bern", "Baku", "Kyiv")
# The second has the prompt and the end that the benchmark TOFU is evaluated with.
FORMATS = {
    "plain": {},
    "worded": {"prompt": "Question: {question}\nAnswer:", "end": "eos"},
    "chat": {"chat": True, "system": "Be."},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model whose tokenizer has a chat template, and rows."""
    folder = tmp_path_factory.mktemp("formats")
    tokenizer = chat_templates.tokenizer(chat_templates.FAMILIES["Qwen 3"])
    sizes = dict(width=32, layers=1, heads=2, kv_heads=2, head_dim=16, hidden=64)
    model, params = tiny.tiny_model(vocab=len(tokenizer), positions=96, **sizes)
    hf.save(model, params, folder / "model", tokenizer=tokenizer)
    rows = [
        {"prompt": f"The town of {land}?", "answer": town}
        for land, town in zip(LANDS, TOWNS, strict=True)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def finetuned(place, name):
    """The run's folder, finetuned until the rows are known by heart."""
    config = settings.defaults()
    config.mode, config.steps, config.save_every = "finetune", 100, 100
    config.output = str(place / name)
    config.model.update(path=str(place / "model"), remat="none")
    config.data.train = dict(source="file", path=str(place / "rows.jsonl"), rows=8)
    config.prompt_format.update(FORMATS[name])
    config.recipe.name = "finetune.nll"
    config.recipe.args.learning_rate = 1e-2
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        result = training.run(settings.check(config), log_fn=lambda line: None)
    assert result["scores"]["after"]["train"]["nll"] < 0.02
    return place / name


def evaluated(model, place, output, **more):
    task = {"source": "file", "path": str(place / "rows.jsonl")}
    found = {"model": str(model), "output": str(output), "tasks": {"forget": task}}
    score = {"gradnorm": False, "new_tokens": 8}
    metrics = evaluation.evaluate(found | {"score": score} | more)
    return {x: v["value"] for x, v in metrics["unlearned"]["tasks"]["forget"].items()}


@pytest.mark.parametrize(
    "name", ["plain", "chat", pytest.param("worded", marks=pytest.mark.slow)]
)
def test_what_a_run_trained_is_what_an_evaluation_scores(place, name, monkeypatch):
    run = finetuned(place, name)
    _, record = run_folder.finished(run)
    assert record.prompt_format == data.PromptFormat(**FORMATS[name])
    given = {"prompt_format": FORMATS[name]}
    found = evaluated(run / "model", place, place / f"{name}-eval", **given)
    assert found["probability"] > 0.97 and found["extraction_strength"] == 1.0
    assert found.get("end_nll", 0.0) < 0.1 and ("end_nll" in found) == (name != "plain")
    rows = folders.read_rows(place / f"{name}-eval", "forget")
    texts = [row["completion"].strip() for row in rows]
    if name != "plain":
        assert texts == list(TOWNS)
    else:  # an end that training never showed is named; nothing stops a completion
        assert all(x.startswith(t) for x, t in zip(texts, TOWNS, strict=True))
        other = {"prompt_format": {"end": "eos"}}
        with pytest.warns(UserWarning, match="'forget': the end token alone costs"):
            other = evaluated(run / "model", place, place / "other-eval", **other)
        assert other["probability"] < 0.5 and other["end_nll"] > 3
    # The run's own format is the default of its evaluation and of its attacks.
    seen = {}

    def attacked(path, fact_set, output, *, settings, **more):
        seen["attack"] = settings.prompt_format

    def scored(run, record, eval_tasks, options, **more):
        seen["evaluation"] = options.settings.prompt_format

    monkeypatch.setattr(attack_run, "attack_model", attacked)
    monkeypatch.setattr(evaluation.of_run, "evaluate_run", scored)
    rows = str(place / "rows.jsonl")
    attack.attack({"model": str(run), "forget": rows, "retain": rows})
    task = {"source": "file", "path": rows}
    given = {"forget": task, "retain": task}
    evaluation.evaluate({"model": str(run), "tasks": given})
    assert seen == dict.fromkeys(("attack", "evaluation"), record.prompt_format)


def test_settings_that_need_a_chat_are_refused():
    config = settings.defaults()
    config.prompt_format.system = "Be."
    with pytest.raises(ValueError, match="system='Be.' and chat=False"):
        settings.check_prompt_format(config)


@pytest.mark.parametrize(
    ("name", "value"), [("system", "Be."), ("template", "{{ x }}")]
)
def test_chat_settings_of_a_stream_without_a_chat_are_refused(place, name, value):
    config = settings.defaults()
    config.output = config.model.path = "unused"
    config.recipe.name = "openunlearning.npo"
    stream = dict(source="file", path="unused", rows=2)
    config.data.retain = stream | {"prompt_format": {name: value}}
    with pytest.raises(ValueError, match=f"stream 'retain' .*{name}='.*chat=False"):
        settings.check(config)
    config.data.retain.prompt_format.chat = True
    settings.check(config)
    # A stream without a chat in a run with one does not use the run's system message.
    config.prompt_format.update({"chat": True, name: value})
    config.data.retain.prompt_format = {"chat": False}
    settings.check(config)
    given, rows = {"prompt_format": {name: value}}, str(place / "rows.jsonl")
    task = {"source": "file", "path": rows}
    for door, more in (
        (evaluation.evaluate, {"tasks": {"forget": task}, **given}),
        (evaluation.evaluate, {"tasks": {"forget": task | {"score": given}}}),
        (attack.attack, {"forget": rows, "retain": rows, **given}),
    ):
        with pytest.raises(ValueError, match=f"{name}='.*chat=False"):
            door({"model": str(place / "model"), "output": "unused", **more})


def test_the_template_of_a_stream_is_read_and_recorded(tmp_path):
    file = tmp_path / "a.jinja"
    file.write_text("{{ messages }}")
    config = settings.defaults()
    config.output = config.model.path = "unused"
    config.recipe.name = "openunlearning.npo"
    format = {"chat": True, "template": str(file)}
    config.data.retain = dict(source="prose", rows=2, length=8)
    config.data.forget = dict(source="file", path="x", rows=2, prompt_format=format)
    settings.check(config)
    assert config.data.forget.prompt_format.template == "{{ messages }}"


def test_questions_of_a_benchmark_take_the_format_that_is_given():
    def formats(name, **given):
        found = benchmarks.tasks(name, data.PromptFormat().as_dict() | given)
        return [task["score"]["prompt_format"] for task in found.values()]

    assert formats("tofu") == [benchmarks.QA_FORMAT] * 5
    chat = data.PromptFormat(chat=True, system="Be.").as_dict()
    assert formats("tofu", chat=True, system="Be.") == [chat] * 5
    *questions, passage = formats("muse", end="\n")
    assert questions == [benchmarks.QA_FORMAT | {"end": "\n"}] * 2
    assert passage == benchmarks.PASSAGE_FORMAT
    assert formats("mmlu", chat=True) == [benchmarks.LETTER_FORMAT]


def test_tasks_of_a_run_have_the_formats_of_its_streams(place, tmp_path):
    (tmp_path / "text.txt").write_text("The river flows to the sea.")
    rows = run_folder.Stream("file", str(place / "rows.jsonl"))
    text = run_folder.Stream("file", str(tmp_path / "text.txt"), "text", "")
    config = {"prompt_format": {"chat": True}}
    config["data"] = {"retain": {"prompt_format": {"chat": False, "end": "eos"}}}
    record = run_folder.Record(
        action="forget",
        command="",
        original="",
        method="",
        arguments={},
        seed=0,
        streams={"forget": rows, "retain": rows, "text": text},
        prompt_format=data.PromptFormat(chat=True),
        versions={},
        config=config,
    )
    found = of_run.read_tasks(record, {name: name for name in record.streams})
    common = tasks.Settings(record.prompt_format)
    formats = [task.with_defaults(common).prompt_format for task in found.values()]
    assert formats == [
        data.PromptFormat(chat=True),
        data.PromptFormat(end="eos"),
        data.PromptFormat(),
    ]
