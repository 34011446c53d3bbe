# SPDX-License-Identifier: Apache-2.0
"""How each family's config.json is read and written: names, defaults and settings.

A setting that the decoder does not support is refused by name.
"""

from collections.abc import Mapping
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.io import (
    _families_llama,
    _families_moe,
    _families_other,
    _hf_layers,
    _nearest,
)
from jaxunlearn.models import _config

FAMILIES = {
    **_families_llama.FAMILIES,
    **_families_other.FAMILIES,
    **_families_moe.FAMILIES,
}
# The ids that end a text where neither config.json nor generation_config.json names
# eos_token_id: the defaults of the classes in transformers.
EOS_IDS = {
    **dict.fromkeys(FAMILIES, ()),
    **dict.fromkeys(("llama", "mistral", "ministral", "mixtral"), (2,)),
    **dict.fromkeys(("granite", "granitemoe", "seed_oss", "phi", "opt"), (2,)),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), (1,)),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "olmoe"), (50279,)),
    **dict.fromkeys(("glm", "glm4"), (151329, 151336, 151338)),
    **{"gpt2": (50256,), "gpt_neox": (2,), "phi3": (32000,), "smollm3": (128001,)},
}
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
_PLAIN_HEADS = ("gpt2", "opt", "gpt_neox")  # no head_dim and no grouped heads
# model_type of a multimodal model -> that of its text_config if it is not given.
_MULTIMODAL = {"gemma3": "gemma3_text", "mistral3": "mistral"}
_SHARED = (  # what a multimodal config.json has outside its text_config
    *("bos_token_id", "eos_token_id", "pad_token_id", "_generation_config"),
    *("dtype", "torch_dtype", "transformers_version", "quantization_config"),
    "tie_word_embeddings",
)


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
    """The error for a config.json whose model_type is not a family."""
    return _nearest.error(given, FAMILIES)


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
