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


def layer_types(c: _config.DecoderConfig) -> list[str]:
    """The setting layer_types of a model with these windows."""
    return [
        "full_attention" if window is None else "sliding_attention"
        for window in c.windows or (None,) * c.layers
    ]
