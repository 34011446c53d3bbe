# SPDX-License-Identifier: Apache-2.0
"""config.json of a Hugging Face checkpoint, to DecoderConfig and back.

Both spellings of rotary positions are read: `rope_theta` with `rope_scaling`
(transformers 4) and `rope_parameters` (transformers 5). A setting that the decoder
does not support is an error and never ignored, so every model that loads computes what
transformers computes.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.io import _families, _hf_layers
from jaxunlearn.models import _config

FAMILIES = tuple(_families.FAMILIES)
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# DecoderConfig fields that determine how the model runs, not which model it is.
_RUNNING = ("compute_dtype", "remat", "attention", "eos_ids", "source")
_OWNER = "hf.load"
# Key of the content of generation_config.json within DecoderConfig.source.
GENERATION = "_generation_config"


def parse(text: str, *, compute_dtype: str = "float32", remat: str = "full"):
    """The DecoderConfig that a config.json describes; of a multimodal model, its text
    model.

    Args:
        text: the content of the file, stored in the result's `source`; of a multimodal
            model, the settings of its text model.
        compute_dtype: dtype of the activations.
        remat: what the backward pass recomputes.
    Raises:
        TypeError, ValueError: if the text is not JSON, or has an unsupported
            architecture or setting.
    """
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(
            f"{_OWNER} needs JSON in config.json, got text that does not parse "
            f"({error}). Copy or download it again."
        ) from error
    complete, inner = given, _families.text_model(given)
    if inner is not None:
        given, text = inner, json.dumps(inner, indent=2)
    family = given.get("model_type")
    if family not in FAMILIES:
        raise _families.unknown(given)
    c = _families.common(given)
    names = _families.FAMILIES[family].names
    missing = [name for name in _NEEDED if c.get(name) is None]
    if missing:
        raise ValueError(
            f"{_OWNER} needs {_checks.listed(names.get(n, n) for n in missing)} in "
            f"config.json, got only {_checks.listed(given, 20)}. Use config.json of "
            "the original release."
        )
    _checks.positive_int(_OWNER, **{names.get(n, n): c[n] for n in _NEEDED})
    _refuse(given)
    heads = c["num_attention_heads"]
    fields = {
        "vocab": c["vocab_size"],
        "width": c["hidden_size"],
        "layers": c["num_hidden_layers"],
        "heads": heads,
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head_dim": c.get("head_dim") or c["hidden_size"] // heads,
        "hidden": c["intermediate_size"],
        "positions": c["max_position_embeddings"],
        "norm_eps": float(c.get("rms_norm_eps", 1e-6)),
        "tied": bool(c.get("tie_word_embeddings", False)),
        "activation": _families.activation(c),
        "windows": _hf_layers.windows(family, c),
    }
    return _config.DecoderConfig(
        family=family,
        **fields | _families.FAMILIES[family].fields(c),
        compute_dtype=compute_dtype,
        remat=remat,
        eos_ids=_eos_ids(complete, given),
        source=text,
    )


def _eos_ids(complete: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of generation_config.json and of config.json, in increasing order.

    Where neither names any, those of the class in transformers that the model has.

    Args:
        complete: the content of config.json.
        given: that of the text model, if it is multimodal.
    """
    found: set[int | None] = set()
    parts = (complete, complete.get("text_config"), complete.get(GENERATION))
    named = [x["eos_token_id"] for x in parts if x and "eos_token_id" in x]
    for ids in named:
        found |= set(ids if isinstance(ids, list) else [ids])
    if not named:
        usual, size = _families.EOS_IDS[given["model_type"]], given["vocab_size"]
        found = {index for index in usual if index < size}
    return tuple(sorted(found - {None}))


def write(config: _config.DecoderConfig, dtype: str) -> str:
    """config.json for a checkpoint saved in `dtype`.

    All settings of the original config.json are written unchanged if they describe the
    model. Otherwise, or if there were none, the settings that the decoder has are
    written from `config`.
    """
    settings = json.loads(config.source)
    if not _describes(config):
        spelled = ("rope_parameters", "rope_scaling", "rope_theta", "num_local_experts")
        others = {name: v for name, v in settings.items() if name not in spelled}
        settings = others | _settings(config)
    if _eos_ids(settings, settings) != config.eos_ids:
        ids = list(config.eos_ids)
        settings["eos_token_id"] = ids if len(ids) > 1 else next(iter(ids), None)
    names = [name for name in ("dtype", "torch_dtype") if name in settings]
    settings |= dict.fromkeys(names or ["torch_dtype"], dtype)
    return json.dumps(settings, indent=2) + "\n"


def is_multimodal(text: str) -> bool:
    """Whether config.json is that of a multimodal model."""
    return _families.text_model(json.loads(text)) is not None


def architecture(family: str) -> str:
    """The transformers class that a family's config.json names."""
    return _families.FAMILIES[family].architecture


def _describes(config: _config.DecoderConfig) -> bool:
    """Whether the config's source parses to the config."""
    try:
        parsed = parse(config.source)
    except ValueError:
        return False
    same = {name: getattr(config, name) for name in _RUNNING}
    return dataclasses.replace(parsed, **same) == config


def _settings(config: _config.DecoderConfig) -> dict[str, Any]:
    """The transformers 4 spelling, which transformers 5 and servers also read."""
    c = config
    if c.family not in FAMILIES:
        raise ValueError(
            f"hf.save needs a config of the family {_checks.listed(FAMILIES)}, got "
            f"{c.family!r}. Set DecoderConfig(family=...) to the nearest one."
        )
    settings = _families.settings(c)
    back = parse(json.dumps(settings))
    if c.rope and back.rope and c.rope.kind in ("default", "linear"):
        # These kinds do not use the original length, so it may differ.
        original = c.rope.original_positions
        rope = dataclasses.replace(back.rope, original_positions=original)
        back = dataclasses.replace(back, rope=rope)
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


def _refuse(given: Mapping[str, Any]) -> None:
    """Raises for settings that would change the computation in an unsupported way."""
    if given.get("quantization_config"):
        method = given["quantization_config"].get("quant_method")
        raise ValueError(
            f"{_OWNER} needs plain floating-point weights, got a checkpoint quantized "
            f"with {method!r} (quantization_config). Load the original release instead."
        )
