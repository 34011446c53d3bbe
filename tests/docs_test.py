# SPDX-License-Identifier: Apache-2.0
"""docs/new-method.md runs as printed, and docs/methods.md agrees with the code."""

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxunlearn as ju
from experiments.tools import methods_table
from jaxunlearn import combine, losses, terms
from tests import tiny
from tests.losses import contract_test as contract

PAGE = Path(__file__).parents[1] / "docs" / "new-method.md"


@pytest.fixture
def example(monkeypatch):
    """The names that the last block of the page defines, after its file and export."""
    file, export, use = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    name = "jaxunlearn.losses._unlikelihood"
    module = types.ModuleType(name)
    exec(compile(file, str(PAGE), "exec"), vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    room = dict(vars(losses))
    exec(compile(export, str(PAGE), "exec"), room)
    monkeypatch.setattr(losses, "unlikelihood", room["unlikelihood"], raising=False)
    made = {}
    exec(compile(use, str(PAGE), "exec"), made)
    return made


def test_the_example_passes_the_contract_of_losses(example):
    logps = np.log([0.5, 0.25, 0.75])
    expected = [np.log(2.0), np.log(4 / 3), np.log(4.0)]
    row = contract.Row(losses.unlikelihood, (logps,), expected)
    contract.test_hand_computed_values_are_not_reduced(row, lambda f: f)
    contract.test_masked_entries_change_neither_value_nor_gradient(row, np.nan)
    contract.test_bfloat16_in_float32_out(row)
    contract.test_finite_value_and_gradient_at_extremes(row)
    contract.test_gradient_agrees_with_differences(row)
    contract.test_a_mask_that_is_not_boolean_is_an_error(row)
    contract.test_sharded_rows_give_the_values_of_one_device(row)


def test_the_example_unlearns(example):
    assert "unlikelihood" not in losses.__all__  # or the page adds what is there
    model, params = tiny.tiny_model()
    streams = {
        name: tiny.tiny_batch(seed=i) for i, name in enumerate(("forget", "retain"))
    }
    learn = {"forget": terms.on_logps(losses.nll, model, "forget", reduce="token")}
    tx = optax.chain(combine.weighted_sum(), optax.sgd(0.5))
    state = ju.init_state(params, tx, jax.random.key(0))
    step = jax.jit(ju.make_step(learn, tx))
    for _ in range(60):
        state, _ = step(state, streams, ju.Frozen())
    params, history = example["unlearn"](model, state.params, streams, steps=10)
    assert history[-1] < 0.5 * history[0], history
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params))


def test_the_table_of_methods_is_that_of_the_code():
    assert methods_table.PAGE.read_text(encoding="utf-8") == methods_table.page(), (
        "Run python -m experiments.tools.methods_table."
    )


def test_a_method_that_needs_the_reference_and_its_column_says_both():
    (row,) = [x for x in methods_table.page().splitlines() if "`sure.npo`" in x]
    assert row.split(" | ")[5] == "1, column"


def test_a_method_without_equation_and_source_is_refused(monkeypatch):
    monkeypatch.delitem(methods_table.FACTS, "sure.npo")
    with pytest.raises(KeyError, match="sure.npo"):
        methods_table.page()
