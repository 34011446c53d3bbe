# SPDX-License-Identifier: Apache-2.0
"""A small world of LUME's documents and a question of each MMLU subject.

    python -m experiments.semeval.run --config=experiments/semeval/config.py

Needs LUME's and MMLU's files, lume/{forget,retain}.jsonl and mmlu/test.jsonl.gz, in the
folder that the variable JAXUNLEARN_DATA names, or ../shared/data. A completion's input
is cut to its last 24 words: complete inputs are six times as long.
"""

from experiments.small import world


def get_config():
    c = world.defaults()
    c.facts = dict(source="lume", folder="", documents=6, words=24, max_words=64)
    c.model.update(width=192, layers=4, heads=4, hidden=512)
    c.update(batch_size=16, steps=420)
    return c
