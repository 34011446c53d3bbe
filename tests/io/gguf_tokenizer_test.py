# SPDX-License-Identifier: Apache-2.0
"""Tokenizer metadata of GGUF files that are incomplete or wrong.

The expected defaults are read off llama.cpp's src/llama-vocab.cpp.
"""

import warnings

import pytest

from jaxunlearn.io import _gguf_tokenizer
from tests.io.gguf_test import MERGES, PIECES

pytest.importorskip("transformers")


def built(rule=None, **changes):
    """The tokenizer of these metadata, and the warnings of building it."""
    fields = {
        "tokens": PIECES,
        "model": "gpt2",
        "merges": MERGES,
        "token_type": [1] * (len(PIECES) - 3) + [3, 3, 3],
        "bos_token_id": PIECES.index("<s>"),
        "eos_token_id": PIECES.index("</s>"),
    } | changes
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    fields |= {} if rule is None else {"tokenizer.ggml.pre": rule}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = _gguf_tokenizer.build(fields, "the-file.gguf")
    return found, [str(w.message) for w in seen if "the-file.gguf" in str(w.message)]


@pytest.mark.parametrize(
    ("rule", "begins"),
    # add_bos of each tokenizer_pre in llama.cpp's src/llama-vocab.cpp
    [("llama-bpe", True), ("llama3", True), ("falcon3", True), ("pixtral", True)]
    + [("tekken", True), ("qwen2", False), ("smollm", False), ("gpt-2", False)]
    + [("deepseek-r1-qwen", False), ("gpt-4o", False), (None, False)],
)
def test_a_file_without_the_begin_key_has_the_default_of_llama_cpp(rule, begins):
    tokenizer, seen = built(rule)
    ids = tokenizer("he he")["input_ids"]
    assert [PIECES[i] for i in ids] == ["<s>"] * begins + ["he", "Ġhe"]
    (message,) = seen
    assert "tokenizer.ggml.add_bos_token" in message
    assert ("tokenizer.ggml.pre" in message) == (rule is None)
    for given in (True, False):
        tokenizer, seen = built(rule, add_bos_token=given, add_eos_token=True)
        first = [PIECES[i] for i in tokenizer("he")["input_ids"]]
        assert first == ["<s>"] * given + ["he", "</s>"]
        assert bool(seen) == (rule is None)


def test_a_file_without_a_word_rule_has_that_of_llama_cpp():
    words = built(None, add_bos_token=False)[0].backend_tokenizer.pre_tokenizer
    split = [word for word, _ in words.pre_tokenize_str("a 12345 $x it's  !? (b)")]
    # llama.cpp splits punctuation first, then words, then digits by three
    expected = ["a", "Ġ", "123", "45", "Ġ", "$", "x", "Ġit", "'", "s"]
    assert split == [*expected, "ĠĠ", "!?", "Ġ", "(", "b", ")"]


def test_special_ids_outside_the_tokens_are_left_out():
    tokenizer, (message,) = built(
        "qwen2",
        add_bos_token=False,
        bos_token_id="<s>",
        eos_token_id=4000,
        padding_token_id=-1,
    )
    assert tokenizer.eos_token is None
    assert "bos_token_id='<s>'" in message
    assert "eos_token_id=4000" in message
    assert "padding_token_id=-1" in message
