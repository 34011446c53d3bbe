# SPDX-License-Identifier: Apache-2.0
"""Section of the README and plot of RTT in the small world, from its lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.rtt.recovery import CHANCE, LESS, MOST, unfinished
from experiments.rtt.small.score import (
    BASES,
    CONTROLS,
    EARLY,
    MEASURES,
    REFERENCES,
    summarise,
    taken,
)
from experiments.shared import page, plot

Rows = Sequence[Mapping[str, Any]]
TITLE = "Small world"


def verdict(content: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The paper's claim in one sentence."""
    return _claim(found, finished=not _missing(content["lines"], content["about"]))


def lines(
    content: Mapping[str, Any], rows: Rows, found: Mapping[str, Any], image: str
) -> list[str]:
    """The section of the README, from the summary and the claim of the lines."""
    about, runs = content["about"], content["lines"]
    return [
        "## Small world",
        "",
        f"A decoder of {about['parameters'] / 1e6:.2f}M parameters, world "
        f"`{about['world']}`. Unlearning: {about['steps']} steps of "
        f"{about['batch_size']} rows of each stream, at the rate of the sweep below "
        "that forgets most with a mean loss on rows to retain of at most "
        f"{about['max_loss']:g} nats a token on the first seed, or, if there is none, "
        f"at the one that loses least. {about['num_facts']} facts in "
        f"{about['num_folds']} folds that share no author. The attack: every "
        f"parameter, Adam, {_rates(about)}, {about['epochs']} epochs of batches of "
        f"{about['attack_batch_size']} over all folds but the one held out.",
        "",
        "Two measures on facts held out: *choice*, whether the answer is the most "
        "probable of four, and *verbatim*, the probability of a token of the answer.",
        "",
        *_missing(runs, about),
        *_parts(rows),
        "",
        f"![What came back]({image})",
        "",
        "### What came back",
        "",
        *map(_control, (row for row in rows if row["who"] in CONTROLS)),
        *_answers(found, rows),
        "",
        *_tables(rows),
        *_sweep(runs, about, rows),
    ]


def _parts(rows) -> list[str]:
    """Which seeds and folds each model has, and why not all have the same."""
    same: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for row in rows:
        same.setdefault((tuple(row["seeds"]), row["folds"]), []).append(row["who"])
    each = [
        f"{', '.join(names)}: {page.seeds(seeds)}, {folds} attacks"
        for (seeds, folds), names in same.items()
    ]
    return [
        f"What ran (an attack is a seed and a fold): {'; '.join(each)}. To save time, "
        "models that no method changed and all models that were finetuned have the "
        "first seed only, facts finetuned in only the two methods that the paper tries "
        "on them, and rates were swept on the first seed only.",
    ]


def _control(row) -> str:
    """A negative control, by the last epoch at every rate."""
    title = {
        "retrained": "the retrained model, which never saw the facts",
        "never seen": "the original, on authors that no model ever saw",
    }[row["who"]]
    each = [
        f"{page.share(x['last'])} at rate {x['rate']:g} "
        f"({'differs' if x['differs_from_chance'] else 'does not differ'} from chance)"
        for x in row["controls"]
    ]
    choice, verbatim = row["choice"], row["verbatim"]
    return (
        f"- Negative control: {title}. After the last epoch it answers by choice "
        f"{' and '.join(each)} of {row['facts']} facts; chance is {CHANCE:.0%}. Before "
        f"the attack it answers {choice['before'][0]:.0%}, and at the best rate and "
        "epoch of each fold, which is biased upwards, "
        f"{choice['best'][0]:.0%}. Verbatim, which has no chance level, rises from "
        f"{verbatim['before'][0]:.2f} to {verbatim['last'][0]:.2f}: this much comes "
        "from the attack itself."
    )


def _answers(found, rows) -> list[str]:
    """What the numbers say, in sentences."""
    out = []
    for base, where in BASES.items():
        tried = [row for row in rows if row["base"] == base and "left" in row["choice"]]
        for measure in found["left"].get(base, ()):
            left = found["left"][base][measure]
            out += _left(tried, where, measure, left)
            out += _returned(tried, where, measure, found)
    for measure, value in found["less"].items():
        compared = found["compared"]
        out.append(
            f"- By {measure}, the fraction that comes back is {page.share(value)} "
            "smaller for facts finetuned in than for the same facts learned in "
            f"pretraining ({', '.join(compared['methods'])}, "
            f"{page.seeds(compared['seeds'])}, the same folds). That it is much "
            f"smaller (by at least {LESS:.0%}, with an interval above 0) "
            f"{page.WORDS[found['much_less'][measure]]}."
        )
    out.append(
        "- Brackets are 95% intervals: Wilson for accuracies, as if facts were "
        "independent; bootstrap over folds, which are few, for recovered fractions. "
        "Variation across seeds, worlds and rates is not included."
    )
    return out


def _left(tried, where, measure, left) -> list[str]:
    """How much of the facts unlearning removed at all."""
    forgot = [row["method"] for row in tried if row[measure]["forgot"]]
    each = ", ".join(f"{row['method']} {row[measure]['left']:.0%}" for row in tried)
    most = "; most was never forgotten" if left > MOST else ""
    return [
        f"- Facts learned {where}, by {measure}: before any attack the {len(tried)} "
        f"methods together still have {left:.0%} of what the model before unlearning "
        f"has above the retrained model ({each}){most}. Methods that forgot half or "
        f"more: {', '.join(forgot) or 'none'}."
    ]


def _returned(tried, where, measure, found) -> list[str]:
    """How much of what unlearning removed came back."""
    base = tried[0]["base"]
    value = found["returned"][base][measure]
    if value is None:
        return [f"- Facts learned {where}, by {measure}: nothing was removed."]
    best = found["best_returned"][base][measure]
    back = {
        row["method"]: row[measure]["returned"][0]
        for row in tried
        if row[measure]["returned"]
    }
    each = ", ".join(f"{name} {share:.0%}" for name, share in back.items())
    over = sum(share > MOST for share in back.values())
    paper = [row[measure]["recovery"][0] for row in tried if row[measure]["recovery"]]
    word = found["most_returns"].get(measure) if base == EARLY else None
    return [
        f"- Of what they removed, {page.share(value)} is back after the last epoch of "
        f"the attack{f' ({best[0]:.0%} at the best epoch)' if best else ''}"
        f"{f'; that most comes back {page.WORDS[word]}' if word else ''}. It is over "
        f"half in {over} of {len(back)} methods: {each}. The paper's recovery, which "
        "also counts what was never forgotten, is "
        f"{min(paper):.0%} to {max(paper):.0%}."
    ]


def _claim(found, *, finished: bool = True) -> str:
    """Both halves of the paper's claim, by each measure."""
    first, second = found["most_returns"], found["much_less"]
    if len(first) < len(MEASURES):
        return "not measured."
    halves = [
        "that most of what was removed of pretraining's facts comes back "
        f"{_both(first)}"
    ]
    if len(second) == len(MEASURES):
        halves.append(f"that much less of facts finetuned in does {_both(second)}")
    else:
        halves.append("that much less of facts finetuned in does was not measured")
    words = {*first.values(), *second.values()}
    both = "is undecided"
    if "fails" in words:
        both = "does not hold in both parts"
    elif words == {"holds"} and len(second) == len(MEASURES):
        both = "holds"
    weak = [m for m in MEASURES if found["left"][EARLY][m] > MOST]
    but = (
        " But most of what was known from pretraining was never forgotten (by "
        f"{' and '.join(weak)}), so the claim is tested on the smaller part that was "
        "removed."
        if weak
        else ""
    )
    few = "" if finished else " by the few attacks that have run"
    return f"the claim {both} here{few}; {'; '.join(halves)}.{but}"


def _both(words: Mapping[str, str]) -> str:
    if len(set(words.values())) == 1:
        return f"{page.WORDS[next(iter(words.values()))]} by both measures"
    return ", ".join(f"{page.WORDS[word]} by {name}" for name, word in words.items())


def _tables(rows) -> list[str]:
    out = [
        "### Numbers",
        "",
        "On facts held out, mean ± standard deviation over seeds where there are "
        "several. *Last*: after the last epoch, at the rate that was better (verbatim) "
        "on the other folds. *Best*: at the best rate and epoch of each fold, that "
        "before the attack included, as in the paper, which favours the attacker. "
        "*Left*: the fraction of what the model before unlearning has above the "
        "retrained model that the method left, both before the attack; above half, the "
        "method forgot less than half. *Of what was removed*: (after - before) / (that "
        "of the model before unlearning after the attack - before), where values below "
        "the retrained model's count as its value. *Recovery*: best over that of the "
        "model before unlearning, as in the paper. *Above retrained*: the same with "
        "the retrained model's best subtracted from both.",
        "",
    ]
    for measure in MEASURES:
        cells = []
        for row in rows:
            found, seeds = row[measure], len(row["seeds"])
            plain = row["who"] in REFERENCES
            line = [f"**{row['who']}**" if plain else row["who"]]
            line += [_pm(found[key], seeds) for key in ("before", "last", "best")]
            if plain or "left" not in found:
                line += ["", "", ""]
            else:
                weak = "" if found["forgot"] else " (forgot less than half)"
                line += [f"{found['left']:.0%}{weak}", page.share(found["returned"])]
                line.append(page.share(found["best_returned"]))
            for key in ("recovery", "above"):
                line.append("" if plain else _pm(found[key], seeds))
            cells.append(line)
        header = [f"{measure} of", "before", "last", "best", "left"]
        header += ["of what was removed, last", "of what was removed, best"]
        out += page.table([*header, "recovery", "above retrained"], cells)
    return out


def _sweep(runs, about, rows) -> list[str]:
    attacked, cells = [x["key"] for row in rows for x in taken(runs, row)], []
    for x in runs:
        if x["kind"] != "unlearned":
            continue
        notes = ["used"] if x["key"] in attacked else []
        notes += ["over the bound"] if x["retain_loss"] > about["max_loss"] else []
        cells.append(
            [
                *(x["of"], x["method"], page.rate(x["rate"]), x["seed"]),
                f"{x['forget_probability']:.3f}",
                f"{x['facts']['verbatim']:.3f}",
                f"{x['facts']['choice']:.2f}",
                f"{x['retain_loss']:.2f}",
                f"{x['retain_exact']:.2f}",
                ", ".join(notes),
            ]
        )
    header = ["facts", "method", "rate", "seed", "forget probability", "verbatim"]
    header += ["choice", "retain loss", "retain exact", ""]
    out = ["### The sweep of unlearning", "", _matched(runs, about, rows), ""]
    return out + page.table(header, cells)


def _matched(runs, about, rows) -> str:
    """How well retain losses are matched."""
    tried = [row for row in rows if row["retain_loss"] is not None]
    if not tried:
        return "No unlearned model has been attacked yet."
    losses = [row["retain_loss"] for row in tried]
    each = ", ".join(f"{row['who']} {row['retain_loss']:.3f}" for row in tried)
    over = [
        f"{row['who']} seed {x['seed']} ({x['retain_loss']:.3f})"
        for row in tried
        for x in taken(runs, row)
        if x["retain_loss"] > about["max_loss"]
    ]
    loose = [row["who"] for row in tried if _loose(runs, about, row)]
    return (
        "The retain losses at the rates used are, as means over seeds, "
        f"{min(losses):.3f} to {max(losses):.3f} nats a token ({each}); over the bound "
        f"of {about['max_loss']:g} in single seeds: {', '.join(over) or 'none'}. So "
        "strengths are matched only roughly. The largest rate tried was within the "
        f"bound on the first seed with {', '.join(loose) or 'none'}"
        f"{'; a larger one was not tried.' if loose else '.'}"
    )


def _loose(runs, about, row) -> bool:
    """Whether the largest rate tried with a method is within the bound."""
    first = taken(runs, row)[0]
    keys = ("kind", "of", "method", "seed")
    same = [x for x in runs if all(x.get(k) == first[k] for k in keys)]
    return max(same, key=lambda x: x["rate"])["retain_loss"] <= about["max_loss"]


def _missing(runs, about) -> list[str]:
    """What has run, where that is not all of the plan."""
    planned = len(about["rates"]) * len(about["seeds"]) * about["num_folds"]
    ran = sum(line["kind"] == "rtt" and line["who"] in about["rates"] for line in runs)
    there = {x.get("who") for x in runs}
    return unfinished(ran, planned, [who for who in about["rates"] if who not in there])


def _rates(about) -> str:
    rates = page.numbers(about["attack_rates"])
    if len(about["attack_rates"]) == 1:
        return f"rate {rates}"
    return (
        f"rates {rates} on the first seed, on others the one that was better "
        "(verbatim, best epoch) on the first seed's folds run by then"
    )


def _pm(value, seeds: int) -> str:
    return "" if value is None else page.pm(value if seeds > 1 else value[:1], 2)


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Both measures for every model, and what came back of what was removed."""
    rows = summarise(content["lines"])
    keys = {"before": "before the attack", "last": "last epoch", "best": "best epoch"}
    titles = ("choice of four on facts held out", "probability of an answer's token")
    with plot.saved(file, size=(15, 4.8), columns=3, dpi=130) as (figure, grid):
        for axis, measure, title in zip(grid[0], MEASURES, titles, strict=False):
            series = {
                label: [row[measure][key] for row in rows]
                for key, label in keys.items()
            }
            colours = ("0.75", "C0", "C9")
            names = [row["who"] for row in rows]
            plot.bars(axis, names, series, colours=colours, rotation=40)
            if measure == "choice":
                axis.axhline(CHANCE, color="k", lw=0.8, ls=":", label="chance")
            axis.set_ylim(0, 1.05)
            axis.set_title(title, fontsize=10)
        axis = grid[0, 2]
        tried = [row for row in rows if row["who"] not in REFERENCES]
        for shift, measure, colour in ((-0.1, "choice", "C0"), (0.1, "verbatim", "C1")):
            found = [(i, row[measure].get("returned")) for i, row in enumerate(tried)]
            found = [(i + shift, value) for i, value in found if value]
            if found:
                places, values = zip(*found, strict=True)
                plot.curve(axis, places, values, fmt="o", color=colour, label=measure)
        axis.axhline(MOST, color="k", lw=0.8, ls=":", label="most")
        names = [row["who"] for row in tried]
        axis.set_xticks(np.arange(len(tried)), names, rotation=40, ha="right")
        axis.set_title("of what was removed, back after the last epoch", fontsize=10)
        axis.legend(fontsize=8)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=8)
