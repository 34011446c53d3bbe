# SPDX-License-Identifier: Apache-2.0
"""The group of commands: misspelt names, errors in one line, exit statuses."""

import importlib
import subprocess
import sys
from functools import partial

import click
import pytest
from click.testing import CliRunner

from jaxunlearn import NotFinite, _checks
from jaxunlearn.commands import _group
from jaxunlearn.io import compilation_cache, preempt


def run(*args):
    result = CliRunner().invoke(_group.group, args)
    assert "Traceback" not in result.output
    return result


def one_line(result, status, *words):
    assert result.exit_code == status, result.output
    assert len(result.stderr.strip().splitlines()) == 1  # click prints a line for ^C
    for word in words:
        assert word in result.stderr
    return result.stderr


def misspelt(name):
    return name[:-2] + name[-1]


@pytest.mark.parametrize("name", _group.COMMANDS)
def test_misspelt_commands_name_the_nearest(name):
    one_line(run(misspelt(name)), 2, misspelt(name), f"'{name}'")


OPTIONS = [
    (name, option)
    for name in _group.COMMANDS
    for parameter in importlib.import_module(
        f"jaxunlearn.commands.{name}"
    ).command.params
    if isinstance(parameter, click.Option)
    for option in parameter.opts
    if option.startswith("--")
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_misspelt_options_name_the_nearest(name, option):
    wrong = misspelt(option) + "x"
    one_line(run(name, wrong), 2, wrong, option)


@pytest.mark.parametrize("name", _group.COMMANDS)
def test_every_command_explains_itself(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    command = importlib.import_module(f"jaxunlearn.commands.{name}").command
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert all(option.help for option in options)


def test_no_command_prints_the_commands():
    result = run()
    assert result.exit_code == 0
    assert all(name in result.output for name in _group.COMMANDS)


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (ValueError("beta\nis -1"), 2, "beta is -1"),
        (ImportError("needs tqdm"), 2, "tqdm"),
        (ModuleNotFoundError("No module named 'grain'"), 2, "jaxunlearn[hf]"),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x"),
        (_checks.Missing("no stream"), 2, "no stream"),
        (NotFinite("step 3", None, [], 3, "forget"), 1, "step 3"),
        (KeyError("bug"), 1, "--debug"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GB"), 1, "--batch-size"),
        (KeyboardInterrupt(), 130, "resume"),
        (_group.Terminated(), 75, "resume"),
        (preempt.Stopped("Step 3 is saved.", 75), 75, "Step 3"),
    ],
)
def test_errors_are_one_line_with_a_documented_status(monkeypatch, error, status, word):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("jaxunlearn.workflows.run_folder.finished", fail)
    one_line(run("export", "runs/a", "--output", "b"), status, word)
    shown = CliRunner().invoke(
        _group.group, ["export", "runs/a", "--output", "b", "--debug"]
    )
    assert shown.exit_code == status
    assert "Traceback" in shown.stderr


def test_the_module_runs_and_misses_click_by_name():
    code = "import sys; sys.modules['click'] = None; import runpy; "
    code += "runpy.run_module('jaxunlearn', run_name='__main__')"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "jaxunlearn[hf]" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_a_signal_inside_a_callback_of_the_collector_is_not_lost():
    program = """
import gc, os, signal, sys, time
from jaxunlearn.commands import _group

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
signal.signal(signal.SIGTERM, _group.terminate)
sys.unraisablehook = _group.send_again
left = []

def callback(phase, info):
    if left:
        os.kill(os.getpid(), left.pop())
        for _ in range(1000):
            pass

gc.callbacks.append(callback)
for number in (signal.SIGINT, signal.SIGTERM):
    left.append(number)
    try:
        gc.collect()
        time.sleep(10)
    except (KeyboardInterrupt, _group.Terminated) as error:
        print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert done.stdout.split() == ["KeyboardInterrupt", "Terminated"], done
    assert not done.stderr


@pytest.mark.parametrize(
    ("option", "called"),
    [((), "enable"), (("--no-compilation-cache",), "disable")],
)
def test_commands_keep_compiled_programs_but_for_an_option(monkeypatch, option, called):
    calls = []
    for name in ("enable", "disable"):
        monkeypatch.setattr(compilation_cache, name, partial(calls.append, name))
    run("export", "no such run", "--output", "b", *option)
    assert calls == [called]
