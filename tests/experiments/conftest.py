# SPDX-License-Identifier: Apache-2.0
"""A tiny small world and tiny evaluations, made once for all tests that ask them."""

import jax
import pytest

from experiments.small import world
from experiments.small.configs import biographies
from tests import tiny
from tests.experiments import questions_of_lands


def tiny_world(folder, **more):
    """The config of a world of five made-up authors."""
    c = biographies.get_config()
    c.output = str(folder)
    c.facts.update(forget=2, retain=3)
    c.model.update(width=32, layers=2, heads=2, hidden=64)
    c.update(vocab=500, steps=180, rows=16, learning_rate=1e-2, warmup=5, save_every=50)
    c.update(more)
    return c


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


@pytest.fixture(scope="session")
def made():
    tokenizer = tiny.tiny_tokenizer()
    model, params = tiny.tiny_model(vocab=len(tokenizer), positions=64)
    return model, params, tokenizer


@pytest.fixture(scope="session")
def other(made):
    """Params of a model that was trained otherwise."""
    return jax.tree.map(lambda x: x * 1.1, made[1])


@pytest.fixture(scope="session")
def retrained(made, other, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrained")
    questions_of_lands.score(
        made, folder, params=other, role="retrained", name="retrained"
    )
    return folder


@pytest.fixture(scope="session")
def scored(made, retrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "eval"
    questions_of_lands.score(
        made, folder, retain=retrained, method="npo", seed=3, command="here"
    )
    return folder
