# SPDX-License-Identifier: Apache-2.0
"""Capitals of countries to forget and to retain, and other facts about the world.

    facts = capitals.capitals()                   # packaged, in capitals.json
    facts = capitals.read_facts("mine.jsonl")     # your own, in the same form

A `Fact` is a subject, its answer and a group. A *phrasing* is a sentence that contains
`{country}` and ends just before the answer, so that greedy completion can be scored. A
`Cloze` is one complete prompt with its answer and wrong choices.
"""

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from jaxunlearn import _checks, _text
from jaxunlearn.data.readers import jsonl

PLACE = "{country}"
KINDS = ("statement", "question")
SPLITS = ("train", "test")
_OPENING = " \t\r\n\u3000\u200e\u200f\"'`*_“”„‘’‚«»‹›「『（【《〈([#>"


@dataclasses.dataclass(frozen=True)
class Fact:
    """A country and its capital.

    Attributes:
        subject: the country as written inside a sentence ("the Netherlands").
        answer: the capital.
        aliases: every accepted spelling; the answer is the first.
        group: the continent; wrong choices are drawn from the same group.
    """

    subject: str
    answer: str
    aliases: tuple[str, ...]
    group: str

    def prompt(self, phrasing: str) -> str:
        """The phrasing with this subject in place of `{country}`."""
        if PLACE not in phrasing:
            raise ValueError(
                f"Fact.prompt needs a phrasing with {PLACE} in it, got {phrasing!r}."
            )
        return phrasing.replace(PLACE, self.subject)


@dataclasses.dataclass(frozen=True)
class Cloze:
    """A prompt that ends before a short answer, with its wrong choices.

    Attributes:
        prompt: the text before the answer.
        answer: the continuation, without its leading space.
        aliases: every accepted spelling; the answer is the first.
        wrong: false answers.
        group: the subject area ("science", "books", ...).
    """

    prompt: str
    answer: str
    aliases: tuple[str, ...]
    wrong: tuple[str, ...]
    group: str


def capitals() -> list[Fact]:
    """All packaged capitals, Europe first, as a new list."""
    return [make_fact(row) for row in _packaged()["capitals"]]


def world() -> list[Cloze]:
    """The packaged short facts that are not about capitals."""
    return [
        Cloze(
            prompt=row["prompt"],
            answer=row["answer"],
            aliases=_aliases(row),
            wrong=tuple(row["wrong"]),
            group=row["group"],
        )
        for row in _packaged()["world"]
    ]


def phrasings(kind: str = "statement", split: str = "train") -> list[str]:
    """Sentences that contain `{country}` and end just before the capital's name.

    Args:
        kind: "statement" (scored by greedy completion or by choice) or "question" (a
            question and the beginning of its reply; score these by choice, because
            small models often reply with a complete sentence).
        split: "train" (two thirds) or "test" (one third, never trained on).
    """
    _checks.one_of("capitals.phrasings", KINDS, kind=kind)
    _checks.one_of("capitals.phrasings", SPLITS, split=split)
    rows = _packaged()["phrasings"]
    return [
        row["text"] for row in rows if row["kind"] == kind and row["split"] == split
    ]


def choices(
    fact: Fact | Cloze,
    pool: Sequence[Fact] = (),
    *,
    seed: int = 0,
    num_choices: int = 4,
) -> tuple[list[str], int]:
    """The right answer among wrong ones, in the same order on every machine.

    The draw depends on the seed and the fact only, not on the order of `pool`.

    Args:
        fact: the fact in question. A `Cloze` has its wrong answers and needs no pool.
        pool: facts whose answers are the wrong choices, if they are of the same group.
        seed: integer >= 0.
        num_choices: number of choices, the right one included.
    Returns:
        (choices, index of the right one).
    Raises:
        ValueError: if there are fewer than num_choices - 1 distinct wrong answers.
    """
    _checks.positive_int("capitals.choices", num_choices=num_choices)
    if isinstance(fact, Cloze):
        name, wrong = fact.prompt, set(fact.wrong)
    else:
        name = fact.subject
        wrong = {other.answer for other in pool if other.group == fact.group}
    right = {_text.unaccented(alias) for alias in fact.aliases}
    wrong = sorted(answer for answer in wrong if _text.unaccented(answer) not in right)
    if len(wrong) < num_choices - 1:
        raise ValueError(
            f"capitals.choices needs {num_choices - 1} wrong answers of group "
            f"{fact.group!r} for {name!r}, got {len(wrong)}. Give a larger pool or a "
            "smaller num_choices."
        )
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    drawn = [wrong[i] for i in rng.permutation(len(wrong))[: num_choices - 1]]
    index = int(rng.integers(num_choices))
    drawn.insert(index, fact.answer)
    return drawn, index


def is_answer(fact: Fact | Cloze, text: str) -> bool:
    """Whether a continuation begins with the answer or one of its aliases.

    Leading spaces, quotes and markdown are ignored, as are case and accents. The name
    must end at a word boundary ("Romeo" is not "Rome"), except in scripts without
    spaces between words, and in Korean, where a particle may follow it.
    """
    text = text.lstrip(_OPENING)
    return any(_text.begins(text, alias) for alias in fact.aliases)


def read_facts(path: str | os.PathLike) -> list[Fact]:
    """Your facts, from JSON lines in the form of the packaged capitals.

    Each object has `country` and `capital`, and optionally `continent` (wrong choices
    are drawn from the same one) and `aliases` (a list of other accepted spellings).

    Raises:
        FileNotFoundError, ValueError: as `data.read_jsonl`; also for a field of the
            wrong type or a country that occurs twice, with file and line.
    """
    facts: list[Fact] = []
    lines: dict[str, int] = {}
    for line, row in jsonl.numbered_rows(path, ("country", "capital")):
        try:
            fact = make_fact(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
        if fact.subject in lines:
            raise ValueError(
                f"{path}, line {line}: {fact.subject!r} is already on line "
                f"{lines[fact.subject]}. Keep one row per country."
            )
        lines[fact.subject] = line
        facts.append(fact)
    return facts


def make_fact(row: Mapping[str, Any]) -> Fact:
    """A Fact from `country`, `capital` and, if present, `continent` and `aliases`.

    Raises:
        TypeError, ValueError: if a value is not a text, or is empty.
    """
    for name in ("country", "capital", "continent"):
        value = row.get(name, "none")
        if not isinstance(value, str):
            raise TypeError(
                f"A fact needs a text {name!r}, got {value!r}. Put it in quotes."
            )
        if not value.strip():
            raise ValueError(f"A fact needs a {name!r}, got an empty text.")
    return Fact(
        subject=row["country"].strip(),
        answer=row["capital"].strip(),
        aliases=_aliases({**row, "answer": row["capital"].strip()}),
        group=row.get("continent", "none").strip(),
    )


def _aliases(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The accepted spellings, each once, the answer first."""
    aliases = row.get("aliases", [])
    if not isinstance(aliases, list) or not all(
        isinstance(alias, str) and alias.strip() for alias in aliases
    ):
        raise TypeError(
            f"A fact needs 'aliases' to be a list of texts, got {aliases!r}. "
            'Write ["Kyiv", "Kiev"], or leave the field out.'
        )
    return tuple(dict.fromkeys([row["answer"], *aliases]))


@functools.cache
def _packaged() -> dict[str, Any]:
    file = resources.files("jaxunlearn.data.benchmarks").joinpath("capitals.json")
    return json.loads(file.read_text(encoding="utf-8"))
