# SPDX-License-Identifier: Apache-2.0
"""The small world: a language model of 5M parameters that memorised made-up authors.

`world.make` trains it and a retrained model, which never saw the authors to forget;
`methods` are the recipes that run there, `unlearn` runs one, `score` measures what a
model still knows, and `program` is the command line of experiments in the small world.
"""
