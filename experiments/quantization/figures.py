# SPDX-License-Identifier: Apache-2.0
"""Tables and plot of rounding unlearned models in the small world, from its lines."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxunlearn.io import log

Line = Mapping[str, Any]

PRECISIONS = {
    "full": "full",
    "int8": "int8",
    "int4": "int4",
    "int4_tensor": "int4 tensor",
    "fp4": "FP4",
    "nf4": "NF4",
    "gptq4": "GPTQ 4",
    "int3": "int3",
}
FOUR = ("int4", "int4_tensor", "fp4", "nf4", "gptq4")
PAIRS = {
    "SURE GA + NLL": "GA + NLL",
    "SURE NPO + KL": "NPO + KL",
    "SURE NPO + KL, modules once": "NPO + KL",
}
BACK = 0.05  # of probability: less is no return, however certain
DRAWS = 2000


def write(lines: Sequence[Line], about: Mapping[str, Any], place: Path) -> None:
    """`place`.json with every line, `place`.md with tables, `place`.png with the plot.

    Args:
        lines: of quantize.compare_precisions.
        about: the experiment's head and parameters.
        place: path without suffix.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    rows = summarise(lines, about)
    whole = {"about": about, "summary": rows, "runs": list(lines)}
    text = json.dumps(log.plain(whole), indent=1)
    place.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    text = "\n".join(_markdown(lines, about, rows, place.name)) + "\n"
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    _plot(lines, rows, place.with_suffix(".png"))


def summarise(lines: Sequence[Line], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every method and dtype, [mean, deviation over seeds] at each precision.

    `return` at a precision is the mean over forgotten answers of its probability there
    minus that in full precision, averaged over seeds, with the 2.5 and 97.5 percentiles
    of a bootstrap over answers; `back` says whether the first of these is above 0 and
    the mean at least BACK. `retained` is the probability over that of the untouched
    model rounded in the same way.
    """
    base = {
        line["dtype"]: line["scores"] for line in lines if line["method"] == "untouched"
    }
    found, done = [], [line for line in lines if line.get("rounded")]
    for name, dtype in dict.fromkeys((x["method"], x["dtype"]) for x in done):
        own = [x for x in done if (x["method"], x["dtype"]) == (name, dtype)]
        row = {"method": name, "dtype": dtype, "rate": own[0]["rate"]}
        row |= {"seeds": len(own), "finite": all(x["finite"] for x in own)}
        for key in ("steps", "codes"):
            row[key] = _spread([x[key] for x in own])
        for precision in own[0]["scores"]:
            scores = [x["scores"][precision] for x in own]
            forget = _spread([s["forget_probability"] for s in scores])
            known = base[dtype][precision]["forget_probability"]
            row[precision] = {
                "forget_probability": forget,
                "forget_exact": _spread([s["forget_exact"] for s in scores]),
                "utility": _spread([s["utility"] for s in scores]),
                "retained": forget[0] / known,
            } | _returned(own, precision)
        row["forgets"] = row["full"]["forget_probability"][0] <= about["forgotten"]
        each = [x["scores"]["full"]["forget_probability"] for x in own]
        row["forgot"] = sum(x <= about["forgotten"] for x in each)  # seeds
        found.append(row)
    return found


def _returned(own: Sequence[Line], precision: str) -> dict[str, Any]:
    gaps = [
        np.subtract(x["rows"][precision], x["rows"]["full"])
        for x in own  # [answers] each
    ]
    gaps = np.mean(gaps, axis=0)
    draws = np.random.default_rng(0).integers(0, len(gaps), (DRAWS, len(gaps)))
    low, high = np.percentile(gaps[draws].mean(1), (2.5, 97.5))
    back = bool(low > 0 and gaps.mean() >= BACK)
    return {"return": [float(gaps.mean()), float(low), float(high)], "back": back}


def _spread(values: Sequence[float]) -> list[float]:
    """[mean, standard deviation]; the deviation of one value is 0."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return [statistics.mean(values), sd]


def _markdown(lines, about, rows, name) -> list[str]:
    labels = [PRECISIONS[precision] for precision in PRECISIONS]
    out = [
        "# Rounding an unlearned model in the small world",
        "",
        "Written by `python -m experiments.quantization.run "
        "--config=experiments/small/configs/biographies.py` (see there for what runs).",
        f"A decoder of {about['parameters'] / 1e6:.2f}M parameters, world "
        f"`{about['world']}`; {about['steps']} steps of {about['rows']} rows of each "
        f"stream, seeds {', '.join(map(str, about['seeds']))}, each method at the "
        f"lowest of the rates {', '.join(f'{r:g}' for r in about['rates'])} at which "
        "the mean probability of the forgotten answers is at most "
        f"{about['forgotten']:g} on the first seed. Linear kernels of the blocks are "
        f"rounded: int8 by channel, int4 and int3 in groups of {about['group']}, all "
        "symmetric; int4 tensor by the paper's equation, one step for a matrix; FP4 "
        "(the released code's 4 bits) and NF4 in blocks of 64; GPTQ on rows to keep.",
        "Mean ± standard deviation over seeds. *Codes* is the fraction of weights "
        "whose nearest int4 code is another one after unlearning.",
        "",
        f"![Probability of the forgotten answers by precision]({name}.png)",
        "",
        *_answers(rows),
        "## Probability of the forgotten answers",
        "",
        f"| | rate | codes | {' | '.join(labels)} |",
        "| --- | --- | --- |" + " --- |" * len(labels),
    ]
    for line in lines:
        if line["method"] in ("untouched", "twin"):
            cells = [
                f"{line['scores'][precision]['forget_probability']:.3f}"
                for precision in PRECISIONS
            ]
            title = f"**{line['method']}**, {line['dtype']}"
            out.append(f"| {title} | | | {' | '.join(cells)} |")
    for row in rows:
        cells = [_pm(row[precision]["forget_probability"]) for precision in PRECISIONS]
        mark = "" if row["forgets"] else " (forgets too little)"
        out.append(
            f"| {row['method']}, {row['dtype']}{mark} | {row['rate']:g} | "
            f"{row['codes'][0]:.1%} | {' | '.join(cells)} |"
        )
    out += [
        "",
        "## Utility",
        "",
        f"| | {' | '.join(labels)} |",
        "| --- |" + " --- |" * len(labels),
    ]
    for line in lines:
        if line["method"] == "untouched":
            cells = [f"{line['scores'][p]['utility']:.3f}" for p in PRECISIONS]
            out.append(f"| **untouched**, {line['dtype']} | {' | '.join(cells)} |")
    for row in rows:
        cells = [_pm(row[precision]["utility"]) for precision in PRECISIONS]
        out.append(f"| {row['method']}, {row['dtype']} | {' | '.join(cells)} |")
    return out


def _answers(rows) -> list[str]:
    """What the numbers say, in plain words."""
    out = ["## Does it come back?", ""]
    usable = [row for row in rows if row["forgets"]]
    for title, kinds in (("4", FOUR), ("8", ("int8",)), ("3", ("int3",))):
        cases = [(row, kind) for row in usable for kind in kinds]
        back = [case for case in cases if case[0][case[1]]["back"]]
        if not cases:
            continue
        most = max(cases, key=lambda case: case[0][case[1]]["return"][0])
        gap = most[0][most[1]]["return"]
        named = "; ".join(
            f"{row['method']}, {row['dtype']}, {PRECISIONS[kind]} "
            f"({row[kind]['return'][0]:+.3f})"
            for row, kind in back
        )
        out.append(
            f"- At {title} bits the forgotten comes back in {len(back)} of "
            f"{len(cases)} cases (a method that forgot, a dtype, a quantizer)"
            f"{': ' + named if named else ''}. The largest change of the answers' "
            f"probability is {gap[0]:+.3f} (95 % of bootstrap samples over answers in "
            f"{gap[1]:+.3f} to {gap[2]:+.3f}), at {most[0]['method']}, "
            f"{most[0]['dtype']}, {PRECISIONS[most[1]]}."
        )
    out += [
        "",
        f"Coming back means: by {BACK:g} of probability or more, and above 0 in 97.5 % "
        "of the samples.",
        "",
        "## What SURE changes",
        "",
    ]
    by_name = {(row["method"], row["dtype"]): row for row in rows}
    for (name, dtype), sure in by_name.items():
        plain = by_name.get((PAIRS.get(name), dtype))
        if plain is None:
            continue
        lead = "" if sure["forgets"] else f", which {_too_little(sure)}"
        out.append(
            f"- {name}, {dtype}{lead}: rate {sure['rate']:g} for {plain['rate']:g} of "
            f"{plain['method']}; codes moved {sure['codes'][0]:.1%} for "
            f"{plain['codes'][0]:.1%}; from full precision to int4, probability of the "
            f"forgotten {_step(sure, 'forget_probability')} for "
            f"{_step(plain, 'forget_probability')} and utility "
            f"{_step(sure, 'utility')} for {_step(plain, 'utility')}."
        )
    return [*out, ""]


def _too_little(row) -> str:
    """A row is usable by the mean over seeds, its rate was chosen on the first."""
    return (
        f"forgets enough on {row['forgot']} of {row['seeds']} seeds and not on average"
    )


def _step(row, measure: str) -> str:
    full, four = (row[precision][measure][0] for precision in ("full", "int4"))
    return f"{full:.3f} → {four:.3f}"


def _pm(spread: Sequence[float]) -> str:
    return f"{spread[0]:.3f} ± {spread[1]:.3f}"


def _plot(lines, rows, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = ("full", "int8", "int4", "int3")
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(
        zip(names, pyplot.cm.tab10(np.linspace(0, 1, len(names))), strict=True)
    )
    figure, grid = pyplot.subplots(
        2, len(dtypes), figsize=(6 * len(dtypes), 8), sharey="row", squeeze=False
    )
    for column, dtype in enumerate(dtypes):
        for axes, measure in zip(
            grid[:, column], ("forget_probability", "utility"), strict=True
        ):
            for row in rows:
                if row["dtype"] == dtype:
                    values = np.array([row[p][measure] for p in shown])
                    axes.errorbar(
                        range(len(shown)),
                        values[:, 0],
                        yerr=values[:, 1],
                        color=colours[row["method"]],
                        linestyle="--" if row["method"].startswith("SURE") else "-",
                        label=row["method"],
                        capsize=2,
                    )
            for line in lines:
                if line["dtype"] == dtype and line["method"] in ("untouched", "twin"):
                    values = [line["scores"][p][measure] for p in shown]
                    style = ":" if line["method"] == "twin" else "-."
                    axes.plot(values, style, color="black", label=line["method"])
            axes.set_xticks(range(len(shown)), [PRECISIONS[p] for p in shown])
            axes.grid(alpha=0.3)
        grid[0, column].set_title(f"trained in {dtype}")
    grid[0, 0].set_ylabel("probability of the forgotten answers")
    grid[1, 0].set_ylabel("utility over rows to keep")
    grid[0, -1].legend(fontsize=7, loc="center right")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
