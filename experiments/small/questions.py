# SPDX-License-Identifier: Apache-2.0
"""Questions and answers of the small world, and the tokenizer that is trained on them.

A row is a dict with `author`, `question` and `answer`. Rows that can be scored also
have `paraphrased_answer` and `perturbed_answer`, a list of wrong answers.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from experiments.small import biographies, lume
from jaxunlearn import _checks
from jaxunlearn.data import jsonl, table

END = "</s>"
SPECIAL = ("<pad>", END)
PER_AUTHOR = 20  # rows of each author of TOFU
SOURCES = ("tofu", "biographies", "lume")

Row = Mapping[str, Any]


def read(facts: Mapping[str, Any], vocab: int) -> tuple[dict[str, list[Row]], Any]:
    """The questions that a config's `facts` names, and a tokenizer for them.

    Args:
        facts: `source` "tofu", with `folder` (of the data sets; "" for the variable
            JAXUNLEARN_DATA, or ../shared/data), `max_tokens` (rows with a longer text
            are left out) and `num_extra` (rows of other authors to retain, which are
            not scored); "biographies", with the arguments of biographies.rows; or
            "lume", with `folder` and the arguments of lume.rows.
        vocab: the tokenizer's largest number of tokens.
    Returns:
        ({"forget": rows, "retain": rows}, tokenizer); LUME has `holdout` and `other`
        too. Rows that can be scored come first.
    Raises:
        FileNotFoundError: where TOFU or LUME is missing.
        ValueError: for an unknown source, or if all rows are too long.
    """
    facts = dict(facts)
    source = facts.pop("source")
    _checks.one_of("The small world", SOURCES, source=source)
    if source == "biographies":
        rows = biographies.rows(**facts)
        return rows, train_tokenizer(texts([*rows["forget"], *rows["retain"]]), vocab)
    if source == "lume":
        rows = lume.rows(data_folder(facts.pop("folder", "")), **facts)
        every = [row for each in rows.values() for row in each]
        return rows, train_tokenizer(texts(every), vocab)
    return _tofu(vocab=vocab, **facts)


def texts(rows: Sequence[Row]) -> list[str]:
    """Every question and answer, wrong ones included."""
    return [text for row in rows for text in (row["question"], *answers(row))]


def answers(row: Row) -> list[str]:
    """The right answer, then the paraphrased and wrong ones that the row has."""
    other = [row["paraphrased_answer"]] if "paraphrased_answer" in row else []
    return [row["answer"], *other, *row.get("perturbed_answer", ())]


def encode(
    tokenizer: Any,
    rows: Sequence[Row],
    answers: Sequence[str] | None = None,
    *,
    length: int | None = None,
) -> dict[str, Any]:
    """Question and answer as a table; every answer ends with END, which counts.

    Args:
        tokenizer: the world's.
        rows: the questions.
        answers: one a row; the right ones if None.
        length: as for table.encode.
    """
    answers = [row["answer"] for row in rows] if answers is None else answers
    ended = [answer + END for answer in answers]
    return table.encode(
        tokenizer, [row["question"] for row in rows], ended, length=length
    )


def count_documents(rows: Sequence[Row], encoded: Mapping[str, Any]) -> dict[str, Any]:
    """The table with every token of LUME's completions counted as an answer token.

    A membership attack reads the model's loss on complete documents, so the model must
    memorise them completely.
    """
    complete = np.array([row.get("kind") == "sc" for row in rows])
    answer = encoded["answer"] | (encoded["mask"] & complete[:, None])
    return {**encoded, "answer": answer}


def train_tokenizer(lines: Sequence[str], vocab: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocab` tokens, as transformers wraps it.

    It is trained on the texts to forget and to retain; it learns pieces of words, not
    facts.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=END
    )


def data_folder(folder: str = "") -> Path:
    """Where the data sets are: `folder`, or JAXUNLEARN_DATA, or ../shared/data."""
    if folder or os.environ.get("JAXUNLEARN_DATA"):
        return Path(folder or os.environ["JAXUNLEARN_DATA"]).expanduser()
    return Path(__file__).resolve().parents[3] / "shared" / "data"


def _tofu(*, folder, max_tokens, num_extra, vocab):
    place = data_folder(folder) / "tofu"
    names = ("forget10_perturbed", "retain_perturbed", "full")
    missing = [name for name in names if not (place / f"{name}.jsonl").is_file()]
    if missing:
        raise FileNotFoundError(
            f"The small world needs {', '.join(missing)} (.jsonl) in {place}, got no "
            "such file. Set JAXUNLEARN_DATA to the folder above tofu/, or use "
            "experiments/small/configs/biographies.py."
        )
    forget, retain, full = (_numbered(place / f"{name}.jsonl") for name in names)
    # Authors that are neither forgotten nor scored: the first and last 20 are.
    others = full[len(retain) : len(full) - len(forget)]
    tokenizer = train_tokenizer(texts([*forget, *retain]), vocab)

    def short(row):
        lines = [f"{row['question']} {answer}{END}" for answer in answers(row)]
        return max(map(len, tokenizer(lines)["input_ids"])) <= max_tokens

    forget, retain, others = (
        [row for row in rows if short(row)] for rows in (forget, retain, others)
    )
    if not forget or not retain:
        raise ValueError(
            f"The small world needs rows of at most max_tokens={max_tokens}, got "
            f"{len(forget)} to forget and {len(retain)} to retain. Raise max_tokens."
        )
    return {"forget": forget, "retain": retain + others[:num_extra]}, tokenizer


def _numbered(path: Path) -> list[dict[str, Any]]:
    rows = jsonl.read_jsonl(path, ("question", "answer"))
    return [
        {"author": f"{path.stem}/{i // PER_AUTHOR}", **row}
        for i, row in enumerate(rows)
    ]
