# SPDX-License-Identifier: Apache-2.0
"""The robustness card: what is known before, after unlearning, after each attack."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxunlearn import attacks
from jaxunlearn.workflows.attack import jobs as units
from jaxunlearn.workflows.attack import prompts as asking

KINDS = ("forget", "retain")
NONE = "–"  # for a number that there is not
Results = Mapping[str, Mapping[str, Any]]


def make(found: Results, ids: Sequence[Any], refused: Mapping[str, str]) -> dict:
    """The card's numbers.

    Args:
        found: unit -> its result.
        ids: of the forgotten facts, in the order in which they were asked.
        refused: unit -> why it was not run.
    Returns:
        `rows`, one for each model and attack that answered questions: name, asked (how
        many forgotten facts), forget and retain (means by way), unlearned (forget's
        means before the attack, over the same facts); `leak`, `rtt`, `strongest` (by
        way, the attack after which most is known, and how much) and `refused`. A mean
        is NaN if one of its values is, and the attack then is not the strongest.
    """
    first = found["unlearned"]["forget"]
    place = {key: i for i, key in enumerate(ids)}
    rows = []
    for name, result in found.items():
        if "forget" not in result:
            continue
        held = [place[key] for key in result.get("held_out", ids)]
        before = {way: [values[i] for i in held] for way, values in first.items()}
        rows.append(
            {
                "name": name,
                "asked": len(held),
                "unlearned": asking.means(before),
                **{kind: asking.means(result[kind]) for kind in KINDS},
            }
        )
    attacked = [r for r in rows if r["name"] not in ("original", "unlearned")]
    attacked = [r for r in attacked if not _broken(r, ("forget", "unlearned"))]
    strongest = {}
    for way in asking.WAYS:
        gains = {r["name"]: r["forget"][way] - r["unlearned"][way] for r in attacked}
        if gains:
            name = max(gains, key=gains.__getitem__)
            row = next(r for r in attacked if r["name"] == name)
            strongest[way] = {
                "attack": name,
                "before": row["unlearned"][way],
                "after": row["forget"][way],
            }
    leak = {
        name: {k: sum(x) / len(x) for k, x in result["leak"].items()}
        for name, result in found.items()
        if "leak" in result
    }
    return {
        "rows": rows,
        "leak": leak,
        "rtt": _rtt(found),
        "strongest": strongest,
        "refused": dict(refused),
    }


def _rtt(found: Results) -> dict[str, float]:
    own = {n: r for n, r in found.items() if n.startswith("rtt ")}
    if not own:
        return {}
    sweeps = [units.sweep(result) for result in own.values()]
    chance = 1 / next(iter(own.values()))["sweep"]["choices"]
    told = {"chance": chance, "rotations": len(sweeps)}
    told["asked"] = sum(sweep.hits.shape[-1] for sweep in sweeps)
    others = [found.get(f"original {name}") for name in own]
    if all(others):
        both = dict(
            unlearned=sweeps, original=[units.sweep(result) for result in others]
        )
        fair = attacks.recovery(**both, chance=chance, nested=True)
        told |= attacks.recovery(**both, chance=chance)
        return told | {"rate_nested": fair["rate"]}
    return told | {
        "before": sum(s.accuracy[0, 0] for s in sweeps) / len(sweeps),
        "unlearned": attacks.best_accuracy(sweeps),
    }


def markdown(card: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The card for people."""
    out = [
        f"# Robustness card of {about['model']}",
        "",
        f"Written by `{about['command']}`: {about['facts']['forget']} facts to forget, "
        f"{about['facts']['retain']} to keep{_chosen(about)}, seed {about['seed']}, "
        f"{about['seconds']:.0f} s in all. *Completion*: greedy decoding says the "
        f"answer; *choice*: the right one of several is the likeliest (chance "
        f"{about['chance']:.2f}); *probability* of an answer's token, geometric mean. "
        "Means over facts.",
        "",
        *_answers(card),
        "",
        "| | forget: completion | choice | probability | retain: completion | choice | "
        "probability |",
        "| --- |" + " --- |" * 6,
    ]
    for row in card["rows"]:
        cells = [_shown(row[kind][way]) for kind in KINDS for way in asking.WAYS]
        name = row["name"]
        if name in ("original", "unlearned"):
            name = f"**{name}**"
        elif name == "relearn":
            own = row["unlearned"]
            before = ", ".join(_shown(own[way]) for way in asking.WAYS)
            name = f"relearn, asked the {row['asked']} held out (before: {before})"
        out.append(f"| {name} | {' | '.join(cells)} |")
    broken = [row["name"] for row in card["rows"] if _broken(row, KINDS)]
    if broken:
        out += [
            "",
            f"{NONE}: log-probabilities are not finite ({', '.join(broken)}). Such a "
            "model answers nothing; its completion and choice are accidents.",
        ]
    if card["leak"]:
        ks = list(next(iter(card["leak"].values())))
        out += ["", f"| leak at k samples | {' | '.join(ks)} |"]
        out.append("| --- |" + " --- |" * len(ks))
        for name, own in card["leak"].items():
            whose = "original" if name.startswith("original") else "unlearned"
            out.append(f"| {whose} | {' | '.join(f'{x:.2f}' for x in own.values())} |")
    if card["rtt"]:
        out += ["", *_retraining(card["rtt"])]
    if card["refused"]:
        out += ["", "Not run:", ""]
        out += [f"- {name}: {reason}" for name, reason in card["refused"].items()]
    return "\n".join(out) + "\n"


def _chosen(about) -> str:
    return f" (known to the original by {about['known']})" if about["known"] else ""


def _broken(row, kinds) -> bool:
    return any(math.isnan(row[kind][way]) for kind in kinds for way in asking.WAYS)


def _shown(number: float, form: str = ".2f") -> str:
    return NONE if math.isnan(number) else f"{number:{form}}"


def _answers(card) -> list[str]:
    """What the numbers say."""
    out = [
        f"- {way}: {own['attack']} leaves most known, {own['before']:.2f} before the "
        f"attack and {own['after']:.2f} after it."
        for way, own in card["strongest"].items()
    ]
    told = card["rtt"]
    if "rate" in told:
        out.append(
            f"- Retraining on other facts brings choice from {told['before']:.2f} to "
            f"{told['unlearned']:.2f} on facts held out; the original has "
            f"{told['original']:.2f} after the same, a recovery of "
            f"{_shown(told['rate'], '.0%')} (who never knew has "
            f"{_shown(told['floor'], '.0%')})."
        )
    return out


def _retraining(told) -> list[str]:
    names = {
        "before": "before",
        "unlearned": "after",
        "original": "original after",
        "rate": "recovery",
        "rate_nested": "recovery, rate chosen on other facts",
        "above_chance": "recovery above chance",
        "floor": "floor of chance",
    }
    kept = {key: title for key, title in names.items() if key in told}
    cells = [_shown(told[key]) for key in kept]
    error = f" ± {told['error']:.2f} (two deviations)" if "error" in told else ""
    return [
        f"Retraining on the other folds (RTT), {told['rotations']} rotations, "
        f"{told['asked']} facts asked{error}; best of all rates and epochs:",
        "",
        f"| {' | '.join(kept.values())} |",
        "|" + " --- |" * len(kept),
        f"| {' | '.join(cells)} |",
    ]
