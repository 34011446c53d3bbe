# SPDX-License-Identifier: Apache-2.0
"""Plans of BLUR-NPO at real sizes on real slices of TPUs.

    python -m experiments.benchmarks.plan_table [--only 8b-v5p,...] [--draw]

Compiles each row twice, with BLUR and with the weighted sum of the same two terms
(minutes each, no TPU). experiments/benchmarks/results/plan.json is written after every
row, and rows in it are not compiled again, so the program can be stopped. --draw only
writes plan.md and plan.png from plan.json.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import optax

from experiments.shared import page
from experiments.shared import plot as plots
from jaxunlearn import _checks, combine
from jaxunlearn.recipes import Recipe
from jaxunlearn.workflows import plan
from jaxunlearn.workflows.training import build, settings

RESULTS = Path(__file__).parent / "results"
GIB = 2.0**30
REFUSED = (ValueError, KeyError, TypeError, ImportError, NotImplementedError)


class Row(NamedTuple):
    """One step to plan; every stream has `rows` rows of 2048 tokens."""

    preset: str
    topology: str
    mesh: dict[str, int]
    rows: int
    layers: int | None = None


ROWS = {
    "8b-v5e": Row("llama-3.1-8b", "v5e:8x8", dict(fsdp=64), 64),
    "8b-v6e": Row("llama-3.1-8b", "v6e:8x8", dict(fsdp=64), 64),
    "8b-v5p": Row("llama-3.1-8b", "v5p:4x4x4", dict(fsdp=64), 64),
    "70b-v5p": Row("llama-3.1-70b", "v5p:8x8x8", dict(fsdp=512), 512),
    "405b-v5p": Row("llama-3.1-405b", "v5p:16x16x16", dict(fsdp=512, tensor=8), 512),
    "30b-a3b-v5p": Row("qwen3-30b-a3b", "v5p:4x4x4", dict(fsdp=8, expert=8), 64),
    "8b-v5p-8-layers": Row("llama-3.1-8b", "v5p:4x4x4", dict(fsdp=64), 64, 8),
}
# (what, where, MFU in percent, by whom): measured by others, on other steps.
PUBLISHED = (
    ("Llama-3.1-8B", "256 v6e", 45.5, "MaxText"),
    ("Llama-3.1-70B", "512 v5p", 65.4, "MaxText"),
    ("Llama-3.1-8B", "H100", 33.0, "torchtitan, low"),
    ("Llama-3.1-8B", "H100", 39.0, "torchtitan, high"),
)
NOTE = """
Memory is what the TPU compiler reserves for a device. Times are lower bounds from
public peak numbers: the matrix products of the step at peak, and bytes sent at the
rate of all links, either overlapped perfectly (the larger counts) or not at all
(their sum, and that of memory traffic). A bound is not a measurement: nothing here
ran on a TPU, and no real step reaches the first. Published figures are measurements
of pre-training steps, with other batches, lengths, layouts and sometimes other ways
to count attention. They show what is reached in practice; they are not a comparison
of speed.

Model FLOPs count 2 N a token forward and 4 N backward (N: all kernels, unembedding
included, embedding lookup not) and causal attention by half, without recomputation.
BLUR / sum is the serial bound of BLUR over that of the weighted sum of the same two
terms: BLUR moves a few scalars more, and multiplies no more matrices. It also reads
both gradients once more, at most 2.5 ms of memory traffic here, which hardly changes
the bounds. The compiler's estimates count every loop once, so that traffic weighs
more in them. Compile times are of two CPU cores.

qwen3-30b-a3b is a mixture of 128 experts, 8 for each token. N counts 8 of them, and so
does the time of compute, which is right if all experts have equal loads. A device has
16 experts (1 / expert of all). It gathers their kernels over fsdp, 1 / 8 of a layer,
and the tokens of 8 devices over expert, and returns their sums (reduce-scatter, as
all-reduce where the compiler fuses it with a slice). The grouped products are kernels
of the compiler. Its compile time was taken while other programs used the same cores.
"""


def config(row: Row):
    """A row as the config of a run."""
    c = settings.defaults()
    c.output = "runs/plan"
    c.model.preset, c.model.compute_dtype = row.preset, "bfloat16"
    if row.layers:
        c.model.fields = {"layers": row.layers}
    stream = dict(source="synthetic", rows=row.rows, length=2048, count=1024)
    c.data = dict(forget=dict(stream, seed=1), retain=dict(stream, seed=2))
    c.recipe.name = "blur.npo"
    return settings.check(c)


def weighted(config, model) -> Recipe:
    """BLUR's terms, joined by a weighted sum."""
    terms = build.recipe(config, model).terms
    tx = optax.chain(combine.weighted_sum(dict.fromkeys(terms, 1.0)), optax.adamw(1e-5))
    return Recipe(terms, tx)


def compile_row(row: Row, **pieces) -> dict:
    """The report of a row as plain numbers."""
    report = plan.planned(config(row), row.topology, row.mesh, **pieces)
    found = plan.as_json(report)
    return {"collectives": found.pop("moved"), **found}


def markdown(content: dict) -> str:
    """results/plan.md."""
    header = ["step", "chips", "mesh", "GiB of a device", "fits", "sent, GB"]
    header += ["compute, s", "links, s", "MFU <= (overlapped)", "MFU <= (serial)"]
    header += ["BLUR / sum", "by the compiler", "compiled, s"]
    lines = ["# Plans of BLUR-NPO, two streams of 2048-token rows", ""]
    lines += page.table(header, [_cells(ROWS[k], x) for k, x in content.items()])
    kinds = next(iter(content.values()))["blur"]["memory"]
    lines += ["Memory of a device by kind, GiB:", ""]
    sizes = [
        (name, *(f"{x / GIB:.3f}" for x in entry["blur"]["memory"].values()))
        for name, entry in content.items()
    ]
    lines += page.table(["step", *kinds], sizes)
    lines += ["Sent by a device in a step of BLUR by kind, GB (times):", ""]
    sent = {name: entry["blur"]["collectives"] for name, entry in content.items()}
    kinds = sorted({kind for each in sent.values() for kind in each})
    none = {"bytes": 0.0, "count": 0}
    cells = [
        (name, *(_sent(each.get(kind, none)) for kind in kinds))
        for name, each in sent.items()
    ]
    lines += page.table(["step", *kinds], cells)
    lines += ["Published, measured by others:", ""]
    lines += [
        f"- {who}: {what} on {where}, {mfu} %" for what, where, mfu, who in PUBLISHED
    ]
    return "\n".join([*lines, NOTE.rstrip()]) + "\n"


def _cells(row: Row, entry: dict) -> tuple:
    report, other = entry["blur"], entry.get("sum")
    size = f"{row.preset}, {row.rows} + {row.rows} rows"
    size += f", {row.layers} layers" if row.layers else ""
    sent = sum(each["bytes"] for each in report["collectives"].values()) / 1e9
    low, high = report["mfu"]
    serial = other and report["seconds"]["serial"] / other["seconds"]["serial"]
    compiler = other and _ratio(report["optimal_seconds"], other["optimal_seconds"])
    return (
        size,
        f"{report['devices']}, {row.topology}",
        ", ".join(f"{axis} {n}" for axis, n in row.mesh.items()),
        f"{report['peak'] / GIB:.2f} of {report['hbm'] / GIB:.0f}",
        "yes" if report["fits"] else "no",
        f"{sent:.1f}",
        f"{report['seconds']['compute']:.3f}",
        f"{report['seconds']['ici']:.3f}",
        f"{100 * high:.1f} %",
        f"{100 * low:.1f} %",
        f"{serial:.3f}" if serial else "not compiled",
        f"{compiler:.3f}" if compiler else "none",
        f"{report['compile_seconds']:.0f}",
    )


def _sent(one: dict) -> str:
    return f"{one['bytes'] / 1e9:.1f} ({one['count']})"


def _ratio(a: float | None, b: float | None) -> float | None:
    """a / b, None unless both are positive: for v5e and v6e the compiler gives less."""
    return a / b if a and b and a > 0 and b > 0 else None


def draw(content: dict, path: Path) -> None:
    """Memory by kind, and both bounds of MFU next to what others measured."""
    names = list(content)
    reports = [content[name]["blur"] for name in names]
    with plots.saved(path, size=(13, 4.5), columns=2, dpi=110) as (_, grid):
        left, right = grid[0]
        bottom = [0.0] * len(names)
        for kind in reports[0]["memory"]:
            sizes = [report["memory"][kind] / GIB for report in reports]
            left.bar(names, sizes, bottom=bottom, label=kind)
            bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
        left.set_ylabel("GiB of a device")
        left.legend(fontsize=8)
        for x, report in enumerate(reports):
            bounds = [100 * value for value in report["mfu"]]
            look = dict(linewidth=8, color="tab:blue", solid_capstyle="butt")
            right.plot([x, x], bounds, **look)
        places = range(len(names), len(names) + len(PUBLISHED))
        right.plot(places, [mfu for _, _, mfu, _ in PUBLISHED], "o", color="tab:orange")
        right.set_ylabel("MFU, %")
        right.set_ylim(0, 100)
        measured = [f"{who}\n{what}, {where}" for what, where, _, who in PUBLISHED]
        right.set_xticks(range(len(names) + len(measured)), [*names, *measured])
        title = "blue: upper bounds, serial to overlapped; orange: measured"
        right.set_title(title, size=9)
        for axes in (left, right):
            axes.tick_params(axis="x", rotation=60, labelsize=7)


def main(argv: list[str] | None = None) -> int:
    """Compiles the missing rows and writes plan.json, plan.md and plan.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="rows between commas; all if absent")
    parser.add_argument("--draw", action="store_true", help="compile nothing")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    path = RESULTS / "plan.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    names = arguments.only.split(",") if arguments.only else list(ROWS)
    kinds = (
        ("blur", {}),
        ("sum", {"pieces": partial(build.pieces, make_recipe=weighted)}),
    )
    for kind, pieces in () if arguments.draw else kinds:
        for name in names:
            if kind in table.get(name, {}):
                continue
            try:
                _checks.one_of("--only", ROWS, row=name)
                report = compile_row(ROWS[name], **pieces)
            except REFUSED as error:
                print(
                    f"experiments.benchmarks.plan_table: {name}: {error}",
                    file=sys.stderr,
                )
                return 2
            table.setdefault(name, {})[kind] = report
            path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
            spent = report["compile_seconds"]
            print(f"{name} {kind}: compiled in {spent:.0f} s", flush=True)
    table = {name: table[name] for name in ROWS if name in table}
    if table:
        (RESULTS / "plan.md").write_text(markdown(table), encoding="utf-8")
        draw(table, RESULTS / "plan.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
