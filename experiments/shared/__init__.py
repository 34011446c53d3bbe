# SPDX-License-Identifier: Apache-2.0
"""What all experiments share.

`ledger` keeps finished runs in a file, so that a stopped experiment resumes;
`intervals` computes spreads, intervals and verdicts; `page` writes Markdown tables,
README pages and JSON; `plot` draws bars and curves; `command` reads the command line.
"""
