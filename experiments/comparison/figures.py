# SPDX-License-Identifier: Apache-2.0
"""The page and the plot of the comparison in the small world."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import plot as plots
from experiments.shared.intervals import spread
from experiments.shared.page import Content, head, numbers, pm, seeds, table
from experiments.small import methods

Line = Mapping[str, Any]
COLUMNS = ("forget_probability", "forget_nll", "retain_probability", "utility")
LEVELS = (0.25, 0.5, 0.75)  # of the retrained model's forget_nll: where pairs compare
PAIRS = (
    "Same terms, same AdamW, same rates and seeds; only the combiner differs. Utility "
    "is compared at equal forgetting: *level* is the negative log-probability of the "
    "forgotten answers as a fraction of the retrained model's, read from each seed's "
    "curve over the rates. *deviation* is the larger one of the two methods' standard "
    "deviations over seeds; *BLUR minus sum* is paired by seed."
)
REFERENCES = {"retrained": "*", "original": "s"}  # and their marks in the plot


def content(lines: Sequence[Line], about: Mapping[str, Any]) -> Content:
    """What results/small.json holds.

    Args:
        lines: of run.compare.
        about: the ledger's head, rates, seeds and parameters.
    """
    return {
        "about": about,
        "methods": summarise(lines, about),
        "pairs": equal_forgetting(lines, about),
        "runs": list(lines),
    }


def summarise(lines: Sequence[Line], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every method, at its published and its best rate: [mean, deviation].

    The best of about["rates"] is chosen on the first seed. `seeds` counts the seeds on
    which a setting has run.
    """
    nll = next(x["forget_nll"] for x in lines if x["method"] == "retrained")
    runs = [line for line in lines if "rate" in line]
    found = []
    for name in dict.fromkeys(line["method"] for line in runs):
        here = [line for line in runs if line["method"] == name]
        published = next((r["rate"] for r in here if r["published"]), None)
        first = {r["rate"]: r for r in here if r["seed"] == about["seeds"][0]}
        swept = [first[rate] for rate in about["rates"] if rate in first]
        complete = len(swept) == len(about["rates"])
        best = max(swept, key=lambda line: balance(line, nll)) if complete else {}
        for setting, rate in (
            ("published", published),
            ("best of sweep", best.get("rate")),
        ):
            at = [r for r in here if r["rate"] == rate]
            if rate is not None and at:
                found.append(
                    {"method": name, "setting": setting, "rate": rate}
                    | {"seeds": len(at), "diverged": sum(not r["finite"] for r in at)}
                    | {column: spread([r[column] for r in at]) for column in COLUMNS}
                    | {"log10_forget_quality": spread([log_quality(r) for r in at])}
                )
    return found


def balance(line: Line, retrained_nll: float) -> float:
    """Harmonic mean of utility and nearness to the retrained model, in [0, 1].

    Nearness is forget_nll over the retrained model's, or the inverse if that is
    smaller: 0 where nothing is forgotten, 1 at the retrained model, and less again for
    a model that gives the forgotten answers no probability at all.
    """
    ratio = max(line["forget_nll"], 1e-9) / retrained_nll
    near = min(ratio, 1.0 / ratio)
    total = near + line["utility"]
    return 2.0 * near * line["utility"] / total if total else 0.0


def log_quality(line: Line) -> float:
    """log10 of forget quality; 0 for the retrained model."""
    return float(np.log10(max(line["forget_quality"], 1e-30)))


def equal_forgetting(
    lines: Sequence[Line], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """BLUR's utility minus its weighted sum's where both have forgotten as much.

    For each seed, the utility of a method is a curve over the mean negative
    log-probability of the forgotten answers, through the original model and the
    method's runs at every rate. It is read, by linear interpolation, at fractions of
    the retrained model's value.

    Returns:
        For each pair and level: the difference, mean and deviation over seeds, and the
        larger deviation of the two methods' utilities there. Levels that a curve does
        not reach, and pairs whose seeds are not complete, are left out.
    """
    base = {line["method"]: line for line in lines if "rate" not in line}
    found = []
    for total, blur in methods.SUMS.items():
        for level in LEVELS:
            target = level * base["retrained"]["forget_nll"]
            sides = [
                [
                    _at(_curve(lines, base["original"], name, seed, about), target)
                    for seed in about["seeds"]
                ]
                for name in (blur, total)
            ]
            if any(value is None for side in sides for value in side):
                continue
            gaps = [b - p for b, p in zip(*sides, strict=True)]
            deviation = max(statistics.stdev(side) for side in sides)
            found.append(
                {"blur": blur, "sum": total, "level": level, "forget_nll": target}
                | {"utility_blur": spread(sides[0]), "utility_sum": spread(sides[1])}
                | {"gap": spread(gaps), "seed_spread": deviation}
                | {"beyond_spread": abs(statistics.mean(gaps)) > deviation}
            )
    return found


def _curve(lines, original, name, seed, about):
    runs = [
        line
        for line in lines
        if line["method"] == name
        and line.get("seed") == seed
        and line["finite"]
        and line["rate"] in about["rates"]
    ]
    if len(runs) < len(about["rates"]):
        return None
    runs = sorted([original, *runs], key=lambda line: line["forget_nll"])
    return [line["forget_nll"] for line in runs], [line["utility"] for line in runs]


def _at(curve, target) -> float | None:
    if curve is None or not curve[0][0] <= target <= curve[0][-1]:
        return None
    return float(np.interp(target, *curve))


def readme(results: Mapping[str, Content]) -> list[str]:
    """README.md, of {"small"}."""
    content = results["small"]
    about, rows, pairs = (content[key] for key in ("about", "methods", "pairs"))
    base = {x["method"]: x for x in content["runs"] if "rate" not in x}
    lines = head(
        "Every method in the small world",
        claim="A question, not a paper: which method forgets most at the least loss of "
        "utility when all have the same steps and the same sweep of learning rates?",
        command="python -m experiments.comparison.run",
        time="About 40 minutes on two cores, scoring not included.",
        setup=f"A decoder of {about['parameters'] / 1e6:.2f}M parameters, world "
        f"`{about['world']}`; {about['steps']} steps of {about['batch_size']} rows of "
        f"each stream, rates {numbers(about['rates'])}, {seeds(about['seeds'])}. The "
        "best rate is chosen on the first seed. One small world; rates of large models "
        "do not carry over.",
        verdict=_verdict(rows, base),
    )
    lines += [
        "Means ± standard deviation over seeds. Forget quality is the p-value of "
        "TOFU's test against the retrained model, as its log10; 0 is "
        "indistinguishable. Utility is the harmonic mean of probability, greedy "
        "match and truth ratio over retain rows.",
        "",
        "![Forget quality against utility](results/small.png)",
        "",
        "Four of these models in TOFU's complete evaluation, measured with version "
        "0.1.0: [report](results/report/report.md).",
        "",
    ]
    header = ["method", "setting", "rate", "seeds", "log10 forget quality"]
    header += ["forget probability", "retain probability", "utility"]
    body: list[list[Any]] = []
    for name in REFERENCES:
        line = base[name]
        cells = [f"{line[key]:.3f}" for key in ("forget_probability", *COLUMNS[2:])]
        body.append([f"**{name}**", "", "", "", f"{log_quality(line):.1f}", *cells])
    for row in rows:
        diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        cells = [pm(row[key]) for key in ("forget_probability", *COLUMNS[2:])]
        body.append(
            [row["method"], row["setting"], f"{row['rate']:g}"]
            + [f"{row['seeds']}{diverged}", pm(row["log10_forget_quality"], 1), *cells]
        )
    lines += table(header, body)
    lines += ["## BLUR against the weighted sum of the same two losses", "", PAIRS, ""]
    return [*lines, *pair_table(pairs), *(f"- {x}" for x in pair_sentences(pairs))]


def _verdict(rows, base) -> list[str]:
    swept = [row for row in rows if row["setting"] == "best of sweep"]
    nll = base["retrained"]["forget_nll"]

    def mean_balance(row):
        means = {key: row[key][0] for key in ("forget_nll", "utility")}
        return balance(means, nll)

    top = sorted(swept, key=mean_balance, reverse=True)[:3]
    named = ", ".join(f"`{row['method']}` ({mean_balance(row):.2f})" for row in top)
    unchanged = sum(
        row["log10_forget_quality"][0] < log_quality(base["original"]) + 0.5
        for row in rows
        if row["setting"] == "published"
    )
    return [
        f"After the sweep {named} have the best balance of forgetting and utility; "
        "the differences are not tested.",
        f"At their published rates {unchanged} of "
        f"{sum(row['setting'] == 'published' for row in rows)} methods leave the "
        "original's forget quality unchanged (within 0.5): 20 steps at rates made for "
        "large models are too few here.",
        "No method reaches the retrained model's forget quality of 0."
        if all(row["log10_forget_quality"][0] < -0.5 for row in rows)
        else "Some methods come within 0.5 of the retrained model's forget quality.",
        "BLUR against weighted sums: [experiments/blur](../blur/README.md).",
    ]


def pair_table(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Utilities of BLUR and of its sum at equal forgetting."""
    return table(
        ["pair", "level", "utility BLUR", "utility sum", "BLUR minus sum", "deviation"],
        [
            (
                f"{pair['blur']} / {pair['sum']}",
                f"{pair['level']:.0%}",
                pm(pair["utility_blur"]),
                pm(pair["utility_sum"]),
                pm(pair["gap"], sign="+"),
                f"{pair['seed_spread']:.3f}",
            )
            for pair in pairs
        ],
    )


def pair_sentences(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which of two methods has more utility at each level, and if that is decided."""
    found = []
    for pair in pairs:
        gap, deviation = pair["gap"]
        side = "more" if gap > 0 else "less"
        decided = "beyond" if pair["beyond_spread"] else "**undecided**, within"
        found.append(
            f"At {pair['level']:.0%} of the retrained model's loss `{pair['blur']}` "
            f"has {abs(gap):.3f} (± {deviation:.3f}) {side} utility than "
            f"`{pair['sum']}`: {decided} the deviation over seeds of "
            f"{pair['seed_spread']:.3f}."
        )
    return found or ["No pair has run at every rate on every seed."]


def draw(content: Content, file: Path) -> None:
    """Forget quality against utility."""
    lines, rows = content["runs"], content["methods"]
    names = list(dict.fromkeys(row["method"] for row in rows))
    looks = {name: (f"C{i % 10}", "osD^v"[i // 10 % 5]) for i, name in enumerate(names)}
    with plots.saved(file, size=(9, 6)) as (_, grid):
        axes = grid[0, 0]
        for row in rows:
            quality, utility = row["log10_forget_quality"], row["utility"]
            colour, mark = looks[row["method"]]
            best = row["setting"] != "published"
            axes.errorbar(
                utility[0],
                quality[0],
                xerr=utility[1],
                yerr=quality[1],
                fmt=mark if best else "x",
                color=colour,
                label=row["method"] if best else None,
                capsize=2,
            )
        for line in lines:
            if "rate" not in line:
                axes.scatter(
                    line["utility"],
                    log_quality(line),
                    marker=REFERENCES[line["method"]],
                    s=160,
                    color="black",
                    label=line["method"],
                    zorder=3,
                )
        axes.set_xlabel("utility over retain rows (right is better)")
        axes.set_ylabel("log10 forget quality (up is better)")
        axes.set_title("Filled: best rate of the sweep; crosses: published rate")
        axes.legend(fontsize=8, ncol=2)
        axes.grid(alpha=0.3)
