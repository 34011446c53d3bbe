# SPDX-License-Identifier: Apache-2.0
"""A small world of made-up authors that needs no data set.

    python -m experiments.small.world --config=experiments/small/configs/biographies.py

It takes four minutes on two CPU cores.
"""

from experiments.small import world


def get_config():
    c = world.defaults()
    c.facts = dict(source="biographies", forget=12, retain=28, seed=0)
    c.steps = 300
    return c
