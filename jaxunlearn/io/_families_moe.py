# SPDX-License-Identifier: Apache-2.0
"""Families with mixtures of experts."""

from jaxunlearn.io import _family, _hf_layers
from jaxunlearn.io._family import Family
from jaxunlearn.models import _config

_EXPERT_HIDDEN = "moe_intermediate_size"
_QWEN_MOE = {
    "max_position_embeddings": 32768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}


def _mixture(c):
    """Settings of Mixtral, Qwen2-MoE and Qwen3-MoE."""
    family = c["model_type"]
    layers = c["num_hidden_layers"]
    if family != "mixtral":
        _family.refuse(c, decoder_sparse_step=1)
        dense = [i for i in c.get("mlp_only_layers") or () if 0 <= i < layers]
        _family.refuse({"mlp_only_layers": dense}, mlp_only_layers=[])
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


def _granite(c):
    bias = bool(c.get("attention_bias", False))
    # The softmax over the chosen logits is the softmax over all, divided by its sum.
    experts = _config.ExpertsConfig(c["num_local_experts"], c["num_experts_per_tok"])
    fields = {"rope": _hf_layers.rope(c), "qkv_bias": bias, "out_bias": bias}
    return fields | {"experts": experts} | _family.multipliers(c)


def _written_granite(c):
    return _family.written_multipliers(c) | {
        "attention_bias": c.qkv_bias,
        "num_local_experts": c.experts.num,
        "num_experts_per_tok": c.experts.per_token,
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
        "layer_types": _family.layer_types(c),
    }


FAMILIES = {
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        _granite,
        {
            "max_position_embeddings": 2048,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        written=_written_granite,
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
}
