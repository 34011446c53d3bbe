# SPDX-License-Identifier: Apache-2.0
"""Attacks on a saved model, and the robustness card.

| module | content |
| --- | --- |
| `run` | `attack_model`: every attack on a model, with resume |
| `config` | `attack`: the same from a config, for a model or a run |
| `facts` | questions with choices, from benchmarks, files or the capitals |
| `prompts` | what a model knows of each fact |
| `jobs` | every attack as jobs, each with a separate result |
| `card` | the robustness card that is made of the results |
"""
