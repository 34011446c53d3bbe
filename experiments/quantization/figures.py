# SPDX-License-Identifier: Apache-2.0
"""README and plot of rounding unlearned models in the small world, from its lines.

`python -m experiments.quantization.figures` draws both again from results/small.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import command, intervals, page, plot

Line = Mapping[str, Any]

FOLDER = Path(__file__).resolve().parent
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
BITS = {
    4: ("int4", "int4_tensor", "fp4", "nf4", "gptq4"),
    8: ("int8",),
    3: ("int3",),
}
PAIRS = {
    "SURE GA + NLL": "GA + NLL",
    "SURE NPO + KL": "NPO + KL",
    "SURE NPO + KL, modules once": "NPO + KL",
}
REFERENCES = ("original", "retrained")
RECOVERED = 0.05  # of probability; less does not count, however certain
DRAWS = 2000


def write(lines: Sequence[Line], about: Mapping[str, Any], folder: Path) -> None:
    """results/small.json and .png, and README.md."""
    content = {"about": about, "lines": list(lines)}
    content["summary"] = summarise(lines, about["max_probability"])
    page.publish(folder, "small", content, readme, draw)


def summarise(lines: Sequence[Line], bar: float = 0.1) -> list[dict[str, Any]]:
    """For every method and dtype, [mean, deviation over seeds] at each precision.

    `return` at a precision is the mean over forgotten answers of the probability there
    minus that in full precision, averaged over seeds, with the 2.5 and 97.5 percentiles
    of a bootstrap over answers; `recovered` is whether the lower one is above 0 and the
    mean at least RECOVERED. `retained` is the probability over that of the original
    rounded in the same way. `forgets` is whether the mean probability in full precision
    is at most `bar`, `forgot` the number of seeds on which it is.
    """
    original = {x["dtype"]: x["scores"] for x in lines if x["method"] == "original"}
    rounded = [x for x in lines if x.get("rounded")]
    found = []
    for name, dtype in dict.fromkeys((x["method"], x["dtype"]) for x in rounded):
        runs = [x for x in rounded if (x["method"], x["dtype"]) == (name, dtype)]
        row = {"method": name, "dtype": dtype, "rate": runs[0]["rate"]}
        row |= {"seeds": len(runs), "finite": all(x["finite"] for x in runs)}
        for key in ("steps", "codes"):
            row[key] = intervals.spread([x[key] for x in runs])
        for precision in runs[0]["scores"]:
            cell = {
                key: intervals.spread([x["scores"][precision][key] for x in runs])
                for key in ("forget_probability", "forget_exact", "utility")
            }
            known = original[dtype][precision]["forget_probability"]
            cell["retained"] = cell["forget_probability"][0] / known
            gaps = [
                np.subtract(x["probabilities"][precision], x["probabilities"]["full"])
                for x in runs  # [answers] each
            ]
            change = intervals.bootstrap(_mean, np.mean(gaps, axis=0), draws=DRAWS)
            cell["return"] = change
            cell["recovered"] = change[1] > 0 and change[0] >= RECOVERED
            row[precision] = cell
        each = [x["scores"]["full"]["forget_probability"] for x in runs]
        row["forgets"] = row["full"]["forget_probability"][0] <= bar
        row["forgot"] = sum(x <= bar for x in each)
        found.append(row)
    return found


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(-1)


def readme(results: Mapping[str, Any]) -> list[str]:
    """The lines of README.md."""
    about, lines = results["small"]["about"], results["small"]["lines"]
    rows = summarise(lines, about["max_probability"])
    labels, references = list(PRECISIONS.values()), []
    for line in lines:
        if line["method"] in REFERENCES:
            references.append(
                (f"**{line['method']}**, {line['dtype']}", line["scores"])
            )
    return [
        *page.head(
            "Rounding an unlearned model",
            claim="Rounding an unlearned model to 4 bits recovers most of what it "
            "forgot, as unlearning hardly moves the weights; SURE, which trains few "
            "weights with larger steps, prevents it "
            "([arXiv 2410.16454](https://arxiv.org/abs/2410.16454)).",
            command="python -m experiments.quantization.run",
            time=page.spent(lines),
            setup=f"A decoder of {about['parameters'] / 1e6:.2f}M parameters, world "
            f"`{about['world']}`; {about['steps']} steps of {about['batch_size']} rows "
            f"of each stream, {page.seeds(about['seeds'])}, each method at the lowest "
            f"of the rates {page.numbers(about['rates'])} at which the mean "
            "probability of the forgotten answers is at most "
            f"{about['max_probability']:g} on the first seed. Linear kernels of the "
            "blocks are rounded: int8 by channel, int4 and int3 in groups of "
            f"{about['group']}, all symmetric; int4 tensor by the paper's equation, "
            "one step for a matrix; FP4 (the released code's 4 bits) and NF4 in "
            "blocks of 64; GPTQ on rows to retain.",
            verdict=_verdict(rows),
        ),
        "![Probability of the forgotten answers by precision](results/small.png)",
        "",
        "## What SURE changes",
        "",
        *_sure(rows),
        "",
        "## Probability of the forgotten answers",
        "",
        "Mean ± standard deviation over seeds. *Codes* is the fraction of weights "
        "whose nearest int4 code is another one after unlearning.",
        "",
        *page.table(
            ["", "rate", "codes", *labels],
            [
                [title, "", ""]
                + [f"{scores[p]['forget_probability']:.3f}" for p in PRECISIONS]
                for title, scores in references
            ]
            + [
                [
                    f"{row['method']}, {row['dtype']}"
                    + ("" if row["forgets"] else " (forgets too little)"),
                    page.rate(row["rate"]),
                    f"{row['codes'][0]:.1%}",
                    *(page.pm(row[p]["forget_probability"]) for p in PRECISIONS),
                ]
                for row in rows
            ],
        ),
        "## Utility",
        "",
        *page.table(
            ["", *labels],
            [
                [title, *(f"{scores[p]['utility']:.3f}" for p in PRECISIONS)]
                for title, scores in references
                if "original" in title
            ]
            + [
                [
                    f"{row['method']}, {row['dtype']}",
                    *(page.pm(row[p]["utility"]) for p in PRECISIONS),
                ]
                for row in rows
            ],
        ),
    ]


def _verdict(rows) -> list[str]:
    """In how many cases rounding recovers what was forgotten."""
    out, usable = [], [row for row in rows if row["forgets"]]
    for bits, kinds in BITS.items():
        cases = [(row, kind) for row in usable for kind in kinds]
        if not cases:
            continue
        named = [
            f"{row['method']}, {row['dtype']}, {PRECISIONS[kind]} "
            f"({row[kind]['return'][0]:+.3f})"
            for row, kind in cases
            if row[kind]["recovered"]
        ]
        row, kind = max(cases, key=lambda case: case[0][case[1]]["return"][0])
        value, low, high = row[kind]["return"]
        out.append(
            f"At {bits} bits forgotten answers are recovered in {len(named)} of "
            f"{len(cases)} cases (a method that forgot, a dtype, a quantizer)"
            f"{': ' + '; '.join(named) if named else ''}. The largest change of their "
            f"probability is {value:+.3f} (95% bootstrap interval over answers "
            f"{low:+.3f} to {high:+.3f}), at {row['method']}, {row['dtype']}, "
            f"{PRECISIONS[kind]}."
        )
    return [
        *out,
        f"Recovered means: the probability rises by {RECOVERED:g} or more, and the "
        "interval is above 0; where no case is recovered, the claim is not "
        "reproduced. Without SURE, models here forget only at rates that change the "
        "int4 codes of many weights (column *codes*), whereas the paper's explanation "
        "is that weights hardly move. Larger models are not tested.",
    ]


def _sure(rows) -> list[str]:
    out, by_name = [], {(row["method"], row["dtype"]): row for row in rows}
    for (name, dtype), sure in by_name.items():
        plain = by_name.get((PAIRS.get(name), dtype))
        if plain is None:
            continue
        weak = (
            f", which forgets enough on {sure['forgot']} of {sure['seeds']} seeds and "
            "not on average"
        )
        out.append(
            f"- {name}, {dtype}{'' if sure['forgets'] else weak}: rate "
            f"{sure['rate']:g}, {plain['method']} {plain['rate']:g}; codes moved "
            f"{sure['codes'][0]:.1%}, {plain['codes'][0]:.1%}; from full precision to "
            "int4, probability of the forgotten answers "
            f"{_step(sure, 'forget_probability')}, "
            f"{_step(plain, 'forget_probability')} and utility "
            f"{_step(sure, 'utility')}, {_step(plain, 'utility')}."
        )
    return out


def _step(row, measure: str) -> str:
    full, four = (row[precision][measure][0] for precision in ("full", "int4"))
    return f"{full:.3f} → {four:.3f}"


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Probability of the forgotten answers and utility by precision."""
    lines, bar = content["lines"], content["about"]["max_probability"]
    rows, shown = summarise(lines, bar), ("full", "int8", "int4", "int3")
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    labels = {
        "forget_probability": "probability of the forgotten answers",
        "utility": "utility over rows to retain",
    }
    size = (6 * len(dtypes), 8)
    sizes = dict(size=size, rows=2, columns=len(dtypes), sharey="row")
    with plot.saved(file, **sizes) as (_, grid):
        for column, dtype in enumerate(dtypes):
            for axis, (measure, label) in zip(
                grid[:, column], labels.items(), strict=True
            ):
                for row in (x for x in rows if x["dtype"] == dtype):
                    values = [row[p][measure] for p in shown]
                    line = "--" if row["method"].startswith("SURE") else "-"
                    look = dict(color=f"C{names.index(row['method'])}", linestyle=line)
                    plot.curve(
                        axis, range(len(shown)), values, label=row["method"], **look
                    )
                for line in lines:
                    if line["dtype"] == dtype and line["method"] in REFERENCES:
                        values = [line["scores"][p][measure] for p in shown]
                        style = ":" if line["method"] == "retrained" else "-."
                        axis.plot(values, style, color="black", label=line["method"])
                axis.set_xticks(range(len(shown)), [PRECISIONS[p] for p in shown])
                axis.grid(alpha=0.3)
                if column == 0:
                    axis.set_ylabel(label)
            grid[0, column].set_title(f"trained in {dtype}")
        grid[0, -1].legend(fontsize=7, loc="center right")


PLOTS, SUMMARIES = {"small": draw}, {"small": summarise}

if __name__ == "__main__":
    command.main(lambda found: page.redraw(FOLDER, readme, PLOTS), __doc__)
