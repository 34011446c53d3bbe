# SPDX-License-Identifier: Apache-2.0
"""Tables and plot of MRP in the small world, from its lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxunlearn.io import log

Line = Mapping[str, Any]

ASKED = ("A", "B", "C", "retain")
KINDS = {
    "full": "full (MRP folded)",
    "lora": "LoRA",
    "held": "full, projections stand still",
    "unwrapped": "projections left out",
}


def write(lines: Sequence[Line], about: Mapping[str, Any], place: Path) -> None:
    """`place`.json with every line, `place`.md with tables, `place`.png with the plot.

    Args:
        lines: of mrp.run.
        about: head, parameters, command and versions.
        place: path without suffix.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    whole = {"about": about, "summary": summarise(lines), "lines": list(lines)}
    text = json.dumps(log.plain(whole), indent=1)
    place.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    text = "\n".join(_markdown(lines, about, place.name)) + "\n"
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    _plot(lines, place.with_suffix(".png"))


def summarise(lines: Sequence[Line]) -> dict[str, list[dict[str, Any]]]:
    """`stages`: by method and topic the scores after it, [mean, deviation] over seeds.
    `attacks`: by method and kind those after each number of steps, at the rate at which
    the rows that the attacker does not know come back most in the end."""
    stages = [
        {"method": name, "topic": topic, "rate": own[0].get("rate"), "seeds": len(own)}
        | {"scores": _over([x["scores"] for x in own])}
        for name, topic, own in _groups(
            [x for x in lines if "scores" in x and not x["key"].startswith("sweep")],
            lambda x: (x["method"], x.get("topic", "")),
        )
    ]
    attacks = []
    for name, kind, own in _groups(
        [x for x in lines if "curve" in x], lambda x: (x["method"], x["kind"])
    ):
        rates = {}
        for line in own:
            rates.setdefault(line["rate"], []).append(line["curve"])
        found = {
            rate: {step: _over([c[step] for c in curves]) for step in curves[0]}
            for rate, curves in rates.items()
        }
        rate = max(found, key=lambda r: _last(found[r])["held out"]["probability"][0])
        row = {"method": name, "kind": kind, "rate": rate, "curve": found[rate]}
        attacks.append(row | {"seeds": len(rates[rate])})
    return {"stages": stages, "attacks": attacks}


def _groups(lines, key):
    found: dict[Any, list[Line]] = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return [(*names, own) for names, own in found.items()]


def _over(scores):
    """Set of rows -> measure -> [mean, deviation]."""
    return {
        rows: {
            name: [float(f([s[rows][name] for s in scores])) for f in (np.mean, np.std)]
            for name in each
        }
        for rows, each in scores[0].items()
    }


def _last(curve):
    return curve[max(curve, key=int)]


def _markdown(lines, about, name) -> list[str]:
    found = summarise(lines)
    steps = ", ".join(map(str, about["curve"]))
    seeds = sorted({x["seed"] for x in lines if x["key"].startswith("end ")})
    sites = "; ".join(
        f"`{site}` of layers {', '.join(map(str, layers))}"
        for site, layers in about["places"].items()
    )
    out = [
        "# MRP in the small world: three topics, then relearning",
        "",
        f"Written by `{about['command']}` (see there for what runs). A decoder of "
        f"{about['parameters'] / 1e6:.2f}M parameters, world `{about['world']}`, seeds "
        f"{', '.join(map(str, seeds)) or 'none finished'}; {about['steps']} steps of "
        f"{about['rows']} rows of each stream a topic. MRP: "
        f"{about['count']} directions a topic at {sites}. "
        "Each method at the lowest of its rates at which the mean probability of A's "
        f"answers is at most {about['forgotten']:g} after A on the first seed. MRP's "
        "places, number of directions and rates were found in a pilot on this world "
        "and seed, which the others' rates were not.",
        "",
        *_sweep(lines),
        "## After each topic",
        "",
        "Share of answers that greedy decoding gives whole, and in brackets the mean "
        "probability of an answer token; mean over seeds.",
        "",
        "| method | rate | after | A | B | C | to keep |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["stages"]:
        cells = [_cell(row["scores"][rows]) for rows in ASKED]
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        out.append(
            f"| {row['method']} | {rate} | {row['topic']} | {' | '.join(cells)} |"
        )
    tried = {
        name: [x for x in lines if x["key"].startswith(f"sweep {name} ")]
        for name in about["methods"]
    }
    weak = [
        name
        for name, own in tried.items()
        if len(own) == len(about["methods"][name])
        and all(x["scores"]["A"]["probability"] > about["forgotten"] for x in own)
    ]
    if weak:
        out += ["", f"Forgets too little at every rate: {', '.join(weak)}."]
    out += [
        "",
        "## Relearning",
        "",
        f"An attacker trains on every other row of A to C for {max(about['curve'])} "
        f"steps at the better of {', '.join(f'{r:g}' for r in about['rates'])}, the "
        "same for all. *Known* are rows it trains on, *held out* the others: what "
        "comes back there was not in its data. Scores as above, after "
        f"{steps} steps.",
        "",
        f"![Held-out answers while an attacker trains]({name}.png)",
        "",
        "| method | attacker | rows | "
        + " | ".join(map(str, about["curve"]))
        + " |\n| --- | --- | --- |"
        + " --- |" * len(about["curve"]),
    ]
    for row in found["attacks"]:
        for rows in ("known", "held out"):
            cells = [
                _cell(row["curve"][str(step)][rows])
                if str(step) in row["curve"]
                else ""
                for step in about["curve"]
            ]
            out.append(
                f"| {row['method']} | {KINDS[row['kind']]} | {rows} | "
                f"{' | '.join(cells)} |"
            )
    if not found["attacks"]:
        out += ["", "No topic after A and no attack had run when this was written."]
    exact = [x for x in lines if "idempotent" in x]
    if exact:
        out += [
            "",
            "## Exactness",
            "",
            f"Over {len(exact)} seeds, after all topics "
            f"({exact[0]['directions']} directions): folded and projected logits "
            f"differ by at most {max(x['folded'] for x in exact):.1e} (bar 1e-4), "
            f"P P and P by at most {max(x['idempotent'] for x in exact):.1e} (bar "
            "1e-6).",
        ]
    versions = ", ".join(f"{name} {x}" for name, x in about["versions"].items())
    return [*out, "", f"Versions: {versions}."]


def _sweep(lines) -> list[str]:
    """Every rate that was tried, after A on the first seed."""
    out = [
        "## Rates on the first seed",
        "",
        "After topic A: share of answers that greedy decoding gives whole, and in "
        "brackets the mean probability of an answer token.",
        "",
        "| method | rate | A | B | C | to keep |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        if line["key"].startswith("sweep "):
            cells = [
                f"{x['exact']:.2f} ({x['probability']:.2f})"
                for x in (line["scores"][rows] for rows in ASKED)
            ]
            out.append(f"| {line['method']} | {line['rate']:g} | {' | '.join(cells)} |")
    return [*out, ""]


def _cell(scores) -> str:
    return f"{scores['exact'][0]:.2f} ({scores['probability'][0]:.2f})"


def _plot(lines, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    attacks = summarise(lines)["attacks"]
    figure, grid = pyplot.subplots(1, 3, figsize=(15, 4.2), sharey=True)
    swept = [line for line in lines if line["key"].startswith("sweep ")]
    for index, name in enumerate(dict.fromkeys(line["method"] for line in swept)):
        scores = [line["scores"] for line in swept if line["method"] == name]
        x, y = ([s[rows]["probability"] for s in scores] for rows in ("A", "retain"))
        grid[0].plot(x, y, "o", color=f"C{index}", label=name)
    grid[0].set_title("first seed, after A, every rate tried")
    grid[0].set_xlabel("probability of A's answers")
    grid[0].grid(alpha=0.3)
    for axes, rows in zip(grid[1:], ("known", "held out"), strict=True):
        for index, row in enumerate(a for a in attacks if a["kind"] == "full"):
            steps = sorted(map(int, row["curve"]))
            values = [row["curve"][str(s)][rows]["probability"] for s in steps]
            mean, spread = np.transpose(values)
            style = ":" if row["method"] in ("untouched", "twin") else "-o"
            axes.errorbar(
                steps,
                mean,
                yerr=spread,
                fmt=style,
                color=f"C{index}",
                label=row["method"],
                capsize=2,
                markersize=3,
            )
        axes.set_title(f"rows the attacker {'knows' if rows == 'known' else 'lacks'}")
        axes.set_xlabel("steps of the attack, every weight trains")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("probability of an answer token (left: to keep)")
    for axes in grid:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
