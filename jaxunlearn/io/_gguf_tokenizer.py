# SPDX-License-Identifier: Apache-2.0
"""Reconstructs the tokenizer in a GGUF file with the `tokenizers` library.

transformers can do this too, but only with torch installed. Byte-level BPE is
supported: the file contains its pieces and merges. The rule that splits a text into
words is not stored, only its name, so an unknown rule gives no tokenizer rather than a
slightly wrong one.
"""

import warnings
from typing import Any

from jaxunlearn import _checks

_KEY = "tokenizer.ggml"
_CONTROL, _USER = 3, 4  # token types: special, and added by a user
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
# Name of the word rule -> its regular expression; None is the rule of GPT-2.
_WORDS = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _HEAD + r"\p{N}{1,3}" + _TAIL,
    "qwen2": _HEAD + r"\p{N}" + _TAIL,
}
RULES = tuple(rule for rule in _WORDS if rule != "default")  # unambiguous names


def build(fields: dict[str, Any]):
    """A transformers PreTrainedTokenizerFast with its chat template, or None.

    Args:
        fields: metadata of the file by key.
    Returns:
        The tokenizer. None if the metadata has none; None and a warning if it is not
        byte-level BPE with a known word rule.
    Raises:
        ImportError: without transformers or tokenizers.
    """
    pieces = fields.get(f"{_KEY}.tokens")
    if pieces is None:
        return None
    kind, rule = fields.get(f"{_KEY}.model"), fields.get(f"{_KEY}.pre", "default")
    if kind != "gpt2" or rule not in _WORDS or not fields.get(f"{_KEY}.merges"):
        warnings.warn(
            f"The tokenizer of this GGUF file ({kind!r}, word rule {rule!r}) cannot be "
            "reconstructed exactly, so hf.load returns None instead. Load that of the "
            "original release with transformers.AutoTokenizer.",
            stacklevel=4,
        )
        return None
    owner = "The tokenizer of a GGUF file"
    tokenizers = _checks.library(owner, "tokenizers", "hf")
    transformers = _checks.library(owner, "transformers", "hf")
    core = _core(tokenizers, fields, pieces, rule)
    named = {}
    for name, key in (
        ("bos", "bos"),
        ("eos", "eos"),
        ("unk", "unknown"),
        ("pad", "padding"),
    ):
        index = fields.get(f"{_KEY}.{key}_token_id")
        if index is not None:
            named[f"{name}_token"] = pieces[index]
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


def _core(tokenizers, fields: dict[str, Any], pieces: list[str], rule: str):
    """The core Tokenizer: normalizer, word rule, BPE, special tokens, template."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    merges = [tuple(merge.split(" ", 1)) for merge in fields[f"{_KEY}.merges"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    core = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, ignore_merges=rule == "llama-bpe")
    )
    words = _WORDS[rule]
    cuts = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)]
    if words is not None:
        cuts.insert(0, pre_tokenizers.Split(tokenizers.Regex(words), "isolated"))
    elif rule == "smollm":
        cuts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    core.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        core.normalizer = normalizers.NFC()
    for piece, kind in zip(
        pieces, fields.get(f"{_KEY}.token_type") or [], strict=False
    ):
        if kind in (_CONTROL, _USER):
            special = kind == _CONTROL
            token = tokenizers.AddedToken(piece, normalized=False, special=special)
            (core.add_special_tokens if special else core.add_tokens)([token])
    bos = fields.get(f"{_KEY}.bos_token_id")
    if fields.get(f"{_KEY}.add_bos_token") and bos is not None:
        first = pieces[bos]
        core.post_processor = processors.TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A {first} $B",
            special_tokens=[(first, bos)],
        )
    return core
