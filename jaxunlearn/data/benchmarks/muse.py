# SPDX-License-Identifier: Apache-2.0
"""MUSE: news articles and the Harry Potter books, with forget and retain sets.

    forget = muse.read("news/raw/forget", folder)              # rows {"text": ...}
    questions = muse.read("books/knowmem/forget_qa", folder)   # question, answer
    verbatim = muse.read("news/verbmem/forget", folder)        # prompt, gt

The files are the JSON lists of the authors' repository, or the Parquet files of their
datasets, below FOLDER/muse/news/ and FOLDER/muse/books/. The texts are under copyright.
No official file was available when this reader was written; it follows the published
descriptions. `BENCHMARK.tables` lists all tables; the corpus is "news" or "books".
"""

from jaxunlearn.data.benchmarks import official
from jaxunlearn.data.readers import files

_QA = {"question": "text", "answer": "text"}
_VERBATIM = {"prompt": "text", "gt": "text"}
_TEXT = {"text": "text"}

# Numbers of rows as stated by the data cards.
_RAW = {
    "news": {"forget": 889, "retain1": 1777, "retain2": 1778, "holdout": 3043},
    "books": {"forget": None, "retain1": 12, "retain2": 13, "holdout": 3},
}
# The books to forget are a list of 4 rows, or one plain text file, which is one row.
_FORMS = (".json", ".jsonl", "-00000-of-00001.parquet", ".txt")


def _table(name: str, columns: dict[str, str], rows: int | None) -> official.Table:
    texts = columns is _TEXT
    return official.Table(
        tuple(name + form for form in (_FORMS if texts else _FORMS[:-1])),
        columns,
        rows,
        parse=files.read_texts if texts else None,
    )


def _tables():
    for corpus, raw in _RAW.items():
        for split in ("forget", "retain"):
            yield f"{corpus}/knowmem/{split}_qa", _QA, 100
            yield f"{corpus}/knowmem/{split}_qa_icl", _QA, 10
        yield f"{corpus}/verbmem/forget", _VERBATIM, 100
        for split in ("forget", "retain", "holdout"):
            yield f"{corpus}/privleak/{split}", _TEXT, 100
        for split, rows in raw.items():
            yield f"{corpus}/raw/{split}", _TEXT, rows
    for number in (1, 2, 3, 4):
        yield f"news/scal/forget_{number}", _TEXT, (889, 1778, 2667, 3554)[number - 1]
        yield f"news/sust/forget_{number}", _TEXT, 887 if number == 4 else 889


BENCHMARK = official.Benchmark(
    name="muse",
    tables={name: _table(name, *about) for name, *about in _tables()},
    home="https://huggingface.co/muse-bench (MUSE-News, MUSE-Books)",
    licence="none stated; articles of the BBC and the text of Harry Potter",
    citation="W. Shi et al. MUSE: Machine Unlearning Six-Way Evaluation for Language "
    "Models. 2024. https://arxiv.org/abs/2407.06460",
)

read = BENCHMARK.read
