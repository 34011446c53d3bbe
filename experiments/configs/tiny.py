# SPDX-License-Identifier: Apache-2.0
"""BLUR-NPO on a random decoder of two small layers: seconds on a CPU.

To run it:

    jaxunlearn forget --config experiments/configs/tiny.py --steps 30
"""

from jaxunlearn.workflows.training import settings


def get_config():
    c = settings.defaults()
    c.output = "runs/tiny"
    c.steps, c.save_every = 24, 3
    c.model.fields = dict(family="llama", vocab=64, width=32, layers=2, heads=4)
    c.model.fields.update(kv_heads=4, head_dim=8, hidden=64, positions=64)
    stream = dict(source="synthetic", rows=8, length=16, count=40)
    c.data = dict(forget=dict(stream, seed=1), retain=dict(stream, seed=2))
    c.recipe.name = "blur.npo"
    c.recipe.args = dict(gamma=0.1, learning_rate=1e-3)
    return c
