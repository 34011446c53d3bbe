# SPDX-License-Identifier: Apache-2.0
"""A run, from a config to a saved model. `run.run` is the story from top to bottom.

| module | what it does |
| --- | --- |
| `settings` | every setting with its default, and the checks |
| `streams` | files and benchmarks to encoded rows |
| `build` | model, recipe, mesh and jitted step, from shapes alone |
| `adapters` | LoRA and projections around the model |
| `run` | resume, train, score, save |
| `describe` | the lines that a run prints |
| `trackers` | where metrics are written |
| `presets` | shapes of well-known models |
"""
