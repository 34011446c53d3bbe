# SPDX-License-Identifier: Apache-2.0
"""MUSE's knowledge and verbatim memorisation of a model: rougeL_f1 of three tasks.

    jaxunlearn evaluate MODEL --config experiments/configs/muse.py:books --output EVAL

The same as `--tasks muse:books`; see workflows/evaluation/benchmarks.py. MUSE's
PrivLeak reads the texts in privleak/: metrics.mia_min_k of evaluate.token_scores.
"""

from ml_collections import ConfigDict

from jaxunlearn.workflows.evaluation import benchmarks
from jaxunlearn.workflows.evaluation import config as evaluation


def get_config(corpus: str = "news"):
    c = ConfigDict(evaluation.defaults())
    c.tasks = benchmarks.tasks(f"muse:{corpus}")
    return c
