# SPDX-License-Identifier: Apache-2.0
"""Selective pruning: removes the units that matter more to forget than to retain data.

No gradients are needed. The activity on both sets gives each unit a score, and the
units with the highest scores over all layers are removed. This is done in small steps,
because the remaining units change their activity:

    pruned, gone = params, None
    for _ in range(steps):
        forget = stats.activity(model, pruned, forget_batches)["mlp"]
        retain = stats.activity(model, pruned, retain_batches)["mlp"]
        scores = edits.unit_scores(forget=forget.abs, retain=retain.abs)
        gone = edits.select_units(scores, 0.02, removed=gone)
        pruned = edits.prune_units(model, params, {"mlp": gone})

For comparison, random pruning is `select_units(jax.random.uniform(key, shape), 0.02,
removed=gone, per_layer=True)`.

References: https://arxiv.org/abs/2403.01267
"""

from collections.abc import Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, trees
from jaxunlearn.edits import _quantize
from jaxunlearn.typing import Array, Model, Params, Site


def unit_scores(*, forget: Array, retain: Array, eps: float = 1e-3) -> Array:
    """Relative importance of each unit to the forget set: forget / (retain + eps).

    eps decides the rank of units that are inactive on the retain set: with a small eps
    they rank first, with a large one only if they are very active on the forget set.

    Args:
        forget: [N, units] float >= 0, an importance such as `stats.Activity.abs`.
        retain: the same on the retain set.
        eps: > 0. The released code uses 1e-3 for MLPs and 1e-4 for attention in its
            main experiments, and 1e-5 for both in its smallest example.
    Returns:
        [N, units] float32; units with higher scores are removed first.
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
    per_layer: bool = False,
) -> Array:
    """Selects the units with the highest scores over all layers.

    Args:
        scores: [N, units] float.
        fraction: of the units of all layers, in [0, 1]; the number is rounded down.
        removed: [N, units] bool, units that were removed before. They stay selected,
            and the fraction counts new units only.
        per_layer: selects the fraction in each layer separately, so that all layers
            keep the same width.
    Returns:
        [N, units] bool, True for a unit to remove.
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
    rows = rows if per_layer else rows.reshape(1, -1)
    # Exact in decimals: 0.29 of 100 units is 29; in floats it would be 28.
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
    """Prunes units by setting their weights to 0, which equals masking their values.

    The unit's weights in the kernel that reads the site become 0, which is exact for
    every activation function. Its weights and biases in the kernels that write it
    become 0 too: the unit is then inactive in later statistics and gets no gradient.
    LoRA leaves of these kernels are treated in the same way. Biases that are added
    after the reading kernel do not change.

    If query heads share a value unit (`Site.grouping`), a mask of the site's units has
    an entry for each head; the value weights become 0 if the unit is removed from all
    heads. A mask of the shared units, for scores from `stats.pooled`, removes them from
    all heads.

    Args:
        model: one whose `sites` name the kernels; the decoder has `mlp` and
            `attention`.
        params: its parameters.
        removed: site -> [N, units] bool, True for a unit to remove.
        offset: site -> [N, units] float, the constant that the unit becomes instead of
            0, such as `stats.Activity.mean` on the retain set. It is added to the bias
            of the reading kernel, which the model must have.
    Returns:
        A tree like params, with its dtypes and sharding.
    Raises:
        ValueError: if a site does not exist or is not read by exactly one kernel, if a
            shape does not match its layers and units, or if there is an offset without
            a bias or with LoRA leaves. TypeError: if a mask is not boolean.
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
    """Removes units from the matrices: the function of `prune_units` in fewer weights.

    `models.resized(model, params)` is the decoder that runs the result.

    Args:
        model, params, removed, offset: as for `prune_units`.
        pad: allows different numbers of removed units per layer. All layers then have
            the width of the widest; the others keep some removed units as zeros.
    Returns:
        A tree like params with fewer units; the sharding of its leaves may differ.
    Raises:
        ValueError: as for `prune_units`; if the numbers differ between layers without
            `pad`, if a layer would lose all units, or at a site whose units are grouped
            in heads, such as `attention`: heads keep their size.
    """
    params = _prune("remove_units", model, params, removed, offset)
    for name, gone in removed.items():
        site = model.sites[name]
        if not site.writers or site.grouping != (1, 1):
            raise ValueError(
                "remove_units needs sites whose units are not grouped in heads, such "
                f"as 'mlp', got {name!r}. Use prune_units there."
            )
        keep = _kept(name, gone, pad)
        params = _map_units(
            params,
            site,
            lambda x, axis, reads, keep=keep: jnp.take_along_axis(
                x, _along(keep, x, axis), axis
            ),
        )
    return params


def _prune(owner, model, params, removed, offset):
    offset = offset or {}
    if others := [name for name in offset if name not in removed]:
        raise ValueError(
            f"{owner} needs an offset only for sites in removed, "
            f"{_checks.listed(removed)}, got {_checks.listed(others)}. Leave it out."
        )
    for name, gone in removed.items():
        site = _site(owner, model, name)
        gone, written = _masks(owner, name, site, gone)
        leaves = trees.paths(params)
        paths = (site.reader, *site.writers)
        fix = "Pass the params of this model, merged if they were split."
        _checks.has_keys(owner, "leaves", paths, leaves, fix)
        _check_reader(owner, name, site, leaves[site.reader])
        if name in offset:
            params = _with_offset(owner, name, site, params, gone, offset[name])

        def zero(x, axis, reads, gone=gone, written=written):
            where = _along(gone if reads else written, x, axis)
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
            f"{owner} needs a site that exactly one kernel reads, got {name!r}. Use "
            f"{_checks.listed(able)}."
        )
    return site


def _masks(owner, name, site, gone):
    """(mask of the units [N, units], mask of the writing kernels' outputs)."""
    heads, size = site.grouping
    shapes = [(site.layers, site.units), (site.layers, site.units // heads)]
    if gone.dtype != jnp.bool_:
        raise TypeError(
            f"{owner} needs a boolean mask at {name!r}, got dtype {gone.dtype}. "
            "select_units makes one from scores."
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


def _check_reader(owner, name, site, kernel):
    shape = kernel.shape
    axis = 1 + site.axis
    fits = len(shape) > axis and (shape[0], shape[axis]) == (site.layers, site.units)
    if not fits:
        raise ValueError(
            f"{owner} needs {site.reader!r} to have {site.layers} layers and "
            f"{site.units} units at {name!r}, got shape {shape}. Pass the params of "
            "this model, or the model of smaller params (models.resized)."
        )


def _map_units(params, site, function):
    """params with function(leaf, axis of the units, whether it reads the site)."""
    places = {site.reader: (1 + site.axis, True)}
    places |= {_sibling(site.reader, "lora_a"): (1, True)}
    for path in site.writers:
        places |= {path: (-1, False), _sibling(path, "bias"): (-1, False)}
        places |= {_sibling(path, "lora_b"): (-1, False)}

    def leaf(path, x):
        return function(x, *places[path]) if path in places else x

    return trees.map_with_path(leaf, params)


def _sibling(kernel: str, name: str) -> str:
    """The path of another leaf of the module that has the kernel."""
    return kernel.rpartition("/")[0] + "/" + name


def _along(rows: Array, x: Array, axis: int) -> Array:
    """rows [N, units] with the axes of x: N along the first, units along `axis`."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = rows.shape
    return rows.reshape(shape)


def _with_offset(owner, name, site, params, gone, means):
    """params with the constants of the removed units added to the bias."""
    leaves = trees.paths(params)
    bias = _sibling(site.reader, "bias")
    if bias not in leaves:
        raise ValueError(
            f"{owner} needs a bias at {bias!r} for the offset of {name!r}, but the "
            "model has none. Leave the offset out; the units then become 0."
        )
    if _sibling(site.reader, "lora_a") in leaves:
        raise ValueError(
            f"{owner} needs params without LoRA for the offset of {name!r}, got LoRA "
            f"leaves for {site.reader!r}. Merge them first (wrap.merge_lora)."
        )
    _checks.same_shape(owner, offset=means, removed=gone)
    constants = jnp.where(gone, means.astype(jnp.float32), 0)
    kernel = leaves[site.reader].astype(jnp.float32)
    kernel = jnp.moveaxis(kernel, 1 + site.axis, 1)
    added = jnp.einsum("nu,nuo->no", constants, kernel, precision="highest")

    def leaf(path, x):
        if path != bias:
            return x
        new = (x.astype(jnp.float32) + added).astype(x.dtype)
        return _quantize.placed(new, x)

    return trees.map_with_path(leaf, params)


def _kept(name: str, gone: Array, pad: bool) -> Array:
    """[N, kept] int32, the indices of the units that each layer keeps, increasing."""
    counts = [int(x) for x in jnp.sum(gone, axis=1)]
    units = gone.shape[1]
    if min(counts) != max(counts) and not pad:
        raise ValueError(
            "remove_units needs the same number of units to remove in each layer, got "
            f"{min(counts)} to {max(counts)} of {units} at {name!r}. Select with "
            "per_layer=True, pass pad=True, or use prune_units, which keeps shapes."
        )
    if max(counts) == units:
        raise ValueError(
            "remove_units needs to keep at least one unit in each layer, got a layer "
            f"with {units} of {units} to remove at {name!r}. Use prune_units, which "
            "keeps shapes."
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
            f"select_units needs scores without NaN, got {int(jnp.sum(bad))} in layers "
            f"{_checks.listed(layers)}. Check the params and the statistics of both "
            "sets."
        )
