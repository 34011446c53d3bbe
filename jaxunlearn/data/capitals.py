# SPDX-License-Identifier: Apache-2.0
"""Facts of our own making: capitals to forget and keep, and other world facts.

A `Fact` is a subject, its answer and a group; a *phrasing* is a sentence with
`{country}` in it that ends just before the answer, so that greedy completion can be
scored. A `Cloze` is one finished prompt with its answer and wrong choices. The facts
live in `capitals.json`.
"""

import dataclasses
import functools
import json
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from jaxunlearn import _checks

PLACE = "{country}"
KINDS = ("statement", "question")
SPLITS = ("train", "test")
_OPENING = " \t\r\n\"'`*_“”‘’«»([#>"


@dataclasses.dataclass(frozen=True)
class Fact:
    """A country and its capital.

    Attributes:
        subject: as it stands inside a sentence, article included ("the Netherlands").
        answer: the name to complete with.
        aliases: every accepted spelling; the answer is the first of them.
        group: the continent; wrong choices come from the same group.
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
    """A prompt that ends before a short answer, with wrong choices of its own.

    Attributes:
        prompt: the text before the answer.
        answer: the continuation, without its leading space.
        aliases: every accepted spelling; the answer is the first of them.
        wrong: answers that are false.
        group: the field it is about ("science", "books", ...).
    """

    prompt: str
    answer: str
    aliases: tuple[str, ...]
    wrong: tuple[str, ...]
    group: str


def capitals() -> list[Fact]:
    """Every packaged capital, Europe first; a new list on each call."""
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
    """Sentences with `{country}` that end just before the capital's name.

    Args:
        kind: "statement" (completed greedily or scored by choice) or "question" (a
            question and the beginning of its reply; a small model often replies with a
            whole sentence, so rate these by choice).
        split: "train" (two thirds) or "test" (one third, never trained on).
    """
    _checks.one_of("facts.phrasings", KINDS, kind=kind)
    _checks.one_of("facts.phrasings", SPLITS, split=split)
    rows = _packaged()["phrasings"]
    return [
        row["text"] for row in rows if row["kind"] == kind and row["split"] == split
    ]


def choices(
    fact: Fact | Cloze, pool: Sequence[Fact] = (), *, seed: int = 0, number: int = 4
) -> tuple[list[str], int]:
    """The right answer among wrong ones, the same on every machine.

    The draw depends on the seed and the fact alone, not on the order of `pool`.

    Args:
        fact: what is asked. A `Cloze` brings its own wrong answers and needs no pool.
        pool: facts whose answers, if of the same group, may serve as wrong ones.
        seed: whole number >= 0.
        number: how many options, the right one included.
    Returns:
        (options, index of the right one).
    Raises:
        ValueError: if fewer than number - 1 distinct wrong answers are there.
    """
    _checks.positive_int("facts.choices", number=number)
    if isinstance(fact, Cloze):
        name, wrong = fact.prompt, set(fact.wrong)
    else:
        name = fact.subject
        wrong = {other.answer for other in pool if other.group == fact.group}
    right = {_plain(alias) for alias in fact.aliases}
    wrong = sorted(answer for answer in wrong if _plain(answer) not in right)
    if len(wrong) < number - 1:
        raise ValueError(
            f"facts.choices needs {number - 1} wrong answers of group {fact.group!r} "
            f"for {name!r}, got {len(wrong)}. Give a larger pool or a smaller number."
        )
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    options = [wrong[i] for i in draw.permutation(len(wrong))[: number - 1]]
    index = int(draw.integers(number))
    options.insert(index, fact.answer)
    return options, index


def is_answer(fact: Fact | Cloze, text: str) -> bool:
    """Whether a continuation begins with the answer or one of its aliases.

    Leading blanks, quotes and markdown are dropped; case and accents do not matter; the
    name must end at a word boundary ("Romeo" is not "Rome").
    """
    text = _plain(text.lstrip(_OPENING))
    return any(
        re.match(re.escape(_plain(alias)) + r"(?!\w)", text) for alias in fact.aliases
    )


def make_fact(row: Mapping[str, Any]) -> Fact:
    """A Fact from `country`, `capital` and, if there, `continent` and `aliases`.

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


def _plain(text: str) -> str:
    """Lower case without accents, one kind of apostrophe."""
    text = unicodedata.normalize("NFKD", text.replace("’", "'"))
    return "".join(c for c in text if not unicodedata.combining(c)).casefold()


@functools.cache
def _packaged() -> dict[str, Any]:
    file = resources.files("jaxunlearn.data").joinpath("capitals.json")
    return json.loads(file.read_text(encoding="utf-8"))
