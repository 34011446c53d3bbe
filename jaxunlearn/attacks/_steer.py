# SPDX-License-Identifier: Apache-2.0
"""Steering: hidden states of forgotten questions are moved to where answers come from.

Unlearning that turns the states of forgotten questions away (RMU does, to a random
vector) leaves those of retained facts in place. Their difference of means is a
direction that the attacker needs no answer for; added at inference, it can bring the
states back (compare Seyitoglu et al., arXiv 2411.02631, who take the difference between
a prompt and an anonymous one).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Array, Batch, Model, Params


@dataclasses.dataclass(frozen=True, eq=False)
class _Steered:
    """`apply` or `extend` of the steered model."""

    function: object
    site: str
    add: Array  # [layers, units]

    def __call__(self, params: Params, batch: Batch, *args, edits=None, **kwargs):
        edits, others = dict(edits or {}), edits or {}
        after = others.get(self.site)

        def edit(value, layer):
            value = value + self.add[layer].astype(value.dtype)
            return value if after is None else after(value, layer)

        edits[self.site] = edit
        return self.function(params, batch, *args, edits=edits, **kwargs)


def steer(
    model: Model,
    params: Params,
    retain: tables.Table,
    forget: tables.Table,
    *,
    layers: Sequence[int],
    site: str = "block",
    strength: float = 1.0,
    batch_size: int = 32,
) -> Model:
    """The model with a direction from retained facts added at some layers.

    The direction is the mean over `retain` of the value at a prompt's last token minus
    the mean over `forget`; strength 1 moves the mean of the second onto the first.

    Args:
        model, params: who is attacked; params are left as they are.
        retain: prompts of facts that the model still answers: `tokens`, `mask` [n, L].
        forget: prompts of forgotten facts, without answers.
        layers: where it is added; one is usual, as layers after it carry it on.
        site: whose values are moved.
        strength: times the direction; 0 changes nothing.
        batch_size: rows at a time.
    Returns:
        A Model that runs the same params.
    Raises:
        ValueError: if the site or a layer does not exist, or a table has no rows.
    """
    owner = "attacks.steer"
    _checks.one_of(owner, list(model.sites), site=site)
    _checks.finite(owner, strength=strength)
    count = model.sites[site].layers
    layers = tuple(layers)
    if not layers or any(not 0 <= layer < count for layer in layers):
        raise ValueError(
            f"{owner} needs layers of 0 to {count - 1} at {site!r}, got {list(layers)}."
        )
    means = [
        _mean(model, params, table, site, layers, batch_size)
        for table in (retain, forget)
    ]
    add = jnp.zeros((count, model.sites[site].units), jnp.float32)
    add = add.at[jnp.array(layers)].set(strength * (means[0] - means[1]))
    extend = model.decode and _Steered(model.decode, site, add)
    return model._replace(apply=_Steered(model.apply, site, add), decode=extend)


def _mean(model, params, table, site, layers, size) -> np.ndarray:
    """[layers, units] float32, over rows, of the value at the last real token."""
    rows, total = tables.num_rows(table), 0.0
    table = {name: table[name] for name in ("tokens", "mask")}
    for batch in tables.eval_batches(table, size):
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
