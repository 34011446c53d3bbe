# SPDX-License-Identifier: Apache-2.0
"""Edits: params to params, pure and run once.

| edit | does | source |
| --- | --- | --- |
| `quantize` | rounds weights to int8 .. int2, NF4 or FP4 | 2410.16454, 2305.14314 |
| `task_vector` | takes away what finetuning on the forget set added | 2212.04089 |
"""

from jaxunlearn.edits._quantize import quantize
from jaxunlearn.edits._task_vector import task_vector

__all__ = ["quantize", "task_vector"]
