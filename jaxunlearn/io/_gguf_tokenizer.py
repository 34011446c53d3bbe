# SPDX-License-Identifier: Apache-2.0
"""Reconstructs the tokenizer in a GGUF file with the `tokenizers` library.

transformers can do this too, for its own classes of tokenizers: it takes the word rule,
spaces and bytes of a class, not of the file. Byte-level BPE (`gpt2`) and SentencePiece
(`llama`) are supported. Of byte-level BPE the file contains pieces and merges; the rule
that splits a text into words is not stored, only its name, so an unknown rule gives no
tokenizer rather than a slightly wrong one. What the metadata leave out has the default
of llama.cpp.

Reference: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

import warnings
from typing import Any, NamedTuple

from jaxunlearn import _checks
from jaxunlearn.io import _gguf_sentencepiece
from jaxunlearn.io._gguf_sentencepiece import CONTROL, UNKNOWN, USER

_KEY = "tokenizer.ggml"
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"  # kinds of tokenizers
# The special tokens of a SentencePiece tokenizer whose metadata do not name them.
_DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_HEAD = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _cased(after: str, digits: str) -> str:
    """The rule of o200k and Tekken: a word has at most one change to lower case."""
    words = (_CASED + f"{_UPPER}*{_LOWER}+", _CASED + f"{_UPPER}+{_LOWER}*")
    tail = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return "|".join(word + after for word in words) + "|" + digits + tail


class Rule(NamedTuple):
    """How texts are split into words.

    Attributes:
        splits: regular expressions, applied one after another; matches and the text
            between them are separate words.
        ignore_merges: whether a word that is a token needs no merges.
        begin: whether llama.cpp adds the begin token if the file does not decide it.
        nfc: whether the text is normalized to NFC first.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    begin: bool = False
    nfc: bool = False


_LLAMA3 = _HEAD + r"\p{N}{1,3}" + _TAIL
_QWEN2 = _HEAD + r"\p{N}" + _TAIL
_DIGITS = Rule((r"\p{N}", _GPT2))
# The rules of `tokenizer.ggml.pre` that save_gguf tries, in this order.
_WORDS = {
    "gpt-2": Rule((_GPT2,)),
    "smollm": _DIGITS,
    "llama-bpe": Rule((_LLAMA3,), ignore_merges=True, begin=True),
    "qwen2": Rule((_QWEN2,), nfc=True),
    "dbrx": Rule((_LLAMA3,)),
    "deepseek-r1-qwen": Rule((_QWEN2,)),
    "qwen35": Rule(
        (
            _SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    "tekken": Rule((_cased("", r"\p{N}"),), ignore_merges=True, begin=True),
    "gpt-4o": Rule((_cased(_SHORT + "?", r"\p{N}{1,3}"),)),
}
RULES = tuple(_WORDS)
_SAME = {
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
    "dbrx": ("smaug-bpe",),
    "deepseek-r1-qwen": ("stablelm2", "megrez", "hunyuan", "solar-open"),
    "gpt-4o": ("llama4", "kanana2"),
}
# The rule of a file that names none, as in llama.cpp.
_DEFAULT = Rule(
    (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
)
_ALL = {
    **_WORDS,
    **{name: _WORDS[rule] for rule, names in _SAME.items() for name in names},
    "default": _DEFAULT,
}
# Texts of tokens at which llama.cpp ends a generation.
ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> "
    "</s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <｜end▁of▁sentence｜>".split()
)
END_KEYS = ("eos", "eot", "eom")  # end of sequence, of a turn, of a message


def special_ids(fields: dict[str, Any]) -> dict[str, int]:
    """The special tokens that the metadata name: "bos", "eos", ... -> id.

    Ids outside the list of tokens are left out, as in llama.cpp.
    """
    size = len(fields.get(f"{_KEY}.tokens") or ())
    return {
        name: index
        for name, index in _named_ids(fields).items()
        if isinstance(index, int) and (not size or 0 <= index < size)
    }


def end_ids(fields: dict[str, Any]) -> list[int]:
    """The ids that end an answer, the end-of-sequence id of the metadata first.

    These are the ids that the metadata name as the end of a sequence, a turn or a
    message, and the tokens that llama.cpp recognises as an end by their text.
    """
    named = special_ids(fields)
    found = [named[name] for name in END_KEYS if name in named]
    pieces = fields.get(f"{_KEY}.tokens") or ()
    found += [index for index, piece in enumerate(pieces) if piece in ENDS]
    return list(dict.fromkeys(found))


def build(fields: dict[str, Any], file: object = "a GGUF file"):
    """A transformers PreTrainedTokenizerFast with its chat template, or None.

    Args:
        fields: metadata of the file by key.
        file: the file, for messages.
    Returns:
        The tokenizer. None if the metadata has none; None and a warning if it is
        neither byte-level BPE with a known word rule nor SentencePiece. One warning
        lists what the metadata leave out or get wrong, and what is used instead.
    Raises:
        ImportError: without transformers or tokenizers.
    """
    pieces = fields.get(f"{_KEY}.tokens")
    if pieces is None:
        return None
    if problem := _problem(fields):
        warnings.warn(
            f"The tokenizer of {file} ({problem}) cannot be reconstructed exactly, so "
            "hf.load returns None instead. Load that of the original release with "
            "transformers.AutoTokenizer.",
            stacklevel=4,
        )
        return None
    owner = "The tokenizer of a GGUF file"
    tokenizers = _checks.library(owner, "tokenizers", "hf")
    transformers = _checks.library(owner, "transformers", "hf")
    ids = special_ids(fields)
    begin, sentencepiece = (
        fields.get(f"{_KEY}.add_bos_token"),
        _is_sentencepiece(fields),
    )
    if begin is None:
        begin = sentencepiece or _rule(fields).begin
    _warn(fields, file, bool(begin), ids)
    if sentencepiece:
        unknown = ids.get("unknown", _DEFAULT_IDS["unknown"])
        core = _gguf_sentencepiece.core(tokenizers, fields, unknown)
    else:
        core = _core(tokenizers, fields, pieces, _rule(fields))
    _add_tokens(tokenizers, core, fields, pieces)
    ends = fields.get(f"{_KEY}.add_eos_token") and "eos" in ids
    first = pieces[ids["bos"]] if begin and "bos" in ids else None
    _add_template(core, first, pieces[ids["eos"]] if ends else None)
    keys = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    named = {
        f"{short}_token": pieces[ids[key]] for key, short in keys.items() if key in ids
    }
    if "eos_token" in named:
        named.setdefault("pad_token", named["eos_token"])
    arch = fields.get("general.architecture")
    built = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=fields.get(f"{arch}.context_length"),
        clean_up_tokenization_spaces=False,
        **named,
    )
    built.chat_template = fields.get("tokenizer.chat_template")
    return built


def _problem(fields: dict[str, Any]) -> str:
    """Why the tokenizer cannot be reconstructed; "" if it can."""
    if _is_sentencepiece(fields):
        return _gguf_sentencepiece.problem(fields)
    kind, name = fields.get(f"{_KEY}.model"), fields.get(f"{_KEY}.pre") or "default"
    known = kind == _BYTE_LEVEL and name in _ALL and fields.get(f"{_KEY}.merges")
    return "" if known else f"{kind!r}, word rule {name!r}"


def _is_sentencepiece(fields: dict[str, Any]) -> bool:
    return fields.get(f"{_KEY}.model") == _SENTENCEPIECE


def _rule(fields: dict[str, Any]) -> Rule:
    return _ALL[fields.get(f"{_KEY}.pre") or "default"]


def _named_ids(fields: dict[str, Any]) -> dict[str, Any]:
    names = ("bos", *END_KEYS, "unknown", "padding")
    usual = _DEFAULT_IDS if _is_sentencepiece(fields) else {}
    found = {
        name: fields.get(f"{_KEY}.{name}_token_id", usual.get(name)) for name in names
    }
    return {name: index for name, index in found.items() if index is not None}


def _warn(fields: dict[str, Any], file: object, begin: bool, ids) -> None:
    """One warning about what the metadata leave out or get wrong."""
    notes = []
    if _is_sentencepiece(fields):
        notes += [
            f"no {_KEY}.{name}_token_id: llama.cpp takes {_DEFAULT_IDS[name]}"
            for name in ("bos", "eos")
            if fields.get(f"{_KEY}.{name}_token_id") is None
        ]
    elif not fields.get(f"{_KEY}.pre"):
        notes.append(f"no {_KEY}.pre: words are split by llama.cpp's default rule")
    if fields.get(f"{_KEY}.add_bos_token") is None:
        what = "adds the" if begin else "adds no"
        notes.append(
            f"no {_KEY}.add_bos_token: llama.cpp {what} begin token by default"
        )
    if begin and "bos" not in ids:
        notes.append(f"no {_KEY}.bos_token_id: no begin token is added")
    for name, index in _named_ids(fields).items():
        if name not in ids:
            size = len(fields[f"{_KEY}.tokens"])
            notes.append(f"{_KEY}.{name}_token_id={index!r} of {size} tokens: ignored")
    if notes:
        warnings.warn(
            f"The tokenizer metadata of {file} are incomplete or wrong ("
            f"{'; '.join(notes)}). Compare its tokens with those of the original "
            "release.",
            stacklevel=5,
        )


def _core(tokenizers, fields: dict[str, Any], pieces: list[str], rule: Rule):
    """The core Tokenizer of byte-level BPE: normalizer, word rule, merges."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ", 1)) for merge in fields[f"{_KEY}.merges"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    core = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, ignore_merges=rule.ignore_merges)
    )
    splits = [tokenizers.Regex(split) for split in rule.splits]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(split, "isolated") for split in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    if rule.nfc:
        core.normalizer = normalizers.NFC()
    return core


def _add_tokens(tokenizers, core, fields: dict[str, Any], pieces: list[str]) -> None:
    """Makes `core` find the special tokens, and those added by a user, in a text."""
    special_kinds = (CONTROL, UNKNOWN) if _is_sentencepiece(fields) else (CONTROL,)
    types = fields.get(f"{_KEY}.token_type") or []
    for piece, kind in zip(pieces, types, strict=False):
        if kind in (*special_kinds, USER):
            special = kind in special_kinds
            token = tokenizers.AddedToken(piece, normalized=False, special=special)
            (core.add_special_tokens if special else core.add_tokens)([token])


def _add_template(core, first: str | None, last: str | None) -> None:
    """Makes `core` add these tokens before and after a text."""
    from tokenizers import processors

    around = [token for token in (first, last) if token is not None]
    if not around:
        return

    def one(text: str) -> str:
        return " ".join([*([first] if first else []), text, *([last] if last else [])])

    core.post_processor = processors.TemplateProcessing(
        single=one("$A"),
        pair=f"{one('$A')} {one('$B')}",
        special_tokens=[(token, core.token_to_id(token)) for token in set(around)],
    )
