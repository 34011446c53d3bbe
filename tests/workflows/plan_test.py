# SPDX-License-Identifier: Apache-2.0
"""`jaxunlearn plan`: what it prints and writes, what it refuses, and the presets."""

import importlib.util
import json
import math

import jax
import pytest
from click.testing import CliRunner

from jaxunlearn import plan as library
from jaxunlearn import sharding
from jaxunlearn.commands import _group
from jaxunlearn.models import decoder
from jaxunlearn.workflows import config_file, plan
from jaxunlearn.workflows.training import presets, settings

TINY = "experiments/configs/tiny.py"
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        yield


def run(*arguments):
    options = ["plan", "--config", TINY, *arguments]
    return CliRunner().invoke(_group.group, options)


def config_of(given):
    config = config_file.load(TINY)
    settings.assign(config, given)
    return settings.check(config)


def test_a_plan_is_printed_and_written(tmp_path):
    output = tmp_path / "plan.json"
    sizes = "fsdp=4,tensor=2"
    found = run("--topology", "cpu:8", "--mesh", sizes, "--output", str(output))
    assert found.exit_code == 0, found.output
    assert "fsdp=4" in found.stdout and "all-gather" in found.stdout
    written = json.loads(output.read_text())
    assert written["topology"] == "cpu:8"
    result = written["result"]
    assert result["mesh"] == {"data": 1, "fsdp": 4, "expert": 1} | {
        "context": 1,
        "tensor": 2,
    }
    assert result["moved"]["all-gather"]["bytes"] > 0
    assert result["memory"]["params"] > 0 and result["fits"] is None


def test_options_alone_make_a_plan():
    options = ["plan", "--topology", "cpu:8", "--method", "npo", "--length", "16"]
    fields = dict(family="llama", vocab=64, width=32, layers=2, heads=4, kv_heads=4)
    fields |= dict(head_dim=8, hidden=64, positions=64)
    for name, value in fields.items():
        options += ["--set", f"model.fields.{name}={value}"]
    found = CliRunner().invoke(_group.group, options)
    assert found.exit_code == 0, found.output
    assert "fsdp=8" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v9:2x2"], ["chip", "'v9'"]),
        (["--topology", "h100:8"], ["h100", "TPU"]),
        (["--topology", "cpu:8", "--mesh", "fsdp=3"], ["devices, 8", "fsdp=3"]),
        (["--topology", "cpu:8", "--mesh", "fsdp"], ["--mesh", "'fsdp'"]),
        (["--topology", "cpu:8", "--mesh", "fsdp=x"], ["--mesh", "fsdp=x"]),
        (["--topology", "cpu:8", "--mesh", "fsdb=8"], ["'fsdb'", "'fsdp'"]),
        (["--topology", "cpu:8", "--set", "data.forget.rows=6"], ["fsdp = 8", "6"]),
        (["--topology", "cpu:8", "--method", "blur.nope"], ["nope", "'blur.npo'"]),
        (["--topology", "cpu:8", "--set", "model.remats=full"], ["'model.remat'"]),
        (["--topology", "cpu:8", "--num-microbatches", "3"], ["num_microbatches=3"]),
        (["--topology", "cpu:8", "--serch"], ["--serch", "--search"]),
        (["--topology", "cpu:8", "--config", "nowhere.py"], ["nowhere.py"]),
        (["--topology", "cpu:8", "--output", f"{TINY}/plan.json"], [TINY, "--output"]),
        ([], ["--topology"]),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, words):
    found = run(*arguments)
    assert found.exit_code == 2
    assert len(found.stderr.splitlines()) == 1
    assert all(word in found.stderr for word in words), found.stderr


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is here")
def test_a_missing_compiler_names_the_extra():
    found = run("--topology", "v5e:2x2")
    assert found.exit_code == 2 and "tpu" in found.stderr


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu; .ci/run plans with it")
def test_an_unknown_shape_is_refused():
    found = run("--topology", "v5e:3x5")
    assert found.exit_code == 2 and "'v5e:3x5'" in found.stderr


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
def test_a_mesh_may_split_an_axis_of_the_machine():
    devices = library.topology_devices("v5p:16x16x16")
    mesh = sharding.make_mesh(fsdp=512, tensor=8, devices=devices)
    assert mesh.size == 4096 and mesh.shape["tensor"] == 8


def test_candidates_divide_the_model_and_fit():
    overrides = {"model.fields.kv_heads": "2"}
    rows = {f"data.{name}.rows": "32" for name in ("forget", "retain")}
    config, chip = config_of(overrides | rows), library.CHIPS["v5e"]
    found = plan.candidates(config, 8, chip, max_each=99)
    assert {c["tensor"] for c in found} == {1, 2}  # two key-value heads
    assert {c["num_microbatches"] for c in found} == {1, 2, 4}
    assert found[0] == dict(fsdp=8, tensor=1, num_microbatches=1, remat="dots")
    assert plan.candidates(config, 8, chip._replace(hbm_bytes=1e3)) == []
    few = config_of(overrides | {"data.forget.rows": "4"})
    found = plan.candidates(few, 8, chip)
    assert [c["remat"] for c in found] == ["dots", "mlp", "full"]
    assert {c["fsdp"] for c in found} == {4}


def test_candidates_of_a_mixture_split_its_experts():
    rows = {f"data.{name}.rows": "32" for name in ("forget", "retain")}
    config, chip = config_of(rows), library.CHIPS["v5e"]
    config.model.fields.experts = dict(num=4, per_token=2)
    found = plan.candidates(config, 8, chip, max_each=999)
    sizes = {(c["fsdp"], c["expert"], c["tensor"]) for c in found}
    assert all(math.prod(each) == 8 for each in sizes)
    assert {expert for _, expert, _ in sizes} == {1, 2, 4}
    assert {tensor * expert for _, expert, tensor in sizes} == {1, 2, 4}
    few = plan.candidates(config, 8, chip)
    assert any(c["expert"] > 1 for c in few) and len(few) == 6
    # Of settings that differ in the mesh alone, that with the fewest bytes is first.
    one = [
        c
        for c in found
        if c | {"fsdp": 0, "expert": 0} == few[0] | {"fsdp": 0, "expert": 0}
    ]
    shape = plan.build.base_model(config).config
    sent = [plan._sent(shape, c["fsdp"], c["tensor"], c["expert"], 64.0) for c in one]
    assert len(one) == 3 and sent == sorted(sent)


def test_a_search_compiles_the_meshes_with_an_expert_axis(monkeypatch):
    config, tried = config_of({}), []
    config.model.fields.experts = dict(num=4, per_token=2)

    def planned(config, topology, mesh):
        tried.append(dict(mesh))
        raise library.DoesNotFit("too large")

    monkeypatch.setattr(plan, "planned", planned)
    plan.search(config, "cpu:8", lambda line: None)
    assert {"fsdp": 2, "expert": 4, "tensor": 1} in tried
    assert all(sharding.make_mesh(**mesh).size == 8 for mesh in tried)


def test_a_search_ranks_what_fits_first(monkeypatch, tmp_path):
    made = {}

    def planned(config, topology, mesh):
        if config.model.remat == "dots":
            raise library.DoesNotFit("too large")
        seconds = {"serial": 1.0 / config.num_microbatches}
        fake = dict.fromkeys(library.Report._fields, 0)
        report = library.Report(**fake)._replace(
            seconds=seconds, fits=True, collectives={}, mesh=dict(mesh)
        )
        return made.setdefault((config.num_microbatches, mesh["tensor"]), report)

    monkeypatch.setattr(plan, "planned", planned)
    output = tmp_path / "search.json"
    options = ["--search", "--output", str(output), "--batch-size", "16"]
    found = run("--topology", "cpu:8", *options)
    assert found.exit_code == 0 and "does not fit" in found.stdout
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
