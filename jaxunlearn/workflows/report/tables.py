# SPDX-License-Identifier: Apache-2.0
"""Numbers with intervals as tables of text: a row for each model, a column for each
metric."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxunlearn.workflows.report import attacks, read

LIKE, HIGH, LOW = (
    "closest to the retrained model is best",
    "higher is better",
    "lower is better",
)
TITLES = {
    "forget_quality": ("forget quality", f"p-value of a KS test; {HIGH}"),
    "forget_quality_distance": ("KS distance", LOW),
    "model_utility": ("model utility", HIGH),
    "privleak": ("PrivLeak", "percent; 0 is best"),
    "rougeL_recall": ("ROUGE-L", "recall of generated answers"),
    "rouge1_recall": ("ROUGE-1", "recall of generated answers"),
    "truth_score": ("truth ratio, as a score", ""),
    "rows_left_out": ("rows left out", "longer than the maximum length"),
}
TASKS = {
    "forget": ("Rows to forget", f"{LIKE.capitalize()}."),
    "retain": ("Rows to retain", f"{HIGH.capitalize()}."),
    "real_authors": ("Real authors", f"{HIGH.capitalize()}."),
    "world_facts": ("World facts", f"{HIGH.capitalize()}."),
    "holdout": (
        "Holdout rows",
        "No model was trained on them. Membership attacks compare them with the "
        "forget rows.",
    ),
}
HEAD = (
    ("overall", "forget_quality"),
    ("overall", "forget_quality_distance"),
    ("overall", "model_utility"),
    ("forget", "probability"),
    ("forget", "rougeL_recall"),
    ("forget", "extraction_strength"),
    ("retain", "probability"),
    ("overall", "privleak"),
)
PVALUES = ("forget_quality",)


class Cell(NamedTuple):
    """A number as text, and its interval if it has one."""

    text: str
    interval: str = ""


class Column(NamedTuple):
    """The head of a column: its title, and which values are best."""

    title: str
    best: str = ""


class Table(NamedTuple):
    """Rows are (name, role, cells)."""

    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, str, Sequence[Cell]]]


def headline(models: Sequence[read.ModelResults]) -> Table:
    """The most important numbers, of those that were measured."""
    shown = [
        (task, name)
        for task, name in HEAD
        if any(name in read.numbers(model, task) for model in models)
    ]
    columns = [_column(name, task) for task, name in shown]
    rows = [
        (model.name, model.role, [cell(model, task, name) for task, name in shown])
        for model in models
    ]
    return Table("At a glance", "", columns, rows)


def of_tasks(models: Sequence[read.ModelResults]) -> list[Table]:
    """A table for each task, and one of the numbers that need several tasks."""
    tasks = list(dict.fromkeys(x for model in models for x in model.metrics["tasks"]))
    known = [task for task in TASKS if task in tasks]
    found = []
    for task in [*known, *(x for x in tasks if x not in TASKS), "overall"]:
        names = list(
            dict.fromkeys(x for model in models for x in read.numbers(model, task))
        )
        title, note = TASKS.get(task, (task, ""))
        if task == "overall":
            title = "Model utility, forget quality and membership attacks"
            note = (
                "AUC of a membership attack: 0.5 if it cannot tell forget rows from "
                f"holdout rows; {LIKE}."
            )
        measured = [model for model in models if read.numbers(model, task)]
        rows = [
            (model.name, model.role, [cell(model, task, name) for name in names])
            for model in measured
        ]
        if rows:
            found.append(Table(title, note, [_column(name) for name in names], rows))
    return found


def of_attacks(results: read.AttackResults) -> list[Table]:
    """The robustness card, and the numbers of attacks that have no curves."""
    found = []
    if results.card:
        title = f"Robustness card: {results.name}"
        note = [str(results.card[x]) for x in ("measure",) if x in results.card]
        guess = attacks.chance(results)
        if guess is not None:
            note.append(f"chance level {number(guess)}")
        found.append(_flat(title, "; ".join(note), results.card["rows"]))
        strongest = results.card.get("strongest")
        if strongest:
            rows = [{"measure": measure, **x} for measure, x in strongest.items()]
            found.append(_flat(f"The strongest attack: {results.name}", "", rows))
        if results.card.get("rtt"):
            rows = [{"": results.name, **results.card["rtt"]}]
            found.append(_flat(f"Retraining on other facts: {results.name}", "", rows))
        for name, reason in (results.card.get("not_run") or {}).items():
            rows = [{"attack": name, "reason": reason}]
            found.append(_flat(f"Not run: {results.name}", "", rows))
    for attack in results.attacks.values():
        if "attack" in attack and "curves" not in attack:
            rest = {k: v for k, v in attack.items() if k != "attack"}
            title = f"{attack['attack']}: {results.name}"
            found.append(_flat(title, "", [{"": results.name} | rest]))
    return found


def in_words(models: Sequence[read.ModelResults]) -> list[str]:
    """A sentence about every unlearned model."""
    first = {
        role: next((r for r in models if r.role == role), None) for role in read.ROLES
    }
    lines = []
    for model in models:
        if model.role != "unlearned":
            continue
        parts = []
        quality = read.value(model, "overall", "forget_quality")
        if quality is not None:
            verdict = (
                "do not differ significantly from the retrained model's"
                if quality > 0.05
                else "differ significantly from the retrained model's"
            )
            parts.append(
                f"its truth ratios on the rows to forget {verdict} "
                f"(p = {number(quality, pvalue=True)})"
            )
        for task, name, words in (
            ("forget", "probability", "the probability of the answers to forget is"),
            ("retain", "probability", "that of the answers to retain"),
            ("overall", "model_utility", "model utility is"),
        ):
            number_ = read.value(model, task, name)
            if number_ is None:
                continue
            rest = [
                f"{number(read.value(other, task, name))} {role}"
                for role, other in first.items()
                if role != "unlearned"
                and other
                and read.value(other, task, name) is not None
            ]
            compared = f" ({', '.join(rest)})" if rest else ""
            parts.append(f"{words} {number(number_)}{compared}")
        if parts:
            lines.append(f"{model.name}: {'; '.join(parts)}.")
    return lines


def cell(model: read.ModelResults, task: str, name: str) -> Cell:
    """One number of a model, with its interval."""
    found = read.numbers(model, task).get(name)
    return of_value(found, pvalue=name in PVALUES) if found else Cell("–")


def of_value(found: Any, *, pvalue: bool = False) -> Cell:
    """A cell of a number, a text, None or {"value", "low", "high"}."""
    if not isinstance(found, Mapping):
        return Cell(number(found, pvalue=pvalue))
    low, high = found.get("low"), found.get("high")
    interval = "" if low is None else f"{number(low)} to {number(high)}"
    return Cell(number(found.get("value"), pvalue=pvalue), interval)


def number(value: Any, *, pvalue: bool = False) -> str:
    """A number as text; a dash if it was not measured."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if pvalue and value < 1e-3:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:.0f}" if abs(value) < 1e5 else f"{value:.2g}"
    if value and abs(value) < 5e-4:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _column(name: str, task: str = "") -> Column:
    title, best = TITLES.get(name, (name.replace("_", " "), ""))
    if name.startswith("mia_"):
        title, best = f"{name[4:-4].replace('_', '-').replace('-plus', '+')} AUC", ""
        title = title.replace("+-+", "++").replace("-++", "++")
    if task in ("forget", "retain"):
        title = f"{task}: {title}"
        best = LIKE if task == "forget" else HIGH
    return Column(title, best)


def _flat(title: str, note: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of flat objects; the first key names the row."""
    rows = attacks.rows(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    first, *rest = keys
    cells = [
        (number(row.get(first)), "", [of_value(row.get(key)) for key in rest])
        for row in rows
    ]
    return Table(title, note, [Column(key.replace("_", " ")) for key in rest], cells)
