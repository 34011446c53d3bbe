# SPDX-License-Identifier: Apache-2.0
"""Section of the README and plot of RTT in SmolLM2, from its lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.rtt.recovery import CHANCE, LESS, unfinished
from experiments.rtt.smollm2.score import LATE, NAMES, TITLES, rise, summarise
from experiments.shared import page, plot

Rows = Sequence[Mapping[str, Any]]
TITLE = "SmolLM2"


def verdict(content: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The paper's claim in one sentence."""
    return _claim(found)


def lines(
    content: Mapping[str, Any], rows: Rows, found: Mapping[str, Any], image: str
) -> list[str]:
    """The section of the README, from the summary and the claim of the lines."""
    about, runs = content["about"], content["lines"]
    return [
        "## SmolLM2",
        "",
        f"Model `{about['model']}`; every fact is scored by the text of four choices, "
        "the most probable (by the sum over its tokens) counts. Unlearning: "
        f"{about['steps']} steps of {about['batch_size']} rows of each stream, at the "
        "largest rate of the sweep below that leaves the losses on the retain stream "
        f"and on prose at most {about['max_rise']:g} nats a token above those before, "
        "or, if there is none, at the one that raises them least. The attack: every "
        f"parameter, Adam, rate {about['attack_rate']:g}, {about['epochs']} epochs of "
        f"batches of {about['attack_batch_size']} over all of {about['num_folds']} "
        f"folds but the one held out; a seed holds out {about['rotations']} folds.",
        "",
        f"![Accuracy before and after the attack]({image})",
        "",
        *_missing(runs, about),
        "### What came back in SmolLM2",
        "",
        *_answers(found, rows),
        "",
        *_choice(runs, about),
        *_tables(rows),
        *_sweep(runs, rows, about),
        *_cost(runs, about),
    ]


def _answers(found, rows) -> list[str]:
    """What the numbers say, in sentences."""
    out = []
    for row in rows:
        if row["who"] == "never trained":
            low, high = row["last"][1:]
            differs = "does not differ" if low <= CHANCE <= high else "differs"
            out.append(
                "- Negative control: the pretrained model, attacked on birthdays that "
                f"it was never trained on, answers {page.share(row['last'])} of "
                f"{row['facts']} held out, which {differs} from chance ({CHANCE:.0%}); "
                f"{row['before'][0]:.0%} before the attack, {row['best'][0]:.0%} at "
                "the best epoch of each fold, which is biased upwards."
            )
    for of, title in TITLES.items():
        tried = [row for row in rows if row["of"] == of and "original" in row]
        if not tried:
            continue
        if of not in found["returned"]:
            out.append(f"- Of {title}: nothing above chance was removed.")
            continue
        forgot = [
            f"{NAMES[row['who']]} {row['recovery'][0]:.0%}"
            for row in tried
            if row["who"] in found["forgot"][of]
        ]
        most = found["most_returns"].get(of)
        word = f"; that most comes back {page.WORDS[most]}" if most else ""
        out.append(
            f"- Of {title}, {page.share(found['returned'][of])} of what unlearning "
            f"removed above chance came back in the attack{word}, over {len(tried)} "
            "methods together. Methods that forgot half or more of what is above "
            "chance, with the paper's recovery: "
            f"{', '.join(forgot) or 'none'}."
        )
    if "less" in found:
        out.append(
            "- The fraction that comes back is "
            f"{page.share(found['less'])} smaller for facts finetuned in than for "
            f"those of pretraining. That it is much smaller (by at least {LESS:.0%}, "
            f"with an interval above 0) {page.WORDS[found['much_less']]}."
        )
    out.append(
        "- Brackets are 95% intervals: Wilson for accuracies, bootstrap over facts for "
        "fractions (an interval without width only says that all facts came out the "
        "same). Variation across seeds, models and rates is not included."
    )
    return out


def _claim(found) -> str:
    """Both halves of the paper's claim in one sentence."""
    first, second = list(found["most_returns"].values()), found.get("much_less")
    if not first or second is None:
        return "not measured in both parts."
    words = {*first, second}
    halves = [
        f"most comes back of {of}: {word}" for of, word in found["most_returns"].items()
    ]
    halves.append(f"much less of facts finetuned in: {second}")
    both = "fails" if "fails" in words else "is undecided"
    both = "holds in both parts" if words == {"holds"} else both
    return f"the claim {both} here ({'; '.join(halves)})."


def _choice(runs, about) -> list[str]:
    """How the facts were chosen, and what that does to the accuracy before."""
    found, out = {x["of"]: x for x in runs if x["kind"] == "facts"}, []
    steps = {name: each["steps"] for name, each in about["finetune"].items()}
    for of, title in TITLES.items():
        if of not in found:
            continue
        facts = found[of]
        if "candidates" in facts:
            how = (
                f"{facts['candidates']} were scored in another wording, "
                f"{facts['correct']} ({facts['correct'] / facts['candidates']:.0%}) "
                "answered right by sum and by mean of log-probabilities (guessing, "
                f"{CHANCE:.0%} by either), and the {facts['facts']} with the largest "
                f"margin used; {facts['num_retain']} others answered right are in the "
                "retain stream and taught the wording used here in "
                f"{steps['wording']} steps, after which {facts['choice']:.0%} of the "
                "facts to forget are answered right"
            )
        else:
            how = (
                f"{facts['facts']}, and the {facts['num_retain']} of the retain "
                f"stream, were finetuned in {steps[LATE]} steps; {facts['choice']:.0%} "
                "are answered right then"
            )
        out.append(f"- {title[0].upper()}{title[1:]}: {how}.")
    return [
        "### The facts",
        "",
        *out,
        "",
        "Choosing facts that are answered right inflates the accuracy before: some "
        "answers were lucky, and in another wording they regress to the mean. The "
        "original is attacked and scored on the same facts, so fractions of its "
        "accuracy suffer less; where it only seems to know, there is also less to "
        "recover.",
        "",
    ]


def _tables(rows) -> list[str]:
    cells = []
    for row in sorted(rows, key=_place):
        name = NAMES.get(row["who"], f"**{row['who']}**")
        if row.get("forgot") is False:
            name += " (forgot less than half)"
        best = row.get("best_recovery")
        cells.append(
            [
                *(row["of"], name, len(row["seeds"]), row["facts"]),
                *(page.bounds(row[key]) for key in ("before", "last", "best")),
                *(page.share(row.get(k)) for k in ("recovery", "above", "returned")),
                "" if best is None else f"{best:.0%}",
            ]
        )
    header = ["facts", "attacked", "seeds", "held out", "before", "last", "best"]
    header += ["recovery", "above chance", "of what was removed"]
    return [
        "### Numbers in SmolLM2",
        "",
        "Accuracy on facts held out. *Last*: after the last epoch. *Best*: after the "
        "best epoch of each fold, as in the paper, which favours the attacker. "
        "*Recovery*: last over that of the original. *Above chance*: chance subtracted "
        "from both. *Of what was removed*: above chance, where accuracies below chance "
        "before the attack count as chance.",
        "",
        *page.table([*header, "recovery, best epochs"], cells),
    ]


def _sweep(runs, rows, about) -> list[str]:
    first = {x["of"]: x for x in runs if x["kind"] == "facts"}
    used = {
        (x["of"], x["who"]): x["rate"]
        for x in runs
        if x["kind"] == "rtt" and "rate" in x
    }
    cells = []
    for of in (name for name in TITLES if name in first):
        base = first[of]
        before = [f"{base[k]:.2f} before" for k in ("retain_loss", "prose_loss")]
        cells.append(
            [of, "**original**", "", "", f"{base['choice']:.2f}"]
            + [f"{base['probability']:.3f}", f"{base['retain_choice']:.2f}"]
            + [*before, ""]
        )
        for x in runs:
            if x["kind"] != "unlearned" or x["of"] != of:
                continue
            rises = [f"{x[k] - base[k]:+.2f}" for k in ("retain_loss", "prose_loss")]
            notes = ["used"] if used.get((of, x["method"])) == x["rate"] else []
            notes += ["over the bound"] if rise(x, base) > about["max_rise"] else []
            cells.append(
                [of, NAMES[x["method"]], page.rate(x["rate"]), x["seed"]]
                + [f"{x['choice']:.2f}", f"{x['forget_probability']:.3f}"]
                + [f"{x['retain_choice']:.2f}", *rises, ", ".join(notes)]
            )
    header = ["facts", "method", "rate", "seed", "choice", "probability", "retain"]
    return [
        "### The sweep of unlearning in SmolLM2",
        "",
        "*Rise*: of the loss, nats a token, above that before. Choice and probability "
        "of a right answer's token are over all facts to forget, before any attack; "
        "*retain*: choice over the facts of the retain stream.",
        "",
        *page.table([*header, "retain rise", "prose rise", ""], cells),
        *_matched(rows, about),
    ]


def _matched(rows, about) -> list[str]:
    """How well the losses at the rates used agree, and where they do not."""
    out = []
    for of, title in TITLES.items():
        tried = [row for row in rows if row["of"] == of and "rate" in row]
        if not tried:
            continue
        rises = {k: [row[f"{k}_rise"] for row in tried] for k in ("retain", "prose")}
        text = " and ".join(
            f"{kind} losses of the methods rose by {min(each):+.2f} to {max(each):+.2f}"
            for kind, each in rises.items()
        )
        loose = [x for x in tried if x["rate"] == max(about["rates"][x["who"]])]
        over = [
            x
            for x in tried
            if max(x["retain_rise"], x["prose_rise"]) > about["max_rise"]
        ]
        for names, what in (
            (loose, "largest rate is within the bound (it could have forgotten more)"),
            (over, "over the bound at every rate, or in the mean over seeds"),
        ):
            if names:
                text += f"; {what}: {', '.join(NAMES[x['who']] for x in names)}"
        out.append(f"- {title[0].upper()}{title[1:]}: {text}.")
    return [*out, ""]


def _cost(runs, about) -> list[str]:
    spent = sum(x.get("core_seconds", 0.0) for x in runs)
    return [
        f"Unlearning and attacks took {spent / 60:.0f} minutes of one core "
        f"({about['device']}). {page.versions(about)[0]}"
    ]


def _missing(runs, about) -> list[str]:
    """What has run, where that is not all of the plan."""
    ran = [x for x in runs if x["kind"] == "rtt" and x["who"] in NAMES]
    seeds = {x["seed"] for x in ran} or {0}
    each = [(who, of) for who in about["rates"] for of in TITLES]
    planned = len(each) * len(seeds) * about["rotations"]
    there = {(x["who"], x["of"]) for x in ran}
    missing = [f"{NAMES[who]} on {of}" for who, of in each if (who, of) not in there]
    return unfinished(len(ran), planned, missing)


def _place(row) -> tuple[int, bool, bool]:
    """Set by set, the original and the control before the methods."""
    who = row["who"]
    return list(TITLES).index(row["of"]), who != "original", who in NAMES


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Accuracy before and after the attack, for each set of facts."""
    rows = summarise(content["lines"])
    sets = [of for of in TITLES if any(row["of"] == of for row in rows)]
    columns = max(1, len(sets))
    with plot.saved(file, size=(13, 4.4), columns=columns, dpi=130) as (figure, grid):
        for axis, of in zip(grid[0], sets, strict=False):
            each = sorted((row for row in rows if row["of"] == of), key=_place)
            series = {
                "before the attack": [row["before"] for row in each],
                "after it": [row["last"] for row in each],
            }
            names = [NAMES.get(row["who"], row["who"]) for row in each]
            plot.bars(axis, names, series, colours=("0.75", "C0"), rotation=40)
            axis.axhline(CHANCE, color="k", lw=0.8, ls=":", label="chance")
            axis.set_ylim(0, 1.05)
            axis.set_title(TITLES[of], fontsize=10)
        grid[0, 0].set_ylabel("accuracy on facts held out")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
