# SPDX-License-Identifier: Apache-2.0
"""MMLU: multiple-choice questions with four choices, from 57 subjects.

    test = mmlu.read("test", folder)
    test[0]["choices"][test[0]["answer"]]

The tables are "test", "dev" (five rows per subject, for few-shot prompts) and "val",
with the columns subject, question, choices (4 texts) and answer (0 to 3).

The input is one file with these columns (.jsonl or Parquet), or the folders of CSV
files that the authors publish, one per subject. The checksums are those of the CSV
files; another edition may differ in white space and then needs check=False.
"""

import csv
import io
from pathlib import Path

from jaxunlearn.data.benchmarks import official
from jaxunlearn.data.readers import files, jsonl

LETTERS = "ABCD"
_COLUMNS = {"subject": "text", "question": "text", "choices": "texts", "answer": "int"}


def _parse(path: Path) -> official.Rows:
    if not path.is_dir():
        return four_way(files.read_rows(path, tuple(_COLUMNS)), path)
    subjects = sorted(path.glob("*.csv"))
    if not subjects:
        raise ValueError(
            f"mmlu needs CSV files in {path}, got none. Unpack them there."
        )
    return four_way([row for file in subjects for row in _subject(file)], path)


def _subject(path: Path) -> official.Rows:
    """Rows of SUBJECT_SPLIT.csv: question, four choices, letter; there is no header."""
    subject = path.stem.rpartition("_")[0]
    rows = []
    for row in csv.reader(io.StringIO(jsonl.read_text(path), newline="")):
        if len(row) != 6 or row[5] not in tuple(LETTERS):
            raise ValueError(
                f"{path}, row {len(rows)}: needs a question, four choices and a letter "
                f"of {LETTERS}, got {str(row)[:60]}. Use the official file."
            )
        answer = LETTERS.index(row[5])
        values = (subject, row[0], row[1:5], answer)
        rows.append(dict(zip(_COLUMNS, values, strict=True)))
    return rows


def four_way(rows: official.Rows, path: Path | str) -> official.Rows:
    """The rows with answers as indices; a letter becomes its index.

    Raises:
        ValueError: if a row has not four choices, or an answer out of range.
    """
    for index, row in enumerate(rows):
        choices, answer = row.get("choices"), row.get("answer")
        if isinstance(answer, str) and answer in tuple(LETTERS):
            row["answer"] = answer = LETTERS.index(answer)
        if not isinstance(choices, list) or len(choices) != 4 or answer not in range(4):
            raise ValueError(
                f"{path}, row {index}: needs 4 choices and an answer from 0 to 3, got "
                f"{str(choices)[:60]} and {answer!r}. Correct or remove the row."
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

read = BENCHMARK.read
