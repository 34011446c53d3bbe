# SPDX-License-Identifier: Apache-2.0
"""The prepared accelerator run: a rehearsal of all of it, and what failures leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import accelerator
from experiments.benchmarks import accelerator_sections as sections

RESULTS = Path(accelerator.__file__).parent / "results"


def test_every_section_has_a_limit_and_all_fit_into_two_runs():
    assert list(sections.SECTIONS) == list(accelerator.SECTIONS)
    assert sum(accelerator.SECTIONS.values()) <= 2 * 9.5 * 60
    assert accelerator.parse([]).minutes <= 10


@pytest.mark.slow
def test_the_rehearsal_runs_every_section_once(tmp_path, capsys):
    prefix = tmp_path / "run"
    argv = ["--rehearse", "--in-process", "--output", str(prefix), "--minutes", "100"]
    command = [sys.executable, "-m", "experiments.benchmarks.accelerator", *argv]
    one_device = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, env=one_device, cwd=RESULTS.parents[2])
    count = len(Path(f"{prefix}.jsonl").read_text().splitlines())
    found = accelerator.main(argv)
    assert len(Path(f"{prefix}.jsonl").read_text().splitlines()) == count
    assert capsys.readouterr().out.count("done before") == len(accelerator.SECTIONS)
    for name in accelerator.SECTIONS:
        assert found[f"section {name}"]["status"] == "done", found
    checks = [x for key, x in found.items() if key.startswith("check ")]
    assert len(checks) >= 4 and all(x["error"] <= x["allowed"] for x in checks)
    steps = {k: x for k, x in found.items() if k.startswith("step ")}
    assert len(steps) >= 10 and all(x["seconds"] > 0 for x in steps.values())
    ratios = [name for name, _ in accelerator.found_ratios(steps)]
    assert "BLUR over weighted sum" in ratios
    written = Path(f"{prefix}.md").read_text(encoding="utf-8")
    assert written == page_of(found) and "rehearsal" in written
    assert json.loads(Path(f"{prefix}.json").read_text()) == found


def page_of(found):
    return "\n".join(accelerator.in_words(found)).rstrip() + "\n"


def test_a_section_that_fails_or_hangs_is_recorded_and_runs_again(
    tmp_path, monkeypatch, capsys
):
    prefix, ran = tmp_path / "run", []

    def child(command, *, env, stderr, timeout, check):
        name = command[command.index("--section") + 1]
        ran.append(name)
        assert timeout <= accelerator.SECTIONS[name] and "cpu" in env["JAX_PLATFORMS"]
        assert (env["JAX_PLATFORMS"] == "cpu") == (name == "torch")
        if name == "1b" and len(ran) < 9:
            raise subprocess.TimeoutExpired(command, timeout)
        code = 1 if name == "3b" and len(ran) < 9 else 0
        if code:
            stderr.write("Traceback\nRESOURCE_EXHAUSTED: no memory\n\n")
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(accelerator.subprocess, "run", child)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    argv = ["--output", str(prefix), "--only", "1b,3b,torch"]
    found = accelerator.main(argv)
    assert found["section 1b"]["status"] == "stopped"
    assert found["section 1b"]["reason"] == "longer than 130 s"
    wanted = "exit status 1: RESOURCE_EXHAUSTED: no memory"
    assert found["section 3b"]["reason"] == wanted
    assert found["section torch"]["status"] == "done"
    ran += [""] * 9
    found = accelerator.main(argv)
    assert [name for name in ran if name] == ["1b", "3b", "torch", "1b", "3b"]
    assert {found[f"section {x}"]["status"] for x in ("1b", "3b")} == {"done"}
    found = accelerator.main(["--output", str(tmp_path / "late"), "--minutes", "0.1"])
    assert found["section device"]["status"] == "not started"
    with pytest.raises(SystemExit, match="--only knows"):
        accelerator.main(["--output", str(prefix), "--only", "2b"])
    with pytest.raises(SystemExit, match="--output PREFIX is needed"):
        accelerator.main([])


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch):
    ran = []

    def good():
        ran.append("good")
        return {"seconds": 1.0}

    def section(run):
        run.add("step good", good)
        run.add("step large", lambda: [][1])
        run.add("step last", lambda: {"seconds": 2.0})

    monkeypatch.setitem(sections.SECTIONS, "3b", section)
    monkeypatch.setattr(sections.jax.config, "update", lambda *_: None)
    prefix = tmp_path / "run"
    with pytest.raises(RuntimeError, match="failed inside it: step large"):
        sections.run("3b", prefix, rehearse=True)
    with pytest.raises(RuntimeError):
        sections.run("3b", prefix, rehearse=True)
    assert len(ran) == 1  # only what failed runs again
    found = accelerator.content(prefix)
    assert found["step last"]["seconds"] == 2.0
    assert found["step large"]["failed"].startswith("IndexError")
    with Path(f"{prefix}.jsonl").open("a") as out:
        out.write('{"key": "cut o')  # as a stopped process leaves it
    assert accelerator.content(prefix) == found


def test_the_page_names_what_is_wrong_and_draws_ratios():
    step = dict(seconds=0.5, tokens_per_second=8.0, mfu=0.41, peak=2**31)
    found = {
        "device": {
            **dict(kind="NVIDIA H200", count=1, memory=2**37, rehearsal=False),
            **dict(peak_tflops=989.0, matmul_tflops=700.0, matmul_size=8192),
            "versions": {"jax": "0.12"},
        },
        "check a": {"error": 0.5, "allowed": 0.1},
        "check b": {"failed": "ValueError: no"},
        "step 1b npo": step,
        "step 1b blur": {**step, "seconds": 0.51, "mfu": 0.4},
        "step 8b": {"failed": "XlaRuntimeError: RESOURCE_EXHAUSTED"},
    }
    text = page_of(found)
    assert "1 x NVIDIA H200 with 128.00 GiB each, 989 TFLOP/s" in text
    assert "| a | 0.5 | 0.1 | **no** |" in text and "| b | ValueError: no |" in text
    assert "| 1b npo | 0.5000 | 8 | 41.0% | 2.00 |" in text
    assert "| BLUR over weighted sum | 1.02 |" in text
    assert "RESOURCE_EXHAUSTED" in text and accelerator.NOT_RUN not in text
    assert accelerator.answer(found) == (
        "NVIDIA H200: 0 of 2 comparisons hold; best MFU 41% (1b npo)"
    )


def test_the_committed_page_is_drawn_from_the_committed_numbers():
    file = RESULTS / "accelerator.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    written = (RESULTS / "accelerator.md").read_text(encoding="utf-8")
    assert written == page_of(found)
    assert file.exists() or accelerator.NOT_RUN in written
