# SPDX-License-Identifier: Apache-2.0
"""How each family's config.json is read and written: names, defaults and settings.

A setting that the decoder does not support is refused by name.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxunlearn import _checks
from jaxunlearn.io import _hf_layers
from jaxunlearn.models import _config

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_WRITTEN = {"gelu_tanh": "gelu_pytorch_tanh"}
# Settings that transformers also reads under their common names.
_ALIASED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Nearest families of known model types, and what differs from them.
_NEAREST = {
    "bloom": ("gpt_neox", "ALiBi positions"),
    "codegen": ("phi", "its fused projections"),
    "cohere": ("llama", "parallel blocks, one norm per block and scaled logits"),
    "cohere2": ("llama", "parallel blocks, one norm per block and scaled logits"),
    "falcon": ("gpt_neox", "its shared key-value heads and ALiBi positions"),
    "falcon_h1": ("llama", "state-space layers"),
    "ministral3": ("mistral", "queries scaled by their position"),
    "gemma3n": ("gemma3_text", "embeddings per layer and shared keys and values"),
    "gemma4_text": ("gemma3_text", "embeddings per layer and shared keys and values"),
    "gemma4": ("gemma3_text", "embeddings per layer and shared keys and values"),
    "gpt_neo": ("gpt2", "windows in every second layer"),
    "gptj": ("phi", "its rotary planes and the absence of biases in attention"),
    "llama4": ("llama", "mixtures of experts, chunked attention and scaled queries"),
    "llama4_text": (
        "llama",
        "mixtures of experts, chunked attention and scaled queries",
    ),
    "mpt": ("gpt_neox", "ALiBi positions"),
    "qwen3_5": ("qwen3", "linear attention in most layers and gated attention"),
    "qwen3_5_text": ("qwen3", "linear attention in most layers and gated attention"),
    "qwen3_next": ("qwen3", "linear attention in most layers and mixtures of experts"),
    "stablelm": ("llama", "its LayerNorm with bias and partial rotation"),
    "starcoder2": ("llama", "its LayerNorm with bias and ungated MLPs"),
    "t5": ("llama", "its encoder"),
}
# Settings, as patterns, that show how a network differs from every family.
_DIFFERENCES = {
    r".*experts.*": "mixtures of experts",
    r"(kv|q)_lora_rank": "latent attention",
    r"(ssm|mamba|conv|linear_(conv|key|value)|state)_.*": "state-space layers",
    r"alibi": "ALiBi positions",
    r"is_encoder_decoder": "its encoder",
    r"(vision|audio)_config": "its vision or audio part",
    r"(residual|embedding|attention)_multiplier|logits?_scal(e|ing)": "scaled layers",
}
_EXPERT_HIDDEN = "moe_intermediate_size"
_PLAIN_HEADS = ("gpt2", "opt", "gpt_neox")  # no head_dim and no grouped heads


class Family(NamedTuple):
    """The settings of one model_type.

    Attributes:
        architecture: the transformers class.
        fields: settings under common names -> DecoderConfig fields of this family.
        defaults: what transformers assumes for settings missing in config.json.
        names: common name -> name in this family.
        written: DecoderConfig -> settings that only this family writes.
    """

    architecture: str
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    defaults: Mapping[str, Any] = {}
    names: Mapping[str, str] = {}
    written: Callable[[_config.DecoderConfig], dict[str, Any]] = lambda c: {}


def common(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under common names, with defaults for missing ones."""
    family = given["model_type"]
    _, _, defaults, names, _ = FAMILIES[family]
    drop = {name for name in names if name not in _ALIASED}
    drop |= {"num_key_value_heads", "head_dim"} if family in _PLAIN_HEADS else set()
    c = {**defaults, **{n: v for n, v in given.items() if n not in drop}}
    c |= {name: given[theirs] for name, theirs in names.items() if theirs in given}
    if family == "gpt2" and c.get("intermediate_size") is None and c.get("hidden_size"):
        c["intermediate_size"] = 4 * c["hidden_size"]
    return c


def text_model(given: dict[str, Any]) -> dict[str, Any] | None:
    """config.json of the text model alone, from that of a multimodal model; None for
    another model."""
    inner, family = given.get("text_config"), given.get("model_type")
    if family not in _MULTIMODAL or not isinstance(inner, Mapping):
        return None
    found = {"model_type": _MULTIMODAL[family]} | dict(inner)
    found = {n: given[n] for n in _SHARED if given.get(n) is not None} | found
    if found["model_type"] in FAMILIES:
        found["architectures"] = [FAMILIES[found["model_type"]].architecture]
    return found


def unknown(given: Mapping[str, Any]) -> ValueError:
    """The error for a model_type without a family: the nearest, and what differs."""
    came = given.get("model_type")
    text = f"hf.load needs model_type to be one of {_checks.listed(FAMILIES, 99)}"
    if not isinstance(came, str):
        return ValueError(f"{text}, got {came!r}. Use config.json of a language model.")
    close = difflib.get_close_matches(came, FAMILIES, 1, 0.6)
    nearest, *differences = _NEAREST.get(came, (close[0] if close else "llama",))
    if not differences:
        inner = given.get("text_config")
        settings = {**given, **(inner if isinstance(inner, Mapping) else {})}
        differences = [
            what
            for pattern, what in _DIFFERENCES.items()
            if any(re.fullmatch(pattern, n) and v for n, v in settings.items())
        ]
    what = " and ".join(differences) or "its blocks, as far as config.json shows"
    return ValueError(
        f"{text}, got {came!r}. The nearest family is {nearest!r}; the model "
        f"differs from it in {what}. Convert other networks with models.from_nnx."
    )


def activation(c: Mapping[str, Any]) -> str:
    """The name of the activation in DecoderConfig."""
    family = c["model_type"]
    name = c.get("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        setting = FAMILIES[family].names.get("hidden_act", "hidden_act")
        raise _hf_layers.unsupported(setting, repr(name), _checks.listed(_ACTIVATIONS))
    if family == "gemma" and name == "gelu":  # early releases call the tanh form so
        return "gelu_tanh"
    return _ACTIVATIONS[name]


def settings(c: _config.DecoderConfig) -> dict[str, Any]:
    """config.json in the transformers 4 spelling, which transformers 5 also reads."""
    family = FAMILIES[c.family]
    found = {
        "hidden_act": _WRITTEN.get(c.activation, c.activation),
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.positions,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
    }
    if c.rope is not None:
        found |= {
            "rope_theta": c.rope.theta,
            "rope_scaling": _hf_layers.scaling(c.rope),
        }
    found |= family.written(c)
    dropped = ("num_key_value_heads", "head_dim") if c.family in _PLAIN_HEADS else ()
    return {
        "architectures": [family.architecture],
        "model_type": c.family,
        **{family.names.get(n, n): v for n, v in found.items() if n not in dropped},
    }


def _refuse(c: Mapping[str, Any], **supported: Any) -> None:
    for name, value in supported.items():
        came = c.get(name, value)
        if came != value and not (value is False and came is None):
            raise _hf_layers.unsupported(name, repr(came), repr(value))


# Families of Llama's kind with the settings attention_bias, mlp_bias.
_BIASED = ("llama", "qwen3", "olmo", "olmo2", "olmo3", "smollm3", "granite")
_MLP_BIASED = ("llama", "smollm3", "granite", "seed_oss")
_UNWINDOWED = ("llama", "olmo", "olmo2", "granite", "seed_oss", "glm", "glm4")


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


def _mixture(c):
    """Settings of Mixtral, Qwen2-MoE and Qwen3-MoE."""
    family = c["model_type"]
    layers = c["num_hidden_layers"]
    if family != "mixtral":
        _refuse(c, decoder_sparse_step=1)
        dense = [i for i in c.get("mlp_only_layers") or () if 0 <= i < layers]
        _refuse({"mlp_only_layers": dense}, mlp_only_layers=[])
    num = c.get("num_local_experts", c.get("num_experts"))
    shared = family == "qwen2_moe" and c["shared_expert_intermediate_size"]
    bias = bool(c.get("attention_bias", False)) and family == "qwen3_moe"
    return {
        "rope": _hf_layers.rope(c),
        "qkv_bias": bool(c["qkv_bias"]) if family == "qwen2_moe" else bias,
        "out_bias": bias,
        "qk_norm": family == "qwen3_moe",
        "hidden": c["intermediate_size" if family == "mixtral" else _EXPERT_HIDDEN],
        "experts": _config.ExpertsConfig(
            num=num,
            per_token=c["num_experts_per_tok"],
            normalize=family == "mixtral" or bool(c["norm_topk_prob"]),
            shared_hidden=int(shared),
        ),
    }


def _olmoe(c):
    clip, bias = c.get("clip_qkv"), bool(c.get("attention_bias", False))
    return {
        "rope": _hf_layers.rope(c),
        "qkv_bias": bias,
        "out_bias": bias,
        "qk_norm": True,
        "qk_norm_over": "all",
        "qkv_clip": None if clip is None else float(clip),
        "experts": _config.ExpertsConfig(
            num=c.get("num_local_experts", c.get("num_experts")),
            per_token=c["num_experts_per_tok"],
            normalize=bool(c["norm_topk_prob"]),
        ),
    }


def _written_olmoe(c):
    return {
        "attention_bias": c.qkv_bias,
        "clip_qkv": c.qkv_clip,
        "num_experts": c.experts.num,
        "num_experts_per_tok": c.experts.per_token,
        "norm_topk_prob": c.experts.normalize,
    }


def _written_mixture(c):
    windows = sorted({w for w in c.windows or () if w is not None})
    found = {
        "num_experts_per_tok": c.experts.per_token,
        "sliding_window": windows[0] if windows else None,
    }
    if c.family == "mixtral":
        return found | {"num_local_experts": c.experts.num}
    found |= {
        "num_experts": c.experts.num,
        _EXPERT_HIDDEN: c.hidden,
        "norm_topk_prob": c.experts.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": bool(windows),
    }
    if c.family == "qwen3_moe":
        return found | {"attention_bias": c.qkv_bias}
    return found | {
        "shared_expert_intermediate_size": c.experts.shared_hidden,
        "qkv_bias": c.qkv_bias,
        "layer_types": _types(c),
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
        found["layer_types"] = _types(c)
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
    return _llama(c) | {
        "embed_scale": float(c.get("embedding_multiplier", 1.0)),
        "attention_scale": float(c.get("attention_multiplier", 1.0)),
        "residual_scale": float(c.get("residual_multiplier", 1.0)),
        "logit_divisor": float(c.get("logits_scaling", 1.0)),
    }


def _written_granite(c):
    return _written_llama(c) | {
        "embedding_multiplier": c.embed_scale or 1.0,
        "attention_multiplier": c.attention_scale or c.head_dim**-0.5,
        "residual_multiplier": c.residual_scale or 1.0,
        "logits_scaling": c.logit_divisor or 1.0,
    }


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


def _phi(c):
    return {
        "rope": _hf_layers.rope(c),
        "norm": "layer",
        "gated": False,
        "parallel": True,
        "shared_norm": True,
        "qk_norm": bool(c.get("qk_layernorm", False)),
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "unembed_bias"), True),
    }


def _types(c):
    return [
        "full_attention" if window is None else "sliding_attention"
        for window in c.windows or (None,) * c.layers
    ]


def _gemma(c):
    _refuse(c, use_bidirectional_attention=False)
    family, bias = c["model_type"], bool(c.get("attention_bias", False))
    found = {
        "norm": "rms_plus_one",
        "embed_scale": float(c["hidden_size"]) ** 0.5,
        "qkv_bias": bias,
        "out_bias": bias,
    }
    if family == "gemma":
        return found | {"rope": _hf_layers.rope(c)}
    found |= {
        "post_norms": True,
        "attention_scale": float(c["query_pre_attn_scalar"]) ** -0.5,
        "logit_softcap": c["final_logit_softcapping"],
    }
    if family == "gemma2":
        softcap = c["attn_logit_softcapping"]
        return found | {"rope": _hf_layers.rope(c), "attention_softcap": softcap}
    _refuse(c, attn_logit_softcapping=None)
    return found | {"qk_norm": True} | _hf_layers.ropes(c)


def _written_gemma(c):
    found: dict[str, Any] = {"attention_bias": c.qkv_bias}
    if c.family == "gemma":
        return found
    windows = sorted({w for w in c.windows or () if w is not None})
    scalar = round((c.attention_scale or c.head_dim**-0.5) ** -2, 6)
    found |= {
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "sliding_window": windows[0] if windows else None,
        "layer_types": _types(c),
        "final_logit_softcapping": c.logit_softcap,
        "attn_logit_softcapping": c.attention_softcap,
    }
    if c.family == "gemma3_text":
        found["rope_local_base_freq"] = (c.local_rope or c.rope).theta
    return found


def _gpt2(c):
    _refuse(c, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    scaled = c.get("scale_attn_weights", True)
    biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
    scale = None if scaled else 1.0
    plain = {"norm": "layer", "gated": False, "rope": None}
    return biases | plain | {"attention_scale": scale}


def _opt(c):
    _refuse(
        c,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        layer_norm_elementwise_affine=True,
    )
    if c.get("word_embed_proj_dim") is not None:
        _refuse(c, word_embed_proj_dim=c["hidden_size"])
    bias = bool(c.get("enable_bias", True))
    biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), bias)
    plain = {"norm": "layer", "norm_eps": 1e-5, "gated": False, "rope": None}
    return biases | plain | {"position_offset": 2}


def _neox(c):
    bias = bool(c.get("attention_bias", True))
    return {
        "norm": "layer",
        "gated": False,
        "rope": _hf_layers.rope(c),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": True,
        "parallel": bool(c.get("use_parallel_residual", True)),
    }


_OLMO3_THETA = 500000.0
_GLM = {
    "partial_rotary_factor": 0.5,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
}
_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "tie_word_embeddings": True,
}
_NEWER_GEMMA = _GEMMA | {
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA2 = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
_GEMMA3 = {
    "final_logit_softcapping": None,
    "max_position_embeddings": 131072,
    "vocab_size": 262208,
    "num_attention_heads": 8,
}
# model_type of a multimodal model -> that of its text_config if it is not given.
_MULTIMODAL = {"gemma3": "gemma3_text", "mistral3": "mistral"}
_SHARED = (  # what a multimodal config.json has outside its text_config
    *("bos_token_id", "eos_token_id", "pad_token_id", "_generation_config"),
    *("dtype", "torch_dtype", "transformers_version", "quantization_config"),
    "tie_word_embeddings",
)

_QWEN_MOE = {
    "max_position_embeddings": 32768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}

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
    "olmo": Family(
        "OlmoForCausalLM",
        _olmo,
        {"max_position_embeddings": 2048},
        written=lambda c: _written_llama(c) | {"clip_qkv": c.qkv_clip},
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
    "granite": Family(
        "GraniteForCausalLM",
        _granite,
        {"max_position_embeddings": 2048},
        written=_written_granite,
    ),
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
    "glm": Family("GlmForCausalLM", _glm, _GLM, written=_written_glm),
    "glm4": Family("Glm4ForCausalLM", _glm, _GLM, written=_written_glm),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _olmo2,
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
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
    "phi": Family(
        "PhiForCausalLM",
        _phi,
        {
            "hidden_act": "gelu_new",
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
        },
        {"rms_norm_eps": "layer_norm_eps"},
        lambda c: {
            "partial_rotary_factor": c.rope.partial,
            "qk_layernorm": c.qk_norm,
        },
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _mixture,
        {
            "max_position_embeddings": 4096 * 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1e6,
        },
        written=_written_mixture,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _mixture,
        _QWEN_MOE
        | {
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            _EXPERT_HIDDEN: 1408,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
        },
        written=_written_mixture,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _mixture,
        _QWEN_MOE
        | {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            _EXPERT_HIDDEN: 768,
        },
        written=_written_mixture,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        _olmoe,
        {
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        written=_written_olmoe,
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
    "gemma": Family(
        "GemmaForCausalLM",
        _gemma,
        _GEMMA | {"max_position_embeddings": 8192, "num_key_value_heads": 16},
        written=_written_gemma,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _gemma,
        _NEWER_GEMMA | _GEMMA2 | {"max_position_embeddings": 8192},
        {"hidden_act": "hidden_activation"},
        _written_gemma,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma,
        _NEWER_GEMMA | _GEMMA3,
        {"hidden_act": "hidden_activation"},
        _written_gemma,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2,
        {
            "hidden_act": "gelu_new",
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        {
            "hidden_act": "activation_function",
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        lambda c: {"scale_attn_weights": c.attention_scale is None},
    ),
    "opt": Family(
        "OPTForCausalLM",
        _opt,
        {
            "hidden_act": "relu",
            "intermediate_size": 3072,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        {"hidden_act": "activation_function", "intermediate_size": "ffn_dim"},
        lambda c: {
            "do_layer_norm_before": True,
            "enable_bias": c.mlp_bias,
            "word_embed_proj_dim": c.width,
        },
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        _neox,
        {
            "hidden_act": "gelu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
        },
        {
            "rms_norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        lambda c: {
            "partial_rotary_factor": c.rope.partial,
            "attention_bias": c.qkv_bias,
            "use_parallel_residual": c.parallel,
        },
    ),
}
