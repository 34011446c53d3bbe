# SPDX-License-Identifier: Apache-2.0
"""Families of other kinds: Gemma, GPT-2, OPT, GPT-NeoX and Phi."""

from typing import Any

from jaxunlearn.io import _family, _hf_layers
from jaxunlearn.io._family import Family

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


def _gemma(c):
    _family.refuse(c, use_bidirectional_attention=False)
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
    _family.refuse(c, attn_logit_softcapping=None)
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
        "layer_types": _family.layer_types(c),
        "final_logit_softcapping": c.logit_softcap,
        "attn_logit_softcapping": c.attention_softcap,
    }
    if c.family == "gemma3_text":
        found["rope_local_base_freq"] = (c.local_rope or c.rope).theta
    return found


def _gpt2(c):
    _family.refuse(c, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    scaled = c.get("scale_attn_weights", True)
    biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
    scale = None if scaled else 1.0
    plain = {"norm": "layer", "gated": False, "rope": None}
    return biases | plain | {"attention_scale": scale}


def _opt(c):
    _family.refuse(
        c,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        layer_norm_elementwise_affine=True,
    )
    if c.get("word_embed_proj_dim") is not None:
        _family.refuse(c, word_embed_proj_dim=c["hidden_size"])
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


FAMILIES = {
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
}
