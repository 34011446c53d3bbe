# SPDX-License-Identifier: Apache-2.0
"""One process of a run: python -m tests.two_processes OUTPUT [COORDINATOR N PROCESS].

Ten steps of BLUR-NPO on a mesh of eight pretend devices; process 0 writes the params.
hosts_test.py runs it alone and as two processes, and compares.
"""

import json
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import jaxunlearn as ju
from jaxunlearn import evaluate, recipes, sharding, trees
from jaxunlearn.data import loader, table
from tests import tiny

SETTINGS = dict(width=32, heads=8, kv_heads=8, head_dim=4, hidden=32, vocab=64)
STEPS, ROWS = 10, 8


class Noted(NamedTuple):
    """A table as a source that writes down which rows were read."""

    table: table.Table
    read: list

    def __len__(self):
        return table.num_rows(self.table)

    def __getitem__(self, row):
        self.read.append(row)
        return {name: values[row] for name, values in self.table.items()}


def tables():
    forget, retain = (
        {k: np.asarray(v) for k, v in tiny.tiny_batch(24, 12, seed=s, vocab=64).items()}
        for s in (0, 1)
    )
    return {"forget": forget, "retain": retain}


def main(output, coordinator=None, processes=None, process=None):
    if coordinator:
        sharding.initialize(coordinator, int(processes), int(process), timeout=60)
    else:
        sharding.initialize()  # finds no cluster
    assert len(jax.devices()) == 8
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model, _ = tiny.tiny_model(**SETTINGS)
    params = sharding.create(model.init, mesh, model.rules, jax.random.key(0))
    recipe = recipes.blur.npo(model, gamma=0.1, learning_rate=1e-3)
    fresh = partial(ju.init_state, tx=recipe.tx)
    key = jax.random.key(1)
    state = sharding.create(fresh, mesh, model.rules, params, key=key)
    plain = ju.make_step(recipe.terms, recipe.tx)
    step = sharding.jit_step(plain, mesh, model.rules, state)
    shard = (jax.process_index(), jax.process_count())
    made = tables()
    scored = Noted(made["forget"], [])
    logps, _ = evaluate.answer_logps(model, params, scored, batch_size=ROWS, mesh=mesh)
    made["forget"] = table.with_columns(made["forget"], {"ref_logps": logps})
    read = {"scored": scored.read, "forget": [], "retain": []}
    position = None
    for steps in (STEPS // 2, STEPS):  # the second half with a loader of its own
        noted = {name: Noted(rows, []) for name, rows in made.items()}
        batches = loader.streams(noted, ROWS, seed=0, shard=shard)
        if position:
            batches.set_state(json.loads(position))
        state, log = ju.fit(step, state, batches, steps=steps)
        position = json.dumps(batches.get_state())
        batches.close()
        for name, source in noted.items():  # it also reads ahead
            read[name] += source.read[: STEPS // 2 * ROWS // shard[1]]
    np.savez(f"{output}.{shard[0]}.npz", **read)
    whole = multihost_utils.process_allgather(state.params, tiled=True)
    if jax.process_index() == 0:
        leaves = {path: np.asarray(x) for path, x in trees.paths(whole).items()}
        last = {name: jnp.float32(value) for name, value in log[-1].items()}
        leaves["ref_logps"] = logps
        np.savez(output, **leaves, **{f"log:{k}": v for k, v in last.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
