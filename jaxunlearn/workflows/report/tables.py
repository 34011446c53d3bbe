# SPDX-License-Identifier: Apache-2.0
"""Numbers with intervals as tables of text: a row a model, a column a metric."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxunlearn.workflows.report import attacks, read

LIKE, HIGH, LOW = "like the retrained model's", "higher is better", "lower is better"
TITLES = {
    "forget_quality": ("forget quality", f"p-value of a KS test; {HIGH}"),
    "forget_quality_distance": ("KS distance", LOW),
    "model_utility": ("model utility", HIGH),
    "privleak": ("PrivLeak", "percent; 0 is best"),
    "rougeL_recall": ("ROUGE-L", "recall of generated answers"),
    "rouge1_recall": ("ROUGE-1", "recall of generated answers"),
    "truth_score": ("truth ratio, as a score", ""),
    "rows_left_out": ("rows left out", "longer than the limit"),
}
TASKS = {
    "forget": ("Rows to forget", f"Best is {LIKE}."),
    "retain": ("Rows to keep", f"{HIGH.capitalize()}."),
    "real_authors": ("Real authors", f"{HIGH.capitalize()}."),
    "world_facts": ("World facts", f"{HIGH.capitalize()}."),
    "holdout": ("Rows never seen", "What the attacks compare the forgotten with."),
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
    """A number in words, and its interval if it has one."""

    text: str
    interval: str = ""


class Column(NamedTuple):
    """What stands above a column: its title and what is best."""

    title: str
    best: str = ""


class Table(NamedTuple):
    """Rows are (name, role, cells)."""

    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, str, Sequence[Cell]]]


def headline(runs: Sequence[read.Run]) -> Table:
    """The numbers that say most, of those that were measured."""
    asked = [
        (task, name)
        for task, name in HEAD
        if any(name in read.numbers(run, task) for run in runs)
    ]
    columns = [_column(name, task) for task, name in asked]
    rows = [
        (run.name, run.role, [cell(run, task, name) for task, name in asked])
        for run in runs
    ]
    return Table("At a glance", "", columns, rows)


def of_tasks(runs: Sequence[read.Run]) -> list[Table]:
    """A table a task, and one of what all tasks say together."""
    tasks = list(dict.fromkeys(x for run in runs for x in run.metrics["tasks"]))
    known = [task for task in TASKS if task in tasks]
    found = []
    for task in [*known, *(x for x in tasks if x not in TASKS), "overall"]:
        names = list(dict.fromkeys(x for run in runs for x in read.numbers(run, task)))
        title, note = TASKS.get(task, (task, ""))
        if task == "overall":
            title = "All tasks together, and membership attacks"
            note = (
                "An attack's AUC is 0.5 where it cannot tell rows to forget from rows "
                f"never seen; best is {LIKE}."
            )
        own = [run for run in runs if read.numbers(run, task)]
        rows = [
            (run.name, run.role, [cell(run, task, name) for name in names])
            for run in own
        ]
        if rows:
            found.append(Table(title, note, [_column(name) for name in names], rows))
    return found


def of_attacks(run: read.Run) -> list[Table]:
    """A run's robustness card, and attacks that left numbers and no curves."""
    found = []
    if run.card:
        title = f"Robustness card: {run.name}"
        note = [str(run.card[x]) for x in ("measure",) if x in run.card]
        guess = attacks.chance(run)
        if guess is not None:
            note.append(f"chance is {number(guess)}")
        found.append(_flat(title, "; ".join(note), run.card["rows"]))
        strongest = run.card.get("strongest")
        if strongest:
            rows = [{"asked by": way, **own} for way, own in strongest.items()]
            found.append(_flat(f"The strongest attack: {run.name}", "", rows))
        if run.card.get("rtt"):
            rows = [{"": run.name, **run.card["rtt"]}]
            found.append(_flat(f"Retraining on other facts: {run.name}", "", rows))
        for name, why in (run.card.get("refused") or {}).items():
            rows = [{"attack": name, "why not": why}]
            found.append(_flat(f"Not run: {run.name}", "", rows))
    for own in run.attacks.values():
        if "attack" in own and "curves" not in own:
            rest = {"": run.name} | {k: v for k, v in own.items() if k != "attack"}
            found.append(_flat(f"{own['attack']}: {run.name}", "", [rest]))
    return found


def in_words(runs: Sequence[read.Run]) -> list[str]:
    """A sentence or two about every unlearned model."""
    first = {
        role: next((r for r in runs if r.role == role), None) for role in read.ROLES
    }
    said = []
    for run in runs:
        if run.role != "unlearned":
            continue
        told = []
        quality = read.value(run, "overall", "forget_quality")
        if quality is not None:
            verdict = (
                "cannot be told apart from the retrained model's"
                if quality > 0.05
                else "differ from the retrained model's"
            )
            told.append(
                f"its truth ratios on the rows to forget {verdict} "
                f"(p = {number(quality, pvalue=True)})"
            )
        for task, name, words in (
            ("forget", "probability", "the probability of the answers to forget is"),
            ("retain", "probability", "that of the answers to keep"),
            ("overall", "model_utility", "model utility is"),
        ):
            own = read.value(run, task, name)
            if own is None:
                continue
            rest = [
                f"{number(read.value(other, task, name))} {role}"
                for role, other in first.items()
                if role != "unlearned"
                and other
                and read.value(other, task, name) is not None
            ]
            compared = f" ({', '.join(rest)})" if rest else ""
            told.append(f"{words} {number(own)}{compared}")
        if told:
            said.append(f"{run.name}: {'; '.join(told)}.")
    return said


def cell(run: read.Run, task: str, name: str) -> Cell:
    """A number of a run, with its interval."""
    found = read.numbers(run, task).get(name)
    return of_value(found, pvalue=name in PVALUES) if found else Cell("–")


def of_value(found: Any, *, pvalue: bool = False) -> Cell:
    """A cell of a number, a text, None or {"value", "low", "high"}."""
    if not isinstance(found, Mapping):
        return Cell(number(found, pvalue=pvalue))
    low, high = found.get("low"), found.get("high")
    interval = "" if low is None else f"{number(low)} to {number(high)}"
    return Cell(number(found.get("value"), pvalue=pvalue), interval)


def number(value: Any, *, pvalue: bool = False) -> str:
    """A number as people read it; a dash for what was not measured."""
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
