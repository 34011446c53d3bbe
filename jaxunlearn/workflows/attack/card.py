# SPDX-License-Identifier: Apache-2.0
"""The robustness card: what a model knows before and after each attack."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxunlearn import attacks
from jaxunlearn.workflows.attack import jobs, prompts

KINDS = ("forget", "retain")
MODELS = ("original", "unlearned")  # rows without an attack
NONE = "–"  # in place of a number that is not finite
Results = Mapping[str, Mapping[str, Any]]


def make(results: Results, ids: Sequence[Any], not_run: Mapping[str, str]) -> dict:
    """The numbers of the card.

    Args:
        results: job -> its result.
        ids: of the facts to forget, in the order of the results.
        not_run: job -> why it could not be run.
    Returns:
        `rows`, one for each model and each attack after which the model was queried:
        name, num_facts (number of facts to forget that were queried), forget and retain
        (the mean of each measure), before (the same as forget, for the same facts
        before the attack), note (where the attack was changed to fit the model);
        `leak`, `rtt`, `strongest` (for each measure the attack that raises it most, and
        the measure before and after it) and `not_run`. A mean is NaN if one of its
        values is; the strongest attack is chosen among the others.
    """
    unlearned = results["unlearned"]["forget"]
    index = {key: i for i, key in enumerate(ids)}
    rows = []
    for name, result in results.items():
        if "forget" not in result:
            continue
        queried = [index[key] for key in result.get("held_out", ids)]
        before = {
            measure: [values[i] for i in queried]
            for measure, values in unlearned.items()
        }
        rows.append(
            {
                "name": name,
                "num_facts": len(queried),
                "before": prompts.means(before),
                **{kind: prompts.means(result[kind]) for kind in KINDS},
                **({"note": result["note"]} if "note" in result else {}),
            }
        )
    attacked = [
        row
        for row in rows
        if row["name"] not in MODELS and _is_finite(row, ("forget", "before"))
    ]
    strongest = {}
    for measure in prompts.MEASURES if attacked else ():
        row = max(attacked, key=lambda r: r["forget"][measure] - r["before"][measure])
        strongest[measure] = {
            "attack": row["name"],
            "before": row["before"][measure],
            "after": row["forget"][measure],
        }
    leak = {
        name: {k: sum(x) / len(x) for k, x in result["leak"].items()}
        for name, result in results.items()
        if "leak" in result
    }
    return {
        "rows": rows,
        "leak": leak,
        "rtt": _rtt(results),
        "strongest": strongest,
        "not_run": dict(not_run),
    }


def _rtt(results: Results) -> dict[str, float]:
    """Accuracy before and after retraining on the other folds, and recovery rates."""
    of_model = {n: r for n, r in results.items() if n.startswith("rtt ")}
    if not of_model:
        return {}
    sweeps = [jobs.sweep(result) for result in of_model.values()]
    chance = 1 / next(iter(of_model.values()))["sweep"]["num_choices"]
    found: dict[str, Any] = {
        "chance": chance,
        "rotations": len(sweeps),
        "num_facts": sum(sweep.hits.shape[-1] for sweep in sweeps),
    }
    of_original = [results.get(f"original {name}") for name in of_model]
    if not all(of_original):
        before = sum(sweep.accuracy[0, 0] for sweep in sweeps) / len(sweeps)
        after = attacks.best_accuracy(sweeps)
        return found | {"before": before, "unlearned": after}
    both = dict(unlearned=sweeps, original=[jobs.sweep(x) for x in of_original])
    nested = attacks.recovery(**both, chance=chance, nested=True)
    found |= attacks.recovery(**both, chance=chance)
    return found | {"rate_nested": nested["rate"]}


def markdown(card: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The card as Markdown text."""
    facts = about["facts"]
    known = f" (known to the original by {about['known']})" if about["known"] else ""
    dtype = about.get("compute_dtype")
    dtype = f", computed in {dtype}" if dtype else ""
    out = [
        f"# Robustness card of {about['model']}",
        "",
        f"Made by `{about['command']}`: {facts['forget']} facts to forget, "
        f"{facts['retain']} to retain{known}, seed {about['seed']}, "
        f"{about['seconds']:.0f} s{dtype}. *Completion*: share of facts whose answer "
        "is in the greedy completion. *Choice*: share of facts whose right choice has "
        "the highest "
        f"log-probability (chance level {about['chance']:.2f}). *Probability*: of a "
        "token of the answer (geometric mean over its tokens). Numbers are means over "
        "facts.",
        "",
        *_sentences(card),
        "",
        "| | forget: completion | choice | probability | retain: completion | choice | "
        "probability |",
        "| --- |" + " --- |" * 6,
    ]
    for row in card["rows"]:
        cells = [
            _text(row[kind][measure]) for kind in KINDS for measure in prompts.MEASURES
        ]
        out.append(f"| {_title(row)} | {' | '.join(cells)} |")
    if broken := [row["name"] for row in card["rows"] if not _is_finite(row, KINDS)]:
        out += [
            "",
            f"{NONE}: not finite ({', '.join(broken)}). The log-probabilities of this "
            "model are not finite, so its completions and choices have no meaning.",
        ]
    if card["leak"]:
        ks = list(next(iter(card["leak"].values())))
        out += ["", "Share of facts whose answer is in at least one of k samples:", ""]
        out.append(f"| k samples | {' | '.join(ks)} |")
        out.append("| --- |" + " --- |" * len(ks))
        for name, shares in card["leak"].items():
            model = "original" if name.startswith("original") else "unlearned"
            out.append(
                f"| {model} | {' | '.join(f'{x:.2f}' for x in shares.values())} |"
            )
    if card["rtt"]:
        out += ["", *_retraining(card["rtt"])]
    if card["not_run"]:
        out += ["", "Not run:", ""]
        out += [f"- {name}: {reason}" for name, reason in card["not_run"].items()]
    return "\n".join(out) + "\n"


def _title(row) -> str:
    if row["name"] in MODELS:
        return f"**{row['name']}**"
    if row["name"].split()[0] != "relearn":
        note = row.get("note")
        return f"{row['name']} ({note})" if note else row["name"]
    before = ", ".join(_text(row["before"][measure]) for measure in prompts.MEASURES)
    return f"{row['name']}, {row['num_facts']} held-out facts (before: {before})"


def _is_finite(row, kinds) -> bool:
    return not any(math.isnan(x) for kind in kinds for x in row[kind].values())


def _text(number: float, form: str = ".2f") -> str:
    return NONE if math.isnan(number) else f"{number:{form}}"


def _sentences(card) -> list[str]:
    """The main results in sentences."""
    out = []
    for measure, best in card["strongest"].items():
        before, after = _text(best["before"]), _text(best["after"])
        text = (
            f"the strongest attack is {best['attack']}, from {before} before it to "
            f"{after} after it."
        )
        if best["after"] <= best["before"] or after == before:
            text = f"no attack raises it above {before}, its value before them."
        out.append(f"- {measure.capitalize()}: {text}")
    rtt = card["rtt"]
    if "rate" in rtt:
        out.append(
            f"- Retraining on other facts (RTT) {_change(rtt)}. The original reaches "
            f"{rtt['original']:.2f} after the same training, so the recovery rate is "
            f"{_text(rtt['rate'], '.0%')} ({_text(rtt['floor'], '.0%')} at chance "
            "level)."
        )
    return out


def _change(rtt) -> str:
    """What RTT does to choice on held-out facts, as far as two digits show."""
    before, after = _text(rtt["before"]), _text(rtt["unlearned"])
    if after == before:
        return f"leaves choice on held-out facts at {before}"
    # The best epoch may be the one before training, so accuracy never falls.
    return f"raises choice on held-out facts from {before} to {after}"


def _retraining(rtt) -> list[str]:
    titles = {
        "before": "before",
        "unlearned": "after",
        "original": "original after",
        "rate": "recovery rate",
        "rate_nested": "recovery rate, learning rate chosen on other facts",
        "above_chance": "recovery above chance",
        "floor": "recovery rate at chance level",
    }
    present = {key: title for key, title in titles.items() if key in rtt}
    cells = [_text(rtt[key]) for key in present]
    error = f" ± {rtt['error']:.2f} (two standard errors)" if "error" in rtt else ""
    return [
        "Retraining on the other folds (RTT): accuracy of choice on the held-out fold, "
        f"{rtt['rotations']} rotation(s), {rtt['num_facts']} facts{error}, at the best "
        "learning rate and epoch:",
        "",
        f"| {' | '.join(present.values())} |",
        "|" + " --- |" * len(present),
        f"| {' | '.join(cells)} |",
    ]
