# SPDX-License-Identifier: Apache-2.0
"""A small world of authors that we made up ourselves, where TOFU is absent.

python -m experiments.small.world --config=experiments/small/configs/biographies.py

Four minutes on two CPU cores.
"""

from experiments.small import world


def get_config():
    c = world.defaults()
    c.facts = dict(source="biographies", forget=12, retain=28, seed=0)
    c.steps = 300
    return c
