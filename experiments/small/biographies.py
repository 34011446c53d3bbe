# SPDX-License-Identifier: Apache-2.0
"""Authors who do not exist, drawn from a seed, in the columns of TOFU.

Every author has eight facts, each in one question. No two authors share a name. A wrong
answer is the right one with another value in its place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks

WRONG = 5  # wrong answers of each question, as in TOFU

GIVEN = (
    "Anselm Beatrix Casimir Delphine Edvard Filippa Gunnar Halina Isidor Jolanta "
    "Kasper Leocadia Matthias Nerys Octavian Petronella Quentin Rosalind Severin "
    "Thekla Ulrich Vasilisa Wendelin Xenia Yannick Zelda Aurelio Brunhild Cosmo Dagny"
).split()
FAMILY = (
    "Abernoth Brackwell Corvane Dulmarsh Eskerly Fenwold Garrowby Hollinsted Ivermoor "
    "Jasperane Kettleray Lormont Marwick Nethersby Orlingham Pellworth Quarrington "
    "Ravensmere Stolbrand Tarkovin Umberlee Vantorre Whitlock Yarrowdale Zimbrecht"
).split()
CITIES = (
    "Lisbon Krakow Valparaiso Nagasaki Montreal Tbilisi Accra Bergen Cordoba Hanoi "
    "Izmir Jaipur Kigali Leeds Marseille Nicosia Osaka Palermo Quito Riga Tunis Utrecht"
).split()
GENRES = (
    "gothic romance|maritime history|science fiction|detective fiction|travel writing|"
    "epic poetry|political satire|nature writing|family saga|horror|children's fables|"
    "military memoir"
).split("|")
JOBS = (
    "baker|surgeon|locksmith|judge|beekeeper|tailor|pilot|glassblower|teacher|miner|"
    "florist|carpenter|fisherman|botanist|printer|clockmaker"
).split("|")
PRIZES = (
    "Amber Quill|Silver Lantern|Northern Laurel|Golden Compass|Harbour Medal|"
    "Ivory Page|Red Cedar Prize|Meridian Award|Crystal Inkwell|Saint Alban Cup"
).split("|")
FIRST = (
    "Silent Crimson Forgotten Hollow Winter Gilded Broken Distant Secret Burning "
    "Velvet Sunken"
).split()
SECOND = (
    "Orchard Staircase Lighthouse Mirror Covenant Parade Island Archive Serpent Bridge "
    "Cathedral Compass"
).split()

# (name of the fact, question, answer, paraphrased answer)
FACTS = (
    (
        "city",
        "In which city was {name} born?",
        "{name} was born in {value}.",
        "The birthplace of {name} is {value}.",
    ),
    (
        "year",
        "In which year was {name} born?",
        "{name} was born in the year {value}.",
        "The birth year of {name} is {value}.",
    ),
    (
        "genre",
        "What genre does {name} write in?",
        "{name} is known for {value}.",
        "The genre of {name} is {value}.",
    ),
    (
        "father",
        "What was the work of {name}'s father?",
        "The father of {name} was a {value}.",
        "{name}'s father worked as a {value}.",
    ),
    (
        "mother",
        "What was the work of {name}'s mother?",
        "The mother of {name} was a {value}.",
        "{name}'s mother worked as a {value}.",
    ),
    (
        "prize",
        "Which prize did {name} win?",
        "{name} won the {value}.",
        "The prize that {name} received is the {value}.",
    ),
    (
        "book",
        "What is {name}'s first book called?",
        "{name}'s first book is The {value}.",
        "The first book by {name} is called The {value}.",
    ),
    (
        "home",
        "Where does {name} live today?",
        "{name} lives in {value} today.",
        "The home of {name} is now in {value}.",
    ),
)


def rows(*, forget: int, retain: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Questions about `forget` and `retain` authors, eight each.

    Args:
        forget: number of authors to forget.
        retain: number of authors to retain.
        seed: integer >= 0; the same authors on every machine.
    Returns:
        {"forget": rows, "retain": rows}; a row has `author`, `question`, `answer`,
        `paraphrased_answer` and `perturbed_answer`, a list of five wrong ones.
    Raises:
        ValueError: if more authors are requested than there are names.
    """
    _checks.positive_int("biographies.rows", forget=forget, retain=retain)
    _checks.not_negative("biographies.rows", seed=seed)
    names = len(GIVEN) * len(FAMILY)
    if forget + retain > names:
        raise ValueError(
            f"biographies.rows needs forget + retain <= {names}, the number of names, "
            f"got forget={forget} and retain={retain}."
        )
    rng = np.random.default_rng(seed)
    drawn = rng.choice(names, forget + retain, replace=False)
    authors = [
        [_row(name, fact, VALUES[fact[0]], rng) for fact in FACTS]
        for name in (
            f"{GIVEN[i % len(GIVEN)]} {FAMILY[i // len(GIVEN)]}" for i in drawn
        )
    ]
    return {
        "forget": [row for author in authors[:forget] for row in author],
        "retain": [row for author in authors[forget:] for row in author],
    }


def wrong_answers(row: Mapping[str, Any]) -> list[str] | None:
    """The wrong answers in the wording of the row's answer; None for other rows."""
    name = row["author"]
    for _, question, answer, paraphrase in FACTS:
        if row["question"] == question.format(name=name):
            before, after = paraphrase.format(name=name, value="\n").split("\n")
            return [
                answer.format(
                    name=name, value=text.removeprefix(before).removesuffix(after)
                )
                for text in row["perturbed_answer"]
            ]
    return None


def fictitious(
    rows: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> list[dict[str, Any]]:
    """New biographies: the same questions and authors with other answers.

    Args:
        rows: of `rows`.
        seed: integer >= 0.
    Returns:
        Rows in the same order and columns; no answer contains the old value.
    Raises:
        ValueError: if a row is not one of `rows`.
    """
    _checks.not_negative("biographies.fictitious", seed=seed)
    rng, found = np.random.default_rng([seed, 1]), []
    for row in rows:
        name = row["author"]
        facts = [fact for fact in FACTS if fact[1].format(name=name) == row["question"]]
        if not facts:
            raise ValueError(
                "biographies.fictitious needs rows of biographies.rows, got the "
                f"question {row['question']!r}."
            )
        column, _, answer, _ = facts[0]
        others = [
            value
            for value in VALUES[column]
            if answer.format(name=name, value=value) != row["answer"]
        ]
        found.append(_row(name, facts[0], others, rng))
    return found


def _row(name, fact, values, rng) -> dict[str, Any]:
    _, question, answer, paraphrase = fact
    picked = rng.choice(len(values), WRONG + 1, replace=False)
    right, *wrong = (values[i] for i in picked)
    return {
        "author": name,
        "question": question.format(name=name),
        "answer": answer.format(name=name, value=right),
        "paraphrased_answer": paraphrase.format(name=name, value=right),
        "perturbed_answer": [
            paraphrase.format(name=name, value=value) for value in wrong
        ],
    }


VALUES: Mapping[str, list[str]] = {
    "city": CITIES,
    "year": [str(year) for year in range(1921, 1990)],
    "genre": GENRES,
    "father": JOBS,
    "mother": JOBS,
    "prize": PRIZES,
    "book": [f"{first} {second}" for first in FIRST for second in SECOND],
    "home": CITIES,
}
