# SPDX-License-Identifier: Apache-2.0
"""The error for a model type without a family: the nearest one, and what differs."""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxunlearn import _checks

# Nearest families of known model types, and what differs from them.
_NEAREST = {
    "bloom": ("gpt_neox", "ALiBi positions"),
    "codegen": ("phi", "its fused projections"),
    "cohere": ("llama", "parallel blocks, one norm per block and scaled logits"),
    "cohere2": ("llama", "parallel blocks, one norm per block and scaled logits"),
    "dbrx": ("mixtral", "its LayerNorm and the form of its fused tensors"),
    "deepseek_v2": ("qwen2_moe", "latent attention and groups of experts"),
    "deepseek_v3": ("qwen2_moe", "latent attention and groups of experts"),
    "ernie4_5_moe": ("qwen2_moe", "dense first layers and a bias in the router"),
    "falcon": ("gpt_neox", "its shared key-value heads and ALiBi positions"),
    "falcon_h1": ("llama", "state-space layers"),
    "ministral3": ("mistral", "queries scaled by their position"),
    "gemma3n": ("gemma3_text", "embeddings per layer and shared keys and values"),
    "gemma4_text": ("gemma3_text", "embeddings per layer and shared keys and values"),
    "gemma4": ("gemma3_text", "embeddings per layer and shared keys and values"),
    "glm4_moe": ("qwen3_moe", "dense first layers and a sigmoid in the router"),
    "gpt_oss": ("mixtral", "attention sinks, and biases and clipping in its experts"),
    "granitemoehybrid": ("granitemoe", "state-space layers and a shared expert"),
    "granitemoeshared": ("granitemoe", "a shared expert without a gate"),
    "gpt_neo": ("gpt2", "windows in every second layer"),
    "gptj": ("phi", "its rotary planes and the absence of biases in attention"),
    "llama4": ("llama", "mixtures of experts, chunked attention and scaled queries"),
    "llama4_text": (
        "llama",
        "mixtures of experts, chunked attention and scaled queries",
    ),
    "hf_olmo": (
        "olmo",
        "the names of its settings and tensors, which the folder of the same release "
        "with -hf in its name has as they should be",
    ),
    "mpt": ("gpt_neox", "ALiBi positions"),
    "phimoe": ("mixtral", "its LayerNorm with bias and the noise of its router"),
    "qwen3_5": ("qwen3", "linear attention in most layers and gated attention"),
    "qwen3_5_text": ("qwen3", "linear attention in most layers and gated attention"),
    "qwen3_next": ("qwen3", "linear attention in most layers and mixtures of experts"),
    "stablelm": ("llama", "its LayerNorm with bias and partial rotation"),
    "starcoder2": ("llama", "its LayerNorm with bias and ungated MLPs"),
    "t5": ("llama", "its encoder"),
}
# Settings, as patterns, that show how a network differs from every family.
_DIFFERENCES = {
    r".*experts.*": "its mixture of experts",
    r"(kv|q)_lora_rank": "latent attention",
    r"(ssm|mamba|conv|linear_(conv|key|value)|state)_.*": "state-space layers",
    r"alibi": "ALiBi positions",
    r"is_encoder_decoder": "its encoder",
    r"(vision|audio)_config": "its vision or audio part",
    r"(residual|embedding|attention)_multiplier|logits?_scal(e|ing)": "scaled layers",
}


def error(given: Mapping[str, Any], families: Collection[str]) -> ValueError:
    """The error for a model_type without a family: the nearest, and what differs."""
    came = given.get("model_type")
    text = f"hf.load needs model_type to be one of {_checks.listed(families, 99)}"
    if not isinstance(came, str):
        return ValueError(f"{text}, got {came!r}. Use config.json of a language model.")
    close = difflib.get_close_matches(came, families, 1, 0.6)
    other = (
        "mixtral"
        if any("experts" in name and v for name, v in given.items())
        else "llama"
    )
    nearest, *differences = _NEAREST.get(came, (close[0] if close else other,))
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
