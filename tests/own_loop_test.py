# SPDX-License-Identifier: Apache-2.0
"""A training loop written by a user runs with the core dependencies alone."""

import importlib.metadata
import re
import subprocess
import sys

from tests.architecture import ROOT

CORE = ("jax", "flax", "optax", "numpy", "ml_dtypes")
LOOP = """
import jax, optax
from flax import nnx
from jax import numpy as jnp
import jaxunlearn as ju
from jaxunlearn import combine, losses, models, terms


class Bigram(nnx.Module):  # a module that jaxunlearn has never seen
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.head = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, tokens):
        return self.head(nnx.relu(self.embed(tokens)))


def rows(*tokens):
    tokens = jnp.array(tokens)
    return {"tokens": tokens, "mask": tokens > 0}


streams = {"forget": rows([1, 2, 3, 4], [1, 5, 3, 0]), "retain": rows([6, 7, 8, 9])}

model, params = models.from_nnx(lambda rngs: Bigram(rngs))
parts = {
    "forget": terms.on_logps(losses.ascent, model, "forget", reduce="token"),
    "retain": terms.on_logps(losses.nll, model, "retain", reduce="token"),
}
tx = optax.chain(combine.blur(gamma=0.1), optax.sgd(0.5))
opt_state = tx.init(params)

@jax.jit
def update(params, opt_state, key):
    values, grads, _ = ju.term_gradients(parts, params, streams, ju.Frozen(), key)
    updates, opt_state = tx.update(grads, opt_state, params, values=values)
    return optax.apply_updates(params, updates), opt_state, values

for key in jax.random.split(jax.random.key(0), 30):
    params, opt_state, values = update(params, opt_state, key)
    print(*(float(values[name]) for name in parts))
"""


def needed(names):
    """The distributions that these need, themselves included; extras left out."""
    found, todo = set(), list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        todo += [re.match(r"[\w.-]+", x)[0] for x in lines if "extra ==" not in x]
    return found


def test_a_custom_loop_forgets_and_needs_only_the_core_dependencies():
    core = needed(CORE) | {"jaxunlearn"}
    others = [
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if not core & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    ]
    assert {"pytest", "transformers"} <= set(others)
    block = f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
    run = [sys.executable, "-c", block + LOOP]
    result = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True)
    numbers = result.stdout.splitlines()
    first, last = ([float(x) for x in numbers[i].split()] for i in (0, -1))
    assert last[0] < first[0] - 0.1  # the forget loss, minus the NLL
    assert last[1] < first[1] - 0.1
