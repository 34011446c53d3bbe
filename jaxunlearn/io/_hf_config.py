# SPDX-License-Identifier: Apache-2.0
"""config.json of a Hugging Face checkpoint, to DecoderConfig and back.

Both spellings of rotary positions are read: `rope_theta` with `rope_scaling`
(transformers 4) and `rope_parameters` (transformers 5). A setting we do not know how to
compute is refused, never ignored: what loads computes what transformers computes.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.models import _config

# What transformers assumes where config.json is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    "phi3": {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
}
FAMILIES = tuple(_DEFAULTS)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# DecoderConfig fields that say how to run the model, not which model it is.
_RUNNING = ("compute_dtype", "remat", "source")
_OWNER = "hf.load"


def parse(text: str, *, compute_dtype: str = "float32", remat: str = "full"):
    """The DecoderConfig that a config.json describes.

    Args:
        text: the file, kept in the result's `source`.
        compute_dtype: dtype of the activations.
        remat: what the backward pass recomputes.
    Raises:
        ValueError: if the text is not JSON, or names an architecture or setting we
        lack.
    """
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(
            f"{_OWNER} needs a config.json in JSON, got text that does not parse "
            f"({error}). Copy or download it again."
        ) from error
    family = given.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{_OWNER} needs model_type to be one of {_checks.listed(FAMILIES)}, got "
            f"{family!r}. Bring another network in with models.from_nnx."
        )
    missing = [name for name in _NEEDED if given.get(name) is None]
    if missing:
        raise ValueError(
            f"{_OWNER} needs {_checks.listed(missing)} in config.json, got only "
            f"{_checks.listed(given, 20)}. Take config.json from the original release."
        )
    _refuse(given)
    c = {**_DEFAULTS[family], **given}
    heads = c["num_attention_heads"]
    bias = bool(c.get("attention_bias", False)) and family in ("llama", "qwen3")
    return _config.DecoderConfig(
        family=family,
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        hidden=c["intermediate_size"],
        positions=c["max_position_embeddings"],
        norm_eps=float(c.get("rms_norm_eps", 1e-6)),
        rope=_rope(c),
        tied=bool(c.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bool(c.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        windows=_windows(family, c),
        compute_dtype=compute_dtype,
        remat=remat,
        source=text,
    )


def write(config: _config.DecoderConfig, dtype: str) -> str:
    """config.json for a checkpoint saved in `dtype`.

    The settings the model came with are kept as they were, known to us or not; where
    they no longer describe the model, or there were none, they are written from
    `config`.
    """
    settings = json.loads(config.source)
    if not _describes(config):
        rope = ("rope_parameters", "rope_scaling", "rope_theta")
        kept = {name: v for name, v in settings.items() if name not in rope}
        settings = kept | _settings(config)
    names = [name for name in ("dtype", "torch_dtype") if name in settings]
    settings |= dict.fromkeys(names or ["torch_dtype"], dtype)
    return json.dumps(settings, indent=2) + "\n"


def architecture(family: str) -> str:
    """The transformers class that a family's config.json names."""
    return _ARCHITECTURES[family]


def _describes(config: _config.DecoderConfig) -> bool:
    """Whether the source still says what the config says."""
    try:
        parsed = parse(config.source)
    except ValueError:
        return False
    same = {name: getattr(config, name) for name in _RUNNING}
    return dataclasses.replace(parsed, **same) == config


def _settings(config: _config.DecoderConfig) -> dict[str, Any]:
    """The transformers 4 spelling, which transformers 5 and servers read too."""
    c = config
    if c.family not in FAMILIES:
        raise ValueError(
            f"hf.save needs a config of the family {_checks.listed(FAMILIES)}, got "
            f"{c.family!r}. Set DecoderConfig(family=...) to the nearest one."
        )
    settings = {
        "architectures": [_ARCHITECTURES[c.family]],
        "model_type": c.family,
        "hidden_act": "silu",
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
        "rope_theta": c.rope.theta,
        "rope_scaling": _scaling(c.rope),
    }
    if c.family in ("llama", "qwen3"):
        settings["attention_bias"] = c.qkv_bias
    if c.family == "llama":
        settings["mlp_bias"] = c.mlp_bias
    if c.family == "phi3":
        settings["partial_rotary_factor"] = c.rope.partial
        settings["original_max_position_embeddings"] = (
            c.rope.original_positions or c.positions
        )
    windows = sorted({w for w in c.windows or () if w is not None})
    if c.family in ("mistral", "phi3"):
        settings["sliding_window"] = windows[0] if windows else None
    if c.family in ("qwen2", "qwen3"):
        settings["use_sliding_window"] = bool(windows)
        settings["sliding_window"] = windows[0] if windows else None
        settings["layer_types"] = [
            "full_attention" if w is None else "sliding_attention"
            for w in c.windows or (None,) * c.layers
        ]
    back = parse(json.dumps(settings))
    if c.rope.kind in ("default", "linear"):  # the length plays no part in these
        back = dataclasses.replace(
            back,
            rope=dataclasses.replace(
                back.rope, original_positions=c.rope.original_positions
            ),
        )
    lost = [
        field.name
        for field in dataclasses.fields(back)
        if field.name not in _RUNNING
        and getattr(back, field.name) != getattr(config, field.name)
    ]
    if lost:
        raise ValueError(
            f"hf.save needs settings that model_type {c.family!r} has in transformers, "
            f"got {_checks.listed(f'{name}={getattr(c, name)!r}' for name in lost)}. "
            "Choose another family, or save with orbax-checkpoint."
        )
    return settings


def _scaling(rope: _config.RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = rope.original_positions
    extra = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "longrope": ("short_factor", "long_factor", "attention_factor"),
        "yarn": (
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    }
    values = {name: getattr(rope, name) for name in extra.get(rope.kind, ())}
    return scaling | {name: v for name, v in values.items() if v is not None}


def _rope(c: Mapping[str, Any]) -> _config.RopeConfig:
    given = c.get("rope_scaling") or c.get("rope_parameters") or {}
    nested = [item for item in given.values() if isinstance(item, Mapping)]
    if nested and all(item == nested[0] for item in nested):
        given = nested[0]
    elif nested:
        raise _unsupported(
            "rope_parameters", "different ones per kind of layer", "one set"
        )
    kind = given.get("rope_type", given.get("type", "default"))
    if c["model_type"] == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # earlier names of it
    if kind not in _config.ROPE_KINDS:
        raise _unsupported("rope_type", repr(kind), _checks.listed(_config.ROPE_KINDS))
    partial = given.get("partial_rotary_factor", c.get("partial_rotary_factor"))
    partial = 1.0 if partial is None else float(partial)
    if partial != 1.0 and c["model_type"] != "phi3":
        raise _unsupported("partial_rotary_factor", partial, "1.0")
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "longrope": ("short_factor", "long_factor"),
    }.get(kind, ())
    lacking = [name for name in needed if given.get(name) is None]
    if lacking:
        raise ValueError(
            f"{_OWNER} needs {_checks.listed(lacking)} for rope_type {kind!r} in "
            f"config.json, got {_checks.listed(given)}. Take config.json from the "
            "original release."
        )
    positions = c["max_position_embeddings"]
    original = None
    if kind == "dynamic":  # transformers reads no other length here
        original = positions
    elif kind in ("llama3", "yarn", "longrope"):
        inside = given.get("original_max_position_embeddings")
        original = c.get("original_max_position_embeddings", inside) or positions
    factor = given.get("factor")
    if factor is None:
        factor = positions / original if original else 1.0
    given = {name: value for name, value in given.items() if value is not None}
    theta = given.get("rope_theta", c.get("rope_theta"))
    return _config.RopeConfig(
        theta=float(10000.0 if theta is None else theta),
        kind=kind,
        factor=float(factor),
        original_positions=original,
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        attention_factor=given.get("attention_factor"),
        mscale=given.get("mscale"),
        mscale_all_dim=given.get("mscale_all_dim"),
        truncate=bool(given.get("truncate", True)),
        short_factor=_floats(given.get("short_factor")),
        long_factor=_floats(given.get("long_factor")),
        partial=partial,
    )


def _windows(family: str, c: Mapping[str, Any]) -> tuple[int | None, ...] | None:
    layers, window = c["num_hidden_layers"], c.get("sliding_window")
    if family == "llama":
        return None
    if family in ("mistral", "phi3"):
        return None if window is None else (window,) * layers
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    types = c.get("layer_types")
    if types is None:
        first = c.get("max_window_layers", 28)
        types = [
            "full_attention" if window is None or i < first else "sliding_attention"
            for i in range(layers)
        ]
    known = {"full_attention": None, "sliding_attention": window}
    strange = [kind for kind in types if kind not in known]
    if strange or len(types) != layers:
        raise _unsupported(
            "layer_types", types, f"{layers} entries from {_checks.listed(known)}"
        )
    if window is None and "sliding_attention" in types:
        raise _unsupported(
            "layer_types with 'sliding_attention'",
            f"use_sliding_window={c.get('use_sliding_window')!r} and "
            f"sliding_window={c.get('sliding_window')!r}",
            "a window size in tokens",
        )
    windows = tuple(known[kind] for kind in types)
    return None if all(w is None for w in windows) else windows


def _refuse(given: Mapping[str, Any]) -> None:
    """Raises for settings that would change the arithmetic in a way we do not have."""
    activation = given.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise _unsupported("hidden_act", repr(activation), "'silu'")
    if given.get("quantization_config"):
        method = given["quantization_config"].get("quant_method")
        raise ValueError(
            f"{_OWNER} needs plain floating-point weights, got a checkpoint quantized "
            f"with {method!r} (quantization_config). Load the original release instead."
        )


def _unsupported(name: str, came: Any, supported: str) -> ValueError:
    return ValueError(
        f"{_OWNER} needs {name} to be {supported}, got {came}. "
        "Bring another network in with models.from_nnx."
    )


def _floats(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)
