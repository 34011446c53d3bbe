# SPDX-License-Identifier: Apache-2.0
"""Projections: directions of a site's values are taken away, and learned.

At chosen layers of a site the value h becomes h - (h Q^T) Q, Q the orthonormal rows
that span all tasks' directions (MRP). The directions of the task at hand train; those
of earlier tasks are constants and never come back. Params without them are the model
they began as, so that the reference of a term costs nothing but the base.

    model = wrap.projection(base, {"mlp_out": (4, 9)})
    inside = stats.moments(base, params, forget, {"mlp_out": (4, 9)})
    rest = stats.moments(base, params, retain, {"mlp_out": (4, 9)})
    start = wrap.initial_directions(inside["mlp_out"], 2, retain=rest["mlp_out"])
    params = wrap.add_projection(params, model, {"mlp_out": start})
    train, fixed = trees.split(params, wrap.PROJECTION)
    ...
    plain = wrap.fold_projection(trees.merge(state.params, fixed), model)
    hf.save(base, plain, "unlearned/")

References: https://arxiv.org/abs/2508.15449
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, trees
from jaxunlearn.typing import Array, Batch, Model, Outputs, Params
from jaxunlearn.wrap._directions import independent, orthonormal, project

PROJECTION = r"projection/.*/new"
_KEY = "projection"


@dataclasses.dataclass(frozen=True)
class _Projected:
    """The wrapped model's `apply`, which carries the places; hashable."""

    model: Model
    places: tuple[tuple[str, tuple[int, ...]], ...]

    def __call__(self, params: Params, batch: Batch, *, edits=None, **kwargs):
        run: Callable[..., Outputs] = self.model.apply
        return run(params, batch, edits=self.edits(params, edits or {}), **kwargs)

    def edits(self, params: Params, others: Mapping[str, Callable]) -> dict:
        """The caller's edits, after ours where both have a site."""
        if _KEY not in params:
            return dict(others)
        found = dict(others)
        for site, layers in self.places:
            basis = _basis(params[_KEY][site])
            rows = jnp.zeros((self.model.sites[site].layers, *basis.shape[1:]))
            rows = rows.at[jnp.array(layers)].set(basis)
            found[site] = _edit(rows, others.get(site))
        return found


@dataclasses.dataclass(frozen=True)
class _Extend:
    """The wrapped model's `extend`."""

    projected: _Projected

    def __call__(self, params: Params, batch: Batch, cache, *, edits=None):
        edits = self.projected.edits(params, edits or {})
        return self.projected.model.decode(params, batch, cache, edits=edits)


def projection(model: Model, places: Mapping[str, Sequence[int]]) -> Model:
    """The model whose values at `places` are projected as its params say.

    Args:
        model: a decoder of `models.make`.
        places: site -> its layers, such as {"mlp_out": (4, 9)}. The released code
            projects `block`; `fold_projection` needs a site that a kernel alone writes
            or reads.
    Returns:
        A Model that reads the leaves of `add_projection` and runs without them too;
        its rules leave them whole on every device.
    Raises:
        ValueError: if a site or layer does not exist, a layer comes twice, or the model
            has projections already.
    """
    owner = "wrap.projection"
    if isinstance(model.apply, _Projected):
        raise ValueError(
            f"{owner} needs a model without projections, got one that has them. Wrap "
            "the model inside with all places."
        )
    if not places:
        raise ValueError(f"{owner} needs at least one site, got none.")
    for site, layers in places.items():
        _checks.one_of(owner, model.sites, site=site)
        count = model.sites[site].layers
        once = len(set(layers)) == len(layers) > 0
        if not once or any(not 0 <= layer < count for layer in layers):
            raise ValueError(
                f"{owner} needs layers of 0 to {count - 1} at {site!r}, each once, got "
                f"{list(layers)}."
            )
    kept = tuple((site, tuple(layers)) for site, layers in places.items())
    apply = _Projected(model, kept)
    return model._replace(
        apply=apply,
        decode=model.decode and _Extend(apply),
        rules=((rf"{_KEY}/.*", ()), *model.rules),
    )


def add_projection(
    params: Params, model: Model, directions: Mapping[str, Array]
) -> Params:
    """Params with a new task's directions; those of the tasks before become constants.

    Args:
        params: of the model before wrapping, or with the projections of earlier tasks.
        model: from `projection`.
        directions: site -> [n layers, k, units], in the order of the site's layers; any
            lengths. Other leaves are not copied.
    Returns:
        The params with `projection/SITE/new` [n, k, units], which trains, and
        `projection/SITE/old` [n, r, units], orthonormal, once there was a task.
    Raises:
        ValueError: if the model is not from `projection`, a site is missing, a shape is
            wrong, there are more directions than units, a value is NaN or infinite, or
            a direction lies in the span of the others or of those taken.
    """
    owner = "wrap.add_projection"
    settings = _settings(owner, model)
    if set(directions) != {site for site, _ in settings.places}:
        raise ValueError(
            f"{owner} needs directions for {_checks.listed(dict(settings.places))}, "
            f"got them for {_checks.listed(directions)}."
        )
    before, leaves = params.get(_KEY), {}
    for site, layers in settings.places:
        new, units = jnp.asarray(directions[site]), settings.model.sites[site].units
        if new.ndim != 3 or (len(new), new.shape[-1]) != (len(layers), units):
            raise ValueError(
                f"{owner} needs directions [{len(layers)}, k, {units}] at {site!r}, "
                f"got shape {new.shape}."
            )
        new = new.astype(jnp.float32)
        old = jnp.zeros((len(layers), 0, units)) if before is None else None
        old = _basis(before[site]) if old is None else old
        if not 1 <= new.shape[1] <= units - old.shape[1]:
            raise ValueError(
                f"{owner} needs 1 to {units - old.shape[1]} directions at {site!r}, as "
                f"it has {units} units of which {old.shape[1]} are taken, got "
                f"{new.shape[1]}."
            )
        if not bool(jnp.all(jnp.isfinite(new))) or not independent(new, old):
            raise ValueError(
                f"{owner} needs finite directions, none in the span of the others or "
                f"of those taken before, got others at {site!r}. wrap.initial_directions("
                "basis=wrap.projection_basis(params)[site]) gives new ones."
            )
        leaves[site] = {"new": new} | ({"old": old} if old.shape[1] else {})
    return params | {_KEY: leaves}


def projection_sites(model: Model) -> dict[str, tuple[int, ...]]:
    """Site -> layers that `projection` was asked for; ValueError for another model."""
    return dict(_settings("wrap.projection_sites", model).places)


def projection_basis(params: Params) -> dict[str, Array]:
    """Site -> [n layers, r, units]: orthonormal rows that span what is taken away."""
    return {site: _basis(leaves) for site, leaves in params.get(_KEY, {}).items()}


def fold_projection(params: Params, model: Model) -> Params:
    """Plain params for the model before wrapping, with the same logits.

    With P = I - Q^T Q: where one kernel W [in, out] writes the site, W becomes W P and
    its bias b P (`attention_out`, `mlp_out`); where kernels alone read it, each becomes
    P W (`attention_in`, `attention`, `mlp_in`, `mlp`).

    Args:
        params: with the leaves of `add_projection`; merge the halves of a split first.
        model: from `projection`.
    Returns:
        Params without those leaves, kernels in their dtypes.
    Raises:
        ValueError: if the model is not from `projection`, there are no such leaves, a
            kernel has LoRA's leaves beside it, or no kernels alone write or read a
            site: `block` is a sum with the residual stream, whose other terms no kernel
            of this layer writes and which norms read; with norms after attention and
            MLP (`post_norms`) the norm's gain comes in between.
    """
    owner = "wrap.fold_projection"
    settings = _settings(owner, model)
    if _KEY not in params:
        raise ValueError(
            f"{owner} needs params with directions, got none. Merge the halves of a "
            "split first: trees.merge(state.params, rest)."
        )
    leaves = trees.paths({k: x for k, x in params.items() if k != _KEY})
    changed: dict[str, Array] = {}
    for site, layers in settings.places:
        place, basis = settings.model.sites[site], _basis(params[_KEY][site])
        written = () if place.readers else place.writers
        if not (written or place.readers):
            able = [k for k, s in model.sites.items() if s.readers or s.writers]
            raise ValueError(
                f"{owner} needs sites that kernels alone write or read, got {site!r}: "
                "the residual stream or a norm lies between it and every kernel, so no "
                "weights give the same logits. Keep the wrapped model, or project "
                f"{_checks.listed(able)}."
            )
        for path in (*written, *place.readers):
            beside = path.removesuffix("kernel")
            if f"{beside}lora_a" in leaves:
                raise ValueError(
                    f"{owner} needs plain kernels, got LoRA's leaves beside {path!r}. "
                    "Merge them first: wrap.merge_lora."
                )
            parts = [path] if place.readers else [path, f"{beside}bias"]
            for part in parts:
                if part in leaves:
                    whole = changed.get(part, leaves[part])
                    changed[part] = _fold(whole, layers, basis, bool(place.readers))
    rest = {k: x for k, x in params.items() if k != _KEY}
    return trees.map_with_path(lambda path, x: changed.get(path, x), rest)


def _fold(leaf, layers, basis, reads):
    rows = leaf[jnp.array(layers)].astype(jnp.float32)
    if reads:
        rows = project(rows.mT, basis).mT
    elif rows.ndim == 2:  # biases
        rows = project(rows[:, None], basis)[:, 0]
    else:
        rows = project(rows, basis)
    return leaf.at[jnp.array(layers)].set(rows.astype(leaf.dtype))


def _basis(leaves: Params) -> Array:
    """All tasks' orthonormal rows, the old ones as they were."""
    new = leaves["new"]
    old = jax.lax.stop_gradient(leaves.get("old", new[:, :0]))
    return jnp.concatenate([old, orthonormal(new, old)], axis=1)


def _edit(rows, after):
    def edit(value, index):
        value = project(value, rows[index])
        return value if after is None else after(value, index)

    return edit


def _settings(owner: str, model: Model) -> _Projected:
    if not isinstance(model.apply, _Projected):
        raise ValueError(
            f"{owner} needs the model that wrap.projection returned, got another."
        )
    return model.apply
