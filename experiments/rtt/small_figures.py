# SPDX-License-Identifier: Apache-2.0
"""Page and plot of retraining on T in the small world, from its lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.rtt.score import CHANCE, LESS, MOST
from experiments.rtt.small_score import (
    BASES,
    CONTROLS,
    EARLY,
    MEASURES,
    REFERENCES,
    Line,
    claim,
    summarise,
    taken,
)
from jaxunlearn.io import log


def write(lines: Sequence[Line], about: Mapping[str, Any], place: Path) -> None:
    """`place`.json with every line, `place`.md with tables, `place`.png with the plot.

    Args:
        lines: of attack.experiment.
        about: the experiment's head and parameters.
        place: path without suffix.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    rows = summarise(lines)
    told = claim(lines, rows)
    whole = {"about": about, "summary": rows, "claim": told}
    text = json.dumps(log.plain(whole | {"runs": list(lines)}), indent=1)
    place.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    text = "\n".join(_markdown(lines, about, rows, told, place.name)) + "\n"
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    _plot(rows, place.with_suffix(".png"))


def _markdown(lines, about, rows, told, name) -> list[str]:
    return [
        "# Retraining on other facts in the small world",
        "",
        "Written by `python -m experiments.rtt.small` (see there for what runs).",
        f"A decoder of {about['parameters'] / 1e6:.2f}M parameters, world "
        f"`{about['world']}`. Unlearning: {about['steps']} steps of {about['rows']} "
        "rows of each stream, at the rate of the sweep below that forgets most with a "
        f"mean loss on rows to keep of at most {about['bound']:g} nats a token on the "
        f"first seed, or else hurts least. {about['facts']} facts in "
        f"{about['folds']} folds that share no author. The attack: every parameter, "
        f"Adam, {_rates(about)}, {about['epochs']} epochs of batches of "
        f"{about['batch']} over all folds but the one that is asked.",
        "Two measures on facts held out: *choice*, whether the answer is the likeliest "
        "of four, and *verbatim*, the probability of a token of the answer.",
        "",
        *_ran(lines, about),
        *_parts(rows),
        "",
        f"![What came back]({name}.png)",
        "",
        "## Does it come back?",
        "",
        *map(_controlled, (row for row in rows if row["who"] in CONTROLS)),
        *_answers(told, rows, finished=not _ran(lines, about)),
        "",
        *_numbers(rows),
        *_sweep(lines, about, rows),
    ]


def _parts(rows) -> list[str]:
    """Which seeds and folds everyone has, and why not all have the same."""
    alike: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for row in rows:
        key = tuple(row["seeds"]), row["folds"]
        alike.setdefault(key, []).append(row["who"])
    told = [
        f"{', '.join(names)}: {_seeds(seeds)}, {folds} attacks"
        for (seeds, folds), names in alike.items()
    ]
    return [
        f"What ran (an attack is a seed and a fold): {'; '.join(told)}. To save time, "
        "models that no method changed and all that was finetuned in have the first "
        "seed only, facts finetuned in only the two methods that the paper tries on "
        "them, and rates were swept on the first seed only.",
    ]


def _controlled(row) -> str:
    """A negative control, by the last epoch at every rate."""
    sense = {
        "twin": "the twin, which never saw the facts",
        "never seen": "the model before unlearning, on authors whom nobody ever saw",
    }[row["who"]]
    said = [
        f"{_share(x['last'])} at rate {x['rate']:g} "
        f"({'away' if x['told_from_chance'] else 'not told'} from chance)"
        for x in row["controls"]
    ]
    choice, verbatim = row["choice"], row["verbatim"]
    return (
        f"- Negative control: {sense}, is right by choice after the last epoch in "
        f"{' and in '.join(said)} of {row['facts']} facts; chance is {CHANCE:.0%}. "
        f"Before the attack it is right in {choice['before'][0]:.0%}, and at the best "
        f"rate and epoch of each fold, which chance favours, in "
        f"{choice['best'][0]:.0%}. Verbatim, which has no level of chance, goes from "
        f"{verbatim['before'][0]:.2f} to {verbatim['last'][0]:.2f}: so much the attack "
        "gives to who never knew."
    )


def _answers(told, rows, *, finished: bool = True) -> list[str]:
    """What the numbers say, in plain words."""
    out = []
    for base, kind in BASES.items():
        own = [row for row in rows if row["base"] == base and "left" in row["choice"]]
        for measure in told["left"].get(base, ()):
            out += _kept(own, kind, measure, told["left"][base][measure])
            out += _back(own, kind, measure, told)
    for measure, value in told["less"].items():
        out.append(
            f"- By {measure}, of facts finetuned in {_share(value)} less of what was "
            "lost comes back than of the same facts learned in pretraining (a "
            f"difference of such shares; {', '.join(told['alike']['methods'])}, "
            f"{_seeds(told['alike']['seeds'])}, the same folds); that it is much less "
            f"(by {LESS:.0%}, and surely by something) "
            f"{_word(told['much_less'][measure])}."
        )
    far = "" if finished else ", judged by the few attacks that have run"
    out.append(f"- The paper's claim{far}: {_claim(told)}")
    out.append(
        "- Brackets: 95 % intervals, of accuracies Wilson's, as if facts were "
        "independent, of shares over folds drawn anew, which are few; they know "
        "nothing of other seeds, worlds or rates."
    )
    return out


def _kept(own, kind, measure, left) -> list[str]:
    """How much of the facts unlearning took at all."""
    forgot = [row["method"] for row in own if row[measure]["forgot"]]
    each = ", ".join(f"{row['method']} {row[measure]['left']:.0%}" for row in own)
    most = "; most was never gone" if left > MOST else ""
    return [
        f"- Facts learned {kind}, by {measure}: before any attack the {len(own)} "
        f"methods together still have {left:.0%} of what the model before unlearning "
        f"has above the twin ({each}){most}. Half or more was forgotten by "
        f"{', '.join(forgot) or 'none of them'}."
    ]


def _back(own, kind, measure, told) -> list[str]:
    """How much of what unlearning took came back."""
    base = own[0]["base"]
    value = told["returned"][base][measure]
    if value is None:
        return [f"- Facts learned {kind}, by {measure}: nothing was lost."]
    best = told["best_returned"][base][measure]
    known = [row for row in own if row[measure]["returned"]]
    back = {row["method"]: row[measure]["returned"][0] for row in known}
    each = ", ".join(f"{name} {share:.0%}" for name, share in back.items())
    over = sum(share > MOST for share in back.values())
    paper = [row[measure]["recovery"][0] for row in own if row[measure]["recovery"]]
    word = told["most_returns"].get(measure) if base == EARLY else None
    return [
        f"- Of what they lost there, {_share(value)} is back after the last epoch of "
        f"the attack{f' ({best[0]:.0%} at the best)' if best else ''}"
        f"{f'; that most comes back {_word(word)}' if word else ''}. It is over half "
        f"in {over} of {len(back)} methods: {each}. The paper's recovery, which counts "
        f"what was never gone too, is {min(paper):.0%} to {max(paper):.0%}."
    ]


def _claim(told) -> str:
    """Both halves of the paper's claim, by each measure."""
    first, second = told["most_returns"], told["much_less"]
    if len(first) < len(MEASURES):
        return "not measured."
    halves = [
        f"that most of what was lost of pretraining's facts comes back {_both(first)}"
    ]
    if len(second) == len(MEASURES):
        halves.append(f"that much less of facts finetuned in does {_both(second)}")
    else:
        halves.append("that much less of facts finetuned in does was not measured")
    words = {*first.values(), *second.values()}
    whole = "undecided"
    if "fails" in words:
        whole = "does not hold as a whole"
    elif words == {"holds"} and len(second) == len(MEASURES):
        whole = "holds"
    weak = [m for m in MEASURES if told["left"][EARLY][m] > MOST]
    but = (
        " But most of what was known from pretraining was never forgotten (by "
        f"{' and '.join(weak)}): the claim is tested on the smaller part that was "
        "lost, and of facts forgotten throughout this says nothing."
        if weak
        else ""
    )
    return f"{whole} here; {'; '.join(halves)}.{but}"


def _both(words: Mapping[str, str]) -> str:
    if len(set(words.values())) == 1:
        return f"{_word(next(iter(words.values())))} by both measures"
    return ", ".join(f"{_word(word)} by {measure}" for measure, word in words.items())


def _word(verdict: str) -> str:
    return "is undecided" if verdict == "undecided" else f"**{verdict}**"


def _numbers(rows) -> list[str]:
    out = [
        "## Numbers",
        "",
        "On facts held out, mean ± standard deviation over seeds where there are "
        "several; *last*: after the last epoch, at the rate that was better (verbatim) "
        "on the other folds; *best*: at the best rate and epoch of each fold, that "
        "before the attack included, as in the paper, which favours the attacker. "
        "*Left*: of what the model before unlearning has above "
        "the twin, both before the attack, what the method left; above half, it forgot "
        "less than half. *Of what was lost*: (after - before) / (that of the model "
        "before unlearning after the attack - before), where who is below the twin's "
        "before counts as at it; *recovery*: best over that of the model before "
        "unlearning, the paper's; *above the twin*: the same with the twin's best "
        "taken off both.",
        "",
    ]
    for measure in MEASURES:
        out += [
            f"| {measure} of | before | last | best | left | of what was lost, last | "
            "of what was lost, best | recovery | above the twin |",
            "| --- |" + " --- |" * 8,
        ]
        for row in rows:
            own, plain = row[measure], row["who"] in REFERENCES
            seeds = len(row["seeds"])
            cells = [_pm(own[key], seeds) for key in ("before", "last", "best")]
            if plain or "left" not in own:
                cells += [""] * 3
            else:
                weak = "" if own["forgot"] else " (forgot less than half)"
                cells += [f"{own['left']:.0%}{weak}", _share(own["returned"])]
                cells.append(_share(own["best_returned"]))
            keys = () if plain else ("recovery", "above")
            cells += [_pm(own[key], seeds) for key in keys] or ["", ""]
            who = f"**{row['who']}**" if plain else row["who"]
            out.append(f"| {who} | {' | '.join(cells)} |")
        out.append("")
    return out


def _sweep(lines, about, rows) -> list[str]:
    out = [
        "## The sweep of unlearning",
        "",
        _matched(lines, about, rows),
        "",
        "| base | method | rate | seed | forget probability | verbatim | choice | "
        "retain loss | retain exact | |",
        "| --- |" + " --- |" * 9,
    ]
    attacked = [x["key"] for row in rows for x in taken(lines, row)]
    for x in lines:
        if x["kind"] != "unlearned":
            continue
        notes = ["taken"] if x["key"] in attacked else []
        notes += ["over the bound"] if x["retain_loss"] > about["bound"] else []
        out.append(
            f"| {x['base']} | {x['method']} | {x['rate']:g} | {x['seed']} | "
            f"{x['forget_probability']:.3f} | {x['facts']['verbatim']:.3f} | "
            f"{x['facts']['choice']:.2f} | {x['retain_loss']:.2f} | "
            f"{x['retain_exact']:.2f} | {', '.join(notes)} |"
        )
    return out


def _matched(lines, about, rows) -> str:
    """How far retain losses are matched."""
    own = [row for row in rows if row["retain_loss"] is not None]
    if not own:
        return "No unlearned model was attacked yet."
    losses = [row["retain_loss"] for row in own]
    each = ", ".join(f"{row['who']} {row['retain_loss']:.3f}" for row in own)
    over = [
        f"{row['who']} seed {x['seed']} ({x['retain_loss']:.3f})"
        for row in own
        for x in taken(lines, row)
        if x["retain_loss"] > about["bound"]
    ]
    loose = [row["who"] for row in own if _loose(lines, about, row)]
    return (
        f"The retain losses at the rates taken are, as means over seeds, "
        f"{min(losses):.3f} to {max(losses):.3f} nats a token ({each}); over the bound "
        f"of {about['bound']:g} in single seeds: {', '.join(over) or 'none'}. So "
        "strengths are matched only roughly. The largest rate tried was within the "
        f"bound on the first seed with {', '.join(loose) or 'none'}"
        f"{'; a larger one was not tried.' if loose else '.'}"
    )


def _loose(lines, about, row) -> bool:
    """Whether the bound left the largest rate tried to a method."""
    first = taken(lines, row)[0]
    keys = ("kind", "base", "method", "seed")
    same = [x for x in lines if all(x.get(k) == first[k] for k in keys)]
    return max(same, key=lambda x: x["rate"])["retain_loss"] <= about["bound"]


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
    return (
        f"rates {_list(about['attack'])} on the first seed, on others the one that was "
        "better (verbatim, best epoch) on the first seed's folds run by then"
    )


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {_list(seeds)}"


def _pm(value: Sequence[float] | None, seeds: int) -> str:
    if value is None:
        return ""
    return f"{value[0]:.2f}" + (f" ± {value[1]:.2f}" if seeds > 1 else "")


def _share(value: Sequence[float] | None) -> str:
    if value is None:
        return ""
    return f"{value[0]:.0%} [{value[1]:.0%}, {value[2]:.0%}]"


def _list(values) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    place = np.arange(len(rows))
    titles = ("choice of four on facts held out", "probability of an answer's token")
    bars = ((-0.27, "before", "0.75"), (0, "last", "C0"), (0.27, "best", "C9"))
    names = {"before": "before the attack", "last": "last epoch", "best": "best epoch"}
    for axis, measure, title in zip(axes, MEASURES, titles, strict=False):
        for shift, key, colour in bars:
            means, errors = np.transpose([row[measure][key] for row in rows])
            axis.bar(
                place + shift, means, 0.25, yerr=errors, color=colour, label=names[key]
            )
        if measure == "choice":
            axis.axhline(CHANCE, color="k", lw=0.8, ls=":", label="chance")
        axis.set_xticks(place, [row["who"] for row in rows], rotation=40, ha="right")
        axis.set_ylim(0, 1.05)
        axis.set_title(title, fontsize=10)
    own, axis = [row for row in rows if row["who"] not in REFERENCES], axes[2]
    for shift, measure, colour in ((-0.1, "choice", "C0"), (0.1, "verbatim", "C1")):
        known = [(i, row[measure].get("returned")) for i, row in enumerate(own)]
        for i, (mean, low, high) in ((i, x) for i, x in known if x):
            reach = [[max(mean - low, 0)], [max(high - mean, 0)]]
            axis.errorbar(i + shift, mean, reach, fmt="o", color=colour, capsize=3)
        axis.plot([], [], "o", color=colour, label=measure)
    axis.axhline(MOST, color="k", lw=0.8, ls=":", label="most")
    axis.set_xticks(
        np.arange(len(own)), [row["who"] for row in own], rotation=40, ha="right"
    )
    axis.set_title("of what was lost, back after the last epoch", fontsize=10)
    axis.legend(fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)
