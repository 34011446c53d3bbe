# SPDX-License-Identifier: Apache-2.0
"""The table of plans: rows make configs, the weighted sum plans like BLUR, files."""

import json

import jax
import pytest

from experiments.benchmarks import plan_table
from experiments.configs import tiny
from jaxunlearn import combine
from jaxunlearn.workflows.training import build, settings


@pytest.mark.parametrize("name", plan_table.ROWS)
def test_a_row_is_a_config_whose_rows_divide_by_its_mesh(name):
    row = plan_table.ROWS[name]
    config = plan_table.config(row)
    model = build.base_model(config)
    assert model.config.compute_dtype == "bfloat16"
    assert model.config.layers == (row.layers or model.config.layers)
    assert row.rows % row.mesh["fsdp"] == 0
    assert model.config.kv_heads % row.mesh.get("tensor", 1) == 0


def test_the_weighted_sum_has_blurs_terms_and_state_but_its_combiners():
    config = settings.check(tiny.get_config())
    blur = build.pieces(config)
    total = build.pieces(config, make_recipe=plan_table.weighted)
    assert list(blur.recipe.terms) == list(total.recipe.terms)
    assert jax.tree.structure(blur.streams) == jax.tree.structure(total.streams)
    first = total.state.opt_state[0]
    assert isinstance(first, combine.WeightedSumState)
    assert isinstance(blur.state.opt_state[0], combine.BlurState)


def test_the_table_is_drawn_from_its_numbers(tmp_path, monkeypatch):
    report = dict(devices=64, peak=2**33, hbm=2**34, fits=True, compile_seconds=9.0)
    report |= dict(optimal_seconds=0.3)
    report |= dict(memory=dict(params=2**32, activations=2**32), mfu=(0.25, 0.5))
    report |= dict(collectives={"all-gather": dict(count=3, bytes=5e9)})
    report |= dict(seconds=dict(compute=1.0, hbm=0.0, ici=1.0, serial=2.0))
    half = report | {"seconds": report["seconds"] | {"serial": 1.6}}
    half |= {"optimal_seconds": 0.25}
    table = {"8b-v5p": {"blur": report, "sum": half}, "8b-v5e": {"blur": report}}
    (tmp_path / "plan.json").write_text(json.dumps(table))
    monkeypatch.setattr(plan_table, "RESULTS", tmp_path)
    assert plan_table.main(["--draw"]) == 0
    text = (tmp_path / "plan.md").read_text()
    assert (
        "8.00 of 16 | yes | 5.0" in text and "50.0 % | 25.0 % | 1.250 | 1.200" in text
    )
    assert "not compiled" in text and "not a measurement" in text
    assert (tmp_path / "plan.png").stat().st_size > 5000


def test_an_unknown_row_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_table, "RESULTS", tmp_path)
    assert plan_table.main(["--only", "8b-v5q"]) == 2
    assert "8b-v5q" in capsys.readouterr().err
