# SPDX-License-Identifier: Apache-2.0
"""The streams that a config names, with what the reference gave.

Small ones are whole tables; files that are read lazily are sources of rows.
"""

import glob
import json
import os
import zlib
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from jaxunlearn import _checks, data
from jaxunlearn.data import capitals, files, jsonl, prose, source, table
from jaxunlearn.typing import Model

Rows = table.Table | table.Source
BENCHMARKS = ("tofu", "lume", "muse", "wmdp", "mmlu", "rtt_facts")


def sources(config: ConfigDict, model: Model, tokenizer: Any) -> dict[str, Rows]:
    """A table or source for every stream of config.data, rows of the length it says.

    Raises:
        ValueError: if a source needs a tokenizer and the model has none, or its rows
            do not fit; what the readers of files raise.
    Warns:
        UserWarning: with the ids, or else the prompts, that are in both `forget` and
            `retain`, where both are read whole from a file or a benchmark.
    """
    made, read = {}, {}
    for name, settings in config.data.items():
        if settings.source != "synthetic" and tokenizer is None:
            raise ValueError(
                f"The stream {name!r} needs a model with a tokenizer for its "
                f"{settings.source}, got one without. Use model.path, or the source "
                "'synthetic'."
            )
        make = {"synthetic": _synthetic, "capitals": _capitals, "prose": _prose}
        make |= {"jsonl": _lazy_jsonl, "array_record": _array_record}
        whole = settings.source == "jsonl" and not settings.get("lazy", False)
        if whole or settings.source in ("file", "benchmark"):
            read[name] = _rows(settings)
            made[name] = _encoded(read[name], settings, tokenizer)
        else:
            made[name] = make[settings.source](settings, model, tokenizer)
    if {"forget", "retain"} <= set(read):
        _told(config, read["forget"], read["retain"])
    return made


def _told(config: ConfigDict, forget: list[dict], retain: list[dict]) -> None:
    """Warns of what is in both: by id, or by prompt where rows have none."""
    if all("id" in row for row in (*forget, *retain)):
        data.overlap(forget, retain)
        return
    prompts = [
        [{"prompt": x} for x in _prompts(config.data[name], rows)]
        for name, rows in (("forget", forget), ("retain", retain))
    ]
    data.overlap(*prompts, by="prompt")


def _prompts(settings: ConfigDict, rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row[_column(settings)] for row in rows))


def _rows(settings: ConfigDict) -> list[dict[str, Any]]:
    """What a file or a benchmark's table holds."""
    wanted = (_column(settings), settings.get("answer", "answer"))
    wanted = tuple(filter(None, wanted))
    if settings.source == "jsonl":
        return jsonl.read_jsonl(settings.get("path", ""), wanted)
    if settings.source == "file" and wanted == ("text",):
        return files.read_texts(settings.get("path", ""))
    if settings.source == "file":
        return files.read_rows(settings.get("path", ""), wanted)
    _checks.one_of("A stream", BENCHMARKS, name=settings.get("name"))
    return getattr(data, settings.name).read(
        settings.get("table", ""),
        settings.get("folder") or None,
        check=settings.get("check", True),
    )


def _encoded(rows, settings, tokenizer):
    prompt, answer = _column(settings), settings.get("answer", "answer")
    for number, row in enumerate(rows):
        for column in filter(None, (prompt, answer)):
            if not isinstance(row.get(column), str):
                raise ValueError(
                    f"A stream needs a text in {column!r}, got "
                    f"{row.get(column)!r} in row {number}, which has "
                    f"{_checks.listed(row)}. Name columns by prompt and answer."
                )
    if not answer:
        text = "\n\n".join(row[prompt] for row in rows)
        return table.encode_text(tokenizer, text, length=settings.length)
    separator = " "
    if settings.get("chat", False):
        date = {"date_string": settings.date} if settings.get("date") else {}
        asked = [row[prompt] for row in rows]
        asked = data.chat_prompts(
            tokenizer, asked, system=settings.get("system", ""), **date
        )
        rows = [
            {prompt: text, answer: row[answer] + (tokenizer.eos_token or "")}
            for text, row in zip(asked, rows, strict=True)
        ]
        separator = ""
    if settings.get("long", "refuse") == "drop":
        names = dict(prompt=prompt, answer=answer, separator=separator)
        rows = data.drop_long(rows, tokenizer, max_length=settings.length, **names)
    texts = files.columns(rows, prompt, answer)
    return table.encode(tokenizer, *texts, length=settings.length, separator=separator)


def _column(settings: ConfigDict) -> str:
    """The prompt's column; benchmarks call theirs a question unless told otherwise, and
    running text is a text."""
    usual = "question" if settings.source == "benchmark" else "prompt"
    usual = usual if settings.get("answer", "answer") else "text"
    return settings.get("prompt", usual)


def with_reference(
    config: ConfigDict, stream: str, rows: Rows, folder: Path, score: Any
) -> Rows:
    """The stream with `ref_logps`, scored once and kept in the folder.

    A restarted run must see the same numbers to the last bit, on whatever mesh.

    Args:
        config: the run's; another model or other settings of the stream are scored
            anew.
        stream: names the file.
        rows: its table or source.
        folder: the run's output, on a file system that all processes share.
        score: () -> ([n] float32, ...), called where there is no file for these rows.
    """
    file = folder / f"reference_{stream}.npz"
    known = _mark(config, stream, rows)
    try:
        with np.load(file) as kept:
            if kept["table"] == known:
                return table.with_columns(rows, {"ref_logps": kept["ref_logps"]})
    except (OSError, ValueError, KeyError):
        pass  # not there yet
    logps = score()[0].astype(np.float32)
    if jax.process_index() == 0:
        fresh = file.with_suffix(".new.npz")
        np.savez(fresh, ref_logps=logps, table=known)
        os.replace(fresh, file)
    return table.with_columns(rows, {"ref_logps": logps})


def _mark(config: ConfigDict, stream: str, rows: Rows) -> np.uint32:
    """A number for what was scored: the settings, and the tokens or how many rows."""
    model = {k: v for k, v in config.model.to_dict().items() if k != "remat"}
    made_of = [model, config.seed, config.data[stream].to_dict(), table.num_rows(rows)]
    text = json.dumps(made_of, sort_keys=True, default=str).encode()
    if isinstance(rows, dict):
        text += rows["tokens"].tobytes() + rows["answer"].tobytes()
    return np.uint32(zlib.crc32(text))


def _synthetic(settings, model, tokenizer):
    """Random tokens; the later half of every row is its answer."""
    del tokenizer
    count, length = settings.get("count", 1024), settings.length
    rng = np.random.default_rng(settings.get("seed", 0))
    tokens = rng.integers(0, model.config.vocab, (count, length), dtype=np.int32)
    mask = np.ones((count, length), np.bool_)
    answer = mask & (np.arange(length) >= length // 2)
    return {"tokens": tokens, "mask": mask, "answer": answer}


def _capitals(settings, model, tokenizer):
    """Every capital of a continent, or of the others, in every training statement."""
    del model
    group, others = settings.get("group", "Europe"), settings.get("others", False)
    known = [f for f in capitals.capitals() if (f.group == group) != others]
    pairs = [
        (fact.prompt(phrasing), fact.answer)
        for fact in known
        for phrasing in capitals.phrasings("statement", "train")
    ]
    prompts, answers = zip(*pairs, strict=True) if pairs else ((), ())
    return table.encode(tokenizer, prompts, answers, length=settings.length)


def _prose(settings, model, tokenizer):
    del model
    text = prose.prose()[1 if settings.get("held_out", False) else 0]
    return table.encode_text(tokenizer, text, length=settings.length)


def _lazy_jsonl(settings, model, tokenizer):
    del model
    wanted = (settings.get("prompt", "prompt"), settings.get("answer", "answer"))
    rows = jsonl.open_jsonl(settings.get("path", ""), wanted)
    return _lazy(rows, settings, tokenizer)


def _array_record(settings, model, tokenizer):
    """Records of JSON; each is read from its file when its turn comes."""
    del model
    path = settings.get("path", "")
    files = sorted(glob.glob(path))
    if not files:
        raise FileNotFoundError(
            f"A stream needs array_record files, got none for path={path!r}. Check it."
        )
    records = grain.sources.ArrayRecordDataSource(files)
    return _lazy(source.mapped(records, json.loads), settings, tokenizer)


def _lazy(texts, settings, tokenizer):
    fields = {name: settings.get(name, name) for name in ("prompt", "answer")}
    return source.encoded(texts, tokenizer, length=settings.length, **fields)
