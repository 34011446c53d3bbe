# SPDX-License-Identifier: Apache-2.0
"""Every command writes the same options into the block `prompt_format`."""

import pytest

from jaxunlearn import data
from jaxunlearn.commands import _training
from jaxunlearn.workflows.attack import config as attack
from jaxunlearn.workflows.evaluation import config as evaluation
from jaxunlearn.workflows.evaluation import printed
from tests import chat_templates

GIVEN = {"chat": True, "system": "Be.", "prompt": "Q: {question}", "end": "eos"}
OPTIONS = ("--chat", "--system", "Be.", "--prompt", "Q: {question}", "--end", "eos")


@pytest.fixture
def configs(monkeypatch):
    """Name of the command -> the config that it made; nothing runs."""
    made = {}
    monkeypatch.setattr(_training, "run", lambda c: made.update(training=c))
    monkeypatch.setattr(printed, "table", lambda found: [])
    for module, name in ((evaluation, "evaluate"), (attack, "attack")):

        def keep(config, name=name, **more):
            made[name] = config
            return {}, "card"

        monkeypatch.setattr(module, name, keep)
    return made


def test_options_are_settings_of_the_prompt_format(run, configs, tmp_path):
    template = tmp_path / "a.jinja"
    template.write_text(chat_templates.FAMILIES["Gemma"].template)
    options = (*OPTIONS, "--template", template)
    arguments = ("--set", "prompt_format.arguments.date_string=1 May")
    paths = ("--model", "m", "--output", "o", "--data", "rows.jsonl")
    for command in (
        ("finetune", *paths),
        ("evaluate", "m", "--output", "o"),
        ("attack", "m", "--output", "o"),
    ):
        found = run(*command, *options, *arguments)
        assert found.exit_code == 0, found.output
    wanted = data.PromptFormat().with_settings(
        GIVEN | {"template": str(template), "arguments": {"date_string": "1 May"}}
    )
    blocks = [configs[name]["prompt_format"] for name in ("evaluate", "attack")]
    blocks.append(configs["training"].prompt_format.to_dict())
    for block in blocks:
        assert data.PromptFormat().with_settings(block) == wanted
    assert run("evaluate", "m", "--no-chat").exit_code == 0
    assert configs["evaluate"]["prompt_format"] == {"chat": False}
    assert run("evaluate", "m").exit_code == 0
    assert configs["evaluate"]["prompt_format"] == {}  # a run's format is used
