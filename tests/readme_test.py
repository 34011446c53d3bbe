# SPDX-License-Identifier: Apache-2.0
"""The Python of README.md runs as it is printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxunlearn.io import hf
from tests import tiny

PAGE = Path(__file__).parents[1] / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def run(text):
    made = {}
    with jax.numpy_dtype_promotion("standard"):  # a user's; optax.adam needs it
        exec(compile(text, str(PAGE), "exec"), made)
    return made


def test_the_main_example_unlearns_one_of_two_tables(capsys):
    run(blocks()[0])
    lines = capsys.readouterr().out.splitlines()
    values = [re.fullmatch(r"(\w+): .* ([\d.]+)", line).groups() for line in lines]
    assert [name for name, _ in values] == ["forget", "retain"] * 2
    memorised, after = [[float(x) for _, x in values[i : i + 2]] for i in (0, 2)]
    assert min(memorised) > 0.9
    assert after[0] < 0.1 and after[1] > 0.9


def test_the_main_example_needs_no_extra():
    text = blocks()[0]
    assert "jaxunlearn.io" not in text and "progress" not in text


def test_the_example_for_hugging_face_folders_runs(tmp_path, monkeypatch):
    tokenizer = tiny.tiny_tokenizer()
    model, params = tiny.tiny_model(vocab=len(tokenizer))
    hf.save(model, params, tmp_path / "model", tokenizer=tokenizer)
    text = blocks()[1]
    assert text.count('"path/or/name"') == 1
    monkeypatch.chdir(tmp_path)
    made = run(text.replace('"path/or/name"', '"model"'))
    _, after, _ = hf.load("unlearned")
    kernels = [x["blocks"]["mlp"]["down"]["kernel"] for x in (after, params)]
    assert not jnp.array_equal(*kernels)
    assert len(made["log"]) == 20


def test_the_commands_of_the_readme_are_three_blocks_in_order():
    """.ci/run takes the second block as the test command."""
    quickstart, tests, commands_of_data = re.findall(
        r"```sh\n(.*?)```", PAGE.read_text(), re.S
    )
    assert "experiments.quickstart" in quickstart
    assert "pytest" in tests and tests.count("\n") == 1
    commands = [line.split()[:2] for line in commands_of_data.splitlines()[1:]]
    assert commands == [
        ["jaxunlearn", name] for name in ("forget", "evaluate", "attack", "report")
    ]
