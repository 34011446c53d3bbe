# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a model read on calibration rows, for edits that look at it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, trees
from jaxunlearn.edits import _quantize
from jaxunlearn.typing import Array, Batch, Model, Params


class Inputs(NamedTuple):
    """Statistics of a site's value x over all real tokens of all rows, in float32.

    Attributes:
        gram: [n layers, units, units], the sum of x x^T.
        mean: [n, units], the mean of |x|.
        largest: [n, units], the maximum of |x|.
        tokens: int32[], how many real tokens that were.
    """

    gram: Array
    mean: Array
    largest: Array
    tokens: Array


def collect(
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    layers: Sequence[int] | None = None,
) -> dict[str, Inputs]:
    """Statistics of every site that kernels read, from one forward pass over the rows.

    Args:
        model: whose sites name their readers, as those of `models.make` do.
        params: its parameters.
        batches: rows with `tokens` and `mask`; one batch is in memory at a time.
        layers: which layers to look at; None means all. The pass ends at the last one.
    Returns:
        Inputs by the site's name.
    Raises:
        ValueError: if no site names a reader, there is no batch or no real token, or an
            input is not finite.
    """
    sites = {name: site for name, site in model.sites.items() if site.readers}
    if not sites or not batches:
        raise ValueError(
            "edits that look at inputs need a model whose sites name the kernels that "
            f"read them and at least one batch, got sites {_checks.listed(sites)} and "
            f"{len(batches)} batches. Use models.make, and data.encode for the rows."
        )
    layers = tuple(range(_layers(model)) if layers is None else layers)
    shapes = {name: (len(layers), site.units) for name, site in sites.items()}
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    sums = {
        name: Inputs(zeros((*s, s[1])), zeros(s), zeros(s), jnp.zeros([], jnp.int32))
        for name, s in shapes.items()
    }
    for batch in batches:
        columns = {"tokens": batch["tokens"], "mask": batch["mask"]}
        sums = _add(model, layers, params, columns, sums)
    tokens = next(iter(sums.values())).tokens
    if not isinstance(tokens, jax.core.Tracer) and not tokens:
        raise ValueError(
            "edits that look at inputs need rows with real tokens, got "
            f"{len(batches)} batches whose masks are all False. Look at the mask."
        )
    for name, each in sums.items():
        traced = isinstance(tokens, jax.core.Tracer)
        if not traced and not jnp.isfinite(each.mean).all():
            raise ValueError(
                "edits that look at inputs need finite ones, got some at the site "
                f"{name!r} that are not. The model has broken down on these rows, or "
                "its weights are not finite."
            )
    count = jnp.maximum(tokens, 1).astype(jnp.float32)
    return {name: x._replace(mean=x.mean / count) for name, x in sums.items()}


def check_tokens(owner: str, kernels: Mapping[str, Array], inputs: Inputs) -> None:
    """Raises ValueError where the gram matrix cannot have full rank, so that errors in
    some directions would count for nothing; a traced count is not known."""
    units = inputs.gram.shape[-1]
    if not isinstance(inputs.tokens, jax.core.Tracer) and inputs.tokens < units:
        raise ValueError(
            f"{owner} needs at least as many calibration tokens as a kernel has "
            f"inputs, got {int(inputs.tokens)} tokens and {_checks.listed(kernels)} "
            f"with {units} inputs: errors would go where no row looks. Give more rows."
        )


def map_sites(
    owner: str,
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    function: Callable[[Mapping[str, Array], Inputs], Mapping[str, Array]],
    *,
    pattern: str,
    at_once: int | None,
    donate: bool,
) -> Params:
    """params with function({path: [n, in, out]}, Inputs) for the kernels of each site.

    Args:
        owner: who asks, for errors.
        function: also gets only the kernels whose whole path matches `pattern`.
        at_once: how many layers are looked at, then edited, in one go; None means all.
        donate: whether leaves are freed as soon as they have been edited.
    """
    at_once = _layers(model) if at_once is None else at_once
    _checks.positive_int(owner, at_once=at_once)
    matched = trees.paths(trees.split(params, pattern)[0])
    readers = {path for site in model.sites.values() for path in site.readers}
    strange = [path for path in matched if path not in readers]
    if strange:
        raise ValueError(
            f"{owner} needs kernels whose input is a site of the model, got "
            f"{_checks.listed(strange)}. Name fewer leaves in pattern; the sites' "
            f"readers are {_checks.listed(sorted(readers), 16)}."
        )
    for first in range(0, _layers(model), at_once):
        layers = tuple(range(first, min(first + at_once, _layers(model))))
        inputs = collect(model, params, batches, layers)
        for name, site in model.sites.items():
            ours = [path for path in site.readers if path in matched]
            if not ours:
                continue
            leaves = trees.paths(params)
            kernels = {path: leaves[path][layers[0] : layers[-1] + 1] for path in ours}
            edited = function(kernels, inputs.pop(name))
            params = _with(params, edited, layers, donate)
    return params


def _with(params: Params, edited: Mapping[str, Array], layers, donate) -> Params:
    """params with the edited layers of some leaves, in their dtypes and shards."""

    def leaf(path, x):
        if path not in edited:
            return x
        new = edited[path].astype(x.dtype)
        if len(layers) < len(x):
            new = x.at[layers[0] : layers[-1] + 1].set(new)
        return _quantize.placed(new, x, free=donate)

    return trees.map_with_path(leaf, params)


def _layers(model: Model) -> int:
    return max((site.layers for site in model.sites.values()), default=1)


@partial(jax.jit, static_argnames=("model", "layers"), donate_argnames="sums")
def _add(model, layers, params, batch, sums):
    taps = {name: layers for name in sums}
    values = model.apply(params, batch, taps=taps, until=layers[-1]).taps
    real = batch["mask"][None, :, :, None]

    def add(name, total):
        x = jnp.where(real, values[name].astype(jnp.float32), 0)
        gram = jnp.einsum("nblu,nblv->nuv", x, x, precision="highest")
        size = jnp.abs(x)
        return Inputs(
            total.gram + gram,
            total.mean + jnp.sum(size, axis=(1, 2)),
            jnp.maximum(total.largest, jnp.max(size, axis=(1, 2))),
            total.tokens + jnp.sum(batch["mask"], dtype=jnp.int32),
        )

    return {name: add(name, total) for name, total in sums.items()}
