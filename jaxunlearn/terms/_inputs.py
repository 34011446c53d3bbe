# SPDX-License-Identifier: Apache-2.0
"""Checks of the loss, the model and the streams that a term is made of."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxunlearn.typing import Array, Model


def check(owner: str, loss: Any, model: Any, *streams: Any) -> None:
    """Raises TypeError unless these are a loss, a Model and names of streams."""
    if isinstance(loss, Model) or not callable(loss) or not isinstance(model, Model):
        raise TypeError(
            f"{owner} needs (loss, model, stream): a function and then a Model, got "
            f"loss={_name(loss)} and model={_name(model)}. Put the loss first; a Flax "
            "module becomes a Model by models.from_nnx or models.from_linen."
        )
    for stream in streams:
        if not isinstance(stream, str):
            raise TypeError(
                f"{owner} needs the name of a stream, got stream={_name(stream)}. Pass "
                "the key of the loader's dict, such as 'forget'."
            )


def takes_where(owner: str, loss: Callable[..., Array]) -> None:
    """Raises TypeError unless the loss has a parameter `where`."""
    parameters = inspect.signature(loss).parameters
    if "where" not in parameters and not any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    ):
        raise TypeError(
            f"{owner} needs a loss with a parameter `where` (bool, True: the token "
            f"counts), got {_name(loss)}({', '.join(parameters)}). Add `*, where` and "
            "return 0 where it is False."
        )


def not_averaged(
    owner: str, loss: Callable, values: Any, shape: tuple[int, ...], unit: str
) -> None:
    """Raises ValueError unless the loss returned one value for each row or token."""
    if jnp.shape(values) != shape:
        raise ValueError(
            f"{owner} needs a loss that returns one value for each {unit}, shape "
            f"{shape}, got shape {jnp.shape(values)} from {_name(loss)}. Return the "
            "values without summing or averaging; the term averages them."
        )


def columns(loss: Callable[..., Array]) -> tuple[str, ...]:
    """Names of the loss's positional parameters after the first without a default."""
    parameters = list(inspect.signature(loss).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in kinds and p.name != "where"
    )


def _name(value: Any) -> str:
    if isinstance(value, Model):
        return "a Model"
    value = getattr(value, "func", value)  # of a functools.partial
    return getattr(value, "__name__", None) or f"a {type(value).__name__}"
