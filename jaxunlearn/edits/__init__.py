# SPDX-License-Identifier: Apache-2.0
"""Edits: pure functions from params to params that run once.

| edit | does | source |
| --- | --- | --- |
| `quantize` | rounds weights: int8 .. int2, NF4, FP4, GGUF | 2410.16454, 2305.14314 |
| `gptq` | rounds each kernel so that its outputs change little | 2210.17323 |
| `awq` | scales weights of large inputs up before rounding | 2306.00978 |
| `llm_int8` | rounds to int8, except weights of outlier inputs | 2208.07339 |
| `unit_scores` | scores units by forget over retain activity (`stats`) | 2403.01267 |
| `select_units` | selects the units with the highest scores | 2403.01267 |
| `prune_loop` | prunes step by step until a stop rule holds | 2403.01267 |
| `prune_units` | sets the weights of units to 0 | 2403.01267 |
| `remove_units` | removes units, which makes the matrices smaller | |
| `svd_values` | rotates attention values to singular directions | 2403.01267 |
| `dampen` | shrinks weights by Fisher importance (SSD) | 2308.07707 |
| `interpolate` | averages two models, leaf by leaf | 2203.05482 |
| `task_vector` | subtracts what finetuning on the forget set added | 2212.04089 |
| `add` | adds an update, such as a gradient, times a scale | |
| `collapse` | shrinks the leading directions of a gradient | 2606.17168 |
| `largest_step` | searches the largest scale of an edit within a budget | 2606.17168 |
| `perturb` | shrinks all weights and adds noise | 2506.06278 |

`gptq`, `awq` and `llm_int8` need statistics of the kernels' inputs on calibration rows;
`collect_inputs` computes them.
"""

from jaxunlearn.edits._awq import awq, llm_int8
from jaxunlearn.edits._collapse import collapse
from jaxunlearn.edits._dampen import dampen
from jaxunlearn.edits._gptq import gptq
from jaxunlearn.edits._inputs import Inputs
from jaxunlearn.edits._inputs import collect as collect_inputs
from jaxunlearn.edits._interpolate import interpolate
from jaxunlearn.edits._largest_step import LargestStep, largest_step
from jaxunlearn.edits._perturb import perturb
from jaxunlearn.edits._prune import prune_units, remove_units, select_units, unit_scores
from jaxunlearn.edits._prune_loop import Pruned, prune_loop
from jaxunlearn.edits._quantize import quantize
from jaxunlearn.edits._svd import svd_values
from jaxunlearn.edits._task_vector import add, task_vector

__all__ = [
    "Inputs",
    "LargestStep",
    "Pruned",
    "add",
    "awq",
    "collapse",
    "collect_inputs",
    "dampen",
    "gptq",
    "interpolate",
    "largest_step",
    "llm_int8",
    "perturb",
    "prune_loop",
    "prune_units",
    "quantize",
    "remove_units",
    "select_units",
    "svd_values",
    "task_vector",
    "unit_scores",
]
