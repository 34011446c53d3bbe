# SPDX-License-Identifier: Apache-2.0
"""The planner's command line: what it writes, what it says when it cannot, presets."""

import importlib.util
import json
import math

import jax
import pytest

from jaxunlearn import plan as library
from jaxunlearn import sharding
from jaxunlearn.models import decoder
from jaxunlearn.workflows import plan
from jaxunlearn.workflows.training import presets

TINY = "experiments/configs/tiny.py"
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        yield


def run(capsys, *arguments):
    code = plan.main(["--config", TINY, *arguments])
    return code, capsys.readouterr()


def test_a_plan_is_printed_and_written(capsys, tmp_path):
    output = tmp_path / "plan.json"
    sizes = "fsdp=4,tensor=2"
    code, said = run(
        capsys, "--topology", "cpu:8", "--mesh", sizes, "--output", str(output)
    )
    assert code == 0 and "fsdp=4" in said.out and "all-gather" in said.out
    written = json.loads(output.read_text())
    assert written["topology"] == "cpu:8"
    result = written["result"]
    assert result["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert result["moved"]["all-gather"]["bytes"] > 0
    assert result["memory"]["params"] > 0 and result["fits"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "needs chip to be one of"),
        (["--topology", "h100:8"], "describes only TPUs"),
        (["--topology", "cpu:8", "--mesh", "fsdp=3"], "number of devices, 8"),
        (["--topology", "cpu:8", "--mesh", "fsdp"], "axis=size, as in fsdp=64"),
        (["--topology", "cpu:8", "--mesh", "fsdb=8"], "Did you mean 'fsdp'"),
    ],
)
def test_what_is_wrong_is_said_with_the_next_move(capsys, arguments, message):
    code, said = run(capsys, *arguments)
    assert code == 2 and message in said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.forget.rows=6", "rows that divide by data * fsdp = 8, got 6"),
        ("recipe.name=blur.nope", "Did you mean 'blur.npo'"),
        ("model.remats=full", "Did you mean 'model.remat'"),
        ("num_microbatches=3", "divide by num_microbatches=3"),
    ],
)
def test_a_wrong_setting_is_said(capsys, override, message):
    code, said = run(capsys, "--topology", "cpu:8", f"--config.{override}")
    assert code == 2 and message in said.err


def test_an_unknown_argument_is_said(capsys):
    code, said = run(capsys, "--topology", "cpu:8", "--serch")
    assert code == 2 and "no argument '--serch'" in said.err


def test_a_missing_config_is_said(capsys):
    assert plan.main(["--config", "nowhere.py", "--topology", "cpu:8"]) == 2
    assert "needs a Python file" in capsys.readouterr().err


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is here")
def test_a_missing_compiler_names_the_extra(capsys):
    code, said = run(capsys, "--topology", "v5e:2x2")
    assert code == 2 and 'pip install -e ".[tpu]"' in said.err


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu; .ci/run plans with it")
def test_an_unknown_shape_is_said(capsys):
    code, said = run(capsys, "--topology", "v5e:3x5")
    assert code == 2 and "knows no topology 'v5e:3x5'" in said.err


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
def test_a_mesh_may_split_an_axis_of_the_machine():
    devices = library.topology_devices("v5p:16x16x16")
    mesh = sharding.make_mesh(fsdp=512, tensor=8, devices=devices)
    assert mesh.size == 4096 and mesh.shape["tensor"] == 8


def test_candidates_divide_the_model_and_fit():
    overrides = {"model.fields.kv_heads": "2"}
    rows = {f"data.{name}.rows": "32" for name in ("forget", "retain")}
    config, chip = plan.load(TINY, overrides | rows), library.CHIPS["v5e"]
    found = plan.candidates(config, 8, chip, most=99)
    assert {c["tensor"] for c in found} == {1, 2}  # two key-value heads
    assert {c["num_microbatches"] for c in found} == {1, 2, 4}
    assert found[0] == dict(fsdp=8, tensor=1, num_microbatches=1, remat="dots")
    assert plan.candidates(config, 8, chip._replace(hbm_bytes=1e3)) == []
    few = plan.load(TINY, overrides | {"data.forget.rows": "4"})
    found = plan.candidates(few, 8, chip)
    assert [c["remat"] for c in found] == ["dots", "mlp", "full"]
    assert {c["fsdp"] for c in found} == {4}


def test_a_search_ranks_what_fits_first(capsys, monkeypatch, tmp_path):
    made = {}

    def planned(config, topology, mesh):
        if config.model.remat == "dots":
            raise library.DoesNotFit("too large")
        seconds = {"serial": 1.0 / config.num_microbatches}
        fake = dict.fromkeys(library.Report._fields, 0)
        report = library.Report(**fake)._replace(
            seconds=seconds, fits=True, moved={}, mesh=dict(mesh)
        )
        return made.setdefault((config.num_microbatches, mesh["tensor"]), report)

    monkeypatch.setattr(plan, "planned", planned)
    rows = [f"--config.data.{name}.rows=16" for name in ("forget", "retain")]
    output = tmp_path / "search.json"
    code, said = run(
        capsys, "--topology", "cpu:8", "--search", "--output", str(output), *rows
    )
    assert code == 0 and "does not fit" in said.out
    ranked = json.loads(output.read_text())["result"]
    remats = [item["remat"] for item in ranked]
    assert sorted(set(remats[:-2])) == ["full", "mlp"] and remats[-2:] == ["dots"] * 2


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.2-1b", 1.236),
        ("llama-3.1-8b", 8.030),
        ("llama-3.1-70b", 70.55),
        ("llama-3.1-405b", 405.85),
        ("qwen3-8b", 8.191),
        ("gemma-2-9b", 9.2417),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, billions):
    shapes = decoder.shapes(presets.PRESETS[name])
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count / 1e9 == pytest.approx(billions, rel=1e-3)
