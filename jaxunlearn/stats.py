# SPDX-License-Identifier: Apache-2.0
"""What a model does on some data: how active its units are, how its weights matter.

    forget = stats.activity(model, params, forget_batches)["mlp"]
    retain = stats.activity(model, params, retain_batches)["mlp"]
    scores = edits.unit_scores(forget.abs, retain.abs)

Padding counts nowhere. A unit is a unit of a site: of `mlp`, what the down projection
reads (of gated MLPs the product); of `attention`, what the output projection reads.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxunlearn import _checks, sharding
from jaxunlearn.typing import Array, Batch, Model, Params, PRNGKey, Site, Streams, Term

_OWNER = "stats.activity"


class Activity(NamedTuple):
    """Statistics of each unit's value z over real tokens.

    Attributes:
        count: int32[], how many tokens.
        mean: [N layers, units] float32, the mean of z.
        abs: the mean of |z|.
        rms: the root of the mean of z^2.
        freq: the fraction of tokens with z > 0, in [0, 1].
        std: the root of the mean of (z - mean)^2.

    Paper and code: the released package's `std` is the unbiased variance, and its `rms`
    the root of that variance squared plus the squared mean. These here are the
    statistics by their names; `as_released` gives its numbers.

    References: https://arxiv.org/abs/2403.01267
    """

    count: Array
    mean: Array
    abs: Array
    rms: Array
    freq: Array
    std: Array


class _Sums(NamedTuple):
    """Sums over the tokens so far; mean, and squared distances from it, are merged."""

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
    """All statistics of all units in all layers, from one forward pass over the rows.

    Sums run in float32, batch by batch, and are divided once; of mean and variance the
    pairs are merged (Chan et al. 1979), as a difference of large sums would lose a
    small variance. So rows may be cut into batches in any way. One batch's values of
    all layers are in memory at a time: [N, B, L, units] in the compute dtype.

    Args:
        model: whose `sites` are looked at.
        params: its parameters.
        batches: rows with `tokens` and `mask`; read once, so a generator does.
        sites: names of sites.
        mesh: where the params lie, if they do on one; rows are then put onto it.
    Returns:
        Activity by the site's name.
    Raises:
        ValueError: if a site does not exist, or there is no real token in any batch.
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
    place = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with place:
        for batch in batches:
            columns = {"tokens": batch["tokens"], "mask": batch["mask"]}
            if mesh is not None:
                columns = sharding.put_rows(columns, mesh)
            count, sums = _add(model, params, columns, count, sums)
    if not int(count):
        raise ValueError(
            f"{_OWNER} needs at least one real token, got none. A generator that "
            "was read before is empty; look at the batches' masks too."
        )
    return {name: _divide(count, x) for name, x in sums.items()}


class Moments(NamedTuple):
    """First and second moments of a site's values h over real tokens.

    Attributes:
        count: int32[], how many tokens.
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
    places: Mapping[str, Sequence[int]],
) -> dict[str, Moments]:
    """Means and second moments of values at some layers of sites, from one pass.

    Sums are float32, batch by batch, and divided once.

    Args:
        model: whose values are looked at.
        params: its parameters.
        batches: rows with `tokens` and `mask`; read once.
        places: site -> layers.
    Returns:
        Moments by the site's name, in the order of its layers.
    Raises:
        ValueError: if a site or layer does not exist, or there is no real token.
    """
    owner = "stats.moments"
    for site in places:
        _checks.one_of(owner, model.sites, site=site)
    taps = tuple((site, tuple(layers)) for site, layers in places.items())
    total = None
    for batch in batches:
        columns = {"tokens": batch["tokens"], "mask": batch["mask"]}
        new = _moment_sums(model, taps, params, columns)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    if total is None or not int(total[0]):
        raise ValueError(
            f"{owner} needs at least one real token, got none. A generator that was "
            "read before is empty; look at the batches' masks too."
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
    """Statistics of a site's producing units, over tokens and all heads that share one.

    With grouped queries several heads read one value unit: of the decoder's `attention`
    [N, heads * head_dim] this gives [N, kv_heads * head_dim], where `edits.prune_units`
    can take away a unit of the values for all its heads. Where no unit is shared it is
    the identity.

    Args:
        activity: of `site`.
        site: of the same model.
    Raises:
        ValueError: if the units are not the site's.
    """
    if activity.mean.shape != _shape(site):
        raise ValueError(
            f"stats.pooled needs statistics of the site's [layers, units] "
            f"{_shape(site)}, got {activity.mean.shape}. Take both from one model."
        )
    heads, size = site.grouping

    def over_heads(x):
        shared = x.reshape(site.layers, -1, heads, size)
        return jnp.mean(shared, axis=2).reshape(site.layers, -1)

    count, mean, absolute, rms, freq, std = activity
    new = over_heads(mean)
    spread = mean.reshape(site.layers, -1, heads, size)
    spread = spread - new.reshape(site.layers, -1, 1, size)
    between = over_heads(jnp.square(spread).reshape(mean.shape))
    return Activity(
        count * heads,
        new,
        over_heads(absolute),
        jnp.sqrt(over_heads(jnp.square(rms))),
        over_heads(freq),
        jnp.sqrt(over_heads(jnp.square(std)) + between),
    )


def as_released(activity: Activity) -> Activity:
    """`std` and `rms` as the package that the paper's code runs on computes them.

    `std` is the unbiased variance, `rms` the root of its square plus the squared mean;
    one token alone gives NaN. Only to compare numbers: `std` ranks units alike where
    eps is small, `rms` does not.
    """
    tokens = activity.count.astype(jnp.float32)
    variance = jnp.square(activity.std) * (tokens / (tokens - 1))
    rms = jnp.sqrt(jnp.square(variance) + jnp.square(activity.mean))
    return activity._replace(std=variance, rms=rms)


def fisher(
    term: Term,
    params: Params,
    batches: Iterable[Streams],
    key: PRNGKey,
    *,
    rows: int = 1,
    ref: Params | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """The diagonal of the empirical Fisher information: means of squared gradients.

    With `terms.on_logps(losses.nll, model, stream)` and one row at a time, the mean
    over rows of (d log p(answer) / d weight)^2. Pieces in which the term counts nothing
    are left out.

    Args:
        term: whose mean over the rows of a piece is differentiated.
        params: all of its leaves are looked at.
        batches: each with the streams that the term reads; read once.
        key: for terms that draw.
        rows: whose mean gradient is squared together; must divide each batch's. 1 is
            the definition and takes a pass a row; the whole batch is what the released
            code of `edits.dampen`'s paper does, and as fast as a step.
        ref: the reference model's parameters, if the term needs them.
        mesh: where the params lie, if they do on one. Rows of a piece are cut over it,
            so data * fsdp of it must divide `rows`.
    Returns:
        A tree like params, float32, >= 0.
    Raises:
        ValueError: if rows do not divide a batch, or the term counts nothing at all.
        KeyError: if a batch lacks a stream.
    References: https://arxiv.org/abs/2308.07707
    """
    owner = "stats.fisher"
    _checks.positive_int(owner, rows=rows)
    add = jax.jit(partial(_add_squares, term, rows), donate_argnums=0)
    sums = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
    state = jnp.float32(0), sums
    place = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with place:
        for index, batch in enumerate(batches):
            _checks.has_keys(owner, "stream", term.reads, batch, "Add it to batches.")
            streams = {name: dict(batch[name]) for name in term.reads}
            if mesh is not None:
                streams = sharding.put_rows(streams, mesh)
            for x in jax.tree.leaves(streams):
                if x.shape[0] % rows:
                    raise ValueError(
                        f"{owner} needs rows that divide each batch, got rows={rows} "
                        f"and a batch of {x.shape[0]}."
                    )
            state = add(state, params, streams, ref, jax.random.fold_in(key, index))
    pieces, sums = state
    if not float(pieces):
        raise ValueError(
            f"{owner} needs at least one row in which the term counts something, got "
            "none. A generator that was read before is empty; look at the masks too."
        )
    return jax.tree.map(lambda x: x / pieces, sums)


def _add_squares(term, rows, state, params, streams, ref, key):
    def mean(params, piece, key):
        total, _ = term(params, piece, ref, key)
        counted = jnp.any(total.count > 0).astype(jnp.float32)
        return jnp.sum(total.mean()), counted

    def add(state, piece):
        pieces, sums = state
        grads, counted = jax.grad(mean, has_aux=True)(params, *piece)
        sums = jax.tree.map(
            lambda total, g: total + counted * jnp.square(g.astype(jnp.float32)),
            sums,
            grads,
        )
        return (pieces + counted, sums), None

    cut = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), streams)
    count = jax.tree.leaves(cut)[0].shape[0]
    pieces = cut, jax.random.split(key, count)
    if count == 1:  # convolutions in a loop of XLA's take a CPU several times longer
        return add(state, jax.tree.map(lambda x: x[0], pieces))[0]
    return jax.lax.scan(add, state, pieces)[0]


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
    ours, before, after = (x.astype(jnp.float32) for x in (new, count, total))
    ours_or_1, after_or_1 = jnp.maximum(ours, 1), jnp.maximum(after, 1)

    def over_tokens(x):
        return jnp.sum(x, axis=(1, 2), dtype=x.dtype)

    def add(name, so_far):
        # Junk of padding may be anything, NaN too.
        x = jnp.where(real, values[name].astype(jnp.float32), 0)
        mean = over_tokens(x) / ours_or_1
        centred = jnp.where(real, x - mean[:, None, None], 0)
        gap = mean - so_far.mean
        return _Sums(
            so_far.absolute + over_tokens(jnp.abs(x)),
            so_far.positive + over_tokens((x > 0).astype(jnp.int32)),
            so_far.mean + gap * (ours / after_or_1),
            so_far.squares
            + over_tokens(jnp.square(centred))
            + jnp.square(gap) * (before * ours / after_or_1),
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
