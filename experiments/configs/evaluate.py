# SPDX-License-Identifier: Apache-2.0
"""TOFU's evaluation of a model: forget10, or another part named after a colon.

    jaxunlearn evaluate MODEL --config experiments/configs/evaluate.py:05 --output EVAL

Needs TOFU's files in the folder that --data-folder or JAXUNLEARN_DATA names; add
--retrained EVAL for forget quality. The prompt is that of a base model. For an instruct
model, in its tokenizer's chat template:

    --chat --prompt "{question}" --end auto --system "You are a helpful assistant." \\
    --set prompt_format.arguments.date_string="10 Apr 2025"
"""

from ml_collections import ConfigDict

from jaxunlearn.workflows.evaluation import benchmarks
from jaxunlearn.workflows.evaluation import config as evaluation


def get_config(part: str = "10"):
    c = ConfigDict(evaluation.defaults())
    c.tasks = benchmarks.tasks(f"tofu:{part}")
    # Common to all tasks here, so that --prompt TEXT changes them together.
    for task in c.tasks.values():
        del task["score"]
    c.prompt_format.update(benchmarks.QA_FORMAT)
    c.score.new_tokens = 200
    return c
