# SPDX-License-Identifier: Apache-2.0
"""The core of a SentencePiece tokenizer from the metadata of a GGUF file (`llama`).

Such a file has pieces, their scores and their types, but no merges. Where the scores
are whole numbers, those of a model of type BPE, the pair of neighbours whose union has
the highest score is merged first, so the merges follow from the scores. Other scores
are the log-probabilities of a Unigram model. Bytes of characters without a piece become
the pieces <0x00> to <0xFF>.

Reference: https://github.com/google/sentencepiece (src/bpe_model.cc, unigram_model.cc)
"""

import itertools
from collections.abc import Sequence
from typing import Any

_SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER = 1, 2, 3, 4  # types of tokens


def problem(fields: dict[str, Any]) -> str:
    """Why the metadata do not decide the tokens; "" if they do."""
    pieces, scores = fields["tokenizer.ggml.tokens"], _scores(fields)
    if len(scores) != len(pieces):
        return f"{len(scores)} scores of {len(pieces)} tokens"
    if fields.get("tokenizer.ggml.remove_extra_whitespaces"):
        return "tokenizer.ggml.remove_extra_whitespaces=True"
    merged = [
        score
        for piece, score, kind in zip(pieces, scores, _types(fields), strict=True)
        if kind == NORMAL and len(piece) > 1
    ]
    if _is_bpe(scores) and len(set(merged)) < len(merged):
        return "equal scores of several tokens"
    return ""


def core(tokenizers: Any, fields: dict[str, Any], unknown: int) -> Any:
    """The core Tokenizer: spaces, pieces, bytes.

    Args:
        tokenizers: the library.
        fields: metadata of the file by key, without a `problem`.
        unknown: id of the unknown token.
    """
    from tokenizers import decoders, models, normalizers

    pieces, scores = fields["tokenizer.ggml.tokens"], _scores(fields)
    if _is_bpe(scores):
        model = models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            merges(pieces, scores, _types(fields)),
            unk_token=pieces[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    else:
        pairs = list(zip(pieces, scores, strict=True))
        model = models.Unigram(pairs, unk_id=unknown, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE)] * bool(prefix)
        + [normalizers.Replace(" ", _SPACE)]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * bool(prefix)
    )
    return made


def merges(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The pairs of pieces whose union is a piece, the best first."""
    normal = {
        piece: score
        for piece, score, kind in zip(pieces, scores, types, strict=True)
        if kind == NORMAL
    }
    order = sorted(normal, key=normal.__getitem__, reverse=True)
    pairs = (
        ((piece[:cut], piece[cut:]) for cut in range(1, len(piece))) for piece in order
    )
    return [
        (left, right)
        for left, right in itertools.chain.from_iterable(pairs)
        if left in normal and right in normal
    ]


def scores_of(core: dict[str, Any], pieces: Sequence[str]) -> list[float]:
    """The scores from which `core` reconstructs a tokenizer's model.

    Args:
        core: the model of a tokenizer.json.
        pieces: the text of every id.
    """
    if core["type"] == "Unigram":
        known = {piece: float(score) for piece, score in core["vocab"]}
        return [known.get(piece, 0.0) for piece in pieces]
    order: dict[str, float] = {}
    for merge in core["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        order.setdefault(left + right, -float(len(order)))
    # Pieces that no merge makes follow, each with a score of its own.
    rest = itertools.count(len(order))
    return [order[p] if p in order else -float(next(rest)) for p in pieces]


def _scores(fields: dict[str, Any]) -> list[float]:
    return fields.get("tokenizer.ggml.scores") or []


def _types(fields: dict[str, Any]) -> list[int]:
    size = len(fields["tokenizer.ggml.tokens"])
    return fields.get("tokenizer.ggml.token_type") or [NORMAL] * size


def _is_bpe(scores: Sequence[float]) -> bool:
    return all(float(score).is_integer() for score in scores)
