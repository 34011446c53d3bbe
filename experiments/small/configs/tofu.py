# SPDX-License-Identifier: Apache-2.0
"""A small world that knows authors of TOFU and can forget those of forget10.

python -m experiments.small.world --config=experiments/small/configs/tofu.py

Needs TOFU's files: tofu/forget10_perturbed.jsonl, tofu/retain_perturbed.jsonl and
tofu/full.jsonl in the folder that the variable JAXUNLEARN_DATA names, ../shared/data
without it. Six to ten minutes on two CPU cores; expect every answer known (probability
above 0.95) and forget answers improbable to the twin (below 0.01).
"""

from experiments.small import world


def get_config():
    c = world.defaults()
    c.facts = dict(source="tofu", folder="", tokens=48, more=200)
    return c
