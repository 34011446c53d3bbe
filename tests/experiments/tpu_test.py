# SPDX-License-Identifier: Apache-2.0
"""The TPU notes name what exists; the scripts send the right commands to gcloud."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.tpu import hosts

ROOT = Path(__file__).resolve().parents[2]
NOTES = ROOT / "experiments" / "tpu"
SCRIPTS = sorted(NOTES.glob("*.sh"))
TEXTS = [p for p in sorted(NOTES.iterdir()) if p.is_file()]
MODULE = re.compile(r"-m[\s,]+(experiments(?:\.\w+)+)")

# Keeps the state of one queued resource in a file. `outcomes` lists how each ssh ends.
GCLOUD = """#!/usr/bin/env bash
set -e
printf '%s\\n' "${*//$'\\n'/;}" >>"$FAKE/log"
case "$4" in
  describe) cat "$FAKE/state" ;;
  create) echo ACTIVE >"$FAKE/state" ;;
  delete) rm "$FAKE/state" ;;
  ssh)
    outcome=$(head -n 1 "$FAKE/outcomes")
    sed -i 1d "$FAKE/outcomes"
    case "$outcome" in
      well) ;;
      taken) echo SUSPENDED >"$FAKE/state"; exit 255 ;;
      saved) exit 75 ;;
      broken) exit 3 ;;
    esac ;;
esac
"""
ENVIRONMENT = {
    "NAME": "mine",
    "ZONE": "zone-a",
    "TYPE": "v6e-16",
    "RUNTIME": "some-runtime",
    "REPO": "https://example.org/it.git",
    "REVISION": "abc123",
}


@pytest.fixture
def cloud(tmp_path):
    """run(script, *args, outcomes, **environment) -> (exit status, calls of gcloud)."""
    for name, text in {"gcloud": GCLOUD, "sleep": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(script, *args, outcomes=(), **environment):
        (tmp_path / "outcomes").write_text("".join(f"{x}\n" for x in outcomes))
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(NOTES / script), *args],
            env=ENVIRONMENT | environment | {"PATH": path, "FAKE": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        log = tmp_path / "log"
        return done, log.read_text().splitlines() if log.exists() else []

    return run


def verbs(calls):
    """The verbs sent to gcloud, without those that read the state."""
    return [verb for verb in (call.split()[3] for call in calls) if verb != "describe"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_the_script(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    sourced = script.name == "common.sh"
    assert os.access(script, os.X_OK) != sourced


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_the_modules_and_files_that_are_named_exist(path):
    text = path.read_text()
    for name in MODULE.findall(text):
        assert importlib.util.find_spec(name), f"{path.name} names {name}"
    for name in re.findall(r"(?:experiments|tests)/[\w/]+\.\w+", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_the_notes_name_modules_to_run():
    found = {path.name for path in TEXTS if MODULE.search(path.read_text())}
    assert {"README.md", "jobset.yaml", "hosts.py"} <= found


def test_the_jobset_has_what_jobset_and_gke_require():
    job_set = yaml.safe_load((NOTES / "jobset.yaml").read_text())
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert job_set["kind"] == "JobSet"
    annotation = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert job_set["metadata"]["annotations"][annotation] == (
        "cloud.google.com/gke-nodepool"
    )
    (slices,) = job_set["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    across, down = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert job["parallelism"] == job["completions"] == int(across) * int(down) // chips
    assert job["backoffLimit"] == 0  # one pod lost fails the Job, and so the JobSet
    assert pod["restartPolicy"] == "Never"  # else podFailurePolicy is refused
    taken, stopped = job["podFailurePolicy"]["rules"]
    assert taken["action"] == stopped["action"] == "FailJob"
    assert stopped["onExitCodes"] == {"operator": "In", "values": [75]}
    total = slices["replicas"] * int(across) * int(down)
    assert container["command"][-2:] == ["--devices", str(total)]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(
    ("environment", "has", "lacks"),
    [
        ({}, "--node-id=mine --spot", "--node-count"),
        ({"SLICES": "2"}, "--node-count=2 --node-prefix=mine --spot", "--node-id"),
        ({"SPOT": "0"}, "--node-id=mine", "--spot"),
    ],
)
def test_create_asks_for_slices_and_waits(cloud, environment, has, lacks):
    done, (create, *_) = cloud("create.sh", **environment)
    assert done.returncode == 0, done.stderr
    assert has in create and lacks not in create
    assert "mine is ACTIVE" in done.stdout


def test_all_runs_the_words_as_they_are_on_every_worker(cloud):
    done, (call,) = cloud("all.sh", "echo", "two words", "$HOME", outcomes=["broken"])
    assert done.returncode == 3  # that of the command
    for flag in ("--node=all", "--worker=all", "--batch-size=all"):
        assert flag in call
    command = call.partition("--command=")[2].partition("exec ")[2]
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert shown.stdout == "two words $HOME\n"


def test_install_checks_out_the_revision(cloud):
    done, (call,) = cloud("install.sh", outcomes=["well"], EXTRAS="data", PREPARE="x")
    assert done.returncode == 0, done.stderr
    assert "checkout --quiet --detach 'abc123'" in call
    assert "-r requirements-tpu.txt -e '.[data]'" in call
    assert call.endswith(";x")
    script = call.partition("--command=")[2].replace(";", "\n")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_until_done_begins_again_when_machines_are_taken(cloud):
    done, calls = cloud(
        "until_done.sh", "train", outcomes=["well", "taken", "well", "well"]
    )
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["create", "ssh", "ssh", "delete", "create", "ssh", "ssh"]


def test_until_done_does_not_repeat_what_fails_by_itself(cloud):
    done, calls = cloud("until_done.sh", "train", outcomes=["well", "broken"])
    assert done.returncode == 3
    assert "status 3" in done.stderr
    assert verbs(calls) == ["create", "ssh", "ssh"]


def test_until_done_restarts_a_run_that_stopped_with_status_75(cloud):
    done, calls = cloud(
        "until_done.sh", "train", outcomes=["well", "saved", "well", "well"]
    )
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["create", "ssh", "ssh", "ssh", "ssh"]


@pytest.mark.parametrize("script", [p.name for p in SCRIPTS if p.name != "common.sh"])
def test_a_missing_setting_is_named(cloud, script):
    done, calls = cloud(script, "train", ZONE="")
    assert done.returncode != 0
    assert "ZONE: is needed" in done.stderr
    assert not calls


def test_hosts_adds_over_all_devices(capsys):
    assert hosts.check(8) == 0
    shown = capsys.readouterr().out
    assert (
        "8 of 8 devices" in shown and "sum over all devices: 28, expected 28" in shown
    )


def test_hosts_fails_where_devices_are_missing(capsys):
    assert hosts.check(16) == 1
    assert "needs 16 devices, got 8" in capsys.readouterr().err


def test_hosts_fails_where_the_sum_is_wrong(monkeypatch):
    monkeypatch.setattr(hosts, "total", lambda mesh: 27)
    assert hosts.check(8) == 1


def test_hosts_runs_by_itself_where_there_is_one_process():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.tpu.hosts", "--devices", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "process 0 of 1: 8 of 8 devices" in done.stdout
