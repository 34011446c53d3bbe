# SPDX-License-Identifier: Apache-2.0
"""A tiny small world, made once for all tests that use it."""

from pathlib import Path

import jax
import pytest

from experiments.small import world
from experiments.small.configs import biographies


def tiny_world(folder, **more):
    """The config of a world of five made-up authors."""
    c = biographies.get_config()
    c.output = str(folder)
    c.facts.update(forget=2, retain=3)
    c.model.update(width=32, layers=2, heads=2, hidden=64)
    c.update(
        vocab=500, steps=180, batch_size=16, learning_rate=1e-2, warmup=5, save_every=50
    )
    c.update(more)
    return c


# Fixtures that train a model or run an experiment. The tests that use them are slow.
RUNS = {"small_world", "small", "world", "folders", "done", "book", "evaluated"}


@pytest.hookimpl(tryfirst=True)  # before pytest selects by mark
def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and RUNS & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        yield


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """(the folder of worlds, the world in it)."""
    folder = tmp_path_factory.mktemp("small")
    with jax.numpy_dtype_promotion("standard"):
        return folder, world.make(tiny_world(folder))
