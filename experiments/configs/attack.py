# SPDX-License-Identifier: Apache-2.0
"""Every attack, on capitals of Europe that were to be forgotten.

    jaxunlearn attack runs/quickstart/model --original smollm2 \\
        --config experiments/configs/attack.py --output runs/attack

After a colon, other facts: attack.py:tofu for forget10. Files of your own need no
config: pass --forget FILE and --retain FILE.
"""

from ml_collections import ConfigDict

from jaxunlearn import _checks
from jaxunlearn.workflows.attack import config as attack


def get_config(which: str = "capitals"):
    _checks.one_of("attack.py", ("capitals", "tofu"), facts=which)
    c = ConfigDict(attack.defaults())
    if which == "capitals":
        capitals = dict(source="capitals", group="Europe")
        c.facts = {
            "forget": capitals | dict(rows=0),
            "retain": capitals | dict(others=True, rows=60),
        }
        c.known = "auto"
    else:
        tofu = dict(source="benchmark", name="tofu", block=20, rows=200)
        c.facts = {
            "forget": tofu | dict(table="forget10_perturbed"),
            "retain": tofu | dict(table="retain_perturbed"),
        }
        c.prompt_format.prompt = "Question: {question}\nAnswer:"
        c.query.new_tokens = 64
    return c
