# SPDX-License-Identifier: Apache-2.0
"""Families like Llama: gated MLPs and rotary positions, with variations."""

import dataclasses

from jaxunlearn.io import _family, _hf_layers
from jaxunlearn.io._family import Family

# Families of Llama's kind with the settings attention_bias, mlp_bias.
_BIASED = ("llama", "qwen3", "olmo", "olmo2", "olmo3", "smollm3", "granite")
_MLP_BIASED = ("llama", "smollm3", "granite", "seed_oss")
_UNWINDOWED = ("llama", "olmo", "olmo2", "granite", "seed_oss", "glm", "glm4")
_OLMO3_THETA = 500000.0
_GLM = {
    "partial_rotary_factor": 0.5,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
}


def _llama(c):
    family, bias = c["model_type"], bool(c.get("attention_bias", False))
    bias = bias and family in _BIASED
    return {
        "rope": _hf_layers.rope(c),
        "qkv_bias": bias or family == "qwen2",
        "out_bias": bias,
        "mlp_bias": bool(c.get("mlp_bias", False)) and family in _MLP_BIASED,
        "qk_norm": family == "qwen3",
    }


def _written_llama(c):
    found, windows = {}, sorted({w for w in c.windows or () if w is not None})
    if c.family in _BIASED:
        found["attention_bias"] = c.qkv_bias
    if c.family in _MLP_BIASED:
        found["mlp_bias"] = c.mlp_bias
    if c.family not in _UNWINDOWED:
        found["sliding_window"] = windows[0] if windows else None
    if c.family in ("qwen2", "qwen3", "smollm3"):
        found["use_sliding_window"] = bool(windows)
    if c.family in ("qwen2", "qwen3", "smollm3", "ministral", "olmo3"):
        found["layer_types"] = _family.layer_types(c)
    if c.family == "phi3":
        original = c.rope.original_positions or c.positions
        found["partial_rotary_factor"] = c.rope.partial
        found["original_max_position_embeddings"] = original
    return found


def _olmo(c):
    clip = c.get("clip_qkv")
    plain = {"norm": "layer_unscaled", "norm_eps": 1e-5}
    return _llama(c) | plain | {"qkv_clip": None if clip is None else float(clip)}


def _olmo2(c):
    norms = {"pre_norms": False, "post_norms": True}
    return _llama(c) | norms | {"qk_norm": True, "qk_norm_over": "all"}


def _olmo3(c):
    theta = c.get("rope_theta")
    if not c.get("rope_parameters") and theta not in (None, _OLMO3_THETA):
        supported = f"{_OLMO3_THETA}, or in rope_parameters for each type of layer"
        raise _hf_layers.unsupported("rope_theta", theta, supported)
    return _olmo2(c | {"rope_parameters": None, "rope_scaling": None}) | (
        _hf_layers.ropes(c, (_OLMO3_THETA, _OLMO3_THETA))
    )


def _granite(c):
    return _llama(c) | _family.multipliers(c)


def _written_granite(c):
    return _written_llama(c) | _family.written_multipliers(c)


def _seed_oss(c):
    biases = {
        "qkv_bias": bool(c.get("attention_bias", True)),
        "out_bias": bool(c.get("attention_out_bias", False)),
    }
    return _llama(c) | biases


def _glm(c):
    rope = dataclasses.replace(_hf_layers.rope(c), interleaved=True)
    bias = bool(c.get("attention_bias", True))
    return {"rope": rope, "qkv_bias": bias, "post_norms": c["model_type"] == "glm4"}


def _written_glm(c):
    return {"partial_rotary_factor": c.rope.partial, "attention_bias": c.qkv_bias}


def _smollm3(c):
    rotates = tuple(_hf_layers.rope_layers(c))
    return _llama(c) | {"rope_layers": None if all(rotates) else rotates}


def _written_smollm3(c):
    rotates = c.rope_layers or (True,) * c.layers
    return _written_llama(c) | {"no_rope_layers": [int(each) for each in rotates]}


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _llama,
        {"max_position_embeddings": 2048},
        written=_written_llama,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _llama,
        {
            "max_position_embeddings": 4096 * 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        written=_written_llama,
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        _llama,
        {
            "max_position_embeddings": 4096 * 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        written=_written_llama,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _llama,
        {"max_position_embeddings": 32768, "num_key_value_heads": 32},
        written=_written_llama,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _llama,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
        written=_written_llama,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _llama,
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        written=_written_llama,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _smollm3,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
        },
        written=_written_smollm3,
    ),
    "olmo": Family(
        "OlmoForCausalLM",
        _olmo,
        {"max_position_embeddings": 2048},
        written=lambda c: _written_llama(c) | {"clip_qkv": c.qkv_clip},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _olmo2,
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        written=_written_llama,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _olmo3,
        {
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
        },
        written=_written_llama,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        _granite,
        {"max_position_embeddings": 2048},
        written=_written_granite,
    ),
    "glm": Family("GlmForCausalLM", _glm, _GLM, written=_written_glm),
    "glm4": Family("Glm4ForCausalLM", _glm, _GLM, written=_written_glm),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        _seed_oss,
        {
            "max_position_embeddings": 524288,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        written=lambda c: (
            _written_llama(c)
            | {"attention_bias": c.qkv_bias, "attention_out_bias": c.out_bias}
        ),
    ),
}
