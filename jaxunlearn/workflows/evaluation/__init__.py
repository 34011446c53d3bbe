# SPDX-License-Identifier: Apache-2.0
"""The parts of jaxunlearn/workflows/evaluation/run.py.

| file | what |
| --- | --- |
| `tasks` | rows of questions from benchmarks and files, checked; what is too long |
| `values` | everything one model says of one task, a dict a row |
| `summary` | rows to numbers with intervals; forget quality, utility, attacks |
| `folder` | the evaluation folder: what is there, whole, and made of what |
"""
