# SPDX-License-Identifier: Apache-2.0
"""A tiny model and its evaluations, made once for all tests that use them."""

import jax
import pytest

from tests import tiny
from tests.workflows import invented_questions


@pytest.fixture(scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        yield


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
    invented_questions.score(
        made,
        folder,
        params=other,
        role="retrained",
        name="retrained",
        settings=invented_questions.ALL,
    )
    return folder


@pytest.fixture(scope="session")
def scored(made, retrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "eval"
    invented_questions.score(
        made,
        folder,
        retrained=retrained,
        method="npo",
        seed=3,
        command="here",
        settings=invented_questions.ALL,
    )
    return folder
