# SPDX-License-Identifier: Apache-2.0
"""MMLU by letters, or WMDP and MMLU: accuracy, plain and calibrated, with intervals.

    jaxunlearn evaluate MODEL --config experiments/configs/choices.py:wmdp --output EVAL

The same as `--tasks mmlu` or `--tasks wmdp,mmlu`; see
workflows/evaluation/benchmarks.py.
"""

from ml_collections import ConfigDict

from jaxunlearn import _checks
from jaxunlearn.workflows.evaluation import benchmarks
from jaxunlearn.workflows.evaluation import config as evaluation


def get_config(which: str = "mmlu"):
    _checks.one_of("choices.py", ("mmlu", "wmdp"), benchmark=which)
    c = ConfigDict(evaluation.defaults())
    c.tasks = benchmarks.tasks("mmlu")
    if which == "wmdp":
        c.tasks.update(benchmarks.tasks("wmdp"))
    return c
