# SPDX-License-Identifier: Apache-2.0
"""A small world of TOFU's authors, which can forget those of forget10.

    python -m experiments.small.world --config=experiments/small/configs/tofu.py

Needs TOFU's files: tofu/forget10_perturbed.jsonl, tofu/retain_perturbed.jsonl and
tofu/full.jsonl in the folder that the variable JAXUNLEARN_DATA names, or
../shared/data. It takes six to ten minutes on two CPU cores. Expect the original to
know every answer (probability above 0.95), and the retrained model no answer to forget
(below 0.01).
"""

from experiments.small import world


def get_config():
    c = world.defaults()
    c.facts = dict(source="tofu", folder="", max_tokens=48, num_extra=200)
    return c
