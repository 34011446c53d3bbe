# SPDX-License-Identifier: Apache-2.0
"""SentencePiece tokenizers of GGUF files, on texts of several scripts.

The reference is SentencePiece's own rule, written out here: of all neighbours whose
union is a piece, those of the highest score are merged first; a Unigram model takes the
pieces with the largest sum of scores. Characters without a piece become bytes.
"""

import collections
import itertools
import math
import warnings

import pytest

from jaxunlearn.io import _gguf_tokenizer, _gguf_write, _tokenizer, hf
from tests.io import gguf_test

pytest.importorskip("transformers")

SPACE = "\u2581"
TEXTS = (
    "The capital of France is Paris, the capital of Kenya is Nairobi.",
    "法国的首都是巴黎。フランスの首都はパリです。",
    "عاصمة فرنسا هي باريس. Столица Франции - Париж.",
    "फ़्रांस की राजधानी पेरिस है। 프랑스의 수도는 파리이다 Ελλάδα",
    "  two  spaces\n\nlines\tand\r\n   a tail   ",
    "naïve café ½ 😀 x1y22 #!/usr/bin $$% aaaaaaa",
)
KNOWN = TEXTS[:3]  # the other texts have characters without a piece


def learned(num_merges=60):
    """(pieces, scores, types) of a BPE model of some words, in the form of Llama 2."""
    words = [list(SPACE + word) for text in KNOWN for word in text.split()]
    chars = sorted(set(itertools.chain.from_iterable(words)))
    merged = []
    for _ in range(num_merges):
        pairs = collections.Counter(
            pair for word in words for pair in itertools.pairwise(word)
        )
        ((best, _),) = pairs.most_common(1)
        merged += [] if "".join(best) in merged else ["".join(best)]
        for word in words:
            for i in reversed(range(len(word) - 1)):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [*fixed, *merged, *chars]
    scores = [0.0] * len(fixed) + [-float(i) for i in range(len(merged) + len(chars))]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(merged) + len(chars))
    return [*pieces, "<user>"], [*scores, -1000.0], [*types, 4]


PIECES, SCORES, TYPES = learned()
NORMAL = {p: s for p, s, kind in zip(PIECES, SCORES, TYPES, strict=True) if kind == 1}
# Log-probabilities, of which longer pieces have more than their parts together.
LOGPS = [
    s if kind != 1 else -6.0 - 2 / len(p) - i / 997
    for i, (p, s, kind) in enumerate(zip(PIECES, SCORES, TYPES, strict=True))
]


def ids_of(symbols):
    found = []
    for symbol in symbols:
        parts = [f"<0x{byte:02X}>" for byte in symbol.encode()]
        found += [symbol] if symbol in NORMAL else parts
    return [PIECES.index(piece) for piece in found]


def merged_greedily(text):
    symbols = list(text)
    while True:
        joined = [a + b for a, b in itertools.pairwise(symbols)]
        best = max((NORMAL[x] for x in joined if x in NORMAL), default=None)
        if best is None:
            return ids_of(symbols)
        place = next(i for i, x in enumerate(joined) if NORMAL.get(x) == best)
        symbols[place : place + 2] = [joined[place]]


def most_probable(text):
    logps = dict(zip(PIECES, LOGPS, strict=True))
    best = [(0.0, [])] + [(-math.inf, [])] * len(text)
    for end in range(1, len(text) + 1):
        for start in range(end):
            part = text[start:end]
            score = logps[part] if part in NORMAL else -1e3 * (end - start)
            if part in NORMAL or end - start == 1:
                before, path = best[start]
                best[end] = max(best[end], (before + score, [*path, part]))
    return ids_of(best[-1][1])


def built(scores=SCORES, **changes):
    """The tokenizer of these metadata, and the messages of our warnings."""
    fields = {"model": "llama", "tokens": PIECES, "scores": scores}
    fields |= {"token_type": TYPES, "bos_token_id": 1, "eos_token_id": 2}
    fields |= {"unknown_token_id": 0, "add_bos_token": True} | changes
    fields = {
        f"tokenizer.ggml.{name}": v for name, v in fields.items() if v is not None
    }
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = _gguf_tokenizer.build(fields, "the-file.gguf")
    return found, [str(w.message) for w in seen if "the-file.gguf" in str(w.message)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [True, False])
def test_tokens_are_those_of_sentencepiece(kind, prefix):
    scores, reference = SCORES, merged_greedily
    if kind == "unigram":
        scores, reference = LOGPS, most_probable
    tokenizer, seen = built(scores, add_space_prefix=prefix)
    assert seen == []
    for text in (*TEXTS, *" ".join(TEXTS).split()):
        wanted = reference(SPACE * prefix + text.replace(" ", SPACE))
        assert tokenizer(text)["input_ids"] == [1, *wanted], text
        assert tokenizer.decode(wanted) == text
    # Special tokens and those of a user are whole, and the text after them is new.
    a, b = (reference(SPACE * prefix + x) for x in ("The", "Paris"))
    for piece in ("</s>", "<user>", "<unk>"):
        ids = tokenizer(f"The{piece}Paris", add_special_tokens=False)["input_ids"]
        assert ids == [*a, PIECES.index(piece), *b]


def test_what_the_metadata_leave_out_is_that_of_llama_cpp():
    missing = dict.fromkeys(("bos_token_id", "eos_token_id", "add_bos_token"))
    tokenizer, (message,) = built(**missing, unknown_token_id=None)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.unk_token == "<unk>" and tokenizer("a")["input_ids"][0] == 1
    assert "add_bos_token" in message and "eos_token_id: llama.cpp takes 2" in message
    assert ".pre" not in message
    ended, _ = built(add_bos_token=False, add_eos_token=True)
    ids = ended("Paris")["input_ids"]
    assert ids[0] != 1 and ids[-1] == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scores": None}, "0 scores of"),
        ({"scores": SCORES[:-1]}, f"{len(SCORES) - 1} scores of"),
        ({"scores": [0.0] * len(SCORES)}, "equal scores"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
    ],
)
def test_metadata_that_do_not_decide_the_tokens_give_none(changes, reason):
    scores = changes.pop("scores", SCORES)
    tokenizer, (message,) = built(scores, **changes)
    assert tokenizer is None and reason in message and "AutoTokenizer" in message


def test_a_file_is_read_and_saved_as_a_folder(tmp_path):
    pytest.importorskip("gguf")
    model, params = gguf_test.model_of("llama", vocab=len(PIECES))
    more = [
        ("add_tokenizer_model", "llama"),
        ("add_token_list", PIECES),
        ("add_token_scores", SCORES),
        ("add_token_types", TYPES),
        ("add_bos_token_id", 1),
        ("add_eos_token_id", 2),
        ("add_unk_token_id", 0),
        ("add_add_bos_token", True),
    ]
    file = gguf_test.write(tmp_path / "t.gguf", model, params, tmp_path, more=more)
    tokenizer = hf.load_tokenizer(file)
    assert hf.model_from_config(file).config.eos_ids == (2,)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = _tokenizer.load(tmp_path / "saved")
    for text in TEXTS:
        wanted = merged_greedily(SPACE + text.replace(" ", SPACE))
        assert tokenizer(text)["input_ids"] == saved(text)["input_ids"] == [1, *wanted]


@pytest.mark.parametrize("scores", [SCORES, LOGPS], ids=["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_is_written_as_it_was_read(scores, prefix):
    given, _ = built(scores, add_space_prefix=prefix)
    config = gguf_test.model_of("llama", vocab=len(PIECES) + 2)[0].config
    fields = _gguf_write._tokens(given, config, "llama")
    assert fields["tokenizer.ggml.token_type"] == [*TYPES, 5, 5]
    assert fields["tokenizer.ggml.add_space_prefix"] == prefix
    again = _gguf_tokenizer.build(fields)
    for text in TEXTS:
        assert again(text)["input_ids"] == given(text)["input_ids"]
    given.backend_tokenizer.normalizer = None
    with pytest.raises(ValueError, match="one space or none"):
        _gguf_write._tokens(given, config, "llama")
