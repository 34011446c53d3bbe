# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, asked to stop or damaged ends as if nothing had happened."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import jax
import pytest
from absl import flags

from experiments.configs import tiny
from experiments.reliability import kill_test
from jaxunlearn.io import checkpoint, log, preempt
from jaxunlearn.workflows.training import run, settings, trackers

MESH = {"data": 1, "fsdp": 8, "tensor": 1}
STEPS = 10


def config_of(output, **changes):
    config = tiny.get_config()
    config.output = str(output)
    config.steps, config.save_every = STEPS, kill_test.EVERY
    config.mesh.update(MESH)
    config.log.tensorboard = False
    config.update(changes)
    return settings.check(config)


def go(output, **changes):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
            return run.run(config_of(output, **changes))
    finally:
        signal.signal(signal.SIGTERM, before)


def logged(output):
    return [
        json.loads(line)["step"]
        for line in (output / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module", autouse=True)
def smaller():
    """The kill test's own run, on the suite's devices and shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kill_test, "DEVICES", jax.device_count())
        patch.setattr(kill_test, "MESH", MESH)
        patch.setattr(kill_test, "STEPS", STEPS)
        yield


@pytest.fixture(scope="module")
def expected(smaller, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    result = go(output, log={"tensorboard": True})
    assert result["step"] == STEPS
    assert list((output / "tensorboard").iterdir())
    return output


def test_a_run_killed_inside_a_save_goes_on(expected, tmp_path, monkeypatch, capsys):
    output = tmp_path / "a"
    monkeypatch.chdir(Path(__file__).parents[2])
    process = kill_test.start(output, tmp_path)
    kill_test.wait_for_save(process, output, 1)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    assert kill_test.unfinished(output)
    go(output)
    assert "Going on after step" in capsys.readouterr().out
    assert kill_test.arrays(output) == kill_test.arrays(expected)
    assert logged(output) == list(range(STEPS))


def test_sigterm_saves_the_step_and_exits_with_75(expected, tmp_path, capsys):
    def ask():
        while kill_test.lines(tmp_path) < 3:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(SystemExit) as caught:
        go(tmp_path, save_every=1000)
    thread.join()
    assert caught.value.code == preempt.EXIT == 75
    (step,) = kill_test.finished_steps(tmp_path)
    assert f"step {step} is saved" in capsys.readouterr().out
    assert 3 <= step == kill_test.lines(tmp_path) < STEPS
    go(tmp_path)
    assert kill_test.arrays(tmp_path) == kill_test.arrays(expected)
    assert logged(tmp_path) == list(range(STEPS))


def test_finished_damaged_and_changed_runs(expected, tmp_path, capsys):
    before = kill_test.arrays(expected)
    assert go(expected)["step"] == STEPS
    assert "Finished: 10 steps are done" in capsys.readouterr().out

    with pytest.raises(SystemExit) as caught:
        go(expected, seed=5)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "error: The checkpoint" in message and "seed was 0, now 5" in message

    scores = go(expected, mode="evaluate", mesh={"fsdp": 4, "tensor": 2})["scores"]
    assert set(scores) == {"forget", "retain"} and scores["forget"]["rows"] == 40
    kept = json.loads((expected / "result.json").read_text())["scores"]
    assert scores["forget"]["nll"] == pytest.approx(kept["forget"]["nll"], rel=1e-5)

    alone = config_of(expected / "alone", mode="evaluate")
    alone.recipe.update(name="", args={})
    untrained = run.run(alone)
    assert untrained["step"] == 0
    assert untrained["scores"]["forget"]["nll"] != scores["forget"]["nll"]

    (expected / "result.json").unlink()
    for file in (expected / "checkpoints" / "10" / "state").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    capsys.readouterr()
    go(expected)
    said = capsys.readouterr().out
    assert "step 10 is damaged" in said and "Going on after step 8" in said
    assert kill_test.arrays(expected) == before
    assert logged(expected) == list(range(STEPS))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.recipe.args.lrr=1e-3", "lrr"),
        ("--config.save_evry=3", "Did you mean --config.save_every"),
        ("--config.steps=many", "steps"),
        ("--config=nowhere.py", "nowhere.py"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(override, message, capsys):
    argv = ["run", override]
    if not override.startswith("--config="):
        argv.insert(1, f"--config={tiny.__file__}")
    try:
        with pytest.raises(SystemExit) as caught:
            run.parse(argv)
    finally:
        flags.FLAGS.unparse_flags()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    assert re.search(message, said), said


def test_a_failed_step_is_not_saved(tmp_path):
    saved = checkpoint.open(tmp_path)
    call = preempt.hook(saved, every=1, steps=3, asked=lambda: True)
    assert call({}, {"step": 0, "finite": False}) is False
    assert checkpoint.steps(saved) == []


def test_lines_of_steps_that_are_done_again_are_taken_back(tmp_path):
    file = tmp_path / "m.jsonl"
    log.keep_before(file, 3)
    assert not file.exists()
    file.write_text("".join(f'{{"step": {n}}}\n' for n in range(5)) + '{"ste')
    log.keep_before(file, 3)
    assert file.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_a_tracker_that_is_not_installed_says_so(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(trackers.importlib, "import_module", absent)
    config = config_of(tmp_path, log={"wandb": True})
    with pytest.raises(ImportError, match="pip install wandb, or set --config.log.wan"):
        trackers.hooks(config, tmp_path, 0)
