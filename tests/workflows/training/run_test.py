# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, stopped or damaged ends as an uninterrupted run does."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import jax
import pytest

from experiments.configs import tiny
from experiments.reliability import kill_test
from jaxunlearn import _checks
from jaxunlearn.io import checkpoint, log, preempt
from jaxunlearn.workflows import config_file, run_folder
from jaxunlearn.workflows.training import run, settings, trackers

MESH = {"data": 1, "fsdp": 8, "tensor": 1}
STEPS = 10


def config_of(output, **changes):
    config = tiny.get_config()
    config.output = str(output)
    config.steps, config.save_every = STEPS, kill_test.EVERY
    config.mesh.update(MESH)
    config.update(changes)
    return settings.check(config)


def go(output, **changes):
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        return run.run(config_of(output, **changes))


def logged(output):
    return [
        json.loads(line)["step"]
        for line in (output / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module", autouse=True)
def smaller():
    """The kill test's run, on the suite's devices and shorter."""
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
    _, record = run_folder.read(output)
    assert record.method == "blur.npo" and record.arguments["gamma"] == 0.1
    assert record.streams["retain"].source == "synthetic"
    return output


@pytest.mark.slow
def test_a_run_killed_inside_a_save_resumes(expected, tmp_path, monkeypatch, capsys):
    output = tmp_path / "a"
    monkeypatch.chdir(Path(__file__).parents[3])
    process = kill_test.start(output, tmp_path)
    kill_test.wait_for_save(process, output, 1)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    assert kill_test.unfinished(output)
    go(output)
    assert "Resuming after step" in capsys.readouterr().out
    assert kill_test.arrays(output) == kill_test.arrays(expected)
    assert logged(output) == list(range(STEPS))


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
@pytest.mark.slow
def test_a_signal_saves_the_step_and_has_its_status(expected, tmp_path, number, status):
    def send():
        while kill_test.lines(tmp_path) < 3:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(preempt.Stopped) as caught:
        go(tmp_path, save_every=1000)
    thread.join()
    assert signal.getsignal(number) is before
    assert caught.value.status == status
    (step,) = kill_test.finished_steps(tmp_path)
    assert f"step {step} is saved" in str(caught.value)
    assert 3 <= step == kill_test.lines(tmp_path) < STEPS
    go(tmp_path)
    assert kill_test.arrays(tmp_path) == kill_test.arrays(expected)
    assert logged(tmp_path) == list(range(STEPS))


def test_finished_damaged_and_changed_runs(expected, capsys):
    before = kill_test.arrays(expected)
    assert go(expected)["step"] == STEPS
    assert "Finished: 10 steps are done" in capsys.readouterr().out

    with pytest.raises(ValueError, match="seed was 0, now 5"):
        go(expected, seed=5)

    scores = go(expected, mode="evaluate", mesh={"fsdp": 4, "tensor": 2})["scores"]
    assert set(scores) == {"forget", "retain"} and scores["forget"]["rows"] == 40
    stored = json.loads((expected / "result.json").read_text())["scores"]["after"]
    assert scores["forget"]["nll"] == pytest.approx(stored["forget"]["nll"], rel=1e-5)

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
    shown = capsys.readouterr().out
    assert "step 10 is damaged" in shown and "Resuming after step 8" in shown
    assert kill_test.arrays(expected) == before
    assert logged(expected) == list(range(STEPS))


KEYS = [
    key
    for key in config_file.leaves(settings.defaults())
    if key not in settings.FREE and len(key) > 3
]


@pytest.mark.parametrize("key", KEYS)
def test_a_misspelt_setting_names_the_nearest(key):
    wrong = key[:-1]
    with pytest.raises(ValueError, match=f"{wrong!r}.*{key!r}"):
        settings.assign(tiny.get_config(), {wrong: "1"})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bata", "1", ("bata", "'beta'")),
        ("recipe.args.beta", "1", ()),
        ("beta", "0.5", ()),
        ("steps", "many", ("steps=many", "int")),
        ("steps", "7", ()),
        ("model.compute_dtype", "bfloat16", ()),
    ],
)
def test_settings_and_arguments_are_assigned(key, value, words):
    config = tiny.get_config()
    if words:
        with pytest.raises((ValueError, TypeError)) as caught:
            settings.assign(config, {key: value})
        assert all(word in str(caught.value) for word in words)
        return
    settings.assign(config, {key: value})
    name = f"recipe.args.{key}" if key == "beta" else key
    for part in name.split("."):
        config = config[part]
    assert str(config) == value


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("npo", "openunlearning.npo"),
        ("blur_npo", "blur.npo"),
        ("blur.npo", "blur.npo"),
        ("wmdp", "rmu.wmdp"),
        ("rmu", "openunlearning.rmu"),
    ],
)
def test_short_names_of_methods(name, meant):
    assert settings.method(name) == meant


@pytest.mark.parametrize("name", ["nop", "blur_nop", "surgery", "openunlearning.npoo"])
def test_other_names_of_methods_are_refused(name):
    with pytest.raises(ValueError, match=name):
        settings.method(name)


def test_a_failed_step_is_not_saved(tmp_path):
    saved = checkpoint.open(tmp_path)
    call = preempt.hook(saved, every=1, steps=3, stop=lambda: True)
    assert call({}, {"step": 0, "finite": False}) is False
    assert checkpoint.steps(saved) == []


def test_lines_of_steps_that_run_again_are_removed(tmp_path):
    file = tmp_path / "m.jsonl"
    log.keep_before(file, 3)
    assert not file.exists()
    file.write_text("".join(f'{{"step": {n}}}\n' for n in range(5)) + '{"ste')
    log.keep_before(file, 3)
    assert file.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(_checks.importlib, "import_module", absent)
    config = config_of(tmp_path, log={"wandb": True})
    with pytest.raises(ImportError, match="log.wandb.*jaxunlearn\\[trackers\\]"):
        trackers.hooks(config, tmp_path, 0)
