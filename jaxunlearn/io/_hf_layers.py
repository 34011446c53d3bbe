# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the rotary positions and windows of a config.json."""

from collections.abc import Mapping
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.models import _config

_OWNER = "hf.load"
# Families without windows.
_UNWINDOWED = ("llama", "gemma", "gpt2", "opt", "gpt_neox", "olmo", "olmo2", "phi")
_UNWINDOWED += ("glm", "glm4", "granite", "granitemoe", "olmoe", "seed_oss")
# Families that may rotate a part of each head.
_PARTIAL = ("phi", "phi3", "gpt_neox", "glm", "glm4")
# The families whose layers follow a pattern: every n-th has no window.
_EVERY = {"gemma2": 2, "gemma3_text": 6, "olmo3": 4}


def rope(c: Mapping[str, Any]) -> _config.RopeConfig:
    """The rotary positions of a config.json with one set for all layers."""
    given = c.get("rope_scaling") or c.get("rope_parameters") or {}
    nested = [item for item in given.values() if isinstance(item, Mapping)]
    if nested and all(item == nested[0] for item in nested):
        given = nested[0]
    elif nested:
        raise unsupported(
            "rope_parameters", "different sets per type of layer", "one set"
        )
    kind = given.get("rope_type", given.get("type", "default"))
    if c["model_type"] == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # its earlier names
    if kind not in _config.ROPE_KINDS:
        raise unsupported("rope_type", repr(kind), _checks.listed(_config.ROPE_KINDS))
    partial = given.get("partial_rotary_factor", c.get("partial_rotary_factor"))
    partial = 1.0 if partial is None else float(partial)
    if partial != 1.0 and c["model_type"] not in _PARTIAL:
        raise unsupported("partial_rotary_factor", partial, "1.0")
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
            f"config.json, got {_checks.listed(given)}. Use config.json of the "
            "original release."
        )
    positions = c["max_position_embeddings"]
    original = None
    if kind == "dynamic":  # transformers uses no other length here
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
        short_factor=floats(given.get("short_factor")),
        long_factor=floats(given.get("long_factor")),
        partial=partial,
    )


def ropes(
    c: Mapping[str, Any], thetas: tuple[float, float] = (1e6, 1e4)
) -> dict[str, _config.RopeConfig]:
    """Two sets, for layers with full attention and with a window (Gemma 3, OLMo 3).

    `thetas` are their bases where config.json does not give them.
    """
    nested, scaled = c.get("rope_parameters") or {}, c.get("rope_scaling") or {}
    kinds = {"full_attention", "sliding_attention"}
    if not set(nested) <= kinds:
        raise unsupported(
            "rope_parameters", _checks.listed(nested), f"under {_checks.listed(kinds)}"
        )
    full, local = ((nested.get(kind) or {}) for kind in sorted(kinds))
    full = {"rope_theta": c.get("rope_theta") or thetas[0]} | full | scaled
    local = {"rope_theta": c.get("rope_local_base_freq") or thetas[1]} | local
    alone = {n: v for n, v in c.items() if n not in ("rope_scaling", "rope_theta")}
    one, other = (rope(alone | {"rope_parameters": given}) for given in (full, local))
    windows_ = windows(c["model_type"], c)
    return {"rope": one, "local_rope": other if windows_ and one != other else None}


def scaling(rope: _config.RopeConfig) -> dict[str, Any] | None:
    """`rope_scaling` in config.json; None for unscaled positions."""
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


def windows(family: str, c: Mapping[str, Any]) -> tuple[int | None, ...] | None:
    """The window of every layer, in tokens, as DecoderConfig.windows."""
    layers, window = c["num_hidden_layers"], c.get("sliding_window")
    if family in _UNWINDOWED:
        return None
    if family in ("mistral", "mixtral", "phi3"):
        return None if window is None else (window,) * layers
    if family == "qwen3_moe":  # in transformers all layers have the window, or none
        window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
        return None if window is None else (window,) * layers
    types = c.get("layer_types")
    if family == "ministral":
        kind = "full_attention" if window is None else "sliding_attention"
        types = types or [kind] * layers
    elif family in _EVERY:
        every = c.get("sliding_window_pattern", _EVERY[family])
        types = types or [
            "sliding_attention" if (i + 1) % every else "full_attention"
            for i in range(layers)
        ]
    else:
        window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    if family == "smollm3" and types is None:
        types = [
            "full_attention" if window is None or rotates else "sliding_attention"
            for rotates in rope_layers(c)
        ]
    if types is None:
        first = c.get("max_window_layers", 28)
        slides = [i >= first for i in range(layers)]
        if family == "qwen2_moe":
            slides = [i % 2 == 0 and i < first for i in range(layers)]
        types = [
            "sliding_attention" if window is not None and slide else "full_attention"
            for slide in slides
        ]
    supported = {"full_attention": None, "sliding_attention": window}
    if len(types) != layers or any(kind not in supported for kind in types):
        raise unsupported(
            "layer_types", types, f"{layers} entries from {_checks.listed(supported)}"
        )
    if window is None and "sliding_attention" in types:
        raise unsupported(
            "layer_types with 'sliding_attention'",
            f"use_sliding_window={c.get('use_sliding_window')!r} and "
            f"sliding_window={c.get('sliding_window')!r}",
            "a window size in tokens",
        )
    windows = tuple(supported[kind] for kind in types)
    return None if all(w is None for w in windows) else windows


def rope_layers(c: Mapping[str, Any]) -> list[bool]:
    """For each layer of SmolLM3 whether it has rotary positions."""
    layers, given = c["num_hidden_layers"], c.get("no_rope_layers")
    if given is None:
        every = c.get("no_rope_layer_interval", 4)
        return [(i + 1) % every != 0 for i in range(layers)]
    if len(given) < layers:
        raise unsupported("no_rope_layers", given, f"{layers} entries, one per layer")
    return [bool(rotates) for rotates in given[:layers]]


def unsupported(name: str, came: Any, supported: str) -> ValueError:
    """The error for a setting of config.json that the decoder does not support."""
    return ValueError(
        f"{_OWNER} needs {name} to be {supported}, got {came}. "
        "Convert other networks with models.from_nnx."
    )


def floats(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)
