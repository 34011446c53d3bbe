# SPDX-License-Identifier: Apache-2.0
"""What one family of models is, for the tables of families."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxunlearn.io import _hf_layers
from jaxunlearn.models import _config


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


def refuse(c: Mapping[str, Any], **supported: Any) -> None:
    """Raises for a setting whose value is not the supported one."""
    for name, value in supported.items():
        came = c.get(name, value)
        if came != value and not (value is False and came is None):
            raise _hf_layers.unsupported(name, repr(came), repr(value))


def multipliers(c: Mapping[str, Any]) -> dict[str, float]:
    """The four factors of Granite's networks."""
    return {
        "embed_scale": float(c.get("embedding_multiplier", 1.0)),
        "attention_scale": float(c.get("attention_multiplier", 1.0)),
        "residual_scale": float(c.get("residual_multiplier", 1.0)),
        "logit_divisor": float(c.get("logits_scaling", 1.0)),
    }


def written_multipliers(c: _config.DecoderConfig) -> dict[str, float]:
    """The settings that `multipliers` reads."""
    return {
        "embedding_multiplier": c.embed_scale or 1.0,
        "attention_multiplier": c.attention_scale or c.head_dim**-0.5,
        "residual_multiplier": c.residual_scale or 1.0,
        "logits_scaling": c.logit_divisor or 1.0,
    }


def layer_types(c: _config.DecoderConfig) -> list[str]:
    """The setting layer_types of a model with these windows."""
    return [
        "full_attention" if window is None else "sliding_attention"
        for window in c.windows or (None,) * c.layers
    ]
