# SPDX-License-Identifier: Apache-2.0
"""`jaxunlearn forget`, `finetune` and `export`: complete runs, and all refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.configs import tiny as tiny_config
from jaxunlearn import trees
from jaxunlearn.io import hf
from jaxunlearn.workflows import run_folder
from tests.commands.conftest import MESH


def options(files, folder, method="npo", **more):
    given = {"model": files / "model", "forget": files / "forget.jsonl"}
    given |= {"retain": files / "retain.jsonl", "method": method, "mesh": MESH}
    given |= {"output": folder, "steps": 2} | more
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def test_forget_trains_lora_resumes_and_refuses_other_settings(run, files, tmp_path):
    given = options(files, tmp_path / "a", lora_rank=2, learning_rate=0.1)
    first = run("forget", *given, "--set", "beta=0.2")
    assert first.exit_code == 0, first.output
    for word in ("10 rows of forget.jsonl", "beta=0.2", "loss before", "step 2/2"):
        assert word in first.stdout
    folder, record = run_folder.finished(tmp_path / "a")
    assert record.method == "openunlearning.npo"
    assert record.original == str(files / "model")
    assert record.arguments == {"learning_rate": 0.1, "beta": 0.2}
    assert record.streams["forget"] == run_folder.Stream(
        "file", str(files / "forget.jsonl"), "prompt", "answer"
    )
    scores = json.loads(folder.result.read_text())["scores"]
    assert scores["before"]["forget"] != scores["after"]["forget"]
    _, params, tokenizer = hf.load(folder.model)
    assert tokenizer is not None
    _, before, _ = hf.load(files / "model")
    changed = [
        name
        for name, x in trees.paths(before).items()
        if not np.array_equal(x, trees.paths(params)[name])
    ]
    assert changed and all(name.endswith("kernel") for name in changed)

    again = run("forget", *given, "--set", "beta=0.2")
    assert again.exit_code == 0 and "Finished" in again.stdout
    other = run("forget", *given, "--set", "beta=0.3")
    assert other.exit_code == 2
    assert "recipe.args.beta was 0.2, now 0.3" in other.stderr

    copy = run("export", tmp_path / "a", "--output", tmp_path / "b")
    assert copy.exit_code == 0 and (tmp_path / "b" / "config.json").exists()
    file = tmp_path / "b.gguf"
    gguf = ["export", tmp_path / "a", "--format", "gguf", "--output"]
    assert run(*gguf, file, "--scheme", "f32").exit_code == 0 and file.exists()
    wrong = run(*gguf, tmp_path / "b.bin")
    assert wrong.exit_code == 2 and "b.bin" in wrong.stderr


@pytest.mark.slow
def test_dpo_reads_pairs_in_one_order(run, files, tmp_path):
    rows = [json.loads(x) for x in (files / "forget.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"answer": "Nowhere."}) for row in rows]
    paired = tmp_path / "paired.jsonl"
    paired.write_text("\n".join(lines))
    given = options(files, tmp_path / "a", "dpo", learning_rate=1e-3)
    found = run("forget", *given, "--stream", f"alternate={paired}")
    assert found.exit_code == 0, found.output
    lines[1:3] = lines[2], lines[1]
    paired.write_text("\n".join(lines))
    found = run("forget", *given, "--stream", f"alternate={paired}")
    assert found.exit_code == 2 and "row 1" in found.stderr


@pytest.mark.slow
def test_a_task_vector_is_subtracted_from_the_original(run, files, tmp_path):
    given = options(files, tmp_path, "task_vector", learning_rate=0.01)
    assert run("forget", *given).exit_code == 0
    scores = json.loads((tmp_path / "result.json").read_text())["scores"]
    assert scores["after"]["forget"]["nll"] > scores["before"]["forget"]["nll"]


@pytest.mark.slow
def test_projections_are_folded_into_the_saved_model(run, files, tmp_path):
    found = run("forget", *options(files, tmp_path, "mrp"))
    assert found.exit_code == 0, found.output
    scores = json.loads((tmp_path / "result.json").read_text())["scores"]
    assert scores["before"]["forget"] != scores["after"]["forget"]
    _, params, _ = hf.load(tmp_path / "model")
    assert "projection" not in params


@pytest.mark.slow
def test_finetune_reads_csv_and_finds_the_columns(run, files, tmp_path):
    found = run(
        "finetune",
        *("--model", files / "model", "--data", files / "forget.csv", "--mesh", MESH),
        *("--output", tmp_path, "--batch-size", 16, "--learning-rate", 0.01),
    )
    assert found.exit_code == 0, found.output
    _, record = run_folder.finished(tmp_path)
    assert record.action == "finetune"
    assert record.streams["train"].prompt == "question"
    assert record.config["steps"] == 4  # 5 passes over 10 rows, 16 at a time
    assert record.config["model"]["compute_dtype"] == "float32"  # of "auto"
    scores = json.loads((tmp_path / "result.json").read_text())["scores"]
    assert scores["after"]["train"]["nll"] < scores["before"]["train"]["nll"]


def test_methods_are_listed(run):
    found = run("forget", "--list-methods")
    assert found.exit_code == 0
    assert "blur.npo" in found.stdout and "gamma" in found.stdout


BAD = {
    "no tokenizer": (dict(model="{files}/plain"), ["tokenizer"]),
    "no model": (dict(model="{files}/nowhere"), ["nowhere"]),
    "no file": (dict(forget="{files}/nowhere.jsonl"), ["nowhere.jsonl"]),
    "no columns": (
        dict(forget="{files}/other.jsonl"),
        ["'prompt'", "other.jsonl", "--prompt-column"],
    ),
    "wrong column": (dict(prompt_column="promt"), ["'promt'", "'prompt'"]),
    "wrong ending": (dict(forget="{files}/model"), ["model"]),
    "stream not given": (dict(method="dpo"), ["'alternate'", "--stream"]),
    "unknown method": (dict(method="nop"), ["'nop'"]),
    "unknown stream": (dict(stream="alternate"), ["alternate"]),
    "unwritable": (dict(output="{files}/forget.csv/a"), ["forget.csv/a"]),
    "too long": (dict(length=4), ["4"]),
    "longer than the model": (dict(length=4096), ["64", "4096"]),
    "mesh does not divide": (dict(mesh="data=3"), ["data=3", "8"]),
    "rows do not divide": (dict(batch_size=12), ["12", "8"]),
    "unknown axis": (dict(mesh="dta=8"), ["'dta'", "'data'"]),
    "unknown argument": (dict(set="bata=1"), ["'bata'", "'beta'"]),
    "unknown setting": (dict(set="model.remats=full"), ["'model.remat'"]),
    "no value": (dict(set="beta"), ["'beta'", "KEY=VALUE"]),
    "wrong type": (dict(set="save_every=often"), ["save_every=often"]),
    "argument out of range": (dict(set="beta=-1"), ["beta"]),
    "layers of another model": (dict(method="rmu.wmdp"), ["layers"]),
    "rank too large": (dict(lora_rank=512), ["512"]),
    "no config": (dict(config="nowhere.py"), ["nowhere.py"]),
    "rounding": (dict(rounding="up"), ["rounding='up'", "'masters'"]),
    "microbatches": (dict(num_microbatches=3), ["num_microbatches=3"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_one_line_before_the_weights_are_read(
    run, files, tmp_path, monkeypatch, case
):
    changes, words = BAD[case]
    changes = {k: str(v).format(files=files) for k, v in changes.items()}

    def load(*args, **kwargs):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(hf, "load", load)
    found = run("forget", *options(files, tmp_path / "a", **changes))
    assert found.exit_code == 2, found.output
    assert len(found.stderr.splitlines()) == 1
    assert all(word in found.stderr for word in words), found.stderr


@pytest.mark.parametrize("missing", ["model", "forget", "method", "output"])
def test_a_missing_option_is_named(run, files, tmp_path, missing):
    given = [x for x in options(files, tmp_path) if not x.startswith(f"--{missing}=")]
    found = run("forget", *given)
    assert found.exit_code == 2 and f"--{missing} is missing" in found.stderr


@pytest.mark.slow
def test_a_config_file_runs_and_its_misspelt_key_is_named(run, tmp_path):
    given = ["forget", "--config", tiny_config.__file__, "--mesh", MESH]
    given += ["--output", tmp_path / "a", "--steps", 1, "--set", "gamma=0.2"]
    found = run(*given)
    assert found.exit_code == 0, found.output
    _, record = run_folder.read(tmp_path / "a")
    assert record.arguments["gamma"] == 0.2
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from experiments.configs import tiny\n\n\ndef get_config():\n"
        "    c = tiny.get_config()\n    with c.unlocked():\n"
        "        c.save_evry = 3\n    return c\n"
    )
    found = run("forget", "--config", wrong, "--output", tmp_path / "b")
    assert found.exit_code == 2
    assert "'save_evry'" in found.stderr and "'save_every'" in found.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes(files, tmp_path):
    command = [sys.executable, "-m", "jaxunlearn", "forget"]
    command += options(files, tmp_path / "a", save_every=10**6, set="log.every=1000000")
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)
    }
    endless = [x if not x.startswith("--steps") else "--steps=1000000" for x in command]
    process = subprocess.Popen(
        endless, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    lines, log = 0, tmp_path / "a" / "metrics.jsonl"
    while lines < 3 and process.poll() is None:
        time.sleep(0.01)
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr.decode()
    assert "is saved" in stderr.decode() and "Traceback" not in stderr.decode()
    (step,) = [int(x.name) for x in (tmp_path / "a/checkpoints").glob("[0-9]*")]
    more = [
        x if not x.startswith("--steps") else f"--steps={step + 1}" for x in command
    ]
    done = subprocess.run(more, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Resuming after step {step}" in done.stdout
    assert log.read_text().count("\n") == step + 1
