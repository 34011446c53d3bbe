# SPDX-License-Identifier: Apache-2.0
"""One prepared run for a GPU or a TPU host: correctness, then time and memory.

    python -m experiments.benchmarks.accelerator --output PREFIX
    python -m experiments.benchmarks.accelerator --rehearse      # tiny, on any machine

Sections run one after the other, each in its own process with its own limit of time. A
section that fails, runs out of memory or out of time is recorded, and the next one
starts. Every number is appended to PREFIX.jsonl when it is there, and PREFIX.json and
PREFIX.md are written after each section. The same command again skips what is done and
runs the rest. Weights and tokens are random and made on the device: nothing is
downloaded. torch is measured beside it where it is installed with CUDA. A rehearsal
with --in-process takes about a minute of one CPU core; without it every section starts
a process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.shared import page

NOT_RUN = "It has not run on an accelerator yet: none was at hand."

# Section -> its limit in seconds, in the order of the run.
SECTIONS = {
    "device": 40,
    "step_is_right": 70,
    "attention_is_right": 70,
    "1b": 130,
    "8b_int8": 130,
    "8b_lora": 80,
    "3b": 70,
    "torch": 60,
    "generate": 60,
    "relearn": 70,
    "8b_offload": 100,
    "remat": 120,
}
MIN_SECONDS = 15  # no section starts with less


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the sections that are not done, within --minutes, and writes the files."""
    options = parse(argv)
    if options.section:
        from experiments.benchmarks import accelerator_sections

        accelerator_sections.run(
            options.section, Path(options.output), options.rehearse
        )
        return {}
    if options.rehearse and not options.output:
        options.output = os.path.join(tempfile.mkdtemp(), "rehearsal")
    if options.rehearse:  # LLVM's optimization takes longer than what it saves here
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()
    if not options.output:
        raise SystemExit("error: --output PREFIX is needed, or --rehearse.")
    prefix = Path(options.output)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    names = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        raise SystemExit(
            f"error: --only knows {', '.join(SECTIONS)}, got {', '.join(unknown)}."
        )
    for name in names:
        done = _latest(prefix).get(f"section {name}", {}).get("status") == "done"
        left = until - time.monotonic()
        if done:
            print(f"{name}: done before", flush=True)
            continue
        if left < MIN_SECONDS:
            line = {"status": "not started", "reason": "no time was left"}
        else:
            line = _section(name, min(left, SECTIONS[name]), options)
        append(prefix, {"key": f"section {name}", **line})
        print(f"{name}: {line['status']} {line.get('reason', '')}", flush=True)
        _write(prefix)
    print(f"Wrote {prefix}.json and {prefix}.md")
    return content(prefix)


def _section(name: str, limit: float, options) -> dict[str, Any]:
    """Runs one section and says how it ended."""
    start = time.monotonic()
    if options.in_process:
        from experiments.benchmarks import accelerator_sections

        try:
            accelerator_sections.run(name, Path(options.output), options.rehearse)
            ended = {"status": "done"}
        except Exception as error:
            ended = {"status": "failed", "reason": reason(error)}
        return {**ended, "seconds": time.monotonic() - start}
    command = [sys.executable, "-m", "experiments.benchmarks.accelerator"]
    command += ["--section", name, "--output", options.output]
    command += ["--rehearse"] if options.rehearse else []
    with tempfile.TemporaryFile("w+") as errors:
        try:
            code = subprocess.run(
                command,
                env=environment(name),
                stderr=errors,
                timeout=limit,
                check=False,
            ).returncode
            ended = {"status": "done"}
            if code:
                errors.seek(0)
                text = [line for line in errors.read().splitlines() if line.strip()]
                last = text[-1][:300] if text else "no message"
                ended = {"status": "failed", "reason": f"exit status {code}: {last}"}
        except subprocess.TimeoutExpired:
            ended = {"status": "stopped", "reason": f"longer than {limit:.0f} s"}
    return {**ended, "seconds": time.monotonic() - start}


def environment(name: str) -> dict[str, str]:
    """Variables of a section's process: a CPU beside the accelerator, and nearly all of
    the device's memory, which jax leaves to torch in torch's section."""
    found = dict(os.environ)
    platforms = found.get("JAX_PLATFORMS", "")
    if name == "torch":
        found["JAX_PLATFORMS"] = "cpu"
    elif platforms and "cpu" not in platforms.split(","):
        found["JAX_PLATFORMS"] = f"{platforms},cpu"
    found.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    found["HF_HUB_OFFLINE"] = "1"
    return found


def reason(error: BaseException) -> str:
    """The first line of an error, for the page."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:300]


def append(prefix: Path, line: Mapping[str, Any]) -> None:
    """Adds a line to PREFIX.jsonl at once."""
    with Path(f"{prefix}.jsonl").open("a", encoding="utf-8") as out:
        out.write(json.dumps(page.plain(line)) + "\n")


def _latest(prefix: Path) -> dict[str, dict[str, Any]]:
    """Key -> the last line with it; a last line that was cut off is left out."""
    file = Path(f"{prefix}.jsonl")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return {line["key"]: line for line in map(json.loads, lines)}


def content(prefix: Path) -> dict[str, Any]:
    """All measurements, key -> numbers."""
    return {"command": "python -m experiments.benchmarks.accelerator"} | _latest(prefix)


def _write(prefix: Path) -> None:
    found = content(prefix)
    page.write_json(Path(f"{prefix}.json"), found)
    text = "\n".join(in_words(found)).rstrip() + "\n"
    page.write_text(Path(f"{prefix}.md"), text)


def in_words(found: Mapping[str, Any]) -> list[str]:
    """The page; without measurements it says that there are none."""
    out = [
        "# One run on an accelerator",
        "",
        "NPO on the forget stream plus NLL on the retain stream, random weights and "
        "tokens, bfloat16 compute. First whether a step and the attention kernels are "
        "right, then what models of 1B to 8B cost. The prepared command takes at most "
        "10 minutes on one GPU or one TPU host and needs no network:",
        "",
        "    python -m experiments.benchmarks.accelerator --output PREFIX",
        "",
    ]
    device = found.get("device")
    if device is None:
        return [*out, NOT_RUN]
    rehearsal = "This is a rehearsal with tiny shapes. " if device["rehearsal"] else ""
    versions = ", ".join(f"{name} {x}" for name, x in device["versions"].items())
    peak = device["peak_tflops"]
    out += [
        f"{rehearsal}{device['count']} x {device['kind']} with "
        f"{_gib(device['memory'])} GiB each, "
        f"{'unknown peak' if peak is None else f'{peak:.0f} TFLOP/s at peak'}, "
        f"{device['matmul_tflops']:.1f} TFLOP/s in one bfloat16 product of "
        f"{device['matmul_size']}^3. {versions}.",
        "",
    ]
    checks = {k: x for k, x in found.items() if k.startswith("check ")}
    out += ["## Is it right?", ""]
    rows = [
        (
            key.removeprefix("check "),
            x.get("failed") or f"{x['error']:.2g}",
            "" if "failed" in x else f"{x['allowed']:.2g}",
            "**failed**"
            if "failed" in x
            else ("yes" if x["error"] <= x["allowed"] else "**no**"),
        )
        for key, x in checks.items()
    ]
    out += page.table(["comparison", "relative error", "allowed", "right"], rows)
    steps = {k: x for k, x in found.items() if k.startswith("step ")}
    out += ["## Steps", ""]
    rows = [_step_row(key.removeprefix("step "), x) for key, x in steps.items()]
    out += page.table(
        [
            "step",
            "s",
            "tokens/s",
            "MFU",
            "peak GiB, of the process",
            "of the compiled step",
            "compiled in s",
        ],
        rows,
    )
    out += [
        "The peak of a process is that of all steps before it in the same section too. "
        "A compilation found in the cache is short.",
        "",
    ]
    if ratios := found_ratios(steps):
        out += page.table(["ratio", "value"], [(k, f"{x:.2f}") for k, x in ratios])
    others = {k: x for k, x in found.items() if k.startswith("other ")}
    out += ["## Generation and attack", ""]
    rows = [
        (
            key.removeprefix("other "),
            name.replace("_", " "),
            value if isinstance(value, str) else f"{value:.4g}",
        )
        for key, x in others.items()
        for name, value in x.items()
        if name != "key"
    ]
    out += page.table(["what", "number", "value"], rows)
    out += ["## Sections", ""]
    rows = [
        (
            key.removeprefix("section "),
            x["status"],
            f"{x.get('seconds', 0.0):.0f}",
            x.get("reason", ""),
        )
        for key, x in found.items()
        if key.startswith("section ")
    ]
    return [*out, *page.table(["section", "ended", "s", "why"], rows)]


def answer(found: Mapping[str, Any]) -> str:
    """One sentence for the table of all benchmarks."""
    checks = [x for k, x in found.items() if k.startswith("check ")]
    right = sum(x.get("error", 1.0) <= x.get("allowed", 0.0) for x in checks)
    steps = {k: x for k, x in found.items() if k.startswith("step ") and x.get("mfu")}
    best = max(steps, key=lambda k: steps[k]["mfu"], default=None)
    rate = (
        ""
        if best is None
        else (f"; best MFU {steps[best]['mfu']:.0%} ({best.removeprefix('step ')})")
    )
    kind = found["device"]["kind"]
    return f"{kind}: {right} of {len(checks)} comparisons hold{rate}"


def _step_row(name: str, x: Mapping[str, Any]) -> list[str]:
    if "failed" in x:
        return [name, x["failed"], "", "", "", "", ""]
    return [
        name,
        f"{x['seconds']:.4f}",
        f"{x['tokens_per_second']:.0f}",
        "" if x.get("mfu") is None else f"{x['mfu']:.1%}",
        _gib(x.get("peak")),
        _gib(x.get("compiled_peak")),
        "" if x.get("compile_seconds") is None else f"{x['compile_seconds']:.1f}",
    ]


def found_ratios(steps: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Ratios of seconds, of those pairs of steps that both ran."""
    pairs = {
        "BLUR over weighted sum": ("step 1b blur", "step 1b npo"),
        "NPO and NLL over NLL alone, equal tokens": ("step 1b npo", "step 1b nll"),
        "XLA's attention over the kernel": (
            "step 1b npo, xla attention",
            "step 1b npo",
        ),
        "torch over ours": ("step torch 1b npo", "step 1b npo"),
    }
    return [
        (name, steps[a]["seconds"] / steps[b]["seconds"])
        for name, (a, b) in pairs.items()
        if all("seconds" in steps.get(key, {}) for key in (a, b))
    ]


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", default="", help="path without suffix of .jsonl, .json and .md"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="no section starts or runs after it"
    )
    parser.add_argument(
        "--only", default="", help=f"some of {', '.join(SECTIONS)}, between commas"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes, on any platform"
    )
    parser.add_argument(
        "--in-process", action="store_true", help="sections without their own process"
    )
    parser.add_argument("--section", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
