# SPDX-License-Identifier: Apache-2.0
"""MMLU: four-way questions of 57 subjects.

    test = mmlu.read("test", folder)
    test[0]["choices"][test[0]["answer"]]

Read from one file with these columns (.jsonl or Parquet), or from the folders of CSV
files that the authors publish, subject after subject. The checksums are of those CSV
files' rows; another edition may differ in white space and then needs check=False.
"""

import csv
import io
import os
from pathlib import Path

from jaxunlearn.data import files, jsonl
from jaxunlearn.data.benchmarks import official

LETTERS = "ABCD"
_COLUMNS = {"subject": "text", "question": "text", "choices": "texts", "answer": "int"}


def _parse(path: Path) -> official.Rows:
    if not path.is_dir():
        return four_way(files.read_rows(path, tuple(_COLUMNS)), path)
    found = sorted(path.glob("*.csv"))
    if not found:
        raise ValueError(
            f"mmlu needs CSV files in {path}, got none. Unpack them there."
        )
    return four_way([row for each in found for row in _subject(each)], path)


def _subject(path: Path) -> official.Rows:
    """The rows of <subject>_<split>.csv: question, four choices, letter; no heading."""
    subject = path.stem.rpartition("_")[0]
    rows = []
    for row in csv.reader(io.StringIO(jsonl.read_text(path), newline="")):
        if len(row) != 6 or row[5] not in tuple(LETTERS):
            raise ValueError(
                f"{path}, row {len(rows)}: needs a question, four choices and a letter "
                f"of {LETTERS}, got {str(row)[:60]}. Take the official file."
            )
        answer = LETTERS.index(row[5])
        values = (subject, row[0], row[1:5], answer)
        rows.append(dict(zip(_COLUMNS, values, strict=True)))
    return rows


def four_way(rows: official.Rows, path: Path | str) -> official.Rows:
    """The rows; ValueError unless each has four choices and the number of one of them.

    A letter for an answer becomes its number.
    """
    for number, row in enumerate(rows):
        choices, answer = row.get("choices"), row.get("answer")
        if isinstance(answer, str) and answer in tuple(LETTERS):
            row["answer"] = answer = LETTERS.index(answer)
        if not isinstance(choices, list) or len(choices) != 4 or answer not in range(4):
            raise ValueError(
                f"{path}, row {number}: needs 4 choices and an answer of 0 to 3, got "
                f"{str(choices)[:60]} and {answer!r}. Mend the row or leave it out."
            )
    return rows


BENCHMARK = official.Benchmark(
    name="mmlu",
    tables={
        split: official.Table(
            (
                f"{split}.jsonl",
                f"all/{hub}-00000-of-00001.parquet",
                f"{hub}-00000-of-00001.parquet",
                split,
            ),
            _COLUMNS,
            rows,
            parse=_parse,
        )
        for split, hub, rows in (
            ("test", "test", 14042),
            ("dev", "dev", 285),
            ("val", "validation", None),
        )
    },
    home="https://github.com/hendrycks/test or "
    "https://huggingface.co/datasets/cais/mmlu",
    licence="MIT",
    citation="D. Hendrycks et al. Measuring Massive Multitask Language Understanding. "
    "ICLR 2021. https://arxiv.org/abs/2009.03300",
)


def read(
    table: str,
    folder: str | os.PathLike | None = None,
    *,
    check: bool = True,
    download: bool = False,
) -> official.Rows:
    """Rows with subject, question, choices (4) and answer (0 to 3), as official.read.

    Args:
        table: "test", "dev" (five a subject, for prompts) or "val".
    """
    return official.read(BENCHMARK, table, folder, check=check, download=download)
