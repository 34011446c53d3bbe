# SPDX-License-Identifier: Apache-2.0
"""A tiny model as a Hugging Face folder, and files of rows."""

import json

import jax
import pytest
from click.testing import CliRunner

from jaxunlearn.commands import _group
from jaxunlearn.io import hf
from tests import tiny

MESH = "data=8"  # the suite's pretend devices


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        yield


@pytest.fixture
def run():
    """run(*arguments) -> the result; never with a traceback."""

    def call(*arguments):
        result = CliRunner().invoke(_group.group, [str(x) for x in arguments])
        assert "Traceback" not in result.output
        return result

    return call


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with model/, plain/ (no tokenizer), and files of rows."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = tiny.tiny_tokenizer()
    model, params = tiny.tiny_model(vocab=len(tokenizer), positions=64)
    hf.save(model, params, folder / "model", tokenizer=tokenizer)
    hf.save(model, params, folder / "plain")
    for start, name in enumerate(("forget", "retain", "alternate")):
        rows = range(10 * start, 10 * start + 10)
        pairs = [(f"The capital of Land {i} is", f"Town {i}.") for i in rows]
        lines = [json.dumps({"prompt": p, "answer": a}) for p, a in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        lines = ["question,answer", *(f"{p},{a}" for p, a in pairs)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (folder / "other.jsonl").write_text('{"q": "Where?", "a": "Here."}\n')
    return folder
