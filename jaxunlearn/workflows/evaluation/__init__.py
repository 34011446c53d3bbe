# SPDX-License-Identifier: Apache-2.0
"""Evaluation of models on tasks.

| module | content |
| --- | --- |
| `run` | `evaluate_model`, `evaluate_path`: a model into a folder, with resume |
| `of_run` | `evaluate_run`: the original and the unlearned model of a run |
| `config` | `evaluate`: the same from a config |
| `tasks` | rows of questions, checked and tokenised |
| `sources` | tasks from benchmarks and files |
| `benchmarks` | the tasks of TOFU, MUSE, MMLU and WMDP by name |
| `values` | the values of every row |
| `summary` | from rows to numbers with intervals; forget quality, utility, attacks |
| `folder` | the files of an evaluation |
| `printed` | numbers as lines of text |
"""
