# SPDX-License-Identifier: Apache-2.0
"""Every attack, on capitals of Europe that were to be forgotten.

python -m jaxunlearn.workflows.attack.run --config=experiments/configs/attack.py \
    --config.model=runs/quickstart/model --config.original=smollm2 \
    --config.output=runs/attack

Behind a colon other facts: attack.py:tofu for forget10, or attack.py:file for files of
your own, with columns `question`, `answer` and `choices` (or `perturbed_answer`, wrong
answers):

    --config=experiments/configs/attack.py:file \
    --config.facts.forget.path=FORGET.jsonl --config.facts.retain.path=RETAIN.jsonl
"""

from jaxunlearn import _checks
from jaxunlearn.workflows.attack import run as attack


def get_config(which: str = "capitals"):
    c = attack.defaults()
    _checks.one_of("attack.py", ("capitals", "tofu", "file"), facts=which)
    capitals = dict(source="capitals", group="Europe")
    tofu = dict(source="benchmark", name="tofu", block=20, rows=200)
    file = dict(source="file", path="", rows=0, block=1)
    c.facts = {
        "capitals": {
            "forget": capitals | dict(rows=0),
            "retain": capitals | dict(others=True, rows=60),
        },
        "tofu": {
            "forget": tofu | dict(table="forget10_perturbed"),
            "retain": tofu | dict(table="retain_perturbed"),
        },
        "file": {"forget": dict(file), "retain": dict(file)},
    }[which]
    if which == "capitals":
        c.known = "auto"
    if which == "tofu":
        c.ask.prompt = "Question: {question}\nAnswer:"
        c.ask.new_tokens = 64
    return c
