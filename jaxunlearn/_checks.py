# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, and the wording of their errors.

Every message states what was needed, what came, and what to do. Only shapes, dtypes and
Python numbers are checked; a traced value always passes.
"""

import difflib
import functools
import importlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def _number(value: Any) -> float | None:
    """The Python value of a concrete scalar; None for a traced or callable value."""
    if isinstance(value, jax.core.Tracer) or callable(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"A number was needed, got {value!r} of type {type(value).__name__}."
        ) from None


def positive(owner: str, **values: Any) -> None:
    """Raises ValueError unless each concrete value is finite and > 0."""
    for name, value in values.items():
        number = _number(value)
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ValueError(f"{owner} needs {name} > 0, got {name}={value}.")


def not_negative(owner: str, **values: Any) -> None:
    """Raises ValueError unless each concrete value is finite and >= 0."""
    for name, value in values.items():
        number = _number(value)
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{owner} needs {name} >= 0, got {name}={value}.")


def finite(owner: str, **values: Any) -> None:
    """Raises ValueError unless each concrete value is finite."""
    for name, value in values.items():
        number = _number(value)
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{owner} needs a finite {name}, got {name}={value}.")


def positive_int(owner: str, **values: Any) -> None:
    """Raises TypeError or ValueError unless each value is an integer >= 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{owner} needs an integer {name}, got {name}={value!r}.")
        if value < 1:
            raise ValueError(f"{owner} needs {name} >= 1, got {name}={value}.")


def integers(owner: str, **arrays: Any) -> None:
    """Raises TypeError unless each array has an integer dtype."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(
                f"{owner} needs integer {name}, got {name} of dtype {array.dtype}. "
                "Convert them to int32."
            )


def one_of(owner: str, allowed: Collection[str], **values: Any) -> None:
    """Raises ValueError unless each value is one of `allowed`."""
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(
                f"{owner} needs {name} to be one of {listed(allowed)}, got "
                f"{name}={value!r}.{_closest(value, allowed)}"
            )


def same_shape(owner: str, **arrays: Any) -> None:
    """Raises ValueError unless all arrays that are not None have one shape."""
    shapes = {
        name: jnp.shape(array) for name, array in arrays.items() if array is not None
    }
    if len(set(shapes.values())) > 1:
        came = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{owner} needs arrays of one shape, got {came}.")


def texts(owner: str, **lists: Any) -> None:
    """Raises unless each value is a list of texts; None passes.

    Raises:
        TypeError: for one text, an iterator, which could be read only once, or
            something else that is not a list.
        ValueError: naming the row, for a value that `not_text` describes.
    """
    for name, values in lists.items():
        if values is None:
            continue
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise TypeError(
                f"{owner} needs a list of texts as {name}, got {short(values)} of type "
                f"{type(values).__name__}. Put one text in a list: [text]."
            )
        if isinstance(values, Iterator):
            raise TypeError(
                f"{owner} needs a list of texts as {name}, got an iterator of type "
                f"{type(values).__name__}. Make a list of it: list(...)."
            )
        for row, value in enumerate(values):
            if problem := not_text(value):
                raise ValueError(
                    f"{owner} needs texts as {name}, got {problem} in row {row}. "
                    "Remove the row, or convert its value to a text."
                )


def token_ids(
    owner: str,
    model: Any,
    batch: Mapping[str, Any],
    *,
    first_row: int = 0,
    tokenizer: Any = None,
) -> None:
    """Raises ValueError naming row and token for an id that the model does not have.

    Neither the embedding nor the logits have a row for such an id, and a compiled
    program would read another row in its place without an error.

    Args:
        owner: what needs the ids; begins the error.
        model: a Model, whose vocabulary is that of its config or else its number of
            logits.
        batch: `tokens` [n, ..., L] int and optionally `mask`, both of one shape; ids
            where it is False are padding and may be anything. Traced arrays and those
            of several processes pass.
        first_row: what the error calls the first row.
        tokenizer: if given, the error has the token's text.
    """
    tokens = batch["tokens"]
    vocab = _vocabulary(model) if _on_host(tokens) else None
    if vocab is None:
        return
    tokens, mask = jax.device_get((tokens, batch.get("mask")))
    if not tokens.size or (tokens.min() >= 0 and tokens.max() < vocab):
        return
    bad = (tokens < 0) | (tokens >= vocab)
    bad = bad if mask is None else bad & mask
    if bad.any():
        row, *place = (int(each[0]) for each in bad.nonzero())
        token = int(tokens[(row, *place)])
        text = "" if tokenizer is None else _token(tokenizer, token)
        raise ValueError(
            f"{owner} needs token ids from 0 to {vocab - 1}, the model's vocabulary, "
            f"got {token}{text} in row {first_row + row} at position {place[-1]}. "
            "Encode with the model's tokenizer, or give the embedding a row for each "
            "token, as resize_token_embeddings of transformers does."
        )


def _vocabulary(model: Any) -> int | None:
    """The number of ids of a model; None for a model that reads no tokens."""
    vocab = getattr(model.config, "vocab", None)
    return _num_logits(model) if vocab is None else vocab


@functools.lru_cache(maxsize=32)
def _num_logits(model: Any) -> int | None:
    def logits(key):
        params = model.init(key)
        batch = {"tokens": jnp.zeros((1, 2), jnp.int32), "mask": jnp.ones((1, 2), bool)}
        return model.unembed(params, model.apply(params, batch).hidden)

    try:  # shapes alone, nothing is computed
        return jax.eval_shape(logits, jax.random.key(0)).shape[-1]
    except Exception:  # a user's model may raise anything for this batch
        return None


def _token(tokenizer: Any, token: int) -> str:
    return f" ({tokenizer.convert_ids_to_tokens(token)!r})" if token >= 0 else ""


def pairs(owner: str, columns: Mapping[str, Any]) -> None:
    """Raises ValueError unless all columns `pair`, given by stream, are equal."""
    if not all(map(_on_host, columns.values())):
        return
    (first, one), *others = jax.device_get(dict(columns)).items()
    for name, other in others:
        if one.shape != other.shape or (one != other).any():
            row = (one != other).argmax() if one.shape == other.shape else 0
            raise ValueError(
                f"{owner} needs batches whose rows belong together, but row {row} of "
                f"{name!r} is not the pair of row {row} of {first!r}. Draw both by one "
                "data.streams, from tables that data.paired returned together."
            )


def _on_host(array: Any) -> bool:
    """Whether the values of an array can be read here."""
    if isinstance(array, jax.core.Tracer):
        return False
    return getattr(array, "is_fully_addressable", True)


def not_text(value: Any) -> str:
    """What is wrong with a value that is not a text of UTF-8; "" for a text."""
    if value is None:
        return "None (a missing value)"
    if not isinstance(value, str):
        return f"{short(value)} of type {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"{short(value)} with a lone surrogate at character {error.start}"
    return ""


def short(value: Any, max_length: int = 60) -> str:
    """The repr of a value in ASCII, cut after `max_length` characters."""
    shown = ascii(value)
    return shown if len(shown) <= max_length else f"{shown[: max_length - 3]}..."


def mask(owner: str, where: Any, **arrays: Any) -> None:
    """Raises unless `where` is None or a boolean array of the shape of every array."""
    if where is None:
        return
    if jnp.asarray(where).dtype != jnp.bool_:
        raise TypeError(
            f"{owner} needs a boolean where, got dtype {jnp.asarray(where).dtype}. "
            "Compare it with 0 first."
        )
    same_shape(owner, where=where, **arrays)


def has_keys(
    owner: str, what: str, needed: Iterable[str], came: Iterable[str], fix: str
) -> None:
    """Raises KeyError with the missing keys, the given keys, and what to do."""
    came = list(came)
    missing = [name for name in needed if name not in came]
    if missing:
        raise Missing(
            f"{owner} reads {what} {listed(missing)}, but there is {listed(came)}. "
            + fix
        )


def library(owner: str, name: str, extra: str, instead: str = "") -> Any:
    """Imports an optional library.

    Args:
        owner: what needs it; begins the error.
        name: dotted name of the module.
        extra: the extra of jaxunlearn that installs it.
        instead: what can be done without it; ends the error.
    Raises:
        ImportError: naming the library and the extra, if the import fails.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{owner} needs the library {name.partition('.')[0]}, got {error}. Run "
            f"pip install 'jaxunlearn[{extra}]'{instead}."
        ) from error


class Missing(KeyError):
    """A KeyError whose message prints as written (KeyError itself prints a repr)."""

    def __str__(self) -> str:
        return str(self.args[0])


def listed(names: Iterable[Any], max_names: int = 8) -> str:
    """'a', 'b' and 3 more."""
    names = list(names)
    if not names:
        return "nothing"
    shown = ", ".join(repr(name) for name in names[:max_names])
    rest = len(names) - max_names
    return shown if rest <= 0 else f"{shown} and {rest} more"


def _closest(value: Any, allowed: Collection[str]) -> str:
    close = difflib.get_close_matches(str(value), [str(name) for name in allowed], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
