# SPDX-License-Identifier: Apache-2.0
"""MMLU by letters, or WMDP and MMLU: accuracy, plain and calibrated, with intervals.

python -m jaxunlearn.workflows.evaluation.run --config=experiments/configs/choices.py:wmdp \\
    --config.model=PATH --config.output=EVAL

Zero-shot: the question, its choices behind letters, "Answer:"; the likeliest letter
counts. Calibrated, each letter's mean over all questions is taken off first. Needs the
files in the folder that --config.folder or JAXUNLEARN_DATA names.
"""

from jaxunlearn import _checks
from jaxunlearn.workflows.evaluation import run as evaluate


def get_config(which: str = "mmlu"):
    c = evaluate.defaults()
    _checks.one_of("choices.py", ("mmlu", "wmdp"), benchmark=which)
    mmlu = dict(source="benchmark", name="mmlu", table="test", letters=True)
    c.tasks = {"mmlu": mmlu}
    if which == "wmdp":
        for subject in ("bio", "chem", "cyber"):
            c.tasks[f"wmdp_{subject}"] = mmlu | dict(name="wmdp", table=subject)
    return c
