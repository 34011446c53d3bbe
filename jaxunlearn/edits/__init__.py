# SPDX-License-Identifier: Apache-2.0
"""Edits: params to params, pure and run once.

| edit | does | source |
| --- | --- | --- |
| `task_vector` | takes away what finetuning on the forget set added | 2212.04089 |
"""

from jaxunlearn.edits._task_vector import task_vector

__all__ = ["task_vector"]
