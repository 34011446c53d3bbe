# SPDX-License-Identifier: Apache-2.0
"""TOFU's evaluation of a model: forget10, or another part named behind a colon.

python -m jaxunlearn.workflows.evaluation.run --config=experiments/configs/evaluate.py:05 \
    --config.model=PATH --config.output=EVAL --config.retain=EVAL_OF_RETRAINED

Needs TOFU's files in the folder that --config.folder or JAXUNLEARN_DATA names. The
prompt is a base model's. For an instruct model, in its tokenizer's chat template:

    --config.score.chat --config.score.prompt="{question}" \
    --config.score.system="You are a helpful assistant." \
    --config.score.date="10 Apr 2025"
"""

from jaxunlearn.workflows.evaluation import run as evaluate


def get_config(part: str = "10"):
    c = evaluate.defaults()
    tables = {
        "forget": f"forget{part}_perturbed",
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
        "holdout": f"holdout{part}",
    }
    tofu = dict(source="benchmark", name="tofu")
    c.tasks = {task: dict(tofu, table=table) for task, table in tables.items()}
    c.score.prompt = "Question: {question}\nAnswer:"
    c.score.new_tokens = 200
    return c
