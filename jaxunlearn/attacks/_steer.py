# SPDX-License-Identifier: Apache-2.0
"""Steering: adds a direction to hidden states at inference.

Some unlearning methods move the hidden states of forgotten questions away (RMU moves
them to a random vector), while those of retained facts hardly change. The difference of
the two means is a direction that needs no answers; adding it can move the states back.
Compare Seyitoglu et al., arXiv 2411.02631, who use the difference between a prompt and
an anonymised one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Array, Batch, Model, Params

_KEY = "steering"


@dataclasses.dataclass(frozen=True)
class _Steered:
    """`apply` or `decode` of the steered model; hashable.

    The direction is a leaf of the params, so that one program runs every direction.
    """

    function: Callable
    site: str

    def __call__(self, params: Params, batch: Batch, *args, edits=None, **kwargs):
        fix = "Pass the params that attacks.steer returned."
        _checks.has_keys("The steered model", "leaves", (_KEY,), params, fix)
        add, edits = params[_KEY][self.site], dict(edits or {})
        callers_edit = edits.get(self.site)

        def edit(value, layer):
            value = value + add[layer].astype(value.dtype)
            return value if callers_edit is None else callers_edit(value, layer)

        edits[self.site] = edit
        return self.function(params, batch, *args, edits=edits, **kwargs)


def steer(
    model: Model,
    params: Params,
    *,
    forget: tables.Table,
    retain: tables.Table,
    layers: Sequence[int],
    site: str = "block",
    strength: float = 1.0,
    batch_size: int = 32,
) -> tuple[Model, Params]:
    """Adds a direction towards retained facts to hidden states at some layers.

    The direction is the mean of the values at the last token of the `retain` prompts
    minus the mean over the `forget` prompts; with strength 1 the two means coincide.
    The attacker needs to change activations at inference, and prompts of both kinds,
    but no answers. If forgotten answers come back, they were still in the weights.

    Args:
        model, params: the attacked model; params are not changed.
        forget: prompts of forgotten facts, without answers: `tokens`, `mask` [n, L].
        retain: prompts of facts that the model still answers.
        layers: layers at which the direction is added. One layer is usual, because the
            following layers pass it on.
        site: the site whose values are changed.
        strength: factor of the direction; 0 changes nothing.
        batch_size: rows at a time.
    Returns:
        (a Model that adds the direction, the params with the direction as the leaf
        `steering/SITE`, [layers of the model, units] float32). The other leaves are
        those of `params`. Directions of a steered model at the same site add up.
    Raises:
        ValueError: if the site or a layer does not exist, or a table has no rows.
    """
    owner = "attacks.steer"
    _checks.one_of(owner, list(model.sites), site=site)
    _checks.finite(owner, strength=strength)
    num_layers = model.sites[site].layers
    layers = tuple(layers)
    if not layers or any(not 0 <= layer < num_layers for layer in layers):
        raise ValueError(
            f"{owner} needs layers from 0 to {num_layers - 1} at {site!r}, got "
            f"{list(layers)}."
        )
    forget_mean, retain_mean = (
        _mean(model, params, table, site, layers, batch_size)
        for table in (forget, retain)
    )
    add = jnp.zeros((num_layers, model.sites[site].units), jnp.float32)
    add = add.at[jnp.array(layers)].set(strength * (retain_mean - forget_mean))
    before = params.get(_KEY, {})
    if site in before:
        add = before[site] + add
    else:
        decode = model.decode and _Steered(model.decode, site)
        rules = ((rf"{_KEY}/.*", ()), *model.rules)
        apply = _Steered(model.apply, site)
        packs = apply if model.packs is model.apply else None
        model = model._replace(apply=apply, decode=decode, rules=rules, packs=packs)
    return model, params | {_KEY: before | {site: add}}


def _mean(model, params, table, site, layers, size) -> np.ndarray:
    """[layers, units] float32, mean over rows of the value at the last real token."""
    rows, total = tables.num_rows(table), 0.0
    table = {name: table[name] for name in ("tokens", "mask")}
    for batch in tables.eval_batches(table, size):
        _checks.token_ids("attacks.steer", model, batch)
        valid = batch.pop("valid")
        total = total + _last(model, params, batch, valid, site, layers)
    return total / rows


@partial(jax.jit, static_argnums=(0, 4, 5))
def _last(model, params, batch: Mapping[str, Array], valid, site, layers):
    values = model.apply(params, batch, taps={site: layers}).taps[site]
    length = batch["mask"].shape[1]
    last = jnp.max(jnp.where(batch["mask"], jnp.arange(length), 0), axis=1)
    picked = jnp.take_along_axis(values, last[None, :, None, None], axis=2)[:, :, 0]
    return jnp.sum(jnp.where(valid[:, None], picked, 0).astype(jnp.float32), axis=1)
