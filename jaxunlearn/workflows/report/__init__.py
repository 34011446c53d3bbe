# SPDX-License-Identifier: Apache-2.0
"""The parts of jaxunlearn/workflows/report/run.py.

| file | what |
| --- | --- |
| `read` | evaluation folders, checked: whole, and of the same data and settings |
| `attacks` | what jaxunlearn/workflows/attack/run.py left beside an evaluation |
| `tables` | numbers with intervals as rows of text |
| `tokens` | tokens of rows to forget with what each is worth to each model |
| `figures` | PNG figures |
| `page.html`, `page.md` | the templates |
"""
