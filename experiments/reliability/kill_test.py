# SPDX-License-Identifier: Apache-2.0
"""Kills runs at random moments, starts them again, and compares what they end with.

    python -m experiments.reliability.kill_test --output runs/kills --results experiments/results

Each trial starts `jaxunlearn forget`, sends it a signal, starts the same command again
until it ends, and compares every array of the last checkpoint (params, optimizer, key)
bit for bit with an uninterrupted run's. Half of the SIGKILLs wait for a save to be
under way, a quarter come while the program starts, a quarter, and the SIGTERMs, between
the first and the last step; each at a random moment. A trial that ends before its
signal is drawn again. One such run on two CPU cores is kept as kills.json and kills.md
in experiments/results.
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

CONFIG = "experiments/configs/tiny.py"
DEVICES, STEPS, EVERY = 4, 24, 2
MESH = {"fsdp": 2, "tensor": 2}
PREEMPTED = 75
LIMIT = 600  # seconds that one start may take


def main(argv: list[str] | None = None) -> dict:
    """Runs all trials, prints them, and writes kills.json and kills.md."""
    flags = _flags(argv)
    folder = Path(flags.output).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    assert start(folder / "warm_up", folder).wait(LIMIT) == 0, f"see {folder}/log"
    expected = folder / "uninterrupted"  # its programs are compiled by now
    begun = time.monotonic()
    process = start(expected, folder)
    first = wait_for_steps(process, expected, 1)
    spans = {"start": first - begun}
    spans["training"] = wait_for_steps(process, expected, STEPS) - first
    spans["save"] = STEPS // EVERY - 2  # how many saves it lets pass
    assert process.wait(LIMIT) == 0, f"see {folder}/log"
    wanted = arrays(expected)
    dice = random.Random(flags.seed)
    moments = ("save", "training", "save", "start")
    kinds = [(signal.SIGKILL, moments[i % 4]) for i in range(flags.kills)]
    kinds += [(signal.SIGTERM, "training")] * flags.terms
    rows = []
    for number, (kind, moment) in enumerate(kinds):
        output, row = folder / f"trial_{number}", None
        for _ in range(10):
            when = dice.uniform(0, 0.9 * spans[moment])
            row = row or trial(output, folder, kind, moment, when, wanted)
            shutil.rmtree(output, ignore_errors=True)
        if row is None:
            raise SystemExit(f"Trial {number} ends before every signal.")
        rows.append({"trial": number} | row)
        print(json.dumps(rows[-1]), flush=True)
    result = summary(rows, len(wanted))
    if flags.results:
        write(Path(flags.results), result)
    bad = [row["trial"] for row in rows if not row["identical"]]
    if bad or result["sigterm"]["other_exit"]:
        raise SystemExit(f"Not as an uninterrupted run: trials {bad}, or a wrong exit.")
    return result


def trial(output, folder, kind, moment, when, wanted) -> dict | None:
    """Sends one signal, starts again until the run ends, and compares; None if the run
    had ended before the signal."""
    process = start(output, folder)
    if moment == "save":
        wait_for_save(process, output, int(when))
    elif moment == "training":
        wait_for_steps(process, output, 1)
        time.sleep(when)
    else:
        time.sleep(when)
    os.kill(process.pid, kind)
    status = process.wait(LIMIT)
    if status == 0:
        return None
    steps = finished_steps(output)
    row = {
        "signal": kind.name,
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
        if starts > 5:
            raise SystemExit(f"{output} does not end; see {folder}/log")
    logged = [
        json.loads(line)["step"]
        for line in (output / "metrics.jsonl").read_text().splitlines()
    ]
    found = arrays(output)
    same = found.keys() == wanted.keys() and all(
        found[name] == wanted[name] for name in wanted
    )
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
        "--mesh=" + ",".join(f"{name}={size}" for name, size in MESH.items()),
    ]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
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
    """Returns while a save is under way, after at least `skip` finished ones."""
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
    return file.read_text().count("\n") if file.exists() else 0


def unfinished(output: Path) -> list[str]:
    """Saves that have begun and have no name yet."""
    folder = output / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return [name for name in names if "tmp" in name]


def finished_steps(output: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
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
    """What the table says in numbers."""
    kills = [row for row in rows if row["signal"] == "SIGKILL"]
    asked = [row for row in rows if row["signal"] == "SIGTERM"]
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
            "runs": len(asked),
            "exit_75": sum(row["status"] == PREEMPTED for row in asked),
            "other_exit": sum(row["status"] != PREEMPTED for row in asked),
            "identical": sum(row["identical"] for row in asked),
        },
        "trials": rows,
    }


def write(folder: Path, result: dict) -> None:
    """kills.json and kills.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
    kills, asked = result["sigkill"], result["sigterm"]
    text = [
        "# Killed and started again",
        "",
        f"`python -m experiments.reliability.kill_test`: {STEPS} steps, saved every {EVERY}, "
        f"{DEVICES} pretend devices, {MESH}.",
        f"SIGKILL: {kills['identical']} of {kills['runs']} runs ended bit for bit as "
        f"the uninterrupted one; {kills['inside_a_save']} were cut off inside a save.",
        f"SIGTERM: {asked['identical']} of {asked['runs']} identical, "
        f"{asked['exit_75']} exited with 75.",
        "",
        "| trial | signal | moment | exit | steps logged | whole checkpoints | "
        "in a save | starts | each step logged once | identical |",
        "|" + " --- |" * 10,
    ]
    for row in result["trials"]:
        cells = [
            row["trial"],
            row["signal"],
            row["moment"],
            row["status"],
            row["logged_steps"],
            " ".join(map(str, row["checkpoints"])) or "none",
            _yes(row["save_cut_off"]),
            row["starts"],
            _yes(row["each_step_logged_once"]),
            _yes(row["identical"]),
        ]
        text.append("| " + " | ".join(map(str, cells)) + " |")
    (folder / "kills.md").write_text("\n".join(text) + "\n")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _flags(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/kills", help="folder for the runs")
    parser.add_argument("--results", help="folder for kills.json and kills.md")
    parser.add_argument("--kills", type=int, default=20, help="runs with SIGKILL")
    parser.add_argument("--terms", type=int, default=5, help="runs with SIGTERM")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
