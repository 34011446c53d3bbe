# SPDX-License-Identifier: Apache-2.0
"""Wrappers: a Model in, a Model out, with parameters beside those it had.

| name | gives |
| --- | --- |
| `lora` | a Model whose chosen kernels have low-rank products added |
| `add_lora` | params with fresh low-rank leaves |
| `merge_lora` | plain params again, the products added to the kernels |
| `LORA` | the pattern of those leaves, for `trees.split` |
"""

from jaxunlearn.wrap._lora import LORA, add_lora, lora, merge_lora

__all__ = ["LORA", "add_lora", "lora", "merge_lora"]
