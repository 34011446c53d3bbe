# SPDX-License-Identifier: Apache-2.0
"""What a run adds to a model before it trains, and removes before the model is saved.

`lora` adds low-rank matrices to kernels (config.lora), `mrp.graddiff` adds
directions that are projected out (config.projection). Params without these leaves are
the original model.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxunlearn import _checks, recipes, wrap
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params, PRNGKey, PyTree

_PROJECTED = "mrp.graddiff"  # the recipe that trains projections


def projects(config: ConfigDict) -> bool:
    return config.recipe.name == _PROJECTED


def adapted(config: ConfigDict, base: Model) -> Model:
    """The model with what is added to it; `base` itself where nothing is.

    Raises:
        ValueError: if the config has both LoRA and projections.
    """
    lora = config.lora
    if lora.rank and projects(config):
        raise ValueError(
            f"{_PROJECTED} trains projections, got lora.rank={lora.rank} too. Leave it "
            "out."
        )
    if lora.rank:
        alpha = lora.alpha or 2.0 * lora.rank
        return wrap.lora(base, pattern=lora.pattern, rank=lora.rank, alpha=alpha)
    if projects(config):
        return wrap.projection(base, _sites(config, base))
    return base


def added_shapes(config: ConfigDict, model: Model, params: PyTree) -> PyTree:
    """The params' shapes with the added leaves; `params` are those of the base."""
    if config.lora.rank:
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.eval_shape(lambda x, k: wrap.add_lora(model, x, k), params, key)
    if not projects(config):
        return params
    count = config.projection.num_directions
    leaves = {
        site: {
            "new": jax.ShapeDtypeStruct(
                (len(layers), count, model.sites[site].units), jnp.float32
            )
        }
        for site, layers in wrap.projection_sites(model).items()
    }
    return params | {"projection": leaves}


def added(
    config: ConfigDict,
    model: Model,
    params: Params,
    rows: dict[str, table.Table | table.Source],
    key: PRNGKey,
) -> Params:
    """The params with fresh leaves, before any update.

    Args:
        config: the run's.
        model: as `adapted` gives it.
        params: of the base.
        rows: the streams; the first directions come from `forget` and `retain`.
        key: of LoRA's random matrices.
    """
    if config.lora.rank:
        return wrap.add_lora(model, params, key)
    if not projects(config):
        return params
    forget, retain = (_batches(config, name, rows) for name in ("forget", "retain"))
    units = min(model.sites[site].units for site in wrap.projection_sites(model))
    return recipes.mrp.begin(
        model,
        params,
        forget=forget,
        retain=retain,
        num_directions=config.projection.num_directions,
        num_protected=config.projection.num_protected or min(64, units // 4),
    )


def folded(config: ConfigDict, model: Model, params: Params) -> Params:
    """Params of the base that compute what the adapted model computes.

    Raises:
        ValueError: if projections are at a site that no weights can hold.
    """
    if config.lora.rank:
        return wrap.merge_lora(model, params)
    return wrap.fold_projection(model, params) if projects(config) else params


def _sites(config: ConfigDict, base: Model) -> dict[str, Any]:
    given = config.projection.sites.to_dict()
    if given:
        return {site: tuple(layers) for site, layers in given.items()}
    fix = "Use a decoder of models.make."
    _checks.has_keys(_PROJECTED, "sites", ["mlp_out"], base.sites, fix)
    return {"mlp_out": tuple(range(base.sites["mlp_out"].layers))}


def _batches(config: ConfigDict, name: str, rows) -> Iterator[table.Table]:
    size = config.data[name].rows
    for batch in table.eval_batches(rows[name], size):
        valid = batch.pop("valid")
        yield {column: values[valid] for column, values in batch.items()}
