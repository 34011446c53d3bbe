# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct forgets the capitals of Europe and keeps the others.

    jaxunlearn forget --config experiments/configs/capitals.py

The data are those of experiments/quickstart, but all capitals are used, not only those
that the model knows.
"""

from jaxunlearn.workflows.training import settings


def get_config():
    c = settings.defaults()
    c.output = "runs/capitals"
    c.steps, c.save_every = 32, 8
    c.model.path = "smollm2"
    c.data = dict(
        forget=dict(source="capitals", group="Europe", rows=12, length=32),
        retain=dict(source="capitals", group="Europe", others=True, rows=12, length=32),
        prose=dict(source="prose", rows=4, length=32),
        held_out=dict(source="prose", held_out=True, rows=4, length=32),
    )
    c.recipe.name = "blur.npo"
    c.recipe.args = dict(
        gamma=0.2, learning_rate=4e-5, retain=dict(retain=1.0, prose=1.0)
    )
    c.schedule.update(warmup=4, steps=32)
    return c
