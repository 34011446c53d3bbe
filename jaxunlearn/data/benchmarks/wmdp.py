# SPDX-License-Identifier: Apache-2.0
"""WMDP: multiple-choice questions about hazardous knowledge, and corpora to unlearn.

    questions = wmdp.read("cyber", folder)                # FOLDER/wmdp/...
    forget = wmdp.read("cyber-forget-corpus", folder)     # rows {"text": ...}

The authors ask not to redistribute these data in plain text, and share the biology
corpus to forget on request only. Nothing is downloaded: put the files in place
yourself. No official file was available when this reader was written; it follows the
published descriptions.
"""

import os
from functools import partial
from pathlib import Path

from jaxunlearn.data.benchmarks import mmlu, official
from jaxunlearn.data.readers import files

_QUESTION = {"question": "text", "choices": "texts", "answer": "int"}
_CORPORA = (
    "bio-forget-corpus",
    "bio-retain-corpus",
    "cyber-forget-corpus",
    "cyber-retain-corpus",
)


def _questions(path: Path) -> official.Rows:
    return mmlu.four_way(files.read_rows(path, tuple(_QUESTION)), path)


def _corpus(path: Path) -> official.Rows:
    """The texts; some corpora also have titles, abstracts and other columns."""
    return [{"text": row["text"]} for row in files.read_texts(path)]


BENCHMARK = official.Benchmark(
    name="wmdp",
    tables={
        subject: official.Table(
            (
                f"{subject}_questions.json",
                f"wmdp-mcqs/{subject}_questions.json",
                f"wmdp-{subject}/test-00000-of-00001.parquet",
            ),
            _QUESTION,
            rows,
            parse=_questions,
        )
        for subject, rows in (("bio", 1273), ("chem", 408), ("cyber", 1987))
    }
    | {
        name: official.Table(
            (f"{name}.jsonl", f"wmdp-corpora/{name}.jsonl"),
            {"text": "text"},
            parse=_corpus,
        )
        for name in _CORPORA
    },
    home="https://www.wmdp.ai or https://huggingface.co/datasets/cais/wmdp",
    licence="MIT for the questions",
    citation="N. Li et al. The WMDP Benchmark: Measuring and Reducing Malicious Use "
    "With Unlearning. ICML 2024. https://arxiv.org/abs/2403.03218",
)


def read(
    table: str,
    folder: str | os.PathLike | None = None,
    *,
    check: bool = True,
    download: bool = False,
    raw_lines: bool = False,
) -> official.Rows:
    """Rows of a table; arguments and errors are those of official.Benchmark.read.

    Args:
        table: "bio", "chem" or "cyber" (question, choices, answer 0 to 3), or a corpus
            such as "cyber-forget-corpus" (text).
        raw_lines: returns every line of a corpus as one text, without decoding its
            JSON.
    Paper and code: OpenUnlearning, and BLUR's code for some of the corpora, train on
    such raw lines, including braces and quotes. The default is the decoded text.
    """
    benchmark = BENCHMARK
    if raw_lines:
        if table not in _CORPORA:
            raise ValueError(
                f"wmdp.read needs a corpus with raw_lines=True, got table={table!r}."
            )
        raw = partial(files.read_texts, lines=True)
        tables = {table: BENCHMARK.tables[table]._replace(parse=raw)}
        benchmark = BENCHMARK._replace(tables=tables)
    return benchmark.read(table, folder, check=check, download=download)
