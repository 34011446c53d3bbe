# SPDX-License-Identifier: Apache-2.0
"""The page and plot of retraining on T in SmolLM2, from the lines of relearn."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.rtt.score import (
    CHANCE,
    LATE,
    LESS,
    NAMES,
    TITLES,
    Line,
    claim,
    rise,
    summarise,
)
from jaxunlearn.io import log


def write(lines: Sequence[Line], about: Mapping[str, Any], place: Path) -> None:
    """`place`.json with every line, `place`.md with tables, `place`.png with the plot.

    Args:
        lines: of relearn.experiment.
        about: the experiment's head, command and versions.
        place: path without suffix.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    rows = summarise(lines)
    whole = {"about": about, "summary": rows, "claim": claim(lines, rows)}
    text = json.dumps(log.plain(whole | {"runs": list(lines)}), indent=1)
    place.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    text = "\n".join(_markdown(lines, about, rows, place.name)) + "\n"
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    _plot(rows, place.with_suffix(".png"))


def _markdown(lines, about, rows, name) -> list[str]:
    config = about["config"]
    out = [
        "# Retraining on other facts in SmolLM2",
        "",
        f"Written by `{about['command']}` (see there for what runs). Model "
        f"`{config['model']}`; every fact is asked by the text of four choices, the "
        "likeliest (by the sum of its tokens) counts. Unlearning: "
        f"{config['steps']} steps of {config['rows']} rows of each stream, at the "
        "largest rate of the sweep below that leaves the losses on the retain stream "
        f"and on prose at most {config['bound']:g} nats a token above those before, or "
        "else the one "
        "that hurts it least. The attack: every parameter, Adam, rate "
        f"{config['attack']:g}, {config['epochs']} epochs of batches of "
        f"{config['batch']} over all of {config['folds']} folds but the "
        f"one that is asked; a seed holds out {config['rotations']} folds.",
        "",
        f"![Accuracy before and after the attack]({name}.png)",
        "",
        *_ran(lines, about),
        *_answers(lines, rows),
        "",
        *_choice(lines, about),
    ]
    return out + _numbers(rows) + _sweep(lines, rows, config) + _cost(lines, about)


def _answers(lines, rows) -> list[str]:
    """What the numbers say, in plain words."""
    out, told = ["## Does it come back?", ""], claim(lines, rows)
    for row in rows:
        if row["who"] == "untold":
            low, high = row["last"][1:]
            verdict = "not told from" if low <= CHANCE <= high else "away from"
            out.append(
                f"- Negative control: the plain model, attacked on birthdays that it "
                f"was never told, answers {row['last'][0]:.0%} of {row['facts']} "
                f"held out [{low:.0%}, {high:.0%}], {verdict} chance ({CHANCE:.0%}); "
                f"{row['before'][0]:.0%} before the attack, {row['best'][0]:.0%} at "
                "the best epoch of each fold, which chance favours."
            )
    for of, title in TITLES.items():
        own = [row for row in rows if row["of"] == of and "original" in row]
        if not own:
            continue
        if of not in told["returned"]:
            out.append(f"- Of {title}: nothing above chance was lost.")
            continue
        forgot = [
            f"{NAMES[row['who']]} {row['recovery'][0]:.0%}"
            for row in own
            if row["who"] in told["forgot"][of]
        ]
        most = told["most_returns"].get(of)
        word = f"; that most comes back {_word(most)}" if most else ""
        out.append(
            f"- Of {title}, {_share(told['returned'][of])} of what unlearning took "
            f"above chance came back in the attack{word}. {len(own)} methods together; "
            "those that forgot half or more of what is above chance, with the paper's "
            f"recovery: {', '.join(forgot) or 'none'}."
        )
    if "less" in told:
        out.append(
            f"- Of facts finetuned in, {_share(told['less'])} less comes back than of "
            f"those of pretraining (a difference of such shares); that it is much less "
            f"(by {LESS:.0%}, and surely by something) {_word(told['much_less'])}."
        )
    out.append(f"- The paper's claim: {_whole(told)}")
    out.append(
        "- Brackets: 95 % intervals, of accuracies Wilson's, of shares over facts "
        "drawn anew (one without width only says that all facts came out alike). They "
        "know nothing of other seeds, models or rates."
    )
    return out


def _whole(told) -> str:
    """Both halves of the paper's claim in one word."""
    first, second = list(told["most_returns"].values()), told.get("much_less")
    if not first or second is None:
        return "not measured as a whole."
    words = {*first, second}
    halves = [
        f"most comes back of {of}: {word}" for of, word in told["most_returns"].items()
    ]
    halves.append(f"much less of facts finetuned in: {second}")
    whole = "fails" if "fails" in words else "undecided"
    whole = "holds in both halves" if words == {"holds"} else whole
    return f"{whole} here ({'; '.join(halves)})."


def _word(verdict: str) -> str:
    return "is undecided" if verdict == "undecided" else f"**{verdict}**"


def _choice(lines, about) -> list[str]:
    """How the facts were chosen, and what that does to the accuracy before."""
    found = {x["of"]: x for x in lines if x["kind"] == "facts"}
    out = ["## The facts", ""]
    for of, title in TITLES.items():
        if of not in found:
            continue
        own = found[of]
        if "asked" in own:
            how = (
                f"{own['asked']} were asked in another wording, {own['right']} "
                f"({own['right'] / own['asked']:.0%}) answered right by sum and by "
                f"mean of log-probabilities (guessing, {CHANCE:.0%} by either), and "
                f"the {own['facts']} with the largest margin taken; "
                f"{own['kept']} others answered right are in the retain stream and "
                "taught the wording asked here in "
                f"{about['config']['told']['wording']['steps']} steps, after which "
                f"{own['choice']:.0%} of the facts to forget are answered right"
            )
        else:
            how = (
                f"{own['facts']}, and the {own['kept']} of the retain stream, were "
                f"told in {about['config']['told'][LATE]['steps']} steps; "
                f"{own['choice']:.0%} are answered right then"
            )
        out.append(f"- {title[0].upper()}{title[1:]}: {how}.")
    return [
        *out,
        "",
        "Choosing by what is answered right inflates the accuracy before: some answers "
        "were lucky, and asked otherwise they fall back to the mean. The model before "
        "unlearning is attacked and asked on the very same facts, so that shares of "
        "its accuracy suffer less; where it only seems to know, there is also less to "
        "bring back.",
        "",
    ]


def _numbers(rows) -> list[str]:
    out = [
        "## Numbers",
        "",
        "Accuracy on facts held out; *last*: after the last epoch; *best*: after the "
        "best epoch of each fold, as in the paper, which favours the attacker. "
        "*Recovery*: last over that of the original; *above chance*: chance taken off "
        "both; *of what was lost*: above chance, where who is below it before counts "
        "as at it.",
        "",
        "| facts | attacked | seeds | held out | before | last | best | recovery | "
        "above chance | of what was lost | recovery, best epochs |",
        "| --- |" + " --- |" * 10,
    ]
    for row in sorted(rows, key=_place):
        name = NAMES.get(row["who"], f"**{row['who']}**")
        if row.get("forgot") is False:
            name += " (forgot less than half)"
        cells = [str(len(row["seeds"])), str(row["facts"])]
        cells += [_range(row[key]) for key in ("before", "last", "best")]
        cells += [_share(row.get(k)) for k in ("recovery", "above", "returned")]
        best = row.get("best_recovery")
        cells.append("" if best is None else f"{best:.0%}")
        out.append(f"| {row['of']} | {name} | {' | '.join(cells)} |")
    return [*out, ""]


def _sweep(lines, rows, config) -> list[str]:
    out = [
        "## The sweep of unlearning",
        "",
        "*Rise*: of the loss, nats a token, above that before. Choice and probability "
        "of a right answer's token are over all facts to forget, before any attack; "
        "*retain*: choice over the facts of the retain stream.",
        "",
        "| facts | method | rate | seed | choice | probability | retain | retain rise "
        "| prose rise | |",
        "| --- |" + " --- |" * 9,
    ]
    first = {x["of"]: x for x in lines if x["kind"] == "facts"}
    taken = {
        (x["of"], x["who"]): x["rate"]
        for x in lines
        if x["kind"] == "rtt" and "rate" in x
    }
    for of in TITLES:
        if of not in first:
            continue
        base = first[of]
        out.append(
            f"| {of} | **original** | | | {base['choice']:.2f} | "
            f"{base['probability']:.3f} | {base['retain_choice']:.2f} | "
            f"{base['retain_loss']:.2f} before | "
            f"{base['prose_loss']:.2f} before | |"
        )
        for x in lines:
            if x["kind"] != "unlearned" or x["of"] != of:
                continue
            rises = [x[k] - base[k] for k in ("retain_loss", "prose_loss")]
            note = "taken" if taken.get((of, x["who"])) == x["rate"] else ""
            if rise(x, base) > config["bound"]:
                note += ", over the bound" if note else "over the bound"
            out.append(
                f"| {of} | {NAMES[x['who']]} | {x['rate']:g} | {x['seed']} | "
                f"{x['choice']:.2f} | {x['forget_probability']:.3f} | "
                f"{x['retain_choice']:.2f} | {rises[0]:+.2f} | {rises[1]:+.2f} | "
                f"{note} |"
            )
    return [*out, "", *_matched(rows, config)]


def _matched(rows, config) -> list[str]:
    """How far the retain losses at the rates taken agree, and where they do not."""
    out = []
    for of, title in TITLES.items():
        own = [row for row in rows if row["of"] == of and "rate" in row]
        if not own:
            continue
        rises = {k: [row[f"{k}_rise"] for row in own] for k in ("retain", "prose")}
        text = f"- {title[0].upper()}{title[1:]}: "
        text += " and ".join(
            f"{kind} losses of the methods rose by {min(each):+.2f} to {max(each):+.2f}"
            for kind, each in rises.items()
        )
        for names, what in (
            (
                [x for x in own if x["rate"] == max(config["rates"][x["who"]])],
                "largest rate is within the bound (it could have forgotten more)",
            ),
            (
                [x for x in own if _worst(x) > config["bound"]],
                "over the bound at every rate, or in the mean over seeds",
            ),
        ):
            if names:
                text += f"; {what}: {', '.join(NAMES[x['who']] for x in names)}"
        out.append(text + ".")
    return [*out, ""]


def _worst(row) -> float:
    return max(row["retain_rise"], row["prose_rise"])


def _cost(lines, about) -> list[str]:
    spent = sum(x.get("core_seconds", 0.0) for x in lines)
    versions = ", ".join(f"{name} {x}" for name, x in about["versions"].items())
    return [
        f"Unlearning and attacks took {spent / 60:.0f} minutes of one core "
        f"({about['device']}). Versions: {versions}."
    ]


def _ran(lines, about) -> list[str]:
    """What there is of the plan, where that is not all of it."""
    config, own = about["config"], [x for x in lines if x.get("who") in NAMES]
    ran = [x for x in own if x["kind"] == "rtt"]
    seeds = {x["seed"] for x in ran} or {0}
    each = [(who, of) for who in config["rates"] for of in TITLES]
    planned = len(each) * len(seeds) * config["rotations"]
    if len(ran) >= planned:
        return []
    there = {(x["who"], x["of"]) for x in ran}
    missing = [f"{NAMES[who]} on {of}" for who, of in each if (who, of) not in there]
    told = f"; none yet of {', '.join(missing)}" if missing else ""
    return [
        f"**Not finished: {len(ran)} of {planned} attacks on unlearned models have run"
        f"{told}.** The same command goes on.",
        "",
    ]


def _place(row) -> tuple[int, bool, bool]:
    """Kind by kind, the original and the untold before the methods."""
    who = row["who"]
    return list(TITLES).index(row["of"]), who != "original", who in NAMES


def _range(value: Sequence[float]) -> str:
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def _share(value: Sequence[float] | None) -> str:
    if value is None:
        return ""
    return f"{value[0]:.0%} [{value[1]:.0%}, {value[2]:.0%}]"


def _plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = [of for of in TITLES if any(row["of"] == of for row in rows)]
    figure, grid = plt.subplots(
        1, max(1, len(kinds)), figsize=(13, 4.4), layout="constrained", squeeze=False
    )
    for axis, of in zip(grid[0], kinds, strict=False):
        own = sorted((row for row in rows if row["of"] == of), key=_place)
        place = np.arange(len(own))
        for shift, key, label, colour in (
            (-0.2, "before", "before the attack", "0.75"),
            (0.2, "last", "after it", "C0"),
        ):
            values = np.array([row[key] for row in own])
            low, high = values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]
            error = np.maximum(0, [low, high])
            axis.bar(
                place + shift,
                values[:, 0],
                0.38,
                yerr=error,
                color=colour,
                error_kw={"lw": 0.8},
                label=label,
            )
        axis.axhline(CHANCE, color="k", lw=0.8, ls=":", label="chance")
        names = [NAMES.get(row["who"], row["who"]) for row in own]
        axis.set_xticks(place, names, rotation=40, ha="right")
        axis.set_ylim(0, 1.05)
        axis.set_title(TITLES[of], fontsize=10)
    grid[0][0].set_ylabel("accuracy on facts held out")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)
