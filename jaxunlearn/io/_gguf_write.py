# SPDX-License-Identifier: Apache-2.0
"""Writes GGUF files, one tensor at a time, with the `gguf` library.

The metadata describe the decoder and its tokenizer, and both are verified: the
metadata are read again from the file, and a tokenizer is stored only if the one
reconstructed from the metadata gives the same tokens.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.io import (
    _gguf,
    _gguf_sentencepiece,
    _gguf_tokenizer,
    _safetensors,
    _tokenizer,
)
from jaxunlearn.models import _config, _rope

SCHEMES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
    "q4_1": "MOSTLY_Q4_1",
}
_ARCHITECTURES = {"llama": "llama", "mistral": "llama"} | dict.fromkeys(
    ("qwen2", "qwen3", "olmo", "olmo2", "smollm3", "granite")
)
_OWNER = "hf.save_gguf"
_BLOCK = 32
_TABLES = ("token_embd.weight", "output.weight")  # float16 where kernels have less
_LARGEST = {"f16": 65504.0, "q8_0": 65504.0 * 127, "q4_0": 65504.0 * 8}
# Kinds of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_PIECES = 2000  # of the vocabulary, concatenated to one text for the comparison


def checked(config: _config.DecoderConfig, scheme: str) -> _config.DecoderConfig:
    """The config that a GGUF file represents: without windows as long as the model's
    longest sequence, which change nothing.

    Raises:
        ValueError: if GGUF cannot represent this decoder.
    """
    _checks.one_of(_OWNER, SCHEMES, scheme=scheme)
    windows = {window for window in config.windows or () if window is not None}
    if windows and min(windows) >= config.max_length:
        config = dataclasses.replace(config, windows=None)
    elif windows and config.family in _ARCHITECTURES:
        arch = _ARCHITECTURES[config.family] or config.family
        raise ValueError(
            f"{_OWNER} needs windows=None, because llama.cpp has no sliding window for "
            f"its architecture {arch!r}, got windows={config.windows}. Use hf.save, or "
            f"save a model whose config has positions={min(windows)}, the window, if "
            "no text is longer."
        )
    supported = {
        "family": (config.family, tuple(_ARCHITECTURES)),
        # llama.cpp needs an output matrix for OLMo 2.
        "tied": (config.tied, (False,) if config.family == "olmo2" else (True, False)),
        "rope.kind": (
            config.rope and config.rope.kind,
            ("default", "linear", "yarn", "llama3"),
        ),
    }
    for name, (came, allowed) in supported.items():
        if came not in allowed:
            raise ValueError(
                f"{_OWNER} needs {name} to be one of {_checks.listed(allowed)}, got "
                f"{came!r}. Use hf.save, and convert the folder with llama.cpp."
            )
    return config


def write(
    file: Path,
    config: _config.DecoderConfig,
    specs: list[_safetensors.Spec],
    tokenizer: Any,
    scheme: str,
) -> None:
    """Writes the file and verifies its metadata.

    Args:
        file: a path that does not exist yet.
        config: a config of `checked`.
        specs: every tensor under its name in GGUF.
        tokenizer: a transformers fast tokenizer of byte-level BPE or SentencePiece, or
            None.
        scheme: of the kernels, one of SCHEMES.
    Raises:
        ValueError: if the tokenizer or a setting is not the same when it is read again,
            32 does not divide a kernel's inputs, or values are too large for the
            scheme.
    """
    gguf = _gguf.library()
    arch = _ARCHITECTURES[config.family] or config.family
    if tokenizer is None:
        tokens = {"tokenizer.ggml.model": "none"}
        tokens |= _end_ids(config.eos_ids, None, ())
    else:
        tokens = _tokens(tokenizer, config, arch)
    writer = gguf.GGUFWriter(file, arch)
    _add_settings(gguf, writer, config, scheme)
    _add_tokens(writer, tokens, config.vocab)
    if config.rope.kind == "llama3":
        plain = dataclasses.replace(config.rope, kind="default", factor=1.0)
        plain, scaled = (
            np.asarray(_rope.frequencies(rope, config.head_dim, 1)[0])
            for rope in (plain, config.rope)
        )
        shape = plain.shape
        divisors = _safetensors.Spec("rope_freqs.weight", shape, lambda: plain / scaled)
        specs = [divisors, *specs]
    kinds = [_kind(gguf, spec, scheme) for spec in specs]
    for spec, kind in zip(specs, kinds, strict=True):
        values, size = gguf.constants.GGML_QUANT_SIZES[kind]
        count = math.prod(spec.shape) // values * size
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), count, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for spec, kind in zip(specs, kinds, strict=True):
            writer.write_tensor_data(_packed(gguf, spec, kind, config, arch))
    finally:
        writer.close()
    _verify(file, config)


def _kind(gguf, spec: _safetensors.Spec, scheme: str):
    """The type of a tensor: vectors are float32, embeddings float16 or float32."""
    if len(spec.shape) == 1:
        scheme = "f32"
    elif spec.name in _TABLES and scheme != "f32":
        scheme = "f16"
    elif scheme.startswith("q") and spec.shape[-1] % _BLOCK:
        raise ValueError(
            f"{_OWNER} needs kernels whose inputs {_BLOCK} divides for "
            f"scheme={scheme!r}, got {spec.name!r} with {spec.shape[-1]} inputs. Use "
            "scheme='f16'."
        )
    return gguf.GGMLQuantizationType[scheme.upper()]


def _packed(gguf, spec, kind, config, arch) -> np.ndarray:
    values = np.ascontiguousarray(spec.make(), np.float32)
    limit = _LARGEST.get(kind.name.lower(), _LARGEST["f16"])
    largest = float(np.max(np.abs(values), initial=0.0))
    if not largest <= (np.finfo(np.float32).max if kind.name == "F32" else limit):
        raise ValueError(
            f"{_OWNER} needs finite values up to {limit:g} for {kind.name}, got "
            f"{largest:g} in {spec.name!r}. Check the params, or use scheme='f32'."
        )
    heads = _gguf.heads_of(arch, spec.name, config.heads, config.kv_heads)
    values = values if heads is None else _permute(values, heads)
    return gguf.quants.quantize(values, kind)


def _permute(values: np.ndarray, heads: int) -> np.ndarray:
    """[heads, 2, half, ...] halves to [heads, half, 2, ...] neighbours."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def _add_settings(gguf, writer, config: _config.DecoderConfig, scheme: str) -> None:
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType[SCHEMES[scheme]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.family == "olmo":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.qkv_clip is not None:
        writer.add_clamp_kqv(config.qkv_clip)
    if config.family == "granite":
        writer.add_attention_scale(config.attention_scale or config.head_dim**-0.5)
        writer.add_embedding_scale(config.embed_scale or 1.0)
        writer.add_residual_scale(config.residual_scale or 1.0)
        writer.add_logit_scale(config.logit_divisor or 1.0)
    writer.add_rope_dimension_count(config.head_dim)
    rope = config.rope
    writer.add_rope_freq_base(rope.theta)
    if rope.kind in ("linear", "yarn"):
        kind = gguf.RopeScalingType[rope.kind.upper()]
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        original = rope.original_positions or config.positions
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)


def _add_tokens(writer, tokens: dict[str, Any], vocab: int) -> None:
    writer.add_vocab_size(vocab)
    for key, add in (
        ("tokenizer.ggml.model", writer.add_tokenizer_model),
        ("tokenizer.ggml.pre", writer.add_tokenizer_pre),
        ("tokenizer.ggml.tokens", writer.add_token_list),
        ("tokenizer.ggml.token_type", writer.add_token_types),
        ("tokenizer.ggml.merges", writer.add_token_merges),
        ("tokenizer.ggml.scores", writer.add_token_scores),
        ("tokenizer.ggml.add_space_prefix", writer.add_add_space_prefix),
        ("tokenizer.ggml.add_bos_token", writer.add_add_bos_token),
        ("tokenizer.ggml.bos_token_id", writer.add_bos_token_id),
        ("tokenizer.ggml.eos_token_id", writer.add_eos_token_id),
        ("tokenizer.ggml.eot_token_id", writer.add_eot_token_id),
        ("tokenizer.ggml.eom_token_id", writer.add_eom_token_id),
        ("tokenizer.ggml.unknown_token_id", writer.add_unk_token_id),
        ("tokenizer.ggml.padding_token_id", writer.add_pad_token_id),
        ("tokenizer.chat_template", writer.add_chat_template),
    ):
        if key in tokens:
            add(tokens[key])


def _tokens(tokenizer, config, arch: str) -> dict[str, Any]:
    """The metadata of a tokenizer, by key.

    Of byte-level BPE, GGUF stores only the name of the rule that splits a text into
    words. Every known name is tried, and the first whose tokenizer gives the same
    tokens is used. Of SentencePiece, it stores scores in place of merges.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    core = state.get("model", {})
    sentencepiece = bool(core.get("byte_fallback"))
    if core.get("type") != "BPE" and not sentencepiece:
        raise ValueError(
            f"{_OWNER} needs a fast tokenizer of byte-level BPE or SentencePiece, got "
            f"{type(tokenizer).__name__} of type {core.get('type')!r}. Pass None, or "
            "use hf.save and convert the folder with llama.cpp."
        )
    pieces = core["vocab"]
    if core["type"] == "Unigram":
        pieces = {piece: index for index, (piece, _) in enumerate(pieces)}
    pieces = dict(pieces)
    kinds = dict.fromkeys(pieces, _NORMAL)
    if sentencepiece:
        kinds |= {piece: _BYTE for piece in pieces if _BYTE_PIECE.fullmatch(piece)}
    for token in state.get("added_tokens", []):
        pieces[token["content"]] = token["id"]
        kinds[token["content"]] = _CONTROL if token["special"] else _USER
    if sentencepiece and tokenizer.unk_token in kinds:
        kinds[tokenizer.unk_token] = _UNKNOWN
    if max(pieces.values()) >= config.vocab:
        raise ValueError(
            f"{_OWNER} needs a row of the embedding for every token, got "
            f"{max(pieces.values()) + 1} tokens and {config.vocab} rows. Pass the "
            "tokenizer that belongs to the model."
        )
    listed = [f"[PAD{i}]" for i in range(config.vocab)]
    types = [_UNUSED] * config.vocab
    for piece, index in pieces.items():
        listed[index], types[index] = piece, kinds[piece]
    plain = backend.encode("a", add_special_tokens=False).ids
    full, bos = backend.encode("a").ids, tokenizer.bos_token_id
    fields = {
        "general.architecture": arch,
        f"{arch}.context_length": config.positions,
        "tokenizer.ggml.tokens": listed,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": bos is not None and full == [bos, *plain],
    }
    fields |= _end_ids(config.eos_ids, tokenizer.eos_token_id, listed)
    for name, index in (
        ("bos", bos),
        ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        if index is not None:
            fields[f"tokenizer.ggml.{name}_token_id"] = index
    if isinstance(tokenizer.chat_template, str):
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    special = [piece for piece, kind in kinds.items() if kind != _NORMAL]
    sample = range(0, config.vocab, -(-config.vocab // _PIECES))
    sample = "".join(listed[i] for i in sample if types[i] == _NORMAL)
    texts = [
        *_tokenizer.PROBES,
        *_tokenizer.PROBES[0].split(" "),
        " ".join(special),
        backend.decoder.decode([sample]),
    ]
    wanted = [backend.encode(text).ids for text in texts]
    for rest in _rules(core, listed, sentencepiece):
        with warnings.catch_warnings():  # of metadata that no tokenizer has
            warnings.simplefilter("ignore")
            again = _gguf_tokenizer.build(fields | rest)
        if again is None:
            continue
        if [again.backend_tokenizer.encode(text).ids for text in texts] == wanted:
            return fields | rest
    needed = f"splits text as one of {_checks.listed(_gguf_tokenizer.RULES)}"
    if sentencepiece:
        needed = "puts one space or none before every part of a text (SentencePiece)"
    raise ValueError(
        f"{_OWNER} needs a tokenizer that {needed}, got another one. Pass None, or use "
        "hf.save and convert the folder with llama.cpp."
    )


def _rules(core: dict[str, Any], pieces: list[str], sentencepiece: bool):
    """The metadata that may describe how a core tokenizer splits and merges texts."""
    if not sentencepiece:
        merges = [x if isinstance(x, str) else " ".join(x) for x in core["merges"]]
        fixed = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": merges}
        for rule in _gguf_tokenizer.RULES:
            yield fixed | {"tokenizer.ggml.pre": rule}
        return
    scores = _gguf_sentencepiece.scores_of(core, pieces)
    fixed = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
    for prefix in (True, False):
        yield fixed | {"tokenizer.ggml.add_space_prefix": prefix}


def _end_ids(ids: Sequence[int], first: int | None, pieces: Sequence[str]):
    """The metadata for the ids that end a text, by key.

    GGUF has three: the end of a text, of a turn and of a message. Further ends are
    known to llama.cpp, and to `hf.load`, only if they have a well-known text.

    Args:
        ids: all of them.
        first: the tokenizer's end token, or None.
        pieces: the text of every token; empty if the file has none.
    Warns:
        UserWarning: naming the ids that are lost.
    """
    if pieces:
        ids = [index for index in ids if index < len(pieces)]
    known = {index for index in ids if pieces and pieces[index] in _gguf_tokenizer.ENDS}
    others = sorted({*ids} - {first}, key=lambda index: (index in known, index))
    ends = others if first is None else [first, *others]
    keys = _gguf_tokenizer.END_KEYS
    if lost := [index for index in ends[len(keys) :] if index not in known]:
        names = [
            f"{index} ({pieces[index]!r})" if pieces else f"{index}" for index in lost
        ]
        warnings.warn(
            f"{_OWNER} stores {len(keys)} ids that end a text, got {len(ends)}; lost: "
            f"{', '.join(names)}. Stop at their texts where the file is run.",
            stacklevel=4,
        )
    return {
        f"tokenizer.ggml.{key}_token_id": index
        for key, index in zip(keys, ends, strict=False)
    }


_NOT_STORED = (
    "family",
    "source",
    "attention",
    "eos_ids",
)  # not part of the computation


def _verify(file: Path, config: _config.DecoderConfig) -> None:
    """Raises ValueError unless the file's metadata describe the same computation."""
    found = _gguf.config(
        _gguf.open_file(file), compute_dtype=config.compute_dtype, remat=config.remat
    )
    changed = []
    for field in dataclasses.fields(config):
        was, now = getattr(config, field.name), getattr(found, field.name)
        same = was == now or (
            isinstance(was, float) and np.isclose(was, now, rtol=1e-6)
        )
        if field.name == "rope":  # llama3 is a list of divisors in the file
            same = same or (was.kind == "llama3" and was.theta == now.theta)
        if not same and field.name not in _NOT_STORED:
            changed.append(f"{field.name}={was!r}, read back as {now!r}")
    if changed:
        raise ValueError(
            f"{_OWNER} needs settings that GGUF can represent, got "
            f"{'; '.join(changed)}. Use hf.save, and convert the folder with llama.cpp."
        )
