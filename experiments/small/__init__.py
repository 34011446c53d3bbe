# SPDX-License-Identifier: Apache-2.0
"""A small world: a language model of 5M parameters that has memorised made-up authors.

`world.make` trains it, and a twin that never saw the authors to forget, once; `score`
looks at a model in it, and `compare` runs every method there.
"""
