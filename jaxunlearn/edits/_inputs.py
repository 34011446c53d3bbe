# SPDX-License-Identifier: Apache-2.0
"""Statistics of the kernels' inputs on calibration rows, for edits that need them."""

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
        tokens: int32[], number of real tokens.
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
        model: one whose sites name their readers, such as those of `models.make`.
        params: its parameters.
        batches: rows with `tokens` and `mask`; one batch is in memory at a time.
        layers: indices of the layers; None means all. The pass ends at the last one.
    Returns:
        Inputs by the site's name.
    Raises:
        ValueError: if no site names a reader, there is no batch or no real token, or an
            input is not finite.
    """
    sites = {name: site for name, site in model.sites.items() if site.readers}
    if not sites or not batches:
        raise ValueError(
            "collect_inputs needs a model whose sites name the kernels that read them "
            f"and at least one batch, got sites {_checks.listed(sites)} and "
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
        _checks.token_ids("collect_inputs", model, columns)
        sums = _add(model, layers, params, columns, sums)
    tokens = next(iter(sums.values())).tokens
    if not isinstance(tokens, jax.core.Tracer) and not tokens:
        raise ValueError(
            "collect_inputs needs rows with real tokens, got "
            f"{len(batches)} batches whose mask is False everywhere. Check the mask."
        )
    for name, each in sums.items():
        traced = isinstance(tokens, jax.core.Tracer)
        if not traced and not jnp.isfinite(each.mean).all():
            raise ValueError(
                "collect_inputs needs finite inputs, got others at the site "
                f"{name!r}. Check that the weights are finite and the model has not "
                "diverged."
            )
    count = jnp.maximum(tokens, 1).astype(jnp.float32)
    return {name: x._replace(mean=x.mean / count) for name, x in sums.items()}


def check_tokens(owner: str, kernels: Mapping[str, Array], inputs: Inputs) -> None:
    """Raises ValueError if there are too few tokens for a gram matrix of full rank.

    Errors in some directions would then have no cost. A traced count is not checked.
    """
    units = inputs.gram.shape[-1]
    if not isinstance(inputs.tokens, jax.core.Tracer) and inputs.tokens < units:
        raise ValueError(
            f"{owner} needs at least as many calibration tokens as a kernel has "
            f"inputs, got {int(inputs.tokens)} tokens for {units} inputs of "
            f"{_checks.listed(kernels)}. Pass more rows."
        )


def map_sites(
    owner: str,
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    function: Callable[[Mapping[str, Array], Inputs], Mapping[str, Array]],
    *,
    pattern: str,
    layers_per_pass: int | None,
    donate: bool,
) -> Params:
    """params with function({path: [n, in, out]}, Inputs) for the kernels of each site.

    Args:
        owner: name of the calling function, for errors.
        function: gets the kernels whose whole path matches `pattern`.
        layers_per_pass: number of layers whose inputs are collected in one pass, before
            these layers are edited; None means all.
        donate: whether leaves are freed as soon as they have been edited.
    """
    layers_per_pass = _layers(model) if layers_per_pass is None else layers_per_pass
    _checks.positive_int(owner, layers_per_pass=layers_per_pass)
    matched = trees.paths(trees.split(params, pattern)[0])
    readers = {path for site in model.sites.values() for path in site.readers}
    if others := [path for path in matched if path not in readers]:
        raise ValueError(
            f"{owner} needs a pattern that matches only kernels whose input is a site, "
            f"got {_checks.listed(others)}. The kernels that read a site are "
            f"{_checks.listed(sorted(readers), 16)}."
        )
    for first in range(0, _layers(model), layers_per_pass):
        layers = tuple(range(first, min(first + layers_per_pass, _layers(model))))
        inputs = collect(model, params, batches, layers)
        for name, site in model.sites.items():
            paths = [path for path in site.readers if path in matched]
            if not paths:
                continue
            leaves = trees.paths(params)
            kernels = {path: leaves[path][layers[0] : layers[-1] + 1] for path in paths}
            edited = function(kernels, inputs.pop(name))
            params = _with(params, edited, layers, donate)
    return params


def _with(params: Params, edited: Mapping[str, Array], layers, donate) -> Params:
    """params with the edited layers of some leaves, in their dtypes and sharding."""

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
