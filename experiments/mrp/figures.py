# SPDX-License-Identifier: Apache-2.0
"""README and plot of MRP in the small world, from its lines.

`python -m experiments.mrp.figures` draws both again from results/small.json.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import command, intervals, page, plot

Line = Mapping[str, Any]

FOLDER = Path(__file__).resolve().parent
MRP = "mrp.graddiff"
SETS = ("A", "B", "C", "retain")
REFERENCES = ("original", "retrained")


def write(lines: Sequence[Line], about: Mapping[str, Any], folder: Path) -> None:
    """results/small.json and .png, and README.md."""
    content = {"about": about, "summary": summarise(lines), "lines": list(lines)}
    page.publish(folder, "small", content, readme, draw)


def summarise(lines: Sequence[Line]) -> dict[str, list[dict[str, Any]]]:
    """`stages`: by method and topic the scores after it, [mean, deviation] over seeds.
    `attacks`: by method and attacker the scores after each number of steps, at the rate
    at which the probability of the rows held out is largest in the end."""
    scored = [x for x in lines if "scores" in x and not x["key"].startswith("sweep")]
    stages = [
        {"method": name, "topic": topic, "rate": each[0].get("rate")}
        | {"seeds": len(each), "scores": _over_seeds([x["scores"] for x in each])}
        for (name, topic), each in _groups(
            scored, lambda x: (x["method"], x.get("topic", ""))
        )
    ]
    attacks = []
    for (name, attacker), each in _groups(
        (x for x in lines if "curve" in x), lambda x: (x["method"], x["attacker"])
    ):
        rates = dict(_groups(each, lambda x: x["rate"]))
        curves = {
            rate: {
                step: _over_seeds([x["curve"][step] for x in same])
                for step in same[0]["curve"]
            }
            for rate, same in rates.items()
        }
        rate = max(curves, key=lambda r: _last(curves[r])["held out"]["probability"][0])
        row = {"method": name, "attacker": attacker, "rate": rate}
        attacks.append(row | {"curve": curves[rate], "seeds": len(rates[rate])})
    return {"stages": stages, "attacks": attacks}


def _groups(lines: Iterable[Line], key: Callable) -> list[tuple[Any, list[Line]]]:
    found: dict[Any, list[Line]] = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return list(found.items())


def _over_seeds(scores: Sequence[Line]) -> dict[str, dict[str, list[float]]]:
    """Set of rows -> measure -> [mean, deviation]."""
    return {
        rows: {
            name: intervals.spread([s[rows][name] for s in scores], ddof=0)
            for name in each
        }
        for rows, each in scores[0].items()
    }


def _last(curve):
    return curve[max(curve, key=int)]


def readme(results: Mapping[str, Any]) -> list[str]:
    """The lines of README.md."""
    content = results["small"]
    about, lines, found = (
        content["about"],
        content["lines"],
        summarise(content["lines"]),
    )
    seeds = sorted({x["seed"] for x in lines if x["key"].startswith("end ")})
    sites = "; ".join(
        f"`{site}` of layers {page.numbers(layers)}"
        for site, layers in about["sites"].items()
    )
    exact = [x for x in lines if "idempotent" in x]
    rates = page.numbers(about["attack_rates"])
    many = len(about["attack_rates"]) > 1
    chosen = f"the best of the rates {rates}" if many else f"rate {rates}"
    out = page.head(
        "MRP: three topics, then relearning",
        claim="A projection of hidden states that is learned for each topic forgets "
        "topics one after another and resists relearning "
        "([arXiv 2508.15449](https://arxiv.org/abs/2508.15449)).",
        command="python -m experiments.mrp.run",
        time=page.spent(lines),
        setup=f"A decoder of {about['parameters'] / 1e6:.2f}M parameters, world "
        f"`{about['world']}`, {page.seeds(seeds) if seeds else 'no seed finished'}; "
        f"{about['steps']} steps of {about['batch_size']} rows of each stream for each "
        f"topic. MRP has {about['num_directions']} directions for each topic at "
        f"{sites}. Each method runs at the lowest of its rates at which the mean "
        "probability of A's answers, after A and on the first seed, is at most "
        f"{about['max_probability']:g}. MRP's sites, number of directions and rates "
        "were found in a pilot on this world and seed; those of the other methods were "
        "not.",
        verdict=_verdict(lines, about, found),
    )
    out += [
        "![Answers while an attacker trains](results/small.png)",
        "",
        "In all tables: the fraction of answers that greedy decoding gives completely, "
        "and in brackets the mean probability of an answer token; means over seeds.",
        "",
        "## Rates on the first seed, after topic A",
        "",
        *page.table(
            ["method", "rate", "A", "B", "C", "retain"],
            [
                [x["method"], page.rate(x["rate"])]
                + [_cell(x["scores"][rows]) for rows in SETS]
                for x in lines
                if x["key"].startswith("sweep ")
            ],
        ),
        "## After each topic",
        "",
        *page.table(
            ["method", "rate", "after", "A", "B", "C", "retain"],
            [
                [row["method"], page.rate(row["rate"]), row["topic"]]
                + [_cell(row["scores"][rows]) for rows in SETS]
                for row in found["stages"]
            ],
        ),
        "## Relearning",
        "",
        "An attacker trains on every other row of A to C for "
        f"{max(about['eval_steps'])} steps at {chosen}, the same for all methods. "
        "*Trained* rows are those it trains on; *held out* rows are the others, so "
        "what comes back there was not in its data. `full` trains every weight (MRP "
        "folded), `lora` products of rank 8, `frozen projections` every weight but "
        "MRP's projections; `no projections` removes them. Columns are steps of the "
        "attack.",
        "",
        *page.table(
            ["method", "attacker", "rows", *map(str, about["eval_steps"])],
            [
                [row["method"], row["attacker"], rows]
                + [
                    _cell(row["curve"][str(step)][rows])
                    if str(step) in row["curve"]
                    else ""
                    for step in about["eval_steps"]
                ]
                for row in found["attacks"]
                for rows in ("trained", "held out")
            ],
        ),
    ]
    if exact:
        out += [
            "## Exactness",
            "",
            f"Over {len(exact)} seeds, after all topics "
            f"({exact[0]['directions']} directions), folded and projected logits "
            f"differ by at most {max(x['folded'] for x in exact):.1e} (bar 1e-4), and "
            f"P P and P by at most {max(x['idempotent'] for x in exact):.1e} (bar "
            "1e-6).",
            "",
        ]
    return out + page.versions(about)


def _verdict(lines, about, found) -> list[str]:
    """What the numbers say about relearning, seed by seed."""
    out, ends = [], {}
    for row in found["attacks"]:
        if row["attacker"] in ("full", "lora"):
            ends[row["method"], row["attacker"]] = {
                x["seed"]: _last(x["curve"])["held out"]["probability"]
                for x in lines
                if (x["method"], x.get("attacker"), x.get("rate"))
                == (row["method"], row["attacker"], row["rate"])
            }
    weak = too_weak(lines, about)
    if weak:
        out.append(f"Forgets too little at every rate: {', '.join(weak)}.")
    for attacker in ("full", "lora"):
        mrp = ends.get((MRP, attacker), {})
        for name in about["methods"]:
            other = ends.get((name, attacker), {})
            seeds = sorted(set(mrp) & set(other))
            if name == MRP or name in weak or not seeds:
                continue
            word = intervals.on_every_seed([other[s] - mrp[s] for s in seeds])
            ours, theirs = (
                page.pm(intervals.spread([each[s] for s in seeds], ddof=0), 2)
                for each in (mrp, other)
            )
            out.append(
                f"That MRP resists the `{attacker}` attacker better than {name} "
                f"{page.WORDS[word]}: at the end held-out answers have a probability "
                f"of {ours} after MRP and {theirs} after {name} (mean ± standard "
                f"deviation over {len(seeds)} seeds)."
            )
    if not ends:
        return [*out, "No attack had run when this was written."]
    return [
        *out,
        "A comparison holds or fails only where all seeds agree. Rates were chosen on "
        "one seed, and methods lose different amounts of the rows to retain, so the "
        "strength of forgetting is matched only roughly.",
    ]


def too_weak(lines: Sequence[Line], about: Mapping[str, Any]) -> list[str]:
    """Methods that do not forget A at any rate."""
    return [
        name
        for name, tried in _groups(
            (x for x in lines if x["key"].startswith("sweep ")), lambda x: x["method"]
        )
        if len(tried) == len(about["methods"][name])
        and all(
            x["scores"]["A"]["probability"] > about["max_probability"] for x in tried
        )
    ]


def _cell(scores) -> str:
    exact, probability = (np.ravel(scores[x])[0] for x in ("exact", "probability"))
    return f"{exact:.2f} ({probability:.2f})"


def draw(content: Mapping[str, Any], file: Path) -> None:
    """The sweep on the first seed, and answers while the full attacker trains."""
    lines, attacks = content["lines"], summarise(content["lines"])["attacks"]
    with plot.saved(file, size=(15, 4.2), columns=3, sharey=True) as (_, grid):
        first, *others = grid[0]
        swept = [x for x in lines if x["key"].startswith("sweep ")]
        for index, (name, each) in enumerate(_groups(swept, lambda x: x["method"])):
            x, y = (
                [line["scores"][rows]["probability"] for line in each]
                for rows in ("A", "retain")
            )
            first.plot(x, y, "o", color=f"C{index}", label=name)
        first.set_title("first seed, after A, every rate tried")
        first.set_xlabel("probability of A's answers")
        first.set_ylabel("probability of an answer token (left: rows to retain)")
        for axis, rows in zip(others, ("trained", "held out"), strict=True):
            full = [row for row in attacks if row["attacker"] == "full"]
            for index, row in enumerate(full):
                steps = sorted(map(int, row["curve"]))
                values = [row["curve"][str(s)][rows]["probability"] for s in steps]
                look = ":" if row["method"] in REFERENCES else "-o"
                look = dict(fmt=look, color=f"C{index}", markersize=3)
                plot.curve(axis, steps, values, label=row["method"], **look)
            axis.set_title(
                f"rows {'the attacker trains on' if rows == 'trained' else rows}"
            )
            axis.set_xlabel("steps of the attack, every weight trains")
        for axis in grid[0]:
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)


PLOTS, SUMMARIES = {"small": draw}, {"small": summarise}

if __name__ == "__main__":
    command.main(lambda found: page.redraw(FOLDER, readme, PLOTS), __doc__)
