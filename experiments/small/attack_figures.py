# SPDX-License-Identifier: Apache-2.0
"""Table and plot of retraining on T in the small world, from its lines."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxunlearn.io import log

Line = Mapping[str, Any]

MEASURES = ("choice", "verbatim")
CHANCE = {"choice": 0.25, "verbatim": 0.0}
MOST = 0.5  # of what the original has above the twin: above it, most came back
REFERENCES = ("original", "twin", "never seen", "finetuned original")


def write(lines: Sequence[Line], about: Mapping[str, Any], place: Path) -> None:
    """`place`.json with every line, `place`.md with tables, `place`.png with the plot.

    Args:
        lines: of attack.experiment.
        about: the experiment's head and parameters.
        place: path without suffix.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    rows = summarise(lines)
    whole = {"about": about, "summary": rows, "runs": list(lines)}
    text = json.dumps(log.plain(whole), indent=1)
    place.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    text = "\n".join(_markdown(lines, about, rows, place.name)) + "\n"
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    _plot(rows, place.with_suffix(".png"))


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row for each who was attacked.

    Returns:
        Rows: who, base, seeds, folds (how many of all seeds together), rate and the
        unlearning's `retain_loss` and `forget_probability` (mean over its seeds), and
        for each measure `before` and `after` ([mean, deviation over seeds] on facts
        held out, after at the best rate and epoch of each fold), `rate` (after over
        that of the base after the same attack, on the same folds: the paper's recovery)
        and `above` (the same with what the twin has after the attack taken off both).
    """
    attacked = [line for line in lines if line["kind"] == "rtt"]
    found = []
    for who in dict.fromkeys(line["who"] for line in attacked):
        own = [line for line in attacked if line["who"] == who]
        base = "finetuned original" if who.startswith("finetuned") else "original"
        name = who.removeprefix("finetuned ")
        method = [
            x
            for x in lines
            if x["kind"] == "unlearned"
            and (x["base"] == "finetuned") == who.startswith("finetuned")
            and x["method"] == name
            and x["rate"] == own[0].get("rate")
        ]
        row = {"who": who, "base": base, "method": name, "folds": len(own)}
        row["seeds"] = sorted({line["seed"] for line in own})
        row["rate"] = own[0].get("rate")
        row["facts"] = sum(line["facts"] for line in own)
        row["finite"] = all(all(line["finite"]) for line in own)
        for key in ("retain_loss", "forget_probability", "retain_exact"):
            row[key] = statistics.mean(x[key] for x in method) if method else None
        for measure in MEASURES:
            row[measure] = _measured(own, attacked, base, measure)
        found.append(row)
    return found


def _measured(own, attacked, base, measure) -> dict[str, Any]:
    def after(line):
        return float(np.max(line[measure]))

    def reference(who, fold):
        same = [x for x in attacked if (x["who"], x["fold"]) == (who, fold)]
        return after(same[0]) if same else None

    seeds: dict[int, list[Line]] = {}
    for line in own:
        seeds.setdefault(line["seed"], []).append(line)
    befores, afters, rates, above = [], [], [], []
    for each in seeds.values():
        befores.append(statistics.mean(line[measure][0][0] for line in each))
        afters.append(statistics.mean(map(after, each)))
        most = [reference(base, line["fold"]) for line in each]
        floor = [reference("twin", line["fold"]) for line in each]
        if None not in most:
            rates.append(afters[-1] / statistics.mean(most))
            if None not in floor and statistics.mean(most) > statistics.mean(floor):
                low = statistics.mean(floor)
                above.append((afters[-1] - low) / (statistics.mean(most) - low))
    told = {"before": _spread(befores), "after": _spread(afters)}
    return told | {"rate": _spread(rates), "above": _spread(above)}


def _spread(values: Sequence[float]) -> list[float] | None:
    """[mean, standard deviation]; the deviation of one value is 0."""
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return [statistics.mean(values), sd]


def _markdown(lines, about, rows, name) -> list[str]:
    out = [
        "# Retraining on other facts in the small world",
        "",
        "Written by `python -m experiments.small.attack` (see there for what runs).",
        f"A decoder of {about['parameters'] / 1e6:.2f}M parameters, world "
        f"`{about['world']}`; {about['steps']} steps of {about['rows']} rows of each "
        f"stream, at the rate of the sweep below that forgets most with a mean loss "
        f"on rows to keep of at most {about['bound']:g} nats a token on the "
        f"first seed, or else hurts least. {about['facts']} facts in "
        f"{about['folds']} folds that share no author. The attack: every parameter, "
        f"Adam, {_rates(about)}, {about['epochs']} epochs of batches of "
        f"{about['batch']}; the best rate and epoch of each fold is taken, "
        "which favours the attacker.",
        "*Recovery* is what an unlearned model has after the attack over what the "
        "model before unlearning has after it; *above the twin*, the same with what "
        "the twin reaches by the attack taken off both. Mean ± standard deviation over "
        "seeds.",
        "",
        *_ran(lines, about),
        f"![What came back]({name}.png)",
        "",
        *_answers(rows, finished=not _ran(lines, about)),
        "",
        "## Numbers",
        "",
        "| attacked | seeds, folds | unlearning rate | retain loss | choice before | "
        "after | recovery | above the twin | verbatim before | after | recovery | "
        "above the twin |",
        "| --- |" + " --- |" * 11,
    ]
    for row in rows:
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        loss = "" if row["retain_loss"] is None else f"{row['retain_loss']:.2f}"
        cells = [f"{len(row['seeds'])}, {row['folds']}", rate, loss]
        for measure in MEASURES:
            own = row[measure]
            plain = row["who"] in REFERENCES
            cells += [_pm(own["before"]), _pm(own["after"])]
            cells += ["", ""] if plain else [_pm(own["rate"]), _pm(own["above"])]
        who = f"**{row['who']}**" if row["who"] in REFERENCES else row["who"]
        out.append(f"| {who} | {' | '.join(cells)} |")
    swept = [line for line in lines if line["kind"] == "unlearned"]
    out += [
        "",
        "## The sweep of unlearning",
        "",
        "| base | method | rate | seed | forget probability | verbatim | choice | "
        "retain loss | retain exact |",
        "| --- |" + " --- |" * 8,
    ]
    for x in swept:
        out.append(
            f"| {x['base']} | {x['method']} | {x['rate']:g} | {x['seed']} | "
            f"{x['forget_probability']:.3f} | {x['facts']['verbatim']:.3f} | "
            f"{x['facts']['choice']:.2f} | {x['retain_loss']:.2f} | "
            f"{x['retain_exact']:.2f} |"
        )
    return out


def _answers(rows, *, finished: bool = True) -> list[str]:
    """What the numbers say, in plain words."""
    by = {row["who"]: row for row in rows}
    out = ["## Does it come back?", ""]
    for who, sense in (
        ("twin", "The twin, which never saw the facts,"),
        ("never seen", "On authors whom nobody ever saw the model before unlearning"),
    ):
        if who not in by:
            continue
        own = by[who]
        error = 2 * (0.25 * 0.75 / own["facts"]) ** 0.5
        choice, verbatim = own["choice"]["after"][0], own["verbatim"]["after"][0]
        verdict = "within" if choice <= CHANCE["choice"] + error else "above"
        out.append(
            f"- {sense} has choice {choice:.2f} after the attack, {verdict} two "
            f"deviations of chance (0.25 ± {error:.2f}, the best of all rates and "
            f"epochs), and verbatim {verbatim:.3f}."
        )
    for base in ("original", "finetuned original"):
        own = [
            row for row in rows if row["base"] == base and row["who"] not in REFERENCES
        ]
        if not own:
            continue
        kind = "in pretraining" if base == "original" else "by finetuning"
        for measure in MEASURES:
            known = [row for row in own if row[measure]["above"]]
            back = [r for r in known if r[measure]["above"][0] > MOST]
            pairs = [
                (r["method"], r[measure]["above"][0], r[measure]["rate"][0])
                for r in known
            ]
            told = ", ".join(f"{name} {a:.0%} ({b:.0%})" for name, a, b in pairs)
            out.append(
                f"- Of facts learned {kind}, measured by {measure}, most of what the "
                f"model before unlearning has above the twin comes back in {len(back)} "
                f"of {len(known)} methods: {told} (in brackets the paper's recovery)."
            )
    far = "" if finished else ", judged by the few attacks that have run"
    out.append(f"- The paper's claim{far}: {_claim(rows)}")
    return out


def _claim(rows) -> str:
    """Whether pretraining facts come back, and finetuned ones less."""
    means = {}
    for base in ("original", "finetuned original"):
        for measure in MEASURES:
            own = [
                row[measure]["above"][0]
                for row in rows
                if row["base"] == base
                and row["who"] not in REFERENCES
                and row[measure]["above"]
            ]
            if own:
                means[base, measure] = statistics.mean(own)
    early = [means.get(("original", measure)) for measure in MEASURES]
    if None in early:
        return "not measured."
    first = all(value > MOST for value in early)
    some = any(value > MOST for value in early)
    word = "holds" if first else "holds by one measure of two" if some else "fails"
    text = (
        f"that most of the accuracy on pretraining facts comes back {word} here (mean "
        f"over methods, above the twin: choice {early[0]:.0%}, verbatim {early[1]:.0%})"
    )
    late = [means.get(("finetuned original", measure)) for measure in MEASURES]
    if None in late:
        return f"{text}; that of facts finetuned in less does was not measured."
    less = [a < b - 0.1 for a, b in zip(late, early, strict=True)]
    word = "holds" if all(less) else "holds by one measure" if any(less) else "fails"
    return (
        f"{text}; that much less of facts finetuned in does {word} (choice "
        f"{late[0]:.0%}, verbatim {late[1]:.0%}; other methods and fewer seeds)."
    )


def _ran(lines, about) -> list[str]:
    """What there is of the plan, where that is not all of it."""
    planned = len(about["rates"]) * len(about["seeds"]) * about["folds"]
    ran = sum(line["kind"] == "rtt" and line["who"] in about["rates"] for line in lines)
    if ran >= planned:
        return []
    missing = [
        who for who in about["rates"] if who not in {x.get("who") for x in lines}
    ]
    told = f"; none yet of {', '.join(missing)}" if missing else ""
    return [
        f"**Not finished: {ran} of {planned} attacks on unlearned models have run"
        f"{told}.** The same command goes on.",
        "",
    ]


def _rates(about) -> str:
    if len(about["attack"]) == 1:
        return f"rate {about['attack'][0]:g}"
    return f"rates {_list(about['attack'])} on the first seed, the better on others"


def _pm(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.2f} ± {value[1]:.2f}"


def _list(values) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    place = np.arange(len(rows))
    titles = ("choice of four on facts held out", "probability of an answer's token")
    for axis, measure, title in zip(axes, MEASURES, titles, strict=True):
        for shift, key, colour in ((-0.2, "before", "0.75"), (0.2, "after", "C0")):
            values = [row[measure][key] for row in rows]
            axis.bar(
                place + shift,
                [v[0] for v in values],
                0.38,
                yerr=[v[1] for v in values],
                color=colour,
                label=f"{key} the attack",
            )
        if CHANCE[measure]:
            axis.axhline(CHANCE[measure], color="k", lw=0.8, ls=":", label="chance")
        axis.set_xticks(place, [row["who"] for row in rows], rotation=40, ha="right")
        axis.set_ylim(0, 1.05)
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)
