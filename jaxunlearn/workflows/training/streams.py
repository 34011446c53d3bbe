# SPDX-License-Identifier: Apache-2.0
"""The streams of rows that a config names, and the reference's log-probabilities.

Small streams are tables in memory; files that are read lazily are sources of rows.
"""

import glob
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxunlearn import _checks, data
from jaxunlearn.data import capitals, files, jsonl, prose, source, table
from jaxunlearn.typing import Model
from jaxunlearn.workflows.training import matching

Rows = table.Table | table.Source
BENCHMARKS = ("tofu", "lume", "muse", "wmdp", "mmlu", "rtt_facts")
TEXT_LENGTH = 256  # of rows of running text, where the config gives none


class Stream(NamedTuple):
    """The rows of one stream.

    Attributes:
        rows: a table or a source.
        settings: those of the config, with what was found: names of the columns, the
            length, and a checksum of a table's rows.
        ids: of a stream of texts that is read in pairs: what ties each row to its pair.
    """

    rows: Rows
    settings: dict[str, Any]
    ids: list[Any] | None = None


def read(
    config: ConfigDict,
    model: Model,
    tokenizer: Any,
    *,
    pairs: Sequence[Sequence[str]] = (),
) -> dict[str, Stream]:
    """Every stream of config.data, encoded.

    A stream of a file without a length in the config gets that of its longest row,
    rounded up to a multiple of 8.

    Args:
        config: the run's.
        model: limits the length, and the ids of tokens.
        tokenizer: of the model; None without one.
        pairs: groups of streams that are read row by row. The rows of a group are
            matched by their `id`, or else by their prompts in the order of the files,
            and a row that is too long in one stream is left out of all.
    Raises:
        ValueError: if a source needs a tokenizer and the model has none, a column is
            missing, rows are too long or have token ids outside the model's vocabulary,
            or rows of pairs do not match; what the readers of files raise.
    Warns:
        UserWarning: with the ids, or else the prompts, that are in both `forget` and
            `retain`, where both are read from files or benchmarks.
    """
    texts: dict[str, list[dict[str, Any]]] = {}
    encode: dict[str, Callable[[int | None], Rows]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, given in config.data.items():
        s = found[name] = dict(given.to_dict())
        wording = prompt_format(config, s)
        if s["source"] != "synthetic" and tokenizer is None:
            raise ValueError(
                f"The stream {name!r} needs a model with a tokenizer, got a model "
                "without one. Put tokenizer.json into the model's folder."
            )
        if s["source"] in ("file", "benchmark") or _in_memory(s):
            texts[name] = _texts(s)
            _name_columns(name, s, texts[name])
            encode[name] = partial(_encoded, texts[name], s, tokenizer, wording)
        elif s["source"] in _SOURCES_OF_TEXT:
            read_texts = _SOURCES_OF_TEXT[s["source"]]
            encode[name] = partial(read_texts, s, tokenizer, wording)
        else:
            encode[name] = partial(_SOURCES[s["source"]], s, model, tokenizer)
    if {"forget", "retain"} <= set(texts):
        _warn_of_overlap(found, texts)
    ids: dict[str, list[Any]] = {}
    for group in pairs:
        if set(group) <= set(texts):
            ids |= matching.matched(group, texts, found)
            matching.drop_long(group, texts, ids, found, encode)
    made = {name: encode[name](s.get("length") or None) for name, s in found.items()}
    for name, s in found.items():
        checked = partial(_within, f"The stream {name!r}", model, tokenizer)
        if not isinstance(made[name], Mapping):
            made[name] = source.mapped(made[name], checked)
        else:
            checked(made[name])
            s["length"] = made[name]["tokens"].shape[1]
            s["checksum"] = _checksum(made[name])
            table.check_length(made[name], model.config.max_length)
    return {name: Stream(made[name], s, ids.get(name)) for name, s in found.items()}


def prompt_format(config: ConfigDict, settings: Mapping[str, Any]) -> data.PromptFormat:
    """How a stream's prompts and answers are joined.

    Args:
        config: the run's.
        settings: of the stream; its `prompt_format` replaces fields of the run's.
    """
    common = data.PromptFormat().with_settings(config.prompt_format.to_dict())
    return common.with_settings(settings.get("prompt_format") or {})


def with_reference(
    config: ConfigDict,
    name: str,
    stream: Stream,
    folder: Path,
    score: Callable[[], tuple[np.ndarray, ...]],
) -> Rows:
    """The stream's rows with the column `ref_logps`, computed once and stored.

    A run that resumes must see the same numbers to the last bit, on any mesh.

    Args:
        config: the run's. For another model or other rows it is computed again.
        name: the stream's.
        stream: its rows.
        folder: the run's output, on a file system that all processes share.
        score: () -> ([n] float32, ...), called if the folder has no file of these rows.
    """
    file = folder / f"reference_{name}.npz"
    key = _key(config, stream)
    try:
        with np.load(file) as stored:
            if stored["table"] == key:
                columns = {"ref_logps": stored["ref_logps"]}
                return table.with_columns(stream.rows, columns)
    except (OSError, ValueError, KeyError):
        pass  # not there yet
    logps = score()[0].astype(np.float32)
    if jax.process_index() == 0:
        fresh = file.with_suffix(".new.npz")
        np.savez(fresh, ref_logps=logps, table=key)
        os.replace(fresh, file)
    return table.with_columns(stream.rows, {"ref_logps": logps})


def _key(config: ConfigDict, stream: Stream) -> np.uint32:
    """A number for what was scored: the model, the seed and the stream."""
    model = {k: v for k, v in config.model.to_dict().items() if k != "remat"}
    made_of = [model, config.seed, stream.settings, table.num_rows(stream.rows)]
    text = json.dumps(made_of, sort_keys=True, default=str).encode()
    return np.uint32(zlib.crc32(text))


def _within(owner: str, model: Model, tokenizer: Any, rows: table.Table) -> table.Table:
    """The rows (or one row), once their token ids are those of the model."""
    batch = {name: np.atleast_2d(rows[name]) for name in ("tokens", "mask")}
    _checks.token_ids(owner, model, batch, tokenizer=tokenizer)
    return rows


def _checksum(rows: table.Table) -> int:
    return zlib.crc32(rows["answer"].tobytes(), zlib.crc32(rows["tokens"].tobytes()))


def _in_memory(settings: Mapping[str, Any]) -> bool:
    return settings["source"] == "jsonl" and not settings.get("lazy", False)


def _texts(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file or of a benchmark's table."""
    path = settings.get("path", "")
    if settings["source"] == "benchmark":
        _checks.one_of("A stream", BENCHMARKS, name=settings.get("name"))
        return getattr(data, settings["name"]).read(
            settings.get("table", ""),
            settings.get("folder") or None,
            check=settings.get("check", True),
        )
    if settings["source"] == "jsonl":
        return jsonl.read_jsonl(path)
    running = str(path).removesuffix(".gz").endswith(".txt")
    if running or (settings.get("answer") == "" and "prompt" not in settings):
        return files.read_texts(path)
    return files.read_rows(path)


def _name_columns(name: str, settings: dict[str, Any], rows: list[dict]) -> None:
    """Fills in the names of the columns, once every row has a text in them."""
    first, path = rows[0], settings.get("path", "")
    running = str(path).removesuffix(".gz").endswith(".txt")
    answer = settings.setdefault("answer", "" if running else "answer")
    usual = "text" if not answer else "prompt" if "prompt" in first else "question"
    if usual not in first and settings["source"] != "benchmark":
        usual = "text" if not answer else "prompt"
    prompt = settings.setdefault("prompt", usual)
    fix = "Correct the row, or name the columns by --prompt-column, --answer-column."
    for column in filter(None, (prompt, answer)):
        try:
            found = files.texts(rows, column, fix=fix)
        except (KeyError, ValueError) as error:
            raise ValueError(f"The stream {name!r}: {error}") from None
        if column == answer and "" in map(str.strip, found):
            row = list(map(str.strip, found)).index("")
            raise ValueError(
                f"The stream {name!r}: {files.place(rows, row)}: needs a text in the "
                f"column {column!r}, got {found[row]!r}. {fix}"
            )


def _warn_of_overlap(found: Mapping[str, dict], texts: Mapping[str, list]) -> None:
    """Warns of rows in both streams: by id, or by prompt where rows have no id."""
    both = [texts["forget"], texts["retain"]]
    if all("id" in row for rows in both for row in rows):
        data.overlap(*both)
        return
    prompts = [
        [
            {"prompt": x}
            for x in dict.fromkeys(row[found[name]["prompt"]] for row in rows)
        ]
        for name, rows in zip(("forget", "retain"), both, strict=True)
    ]
    data.overlap(*prompts, by="prompt")


def _encoded(
    rows: list[dict],
    settings: dict[str, Any],
    tokenizer: Any,
    prompt_format: data.PromptFormat,
    length: int | None,
) -> table.Table:
    prompt, answer = settings["prompt"], settings["answer"]
    if not answer:
        text = "\n\n".join(row[prompt] for row in rows)
        return table.encode_text(tokenizer, text, length=length or TEXT_LENGTH)
    if length and settings.get("long", "refuse") == "drop":
        names = dict(prompt=prompt, answer=answer, prompt_format=prompt_format)
        rows = data.drop_long(rows, tokenizer, max_length=length, **names)
    texts = files.columns(rows, prompt, answer)
    return table.encode(tokenizer, *texts, prompt_format=prompt_format, length=length)


def _synthetic(settings, model, tokenizer, length):
    """Random tokens; the second half of every row is its answer."""
    del tokenizer
    count = settings.get("count", 1024)
    rng = np.random.default_rng(settings.get("seed", 0))
    tokens = rng.integers(0, model.config.vocab, (count, length), dtype=np.int32)
    mask = np.ones((count, length), np.bool_)
    answer = mask & (np.arange(length) >= length // 2)
    return {"tokens": tokens, "mask": mask, "answer": answer}


def _capitals(settings, tokenizer, prompt_format, length):
    """The capitals of a continent, or all others, in every training statement."""
    group, others = settings.get("group", "Europe"), settings.get("others", False)
    chosen = [f for f in capitals.capitals() if (f.group == group) != others]
    pairs = [
        (fact.prompt(phrasing), fact.answer)
        for fact in chosen
        for phrasing in capitals.phrasings("statement", "train")
    ]
    prompts, answers = zip(*pairs, strict=True) if pairs else ((), ())
    return table.encode(
        tokenizer, prompts, answers, prompt_format=prompt_format, length=length
    )


def _prose(settings, model, tokenizer, length):
    del model
    text = prose.prose()[1 if settings.get("held_out", False) else 0]
    return table.encode_text(tokenizer, text, length=length)


def _lazy_jsonl(settings, tokenizer, prompt_format, length):
    columns = (settings.get("prompt", "prompt"), settings.get("answer", "answer"))
    rows = jsonl.open_jsonl(settings.get("path", ""), columns)
    return _lazy(rows, settings, tokenizer, prompt_format, length)


def _array_record(settings, tokenizer, prompt_format, length):
    """Records of JSON; each is read from its file when its batch is made."""
    path = settings.get("path", "")
    paths = sorted(glob.glob(path))
    if not paths:
        raise FileNotFoundError(
            f"A stream needs array_record files, got none for path={path!r}. Check it."
        )
    grain = _checks.library("A stream of array_record files", "grain", "data")
    records = grain.sources.ArrayRecordDataSource(paths)
    rows = source.mapped(records, jsonl.parse)
    return _lazy(rows, settings, tokenizer, prompt_format, length)


def _lazy(texts, settings, tokenizer, prompt_format, length):
    columns = {name: settings.get(name, name) for name in ("prompt", "answer")}
    return source.encoded(
        texts, tokenizer, length=length, prompt_format=prompt_format, **columns
    )


_SOURCES = {"synthetic": _synthetic, "prose": _prose}
_SOURCES_OF_TEXT = {
    "capitals": _capitals,
    "jsonl": _lazy_jsonl,
    "array_record": _array_record,
}
