# SPDX-License-Identifier: Apache-2.0
"""Reads GGUF files: settings, weights as float32, and the tokenizer in the metadata.

Two traps. In files of architecture `llama` and some others the rows of q and k are
ordered so that rotary positions rotate neighbouring units; ours (and Hugging Face's)
rotate unit i with unit i + half, so the rows are permuted. And quantized weights have
their rounded values: converting them to float32 does not restore the original release.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.io import _gguf_tokenizer, _hf_config, _tokenizer
from jaxunlearn.models import _config, _rope

_ARCHITECTURES = {
    name: name
    for name in ("llama", "qwen2", "qwen3", "olmo", "olmo2", "smollm3", "granite")
}
# Architectures whose rotary positions rotate neighbouring units.
_PERMUTED = ("llama", "olmo", "smollm3", "granite")
_EPSILON = "attention.layer_norm_rms_epsilon"
_OWNER = "hf.load"
_AGAIN = "Copy or download it again."
_ROWS = 4096  # rows converted at a time, which limits temporary memory


class Entry(NamedTuple):
    """The location and storage type of a tensor; `shape` is that of its values."""

    file: Path
    kind: Any
    shape: tuple[int, ...]
    start: int
    size: int
    heads: int | None = None


class File(NamedTuple):
    """A GGUF file without its weights: metadata by key, and tensors by name."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Entry]


def open_file(path: Path) -> File:
    """Reads the metadata and the list of tensors; the weights stay on disk.

    Raises:
        ImportError: without the `gguf` library.
        ValueError: if the file is truncated, corrupt or not a GGUF file.
    """
    gguf = library()
    try:
        reader = gguf.GGUFReader(path)
        if reader.byte_order != "I":
            raise ValueError("its byte order is not that of this machine")
        fields = {name: field.contents() for name, field in reader.fields.items()}
        fields |= _uniform(fields)
        arch = fields.get("general.architecture")
        heads = fields.get(f"{arch}.attention.head_count")
        kv_heads = fields.get(f"{arch}.attention.head_count_kv", heads)
        tensors = {
            tensor.name: Entry(
                path,
                tensor.tensor_type,
                tuple(int(axis) for axis in tensor.shape[::-1]),
                int(tensor.data_offset),
                int(tensor.n_bytes),
                heads_of(arch, tensor.name, heads, kv_heads),
            )
            for tensor in reader.tensors
        }
    except PermissionError:
        raise
    except Exception as error:  # the reader raises errors of many types
        raise ValueError(
            f"{_OWNER} needs a complete GGUF file, got {path}, which cannot be read "
            f"({type(error).__name__}: {error}). {_AGAIN}"
        ) from error
    return File(path, fields, tensors)


def library() -> Any:
    """The package `gguf`."""
    return _checks.library("A .gguf file", "gguf", "hf")


def config(file: File, *, compute_dtype: str, remat: str) -> _config.DecoderConfig:
    """The DecoderConfig of a file; its `source` is an equivalent config.json.

    Raises:
        ValueError: for an unsupported architecture or setting.
    """
    settings = _settings(file)
    text = json.dumps(settings, indent=2)
    try:
        return _hf_config.parse(text, compute_dtype=compute_dtype, remat=remat)
    except ValueError as error:
        raise ValueError(f"{error} These settings are those of {file.path}.") from error


def read(entry: Entry, index: Any = ...) -> np.ndarray:
    """A block of a tensor in float32, with rows of q and k in Hugging Face's order.

    The complete tensor is read, because quantized blocks need not align with `index`.
    """
    gguf = library()
    rows = math.prod(entry.shape[:-1])
    raw = np.fromfile(entry.file, np.uint8, entry.size, offset=entry.start)
    raw = raw.reshape(rows, -1)
    native = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    values = np.empty((rows, entry.shape[-1]), np.float32)
    for first in range(0, rows, _ROWS):
        part = raw[first : first + _ROWS]
        if entry.kind.name in native:
            values[first : first + _ROWS] = part.view(native[entry.kind.name])
        else:
            values[first : first + _ROWS] = gguf.quants.dequantize(part, entry.kind)
    values = values.reshape(entry.shape)
    values = values if entry.heads is None else _unpermute(values, entry.heads)
    return values[index]


def tokenizer(file: File):
    """The tokenizer in the metadata as a transformers fast tokenizer.

    None if the file has none, or one that cannot be reconstructed exactly; a stand-in
    that raises the reason when it is used if its metadata are broken.
    """
    return _tokenizer.guarded(
        file.path, lambda: _gguf_tokenizer.build(file.fields, file.path)
    )


def _uniform(fields: dict[str, Any]) -> dict[str, Any]:
    """The settings given as one equal number per layer, as that number."""
    return {
        key: value[0]
        for key, value in fields.items()
        if isinstance(value, list)
        and value
        and key.endswith(("head_count", "head_count_kv", "feed_forward_length"))
        and all(item == value[0] for item in value)
    }


def heads_of(arch: str | None, name: str, heads: int, kv_heads: int) -> int | None:
    """The number of heads of a tensor with permuted rows; None if not permuted."""
    part = name.split(".")[2:3]
    permuted = {"attn_q": heads, "attn_k": kv_heads} if arch in _PERMUTED else {}
    return permuted.get(part[0]) if part else None


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """[heads, half, 2, ...] neighbours to [heads, 2, half, ...] halves."""
    split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _settings(file: File) -> dict[str, Any]:
    """A config.json, as a dict, that describes the file."""
    parts = file.fields.get("split.count") or 1
    if parts > 1:
        raise ValueError(
            f"{_OWNER} needs a model in one GGUF file, got {file.path}, one of {parts} "
            "parts. Join them with llama.cpp: llama-gguf-split --merge FIRST OUT.gguf"
        )
    arch = file.fields.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise ValueError(
            f"{_OWNER} needs a GGUF file of architecture "
            f"{_checks.listed(_ARCHITECTURES)}, got {arch!r} in {file.path}. "
            "Load the original release in safetensors instead."
        )

    def get(key: str, default: Any = None) -> Any:
        return file.fields.get(f"{arch}.{key}", default)

    needed = (
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_epsilon" if arch == "olmo" else _EPSILON,
    )
    lacking = [f"{arch}.{key}" for key in needed if get(key) is None]
    if "token_embd.weight" not in file.tensors:
        lacking.append("token_embd.weight")
    if lacking:
        raise ValueError(
            f"{_OWNER} needs {_checks.listed(lacking)} in the GGUF file, which "
            f"{file.path} lacks. {_AGAIN}"
        )
    lists = {
        f"{arch}.{key}": get(key)
        for key in (*needed, "attention.head_count_kv", "attention.key_length")
        if isinstance(get(key), list)
    }
    if lists:
        key, values = next(iter(lists.items()))
        raise ValueError(
            f"{_OWNER} needs the same {key} in every layer, got "
            f"{_checks.listed(values)} in {file.path}. Layers of different sizes are "
            "not supported; load a model whose layers are alike."
        )
    for key in needed[:-1]:
        if not isinstance(get(key), int) or get(key) < 1:
            raise ValueError(
                f"{_OWNER} needs a positive whole number for {arch}.{key}, got "
                f"{get(key)!r} in {file.path}. {_AGAIN}"
            )
    window = get("attention.sliding_window") or 0
    window = window if window < get("context_length") else 0
    if window and arch != "llama":
        raise ValueError(
            f"{_OWNER} needs full attention in a GGUF file of architecture {arch!r}, "
            f"got {arch}.attention.sliding_window={window} in {file.path}. Load the "
            "original release in safetensors instead."
        )
    if get("expert_count"):
        raise ValueError(
            f"{_OWNER} needs a dense model, got a mixture of {get('expert_count')} "
            f"experts in {file.path}. Convert other networks with models.from_nnx."
        )
    width, heads = get("embedding_length"), get("attention.head_count")
    rotated = get("rope.dimension_count")
    head_dim = get("attention.key_length", rotated or width // heads)
    settings = {
        "architectures": [_hf_config.architecture(_ARCHITECTURES[arch])],
        "model_type": _ARCHITECTURES[arch],
        "hidden_act": "silu",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _short(get(needed[-1])),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": _short(get("rope.freq_base", 10000.0)),
        "rope_scaling": _scaling(file, get, head_dim),
    }
    if rotated is not None and rotated != head_dim:
        settings["partial_rotary_factor"] = rotated / head_dim
    if arch == "llama":
        settings["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        settings["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if arch == "olmo":
        if settings["rms_norm_eps"] != 1e-5:
            raise ValueError(
                f"{_OWNER} needs olmo.{needed[-1]} to be 1e-05, got {get(needed[-1])} "
                f"in {file.path}. Load the original release in safetensors instead."
            )
        clip = get("attention.clamp_kqv") or None
        settings["clip_qkv"] = clip and _short(clip)
    if arch == "granite":
        scale = get("attention.scale") or head_dim**-0.5
        settings |= {
            "attention_multiplier": _short(scale),
            "embedding_multiplier": _short(get("embedding_scale") or 1.0),
            "residual_multiplier": _short(get("residual_scale") or 1.0),
            "logits_scaling": _short(get("logit_scale") or 1.0),
        }
    if window:  # Mistral
        family = "mistral"
        settings |= {"model_type": family, "sliding_window": window}
        settings["architectures"] = [_hf_config.architecture(family)]
    ids = _gguf_tokenizer.special_ids(file.fields)
    ends = _gguf_tokenizer.end_ids(file.fields)
    settings["bos_token_id"] = ids.get("bos")
    settings["eos_token_id"] = ends if len(ends) > 1 else (ends or [None])[0]
    return settings | ({"pad_token_id": ids["padding"]} if "padding" in ids else {})


def _scaling(file: File, get, head_dim: int) -> dict[str, Any] | None:
    """`rope_scaling` from the metadata and from the tensors of frequency divisors."""
    original = get("rope.scaling.original_context_length", get("context_length"))
    factor = get("rope.scaling.factor")
    stretch = get("rope.scaling.attn_factor", 1.0)
    lists = {
        f"{name}_factor": file.tensors.get(f"rope_factors_{name}.weight")
        for name in ("short", "long")
    }
    if "rope_freqs.weight" in file.tensors:
        divisors = read(file.tensors["rope_freqs.weight"])
        return _divided(divisors, _short(get("rope.freq_base", 10000.0)), head_dim)
    if all(lists.values()):
        scaling = {name: read(entry).tolist() for name, entry in lists.items()}
        scaling |= {"rope_type": "longrope", "attention_factor": _short(stretch)}
        return scaling | {"original_max_position_embeddings": original}
    kind = get("rope.scaling.type", "none" if factor is None else "linear")
    if factor is None and get("rope.scale_linear"):  # the key in older files
        kind, factor = "linear", get("rope.scale_linear")
    if kind == "none" or not factor:
        return None
    scaling = {"rope_type": kind, "factor": _short(factor)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if get(f"rope.scaling.yarn_{name}") is not None:
                scaling[name] = _short(get(f"rope.scaling.yarn_{name}"))
        if stretch != 1.0:
            scaling["attention_factor"] = stretch * (0.1 * math.log(factor) + 1.0)
    return scaling


def _divided(divisors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, which GGUF stores as one divisor per plane.

    The published Llama 3.1 to 3.3 models differ only in the factor, so their settings
    are tried first. Other divisors become `longrope` with these divisors, which
    computes the same.
    """
    guess = _config.RopeConfig(
        theta=theta,
        kind="llama3",
        factor=float(np.max(divisors)),
        original_positions=8192,
    )
    if guess.factor >= 1:
        plain = _rope.frequencies(_config.RopeConfig(theta=theta), head_dim, 1)[0]
        scaled = _rope.frequencies(guess, head_dim, 1)[0]
        if np.allclose(np.asarray(plain) / np.asarray(scaled), divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": guess.factor,
                "low_freq_factor": guess.low_freq_factor,
                "high_freq_factor": guess.high_freq_factor,
                "original_max_position_embeddings": guess.original_positions,
            }
    factors = divisors.tolist()
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }


def _short(number: float) -> float:
    """The float with the shortest text of a float32: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(number)))
