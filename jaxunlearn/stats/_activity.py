# SPDX-License-Identifier: Apache-2.0
"""Activity and moments of units at sites of a model."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxunlearn import _checks, sharding
from jaxunlearn.typing import Array, Batch, Model, Params, Site

_OWNER = "stats.activity"


class Activity(NamedTuple):
    """Statistics of each unit's value z over real tokens.

    Attributes:
        count: int32[], number of tokens.
        mean: [N layers, units] float32, the mean of z.
        abs: [N layers, units] float32, the mean of |z|.
        rms: [N layers, units] float32, the square root of the mean of z^2.
        freq: [N layers, units] float32, fraction of tokens with z > 0, in [0, 1].
        std: [N layers, units] float32, the square root of the mean of (z - mean)^2.

    Paper and code: in the released package `std` is the unbiased variance,
        std^2 count / (count - 1), and `rms` is the square root of the square of that
        variance plus mean^2. For small eps its `std` ranks units as std does here; its
        `rms` does not.

    References: https://arxiv.org/abs/2403.01267
    """

    count: Array
    mean: Array
    abs: Array
    rms: Array
    freq: Array
    std: Array


class _Sums(NamedTuple):
    """Running sums; `mean` and `squares` (squared distances from it) are merged."""

    absolute: Array
    positive: Array
    mean: Array
    squares: Array


def activity(
    model: Model,
    params: Params,
    batches: Iterable[Batch],
    sites: Sequence[str] = ("mlp",),
    *,
    mesh: Mesh | None = None,
) -> dict[str, Activity]:
    """Statistics of the units in all layers of some sites, from one forward pass.

    Sums are accumulated in float32 over the batches and divided once. Means and
    variances of batches are merged (Chan et al. 1979), because a difference of large
    sums would lose a small variance. The result does not depend on how rows are divided
    into batches. The values of all layers for one batch are in memory at a time:
    [N, B, L, units] in the compute dtype.

    Args:
        model: a model with the `sites`.
        params: its parameters.
        batches: rows with `tokens` and `mask`. Consumed once; a generator is fine.
        sites: names of sites.
        mesh: the mesh of the params, if they are sharded; rows are put onto it.
    Returns:
        site -> Activity.
    Raises:
        ValueError: if a site does not exist, or no batch has a real token.
    References: https://arxiv.org/abs/2403.01267
    """
    for site in sites:
        _checks.one_of(_OWNER, model.sites, site=site)
    shapes = {name: _shape(model.sites[name]) for name in sites}
    real = partial(jnp.zeros, dtype=jnp.float32)
    sums = {
        name: _Sums(real(s), jnp.zeros(s, jnp.int32), real(s), real(s))
        for name, s in shapes.items()
    }
    count = jnp.int32(0)
    with sharding.on_mesh(mesh):
        for batch in batches:
            columns = {"tokens": batch["tokens"], "mask": batch["mask"]}
            _checks.token_ids(_OWNER, model, columns)
            if mesh is not None:
                columns = sharding.put_rows(columns, mesh)
            count, sums = _add(model, params, columns, count, sums)
    if not int(count):
        raise ValueError(
            f"{_OWNER} needs at least one real token, got none. Check the masks, and "
            "that batches is not a generator that was consumed before."
        )
    return {name: _divide(count, x) for name, x in sums.items()}


class Moments(NamedTuple):
    """First and second moments of a site's values h over real tokens.

    Attributes:
        count: int32[], number of tokens.
        mean: [n layers, units] float32, the mean of h.
        second: [n layers, units, units] float32, the mean of h h^T, uncentred.
    """

    count: Array
    mean: Array
    second: Array


def moments(
    model: Model,
    params: Params,
    batches: Iterable[Batch],
    sites: Mapping[str, Sequence[int]],
) -> dict[str, Moments]:
    """Means and second moments of values at some layers of sites, from one pass.

    Sums are accumulated in float32 over the batches and divided once.

    Args:
        model: a model with the sites.
        params: its parameters.
        batches: rows with `tokens` and `mask`. Consumed once; a generator is fine.
        sites: site -> layers.
    Returns:
        site -> Moments, with layers in the given order.
    Raises:
        ValueError: if a site or layer does not exist, or there is no real token.
    """
    owner = "stats.moments"
    for site in sites:
        _checks.one_of(owner, model.sites, site=site)
    taps = tuple((site, tuple(layers)) for site, layers in sites.items())
    total = None
    for batch in batches:
        columns = {"tokens": batch["tokens"], "mask": batch["mask"]}
        _checks.token_ids(owner, model, columns)
        new = _moment_sums(model, taps, params, columns)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    if total is None or not int(total[0]):
        raise ValueError(
            f"{owner} needs at least one real token, got none. Check the masks, and "
            "that batches is not a generator that was consumed before."
        )
    count, sums = total
    return {
        site: Moments(count, *(x / count.astype(jnp.float32) for x in pair))
        for site, pair in sums.items()
    }


@partial(jax.jit, static_argnames=("model", "taps"))
def _moment_sums(model, taps, params, batch):
    real = batch["mask"][None, :, :, None]
    values = model.apply(params, batch, taps=dict(taps)).taps

    def sums(x):
        x = jnp.where(real, x.astype(jnp.float32), 0)
        highest = jax.lax.Precision.HIGHEST
        second = jnp.einsum("nbld,nble->nde", x, x, precision=highest)
        return jnp.sum(x, axis=(1, 2)), second

    count = jnp.sum(batch["mask"], dtype=jnp.int32)
    return count, {site: sums(x) for site, x in values.items()}


def pooled(activity: Activity, site: Site) -> Activity:
    """Statistics of value units, over tokens and over all heads that share the unit.

    With grouped queries several query heads read the same value unit. For the site
    `attention` of the decoder, statistics [N, heads * head_dim] become
    [N, kv_heads * head_dim], for which `edits.prune_units` removes a value unit from
    all its heads. Without shared units the result equals `activity`.

    Args:
        activity: statistics of `site`.
        site: a site of the same model.
    Returns:
        Activity of the value units; its count includes the heads.
    Raises:
        ValueError: if the shape of the statistics is not that of the site.
    """
    if activity.mean.shape != _shape(site):
        raise ValueError(
            f"stats.pooled needs statistics of shape {_shape(site)}, the site's "
            f"[layers, units], got {activity.mean.shape}. Take both from one model."
        )
    heads, size = site.grouping

    def over_heads(x):
        shared = x.reshape(site.layers, -1, heads, size)
        return jnp.mean(shared, axis=2).reshape(site.layers, -1)

    count, mean, absolute, rms, freq, std = activity
    pooled_mean = over_heads(mean)
    deviation = mean.reshape(site.layers, -1, heads, size)
    deviation = deviation - pooled_mean.reshape(site.layers, -1, 1, size)
    between = over_heads(jnp.square(deviation).reshape(mean.shape))
    return Activity(
        count * heads,
        pooled_mean,
        over_heads(absolute),
        jnp.sqrt(over_heads(jnp.square(rms))),
        over_heads(freq),
        jnp.sqrt(over_heads(jnp.square(std)) + between),
    )


def _shape(site: Site) -> tuple[int, int]:
    return site.layers, site.units


@partial(jax.jit, static_argnames="model", donate_argnames=("count", "sums"))
def _add(model, params, batch, count, sums):
    taps = {name: tuple(range(model.sites[name].layers)) for name in sums}
    values = model.apply(params, batch, taps=taps).taps
    mask = batch["mask"]
    real = mask[None, :, :, None]
    new = jnp.sum(mask, dtype=jnp.int32)
    total = count + new
    num_new, num_before, num_total = (
        x.astype(jnp.float32) for x in (new, count, total)
    )
    new_or_1, total_or_1 = jnp.maximum(num_new, 1), jnp.maximum(num_total, 1)

    def over_tokens(x):
        return jnp.sum(x, axis=(1, 2), dtype=x.dtype)

    def add(name, so_far):
        # Values at padding may be NaN.
        x = jnp.where(real, values[name].astype(jnp.float32), 0)
        mean = over_tokens(x) / new_or_1
        centred = jnp.where(real, x - mean[:, None, None], 0)
        gap = mean - so_far.mean
        return _Sums(
            so_far.absolute + over_tokens(jnp.abs(x)),
            so_far.positive + over_tokens((x > 0).astype(jnp.int32)),
            so_far.mean + gap * (num_new / total_or_1),
            so_far.squares
            + over_tokens(jnp.square(centred))
            + jnp.square(gap) * (num_before * num_new / total_or_1),
        )

    return total, {name: add(name, x) for name, x in sums.items()}


@jax.jit
def _divide(count, sums):
    tokens = count.astype(jnp.float32)
    variance = sums.squares / tokens
    return Activity(
        count,
        sums.mean,
        sums.absolute / tokens,
        jnp.sqrt(variance + jnp.square(sums.mean)),
        sums.positive.astype(jnp.float32) / tokens,
        jnp.sqrt(variance),
    )
