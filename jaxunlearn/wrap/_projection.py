# SPDX-License-Identifier: Apache-2.0
"""Projections: learned directions are removed from a site's values.

At chosen layers of a site the value h becomes h - (h Q^T) Q, where the orthonormal rows
Q span the directions of all tasks (MRP). The directions of the current task train;
those of earlier tasks are constant. Params without directions give the original model,
so that the reference of a term needs no memory besides the base.

    sites = {"mlp_out": (4, 9)}
    model = wrap.projection(base, sites)
    forget, retain = (stats.moments(base, params, x, sites) for x in (forget, retain))
    start = wrap.initial_directions(forget["mlp_out"], 2, retain=retain["mlp_out"])
    params = wrap.add_projection(model, params, {"mlp_out": start})
    step, state, frozen = recipe.setup(model, params)     # trainable=wrap.PROJECTION
    ...
    params = trees.merge(state.params, frozen.params)
    hf.save(base, wrap.fold_projection(model, params), "unlearned/")

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
    """The wrapped model's `apply`, which carries the sites and layers; hashable."""

    model: Model
    sites: tuple[tuple[str, tuple[int, ...]], ...]

    def __call__(self, params: Params, batch: Batch, *, edits=None, **kwargs):
        run: Callable[..., Outputs] = self.model.apply
        return run(params, batch, edits=self.edits(params, edits or {}), **kwargs)

    def edits(self, params: Params, others: Mapping[str, Callable]) -> dict:
        """The projections, each followed by the caller's edit of the same site."""
        if _KEY not in params:
            return dict(others)
        found = dict(others)
        for site, layers in self.sites:
            basis = _basis(params[_KEY][site])
            rows = jnp.zeros((self.model.sites[site].layers, *basis.shape[1:]))
            rows = rows.at[jnp.array(layers)].set(basis)
            found[site] = _edit(rows, others.get(site))
        return found


@dataclasses.dataclass(frozen=True)
class _Decode:
    """The wrapped model's `decode`."""

    projected: _Projected

    def __call__(self, params: Params, batch: Batch, cache, *, edits=None):
        edits = self.projected.edits(params, edits or {})
        return self.projected.model.decode(params, batch, cache, edits=edits)


def projection(model: Model, sites: Mapping[str, Sequence[int]]) -> Model:
    """A Model whose values at `sites` lose the directions that its params hold.

    Args:
        model: a decoder of `models.make`.
        sites: site -> its layers, such as {"mlp_out": (4, 9)}. The released code
            projects `block`; `fold_projection` needs a site that only kernels write or
            only kernels read.
    Returns:
        A Model that reads the leaves of `add_projection` and also runs without them;
        its rules put a full copy of them on every device.
    Raises:
        ValueError: if a site or layer does not exist, a layer is given twice, or the
            model already has projections.
    """
    owner = "wrap.projection"
    if isinstance(model.apply, _Projected):
        raise ValueError(
            f"{owner} needs a model without projections, got one with them. Wrap the "
            "original model with all sites."
        )
    if not sites:
        raise ValueError(f"{owner} needs at least one site, got sites={{}}.")
    for site, layers in sites.items():
        _checks.one_of(owner, model.sites, site=site)
        count = model.sites[site].layers
        once = len(set(layers)) == len(layers) > 0
        if not once or any(not 0 <= layer < count for layer in layers):
            raise ValueError(
                f"{owner} needs layers of 0 to {count - 1} at {site!r}, each once, got "
                f"{list(layers)}."
            )
    apply = _Projected(model, tuple((k, tuple(v)) for k, v in sites.items()))
    return model._replace(
        apply=apply,
        decode=model.decode and _Decode(apply),
        packs=apply if model.packs is model.apply else None,
        rules=((rf"{_KEY}/.*", ()), *model.rules),
    )


def add_projection(
    model: Model, params: Params, directions: Mapping[str, Array]
) -> Params:
    """Params with a new task's directions; those of earlier tasks become constant.

    Args:
        model: from `projection`.
        params: of the model before wrapping, or with the projections of earlier tasks.
        directions: site -> [n layers, k, units], in the order of the site's layers; of
            any length. Other leaves are not copied.
    Returns:
        The params with `projection/SITE/new` [n, k, units], which trains, and
        `projection/SITE/old` [n, r, units], orthonormal, if there was an earlier task.
    Raises:
        ValueError: if the model is not from `projection`, a site is missing, a shape is
            wrong, there are more directions than units, a value is NaN or infinite, or
            a direction is in the span of the others or of earlier tasks' directions.
    """
    owner = "wrap.add_projection"
    settings = _settings(owner, model)
    if set(directions) != {site for site, _ in settings.sites}:
        raise ValueError(
            f"{owner} needs directions for {_checks.listed(dict(settings.sites))}, "
            f"got them for {_checks.listed(directions)}."
        )
    before, leaves = params.get(_KEY), {}
    for site, layers in settings.sites:
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
                f"{owner} needs 1 to {units - old.shape[1]} directions at {site!r}, "
                f"which has {units} units and {old.shape[1]} earlier directions, got "
                f"{new.shape[1]}."
            )
        if not bool(jnp.all(jnp.isfinite(new))) or not independent(new, old):
            raise ValueError(
                f"{owner} needs finite directions that are not in the span of the "
                f"others or of earlier ones, got other directions at {site!r}. Make "
                "them by wrap.initial_directions with basis="
                "wrap.projection_basis(params)[site]."
            )
        leaves[site] = {"new": new} | ({"old": old} if old.shape[1] else {})
    return params | {_KEY: leaves}


def projection_sites(model: Model) -> dict[str, tuple[int, ...]]:
    """Site -> layers of a model from `projection`; ValueError for another model."""
    return dict(_settings("wrap.projection_sites", model).sites)


def projection_basis(params: Params) -> dict[str, Array]:
    """Site -> [n layers, r, units]: orthonormal rows, the span of all directions."""
    return {site: _basis(leaves) for site, leaves in params.get(_KEY, {}).items()}


def fold_projection(model: Model, params: Params) -> Params:
    """Plain params for the model before wrapping, with the same logits.

    With P = I - Q^T Q: where one kernel W [in, out] writes the site, W becomes W P and
    its bias b P (`attention_out`, `mlp_out`); where only kernels read it, each becomes
    P W (`attention_in`, `attention`, `mlp_in`, `mlp`).

    Args:
        model: from `projection`.
        params: with the leaves of `add_projection`; merge the halves of a split first.
    Returns:
        Params without those leaves, kernels in their dtypes.
    Raises:
        ValueError: if the model is not from `projection`, there are no such leaves, a
            kernel has LoRA leaves, or a site is neither written nor read by kernels
            alone: `block` is a sum with the residual stream, whose other terms no
            kernel of this layer writes and which norms read; with norms after attention
            and MLP (`post_norms`) the norm's gain is in between.
    """
    owner = "wrap.fold_projection"
    settings = _settings(owner, model)
    if _KEY not in params:
        raise ValueError(
            f"{owner} needs params with directions, got none. Merge the halves of a "
            "split first: trees.merge(state.params, frozen.params)."
        )
    leaves = trees.paths({k: x for k, x in params.items() if k != _KEY})
    changed: dict[str, Array] = {}
    for site, layers in settings.sites:
        place, basis = settings.model.sites[site], _basis(params[_KEY][site])
        written = () if place.readers else place.writers
        if not (written or place.readers):
            able = [k for k, s in model.sites.items() if s.readers or s.writers]
            raise ValueError(
                f"{owner} needs sites that only kernels write or read, got {site!r}: "
                "the residual stream or a norm is between it and every kernel, so no "
                "weights give the same logits. Use the wrapped model as it is, or "
                f"project {_checks.listed(able)}."
            )
        for path in (*written, *place.readers):
            layer = path.removesuffix("kernel")
            if f"{layer}lora_a" in leaves:
                raise ValueError(
                    f"{owner} needs plain kernels, got LoRA leaves at {path!r}. Merge "
                    "them first with wrap.merge_lora."
                )
            parts = [path] if place.readers else [path, f"{layer}bias"]
            for part in parts:
                if part in leaves:
                    leaf = changed.get(part, leaves[part])
                    changed[part] = _fold(leaf, layers, basis, bool(place.readers))
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
    """Orthonormal rows of all tasks; the old rows do not change."""
    new = leaves["new"]
    old = jax.lax.stop_gradient(leaves.get("old", new[:, :0]))
    return jnp.concatenate([old, orthonormal(new, old)], axis=1)


def _edit(rows, after):
    def edit(value, index):
        value = project(value, rows[index])
        return value if after is None else after(value, index)

    return edit


def _settings(owner: str, model: Model) -> _Projected:
    if not isinstance(getattr(model, "apply", None), _Projected):
        raise ValueError(
            f"{owner} needs (model, params) with a model from wrap.projection, got a "
            f"{type(model).__name__} without projections."
        )
    return model.apply
