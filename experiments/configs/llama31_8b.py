# SPDX-License-Identifier: Apache-2.0
"""BLUR-NPO at the shape of Llama-3.1-8B, random weights and tokens: for planning.

To plan or run it:

    jaxunlearn forget --config experiments/configs/llama31_8b.py --output DIR
    jaxunlearn plan --config experiments/configs/llama31_8b.py --topology v5p:4x4x4
"""

from jaxunlearn.workflows.training import settings


def get_config():
    c = settings.defaults()
    c.output = "runs/llama31_8b"
    c.steps, c.save_every = 100, 50
    c.model.preset = "llama-3.1-8b"
    c.model.compute_dtype = "bfloat16"
    stream = dict(source="synthetic", rows=64, length=2048, count=1024)
    c.data = dict(forget=dict(stream, seed=1), retain=dict(stream, seed=2))
    c.recipe.name = "blur.npo"
    c.recipe.args = dict(gamma=0.1, learning_rate=1e-5)
    return c
