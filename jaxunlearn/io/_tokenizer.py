# SPDX-License-Identifier: Apache-2.0
"""Reads the tokenizer of a Hugging Face folder with transformers.

Two rules. tokenizer.json decides how texts become tokens: transformers rebuilds some
tokenizers by their class with another word rule, so both are compared and the file
wins. And a tokenizer that cannot be read does not prevent loading the weights: a
stand-in takes its place and raises the reason when it is used. No code of a checkpoint
is run, and the terminal is never read.
"""

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxunlearn import _checks

_OWNER = "hf.load"
_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# What transformers can build a tokenizer from: any of these groups of files.
_VOCABULARIES = (
    (_FILE,),
    *((name,) for name in _SENTENCEPIECE),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tekken.json",),
)
_FILES = (_CONFIG, "vocab.json", *(name for (name, *_) in _VOCABULARIES))
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_ADDED = ("add_bos_token", "add_eos_token")
# Texts on which word rules differ: digits, contractions, spaces, lines, case, accents.
PROBES = (
    "Hello world, it's 3 o'clock; I'LL say 12345678 things we'd\n\n  indent\tand\r\n"
    "   trailing   \n naïve cafe\u0301 — 中文字符 日本語 Здравствуйте ½ ² 😀 x1y22z333 "
    "__init__(self): #!/usr/bin $$% ... ''' don't DON'T   (a+b)=c ",
    " leading",
    "HelloWorld fooBar ÀÉ नमस्ते สวัสดี",
)


class UnreadableTokenizer:
    """Stands for a tokenizer that cannot be read, and raises the reason when used.

    `hf.load` returns it so that the weights can be used without texts.
    """

    def __init__(self, error: Exception):
        self.__dict__["reason"] = error

    def __repr__(self) -> str:
        return f"UnreadableTokenizer({str(self.reason)!r})"

    def _raise(self, *_: Any, **__: Any) -> Any:
        kind = ImportError if isinstance(self.reason, ImportError) else ValueError
        raise kind(str(self.reason)) from self.reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._raise()

    __call__ = __len__ = __iter__ = __contains__ = _raise


def guarded(where: object, make: Callable[[], Any]) -> Any:
    """What `make` returns, or a stand-in and a warning if it raises.

    Args:
        where: the file or folder, for the message.
        make: returns a tokenizer or None.
    """
    try:
        return make()
    except Exception as error:  # transformers and tokenizers raise errors of many types
        if str(error).startswith(_OWNER):
            reason: Exception = error
        elif isinstance(error, ImportError):
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            reason = ImportError(
                f"{_OWNER} needs a library to read the tokenizer of {where}, got: "
                f"{first}"
            )
        else:
            first = next(iter(str(error).strip().splitlines()), "no message")
            reason = ValueError(
                f"{_OWNER} needs a readable tokenizer, got {where} with which "
                f"transformers fails: {type(error).__name__}: {first} Copy or download "
                "the tokenizer's files again."
            )
        reason.__cause__ = error if reason is not error else error.__cause__
        warnings.warn(
            f"{reason} The weights are loaded; the tokenizer raises this error when it "
            "is used.",
            stacklevel=5,
        )
        return UnreadableTokenizer(reason)


def load(folder: Path) -> Any:
    """The tokenizer of a folder; None if the folder has no file of one.

    Returns:
        A transformers tokenizer that gives the tokens of tokenizer.json, or a stand-in
        and a warning that names the file if it cannot be read.
    """
    if not any((folder / name).is_file() for name in _FILES):
        return None
    return guarded(folder, lambda: _with_template(_read(folder), folder))


def _with_template(built: Any, folder: Path) -> Any:
    """The tokenizer, with the chat template of a separate file if it has none.

    transformers reads chat_template.jinja for tokenizers since 4.50, and
    chat_template.json for processors only.
    """
    jinja, by_json = folder / "chat_template.jinja", folder / "chat_template.json"
    if getattr(built, "chat_template", None):
        return built
    if jinja.is_file():
        built.chat_template = jinja.read_text(encoding="utf-8")
    elif by_json.is_file():
        built.chat_template = _json(by_json).get("chat_template")
    return built


def _read(folder: Path) -> Any:
    transformers = _checks.library(f"The tokenizer in {folder}", "transformers", "hf")
    config = _json(folder / _CONFIG)
    core = _core(folder / _FILE)
    if core is None:
        _check_vocabulary(folder)
    auto = transformers.AutoTokenizer
    try:
        built = auto.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # for example a class that this version does not have
        if core is None and _auto_map(config):
            raise ValueError(
                f"{_OWNER} needs a tokenizer that transformers has, got auto_map="
                f"{_auto_map(config)!r} in {folder / _CONFIG}, whose code is not run. "
                f"Save the tokenizer as {_FILE} in an environment that trusts the "
                "code, and copy the file here."
            ) from error
        if core is None:
            raise
        built = None
    if core is not None:
        built = _as_in_file(transformers, folder, config, core, built)
    getattr(built, "init_kwargs", {}).pop("auto_map", None)
    return built


def _json(file: Path) -> dict[str, Any]:
    """The content of a JSON file, empty if there is no file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{_OWNER} needs JSON in {file}, got text that does not parse ({error}). "
            "Copy or download it again."
        ) from error
    return found


def _core(file: Path) -> Any:
    """The Tokenizer of a tokenizer.json, None if there is no file."""
    if not file.is_file():
        return None
    tokenizers = _checks.library(f"The tokenizer in {file}", "tokenizers", "hf")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(
            f"{_OWNER} needs a tokenizer of the tokenizers library in {file}, got a "
            f"file that does not parse ({error}). Copy or download it again."
        ) from error


def _check_vocabulary(folder: Path) -> None:
    """Raises an error if no vocabulary, or no library that reads it, is there."""
    found = [
        names
        for names in _VOCABULARIES
        if all((folder / name).is_file() for name in names)
    ]
    if not found:
        names = [file.name for file in sorted(folder.iterdir()) if file.is_file()]
        raise ValueError(
            f"{_OWNER} needs a vocabulary for the tokenizer ({_FILE}, "
            f"{_SENTENCEPIECE[0]}, or vocab.json with merges.txt), got {folder} with "
            f"{_checks.listed(names)}. Copy the missing file from the original release."
        )
    (file, *_), missing = found[0], importlib.util.find_spec("sentencepiece") is None
    if file in _SENTENCEPIECE and missing:
        raise ImportError(
            f"{_OWNER} needs the library sentencepiece to read {folder / file}, got an "
            "environment without it. Run pip install sentencepiece protobuf, or copy "
            f"{_FILE} of the release into the folder."
        )


def _auto_map(config: dict[str, Any]) -> Any:
    """The class outside transformers that tokenizer_config.json names, or None."""
    found = config.get("auto_map")
    return found.get("AutoTokenizer") if isinstance(found, dict) else found


def _as_in_file(transformers, folder: Path, config, core, built) -> Any:
    """A tokenizer with the tokens of tokenizer.json.

    Args:
        transformers: the library.
        folder: the folder, whose other files give names and templates.
        config: the content of tokenizer_config.json.
        core: the Tokenizer of tokenizer.json.
        built: what transformers makes of the folder, or None.
    """
    file, found = folder / _FILE, built
    # Stored limits of length would hide a difference and end every text there.
    for each in filter(None, (core, getattr(built, "backend_tokenizer", None))):
        each.no_truncation()
        each.no_padding()
    if getattr(built, "backend_tokenizer", None) is None or not _same_parts(
        built.backend_tokenizer, core
    ):
        fast = transformers.PreTrainedTokenizerFast
        found = fast.from_pretrained(folder, local_files_only=True)
        found.backend_tokenizer.no_truncation()
        found.backend_tokenizer.no_padding()
        vocabulary = core.get_vocab()
        for name in _NAMED if built is not None else ():
            token = getattr(built, name, None)  # some classes have defaults
            if getattr(found, name, None) is None and token in vocabulary:
                setattr(found, name, token)
    word = _word(core)
    if _around(found.backend_tokenizer, word) != _around(core, word):
        found.backend_tokenizer.post_processor = core.post_processor
    for name in _ADDED:
        found.init_kwargs.pop(name, None)
    _report(file, config, core, built)
    return found


def _report(file: Path, config, core, built) -> None:
    """One warning if transformers alone, or a setting, would give other tokens."""
    inner = getattr(built, "backend_tokenizer", None)
    if inner is not None and not _same_words(inner, core):
        warnings.warn(
            f"transformers rebuilds the tokenizer of {file} as "
            f"{type(built).__name__} with another rule for words; the rule of the file "
            "is used. Open a saved folder with hf.load or with "
            "transformers.PreTrainedTokenizerFast, which use the file too.",
            stacklevel=7,
        )
        return
    word = _word(core)
    text, inside = _plain(core, word), core.encode(word).ids
    starts = [i for i in range(len(inside)) if inside[i : i + len(text)] == text]
    begins = bool(starts) and starts[0] > 0
    ends = bool(starts) and len(inside) > starts[0] + len(text)
    wrong = [
        f"{name}={config[name]}"
        for name, adds in zip(_ADDED, (begins, ends), strict=True)
        if isinstance(config.get(name), bool) and config[name] != adds
    ]
    if wrong:
        warnings.warn(
            f"{file.with_name(_CONFIG)} has {' and '.join(wrong)}, but {file.name} "
            "does otherwise; the file of the tokenizer is used. Compare the tokens of "
            "a prompt with those of the model's training.",
            stacklevel=7,
        )


def _same_parts(one: Any, other: Any) -> bool:
    """Whether two Tokenizers split, merge and join texts by the same rules."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        states = [getattr(core, name) for core in (one, other)]
        states = [None if part is None else part.__getstate__() for part in states]
        if states[0] != states[1]:
            return False
    settings = (
        "ignore_merges",
        "byte_fallback",
        "fuse_unk",
        "unk_token",
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
    )
    models = [
        (type(core.model), [getattr(core.model, name, None) for name in settings])
        for core in (one, other)
    ]
    return (
        models[0] == models[1]
        and one.get_vocab() == other.get_vocab()
        and _same_words(one, other)
    )


def _same_words(one: Any, other: Any) -> bool:
    """Whether two Tokenizers give the same tokens for the probes."""
    return all(_plain(one, text) == _plain(other, text) for text in PROBES)


def _plain(core: Any, text: str) -> list[int] | None:
    """The tokens of a text; None if it has one that is unknown and there is no token
    for that."""
    try:
        return core.encode(text, add_special_tokens=False).ids
    except Exception:  # tokenizers raises Exception itself
        return None


def _around(core: Any, word: str) -> list[list[int]]:
    """The begin and end tokens of one text and of a pair."""
    texts = ((word,), (word, word))
    return [core.encode(*text).ids for text in texts]


def _word(core: Any) -> str:
    """A text that a Tokenizer can encode; one of words may have no unknown token."""
    words = ("a", *core.get_vocab())
    return next((word for word in words if _plain(core, word) is not None), "a")
