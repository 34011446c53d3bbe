# SPDX-License-Identifier: Apache-2.0
"""Kills runs at random moments, starts them again, and compares their final states.

    python -m experiments.reliability.kill_test --output runs/kills

Each trial starts `jaxunlearn forget --config`, sends it a signal, starts the same
command again until it ends, and compares every array of the last checkpoint (params,
optimizer state, key) bit for bit with that of an uninterrupted run. Each signal comes
at a random moment: half of the SIGKILLs while a checkpoint is being saved, a quarter
while the program starts, a quarter, and all SIGTERMs, between the first and the last
step. A trial that ends before its signal is drawn again.

With --results FOLDER the summary is written to FOLDER/results/kills.json and
FOLDER/README.md; experiments/reliability holds one such run on two CPU cores.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments.reliability import figures
from experiments.shared import page

CONFIG = "experiments/configs/tiny.py"
DEVICES, STEPS, EVERY = 4, 24, 2
MESH = {"fsdp": 2, "tensor": 2}
PREEMPTED = 75
LIMIT = 600  # seconds that one start may take
MAX_STARTS = 5  # of one trial
MAX_DRAWS = 10  # of the moment of a signal


def main(argv: list[str] | None = None) -> dict:
    """Runs all trials and prints them; returns the summary."""
    options = parse(argv)
    folder = Path(options.output).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    assert start(folder / "warm_up", folder).wait(LIMIT) == 0, f"see {folder}/log"
    reference = folder / "uninterrupted"  # its programs are compiled by now
    begun = time.monotonic()
    process = start(reference, folder)
    first = wait_for_steps(process, reference, 1)
    spans = {"start": first - begun}
    spans["training"] = wait_for_steps(process, reference, STEPS) - first
    spans["save"] = STEPS // EVERY - 2  # how many saves it lets pass
    assert process.wait(LIMIT) == 0, f"see {folder}/log"
    expected = arrays(reference)
    rng = random.Random(options.seed)
    moments = ("save", "training", "save", "start")
    signals = [(signal.SIGKILL, moments[i % 4]) for i in range(options.kills)]
    signals += [(signal.SIGTERM, "training")] * options.terms
    rows = []
    for number, (sent, moment) in enumerate(signals):
        output, row = folder / f"trial_{number}", None
        for _ in range(MAX_DRAWS):
            when = rng.uniform(0, 0.9 * spans[moment])
            row = row or trial(output, folder, sent, moment, when, expected)
            shutil.rmtree(output, ignore_errors=True)
        if row is None:
            raise SystemExit(f"Trial {number} ended before each of its signals.")
        rows.append({"trial": number} | row)
        print(json.dumps(rows[-1]), flush=True)
    result = summary(rows, len(expected))
    if options.results:
        place = Path(options.results)
        page.publish(place, "kills", result, figures.readme, None)
    bad = [row["trial"] for row in rows if not row["identical"]]
    if bad or result["sigterm"]["other_exit"]:
        raise SystemExit(
            f"Trials {bad} differ from the uninterrupted run, or a SIGTERM did not end "
            f"with exit status {PREEMPTED}."
        )
    return result


def trial(output, folder, sent, moment, when, expected) -> dict | None:
    """Sends one signal, starts again until the run ends, and compares the results.

    Returns None if the run had ended before the signal.
    """
    process = start(output, folder)
    if moment == "save":
        wait_for_save(process, output, int(when))
    elif moment == "training":
        wait_for_steps(process, output, 1)
        time.sleep(when)
    else:
        time.sleep(when)
    os.kill(process.pid, sent)
    status = process.wait(LIMIT)
    if status == 0:
        return None
    steps = finished_steps(output)
    row = {
        "signal": sent.name,
        "moment": moment,
        "status": status,
        "logged_steps": lines(output),
        "checkpoints": steps,
        "save_cut_off": bool(unfinished(output)),
    }
    starts = 1
    while status != 0:
        status = start(output, folder).wait(LIMIT)
        starts += 1
        if starts > MAX_STARTS:
            raise SystemExit(f"{output} does not end; see {folder}/log")
    logged = [
        json.loads(line)["step"]
        for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = arrays(output)
    same = found == expected
    once = logged == list(range(STEPS))
    return row | {"starts": starts, "each_step_logged_once": once, "identical": same}


def start(output: Path, folder: Path) -> subprocess.Popen:
    """The command that is killed and started again."""
    command = [
        sys.executable,
        "-m",
        "jaxunlearn",
        "forget",
        f"--config={CONFIG}",
        f"--output={output}",
        f"--steps={STEPS}",
        f"--save-every={EVERY}",
        "--set=model.compute_dtype=float32",  # on every machine the same bits
        "--mesh=" + ",".join(f"{name}={size}" for name, size in MESH.items()),
    ]
    devices = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # The caller's flags stay: other flags compile to other last bits.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip(),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_for_steps(process: subprocess.Popen, output: Path, count: int) -> float:
    """When so many steps were logged."""
    while process.poll() is None and lines(output) < count:
        time.sleep(0.002)
    return time.monotonic()


def wait_for_save(process: subprocess.Popen, output: Path, skip: int) -> None:
    """Waits until a save is under way, after at least `skip` finished ones."""
    while process.poll() is None:
        if (
            unfinished(output)
            and max(finished_steps(output), default=0) >= skip * EVERY
        ):
            return
        time.sleep(0.0005)


def lines(output: Path) -> int:
    """Steps in the log."""
    file = output / "metrics.jsonl"
    return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0


def unfinished(output: Path) -> list[str]:
    """Saves that have begun and are not complete."""
    folder = output / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return [name for name in names if "tmp" in name]


def finished_steps(output: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    folder = output / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def arrays(output: Path) -> dict[str, tuple]:
    """Every array of the last checkpoint: kind, shape and bytes."""
    import numpy as np
    import orbax.checkpoint as ocp

    step = finished_steps(output)[-1]
    assert step == STEPS, f"{output} ends at {step}"
    folder = output / "checkpoints" / str(step) / "state"
    with ocp.StandardCheckpointer() as reader:
        shapes = reader.metadata(folder).item_metadata
        leaves = {k: np.zeros(v.shape, v.dtype) for k, v in dict(shapes).items()}
        found = reader.restore(folder, leaves)
    return {k: (str(v.dtype), v.shape, v.tobytes()) for k, v in found.items()}


def summary(rows: list[dict], leaves: int) -> dict:
    """The numbers of the page."""
    kills = [row for row in rows if row["signal"] == "SIGKILL"]
    terms = [row for row in rows if row["signal"] == "SIGTERM"]
    return {
        "steps": STEPS,
        "save_every": EVERY,
        "devices": DEVICES,
        "mesh": MESH,
        "arrays_compared": leaves,
        "sigkill": {
            "runs": len(kills),
            "inside_a_save": sum(row["save_cut_off"] for row in kills),
            "identical": sum(row["identical"] for row in kills),
        },
        "sigterm": {
            "runs": len(terms),
            "exit_75": sum(row["status"] == PREEMPTED for row in terms),
            "other_exit": sum(row["status"] != PREEMPTED for row in terms),
            "identical": sum(row["identical"] for row in terms),
        },
        "trials": rows,
    }


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reliability.kill_test",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("--output", default="runs/kills", help="folder for the runs")
    parser.add_argument("--results", help="folder for README.md and results/")
    parser.add_argument("--kills", type=int, default=20, help="runs with SIGKILL")
    parser.add_argument("--terms", type=int, default=5, help="runs with SIGTERM")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
