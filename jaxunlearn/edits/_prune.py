# SPDX-License-Identifier: Apache-2.0
"""Selective pruning: take away the units that matter more to forget than to retain.

Without any gradient: activity on both sets gives each unit a score, the highest over
all layers go, and a little at a time, as the rest changes what it does:

    pruned, gone = params, None
    for _ in range(steps):
        forget = stats.activity(model, pruned, forget_batches)["mlp"]
        retain = stats.activity(model, pruned, retain_batches)["mlp"]
        scores = edits.unit_scores(forget.abs, retain.abs)
        gone = edits.select_units(scores, 0.02, removed=gone)
        pruned = edits.prune_units(model, params, {"mlp": gone})

Random pruning, to compare with, is `select_units(jax.random.uniform(key, shape), 0.02,
removed=gone, each_layer=True)`.

References: https://arxiv.org/abs/2403.01267
"""

from collections.abc import Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, trees
from jaxunlearn.edits import _quantize
from jaxunlearn.typing import Array, Model, Params, Site


def unit_scores(forget: Array, retain: Array, *, eps: float = 1e-3) -> Array:
    """How much more a unit matters to the forget set: forget / (retain + eps).

    eps decides about units that are silent on what is retained: with a large one they
    rank low unless they are loud on what is to be forgotten, with a small one first.

    Args:
        forget: [N, units] float >= 0, an importance such as `stats.Activity.abs`.
        retain: the same on the retain set.
        eps: > 0. The released code takes 1e-3 for MLPs and 1e-4 for attention in its
            main experiments, 1e-5 for both in its smallest example.
    Returns:
        [N, units] float32; higher goes first.
    Raises:
        ValueError: if eps <= 0 or the shapes differ.
    References: https://arxiv.org/abs/2403.01267
    """
    _checks.positive("unit_scores", eps=eps)
    _checks.same_shape("unit_scores", forget=forget, retain=retain)
    return forget.astype(jnp.float32) / (retain.astype(jnp.float32) + eps)


def select_units(
    scores: Array,
    fraction: float,
    *,
    removed: Array | None = None,
    each_layer: bool = False,
) -> Array:
    """The units of the highest scores over all layers together.

    Args:
        scores: [N, units] float.
        fraction: of all units of all layers, in [0, 1], rounded down to whole units.
        removed: [N, units] bool, units that are gone already; as many new ones follow.
        each_layer: takes that fraction from each layer instead, so that all layers keep
            the same width.
    Returns:
        [N, units] bool, True for a unit to remove; those of `removed` stay True.
    Raises:
        ValueError: if fraction is outside [0, 1], scores are NaN or shapes differ.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"select_units needs a fraction in [0, 1], got fraction={fraction}."
        )
    if scores.ndim != 2:
        raise ValueError(
            f"select_units needs scores [layers, units], got shape {scores.shape}."
        )
    _checks.mask("select_units", removed, scores=scores)
    _check_no_nan(scores)
    if removed is None:
        removed = jnp.zeros(scores.shape, jnp.bool_)
    rows = jnp.where(removed, -jnp.inf, scores.astype(jnp.float32))
    rows = rows if each_layer else rows.reshape(1, -1)
    # By its decimal digits: 0.29 of 100 units are 29, which floats make 28.
    count = int(Fraction(str(float(fraction))) * rows.shape[1])
    _, best = jax.lax.top_k(rows, count)
    chosen = jnp.zeros(rows.shape, jnp.bool_)
    chosen = chosen.at[jnp.arange(len(rows))[:, None], best].set(True)
    return chosen.reshape(scores.shape) | removed


def prune_units(
    model: Model,
    params: Params,
    removed: Mapping[str, Array],
    *,
    offset: Mapping[str, Array] | None = None,
) -> Params:
    """Takes units away in the weights, as if their values were masked with 0.

    The kernel that reads a site loses the unit's weights, which is exact for whatever
    activation. Those that produce the unit, and their biases, become 0 too, so that the
    unit is silent in later statistics and no gradient revives it. LoRA's leaves beside
    a kernel follow it. Biases that are added after the unit stay.

    Where query heads share a value unit (`Site.grouping`), a mask of the site's units
    counts each head's by itself, and the values go once all heads lost them. A mask of
    the shared units, as `stats.pooled` scores them, takes them from all heads.

    Args:
        model: whose `sites` name the kernels; the decoder's `mlp` and `attention`.
        params: its parameters.
        removed: site -> [N, units] bool, True for a unit to remove.
        offset: site -> [N, units] float: instead of 0 the unit becomes this constant,
            such as `stats.Activity.mean` on the retain set. It goes into the bias that
            is added after the kernel, which the model must have.
    Returns:
        A tree like params, in its dtypes and, where they lie on a mesh, its shards.
    Raises:
        ValueError: if a site does not exist or no single kernel reads it, if shapes do
            not fit its layers and units, or an offset finds no bias, or LoRA's leaves.
        TypeError: if a mask is not boolean.
    References: https://arxiv.org/abs/2403.01267
    """
    return _prune("prune_units", model, params, removed, offset)


def remove_units(
    model: Model,
    params: Params,
    removed: Mapping[str, Array],
    *,
    offset: Mapping[str, Array] | None = None,
    pad: bool = False,
) -> Params:
    """Takes units away for good: the same function from smaller matrices.

    `models.resized(model, params)` is the decoder that runs the result.

    Args:
        model, params, removed, offset: as for `prune_units`.
        pad: lets layers lose different counts; all keep the width of the widest, in the
            others some removed units stay as zeros.
    Returns:
        A tree like params with fewer units; leaves on a mesh may lie on it otherwise.
    Raises:
        ValueError: as for `prune_units`; if layers lose different counts without `pad`,
            if a layer would lose every unit, or at sites that do not stand alone, such
            as `attention`, whose heads keep their size.
    """
    params = _prune("remove_units", model, params, removed, offset)
    for name, gone in removed.items():
        site = model.sites[name]
        if not site.writers or site.grouping != (1, 1):
            raise ValueError(
                "remove_units needs sites whose units stand alone, such as 'mlp', got "
                f"{name!r}: its matrices keep their shape. Use prune_units there."
            )
        keep = _kept(name, gone, pad)
        params = _map_units(
            params,
            site,
            lambda x, axis, of_consumer, keep=keep: jnp.take_along_axis(
                x, _along(keep, x, axis), axis
            ),
        )
    return params


def _prune(owner, model, params, removed, offset):
    offset = offset or {}
    strange = [name for name in offset if name not in removed]
    if strange:
        raise ValueError(
            f"{owner} needs offsets of sites it prunes, got {_checks.listed(strange)} "
            f"beside removed {_checks.listed(removed)}."
        )
    for name, gone in removed.items():
        site = _site(owner, model, name)
        gone, outputs = _both_ways(owner, name, site, gone)
        leaves = trees.paths(params)
        paths = (site.reader, *site.writers)
        fix = "Give the params of this model, merged if they were split."
        _checks.has_keys(owner, "leaves", paths, leaves, fix)
        _check_consumer(owner, name, site, leaves[site.reader])
        if name in offset:
            params = _with_offset(owner, name, site, params, gone, offset[name])

        def zero(x, axis, of_consumer, gone=gone, outputs=outputs):
            where = _along(gone if of_consumer else outputs, x, axis)
            new = jnp.where(where, jnp.zeros((), x.dtype), x)
            return _quantize.placed(new, x)

        params = _map_units(params, site, zero)
    return params


def _site(owner: str, model: Model, name: str) -> Site:
    _checks.one_of(owner, model.sites, site=name)
    site = model.sites[name]
    if site.reader is None:
        able = [key for key, other in model.sites.items() if other.reader]
        raise ValueError(
            f"{owner} needs a site that one kernel reads, got {name!r}; "
            f"{_checks.listed(able)} can be pruned."
        )
    return site


def _both_ways(owner, name, site, gone):
    """The mask [N, units], and that of the producers' outputs [N, outputs]."""
    heads, size = site.grouping
    shapes = [(site.layers, site.units), (site.layers, site.units // heads)]
    if gone.dtype != jnp.bool_:
        raise TypeError(
            f"{owner} needs a boolean mask, got dtype {gone.dtype} at {name!r}. "
            "select_units makes one of scores."
        )
    if gone.shape not in shapes:
        raise ValueError(
            f"{owner} needs a mask [layers, units] of shape "
            f"{' or '.join(str(s) for s in dict.fromkeys(shapes))} at {name!r}, got "
            f"{gone.shape}."
        )
    if gone.shape == shapes[0]:
        shared = gone.reshape(site.layers, -1, heads, size)
        return gone, jnp.all(shared, axis=2).reshape(shapes[1])
    each = jnp.repeat(gone.reshape(site.layers, -1, 1, size), heads, axis=2)
    return each.reshape(shapes[0]), gone


def _check_consumer(owner, name, site, kernel):
    shape = kernel.shape
    axis = 1 + site.axis
    fits = len(shape) > axis and (shape[0], shape[axis]) == (site.layers, site.units)
    if not fits:
        raise ValueError(
            f"{owner} needs {site.consumer!r} to have {site.layers} layers and "
            f"{site.units} units at {name!r}, got shape {shape}. Give the params of "
            "this model; smaller ones have their own (models.resized)."
        )


def _map_units(params, site, function):
    """params with function(leaf, axis of the units, whether it is the consumer's)."""
    beside = {site.reader: (1 + site.axis, True)}
    beside |= {_beside(site.reader, "lora_a"): (1, True)}
    for path in site.writers:
        beside |= {path: (-1, False), _beside(path, "bias"): (-1, False)}
        beside |= {_beside(path, "lora_b"): (-1, False)}

    def leaf(path, x):
        return function(x, *beside[path]) if path in beside else x

    return trees.map_with_path(leaf, params)


def _beside(kernel: str, name: str) -> str:
    return kernel.rpartition("/")[0] + "/" + name


def _along(rows: Array, x: Array, axis: int) -> Array:
    """[N, units] with axes of length 1, so that its units lie along x's `axis`."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = rows.shape
    return rows.reshape(shape)


def _with_offset(owner, name, site, params, gone, means):
    """params with the constants that removed units leave behind in the bias."""
    leaves = trees.paths(params)
    bias = _beside(site.reader, "bias")
    if bias not in leaves:
        raise ValueError(
            f"{owner} needs a bias at {bias!r} for the offset of {name!r}, which this "
            "model lacks. Leave the offset out, so that units become 0."
        )
    if _beside(site.reader, "lora_a") in leaves:
        raise ValueError(
            f"{owner} needs plain params for the offset of {name!r}, got LoRA's leaves "
            f"beside {site.consumer!r}. Merge them first (wrap.merge_lora)."
        )
    _checks.same_shape(owner, offset=means, removed=gone)
    wide = jnp.where(gone, means.astype(jnp.float32), 0)
    kernel = leaves[site.reader].astype(jnp.float32)
    kernel = jnp.moveaxis(kernel, 1 + site.axis, 1)
    added = jnp.einsum("nu,nuo->no", wide, kernel, precision="highest")

    def leaf(path, x):
        if path != bias:
            return x
        new = (x.astype(jnp.float32) + added).astype(x.dtype)
        return _quantize.placed(new, x)

    return trees.map_with_path(leaf, params)


def _kept(name: str, gone: Array, pad: bool) -> Array:
    """[N, kept] int32, the units that stay in each layer, in their order."""
    counts = [int(x) for x in jnp.sum(gone, axis=1)]
    units = gone.shape[1]
    if min(counts) != max(counts) and not pad:
        raise ValueError(
            "remove_units needs layers that lose equally many units, got "
            f"{min(counts)} to {max(counts)} of {units} at {name!r}. Select with "
            "each_layer=True, give pad=True, or use prune_units, which keeps shapes."
        )
    if max(counts) == units:
        raise ValueError(
            f"remove_units needs at least one unit to stay in each layer, got {units} "
            f"of {units} removed at {name!r}. Use prune_units, which keeps shapes."
        )
    first = jnp.argsort(gone, axis=1, stable=True)[:, : units - min(counts)]
    return jnp.sort(first, axis=1)


def _check_no_nan(scores: Array) -> None:
    if isinstance(scores, jax.core.Tracer):
        return
    bad = jnp.isnan(scores)
    if bool(jnp.any(bad)):
        layers = [int(i) for i in jnp.nonzero(jnp.any(bad, axis=1))[0]]
        raise ValueError(
            f"select_units needs scores that are not NaN, got {int(jnp.sum(bad))} in "
            f"layers {_checks.listed(layers)}. Look at the params and at both "
            "statistics."
        )
