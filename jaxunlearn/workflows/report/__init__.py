# SPDX-License-Identifier: Apache-2.0
"""A self-contained page that compares evaluated models.

| file | content |
| --- | --- |
| `run` | `write`: the page and its figures |
| `read` | evaluations, logs and attacks, checked: finished, same data and settings |
| `attacks` | attacks as curves and flat rows |
| `tables` | numbers with intervals as tables of text |
| `tokens` | the tokens of forget rows, coloured by their log-probability |
| `figures` | PNG figures |
| `page.html`, `page.md` | the templates |
"""
