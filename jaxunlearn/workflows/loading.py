# SPDX-License-Identifier: Apache-2.0
"""Loads the model that a command names, with its tokenizer."""

import os
from typing import Any

from jax.sharding import Mesh

from jaxunlearn.io import hf
from jaxunlearn.typing import Model, Params

# config -> model. Compiled programs belong to a Model object, so models of one config
# share one, and the unlearned model needs no compilation after the original.
_MODELS: dict[str, Model] = {}


def load(
    path: str | os.PathLike,
    *,
    dtype: str = "float32",
    compute_dtype: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[Model, Params, Any]:
    """(model, params, tokenizer) for a workflow that reads texts.

    Args:
        path: as in hf.load: a folder, a GGUF file, an adapter, a name on the hub, or
            "smollm2".
        dtype: of the params.
        compute_dtype: as in hf.load; `model.config` has what "auto" stands for.
        mesh: where the params are placed; one device if None.
    Raises:
        FileNotFoundError, ValueError: if there is no such model, or no tokenizer.
    """
    model, params, tokenizer = hf.load(
        path,
        dtype=dtype,
        compute_dtype=compute_dtype,
        remat="none",
        mesh=mesh,
    )
    check_tokenizer(tokenizer, path)
    return _MODELS.setdefault(repr(model.config), model), params, tokenizer


def check_tokenizer(tokenizer: Any, path: str | os.PathLike) -> None:
    """Raises an error, naming the model's path, if there is no readable tokenizer."""
    if isinstance(tokenizer, hf.UnreadableTokenizer):
        raise tokenizer.reason
    if tokenizer is None:
        raise ValueError(
            f"A model needs its tokenizer to be evaluated, got {path} without one. "
            "Save it with hf.save(..., tokenizer=tokenizer) or hf.save_gguf, or copy "
            "tokenizer.json and tokenizer_config.json into the folder (files next to a "
            ".gguf file are not read)."
        )
