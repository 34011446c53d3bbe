# SPDX-License-Identifier: Apache-2.0
"""What the commands do, as functions: runs, evaluations, attacks, reports, plans.

| module | what it does |
| --- | --- |
| `training` | a run from a config to a saved model |
| `evaluation` | metrics of a model, with intervals |
| `attack` | attacks on a model, and the robustness card |
| `report` | one HTML page from evaluations, attacks and logs |
| `plan` | compiles a run's step for devices that are only described (experimental) |
| `harness` | models in memory for lm-evaluation-harness (extra `harness`) |
| `run_folder` | the layout of a run's folder, and run.json |
| `config_file` | config files, and KEY=VALUE pairs |
"""
