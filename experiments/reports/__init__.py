# SPDX-License-Identifier: Apache-2.0
"""The parts of experiments/report.py.

| file | what |
| --- | --- |
| `read` | evaluation folders, checked: whole, and of the same data and settings |
| `attacks` | what experiments/attack.py left beside an evaluation |
| `tables` | numbers with intervals as rows of text |
| `tokens` | tokens of rows to forget with what each is worth to each model |
| `figures` | PNG figures |
| `page.html`, `page.md` | the templates |
"""
