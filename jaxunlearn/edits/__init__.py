# SPDX-License-Identifier: Apache-2.0
"""Edits: params to params, pure and run once.

| edit | does | source |
| --- | --- | --- |
| `quantize` | rounds weights to int8 .. int2, NF4 or FP4 | 2410.16454, 2305.14314 |
| `gptq` | rounds each kernel so that its outputs stay | 2210.17323 |
| `awq` | scales weights of large inputs up before it rounds | 2306.00978 |
| `llm_int8` | int8, but inputs with outliers keep their weights | 2208.07339 |
| `task_vector` | takes away what finetuning on the forget set added | 2212.04089 |

`gptq`, `awq` and `llm_int8` look at a model's inputs on calibration rows, which
`collect_inputs` gathers.
"""

from jaxunlearn.edits._awq import awq, llm_int8
from jaxunlearn.edits._gptq import gptq
from jaxunlearn.edits._inputs import Inputs
from jaxunlearn.edits._inputs import collect as collect_inputs
from jaxunlearn.edits._quantize import quantize
from jaxunlearn.edits._task_vector import task_vector

__all__ = [
    "Inputs",
    "awq",
    "collect_inputs",
    "gptq",
    "llm_int8",
    "quantize",
    "task_vector",
]
