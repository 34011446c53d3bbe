# SPDX-License-Identifier: Apache-2.0
"""From a config to the pieces of a run: no weights are read and nothing is computed.

`pieces` has the jitted step and the shapes, with shardings, of all its arguments. That
is enough to compile exactly the step that a run of this config executes:

    built = build.pieces(config, devices)
    compiled = built.step.lower(built.state, built.streams, built.frozen).compile()
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import jaxunlearn as ju
from jaxunlearn import _checks, combine, models, recipes, sharding
from jaxunlearn.io import hf
from jaxunlearn.recipes import Recipe
from jaxunlearn.typing import Frozen, Model, PyTree, Streams
from jaxunlearn.workflows.training import adapters, presets, settings

COLUMNS = ("tokens", "mask", "answer")


class Pieces(NamedTuple):
    """A run without its arrays; shapes are jax.ShapeDtypeStructs with shardings.

    Attributes:
        base: the model that the config names.
        model: the base, with LoRA or projections if the config has them.
        recipe, mesh: what the functions of these names return.
        step: (state, streams, frozen) -> (state, metrics), jitted; has `lower`.
        state, streams, frozen: shapes of the step's arguments.
    """

    base: Model
    model: Model
    recipe: Recipe
    mesh: Mesh
    step: Any
    state: ju.UnlearnState
    streams: Streams
    frozen: Frozen


def pieces(
    config: ConfigDict,
    devices: Sequence[Any] | None = None,
    *,
    make_recipe: Callable[[ConfigDict, Model], Recipe] | None = None,
) -> Pieces:
    """Everything that a run of this config consists of.

    Args:
        config: as settings.defaults lays it out, with the lengths of all streams.
        devices: those of the mesh, real or described; all that JAX finds if None.
        make_recipe: replaces the function `recipe`.
    Raises:
        ValueError, TypeError, KeyError: for a config that cannot be run.
    """
    base, grid = base_model(config), mesh(config, devices)
    model = adapters.adapted(config, base)
    method = (make_recipe or recipe)(config, model)
    tx = combine.with_moments(method.tx, config.moments)
    method = method._replace(tx=combine.with_rounding(tx, config.rounding))
    train, frozen = method.split(params_shapes(config, base, model, grid))
    key = jax.eval_shape(partial(jax.random.key, 0))
    state = jax.eval_shape(partial(ju.init_state, tx=method.tx), train, key=key)
    state = placed(state, grid, model)
    step = ju.make_step(
        method.terms, method.tx, num_microbatches=config.num_microbatches
    )
    return Pieces(
        base,
        model,
        method,
        grid,
        sharding.jit_step(step, grid, model.rules, state),
        state,
        sharding.put_rows(batch_shapes(config, method), grid),
        frozen,
    )


def base_model(config: ConfigDict) -> Model:
    """The model that config.model describes."""
    c = config.model
    running = {name: c[name] for name in ("compute_dtype", "remat", "attention")}
    if c.path:
        return hf.model_from_config(c.path, **running)
    fields = {}
    if c.preset:
        _checks.one_of("The config", sorted(presets.PRESETS), preset=c.preset)
        preset = presets.PRESETS[c.preset]
        fields = {x.name: getattr(preset, x.name) for x in dataclasses.fields(preset)}
    return _decoder(fields | c.fields.to_dict() | running)


def recipe(config: ConfigDict, model: Model) -> Recipe:
    """The recipe that config.recipe names, with its arguments and schedule."""
    if config.mode == "evaluate" and not config.recipe.name:
        # Nothing trains: this recipe only decides how the params are sharded.
        return recipes.finetune.nll(model, streams={next(iter(config.data)): 1.0})
    name, args = config.recipe.name, config.recipe.args.to_dict()
    accepted = settings.recipe_arguments(name)
    for argument in args:
        _checks.one_of(f"The recipe {name}", list(accepted), argument=argument)
    plan = config.schedule
    if plan.steps:
        peak = args.get("learning_rate", accepted["learning_rate"])
        args["learning_rate"] = optax.warmup_cosine_decay_schedule(
            peak / max(1, plan.warmup), peak, plan.warmup, plan.steps, peak * plan.end
        )
    made = recipes.by_name(name)(model, **args)
    if config.recipe.trainable:
        made = made._replace(trainable=config.recipe.trainable)
    return made


def pairs(config: ConfigDict, model: Model) -> list[tuple[str, ...]]:
    """The groups of streams that the recipe reads row by row."""
    return recipe(config, adapters.adapted(config, model)).pairs()


def mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of config.mesh over `devices`, all that JAX finds if None."""
    return sharding.make_mesh(**config.mesh.to_dict(), devices=devices)


def params_shapes(config: ConfigDict, base: Model, model: Model, mesh: Mesh) -> PyTree:
    """Shapes of the params with shardings, LoRA or projections included."""
    dtype = jnp.dtype(config.model.dtype)
    params = jax.eval_shape(base.init, jax.eval_shape(partial(jax.random.key, 0)))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    return placed(adapters.added_shapes(config, model, params), mesh, model)


def batch_shapes(config: ConfigDict, recipe: Recipe) -> Streams:
    """Shapes of one step's streams, all hosts' rows together, without shardings."""
    shapes = {}
    for stream, columns in recipe.reads().items():
        fix = f"Add --stream {stream}=FILE, or the stream to the config's data."
        owner = f"The method {config.recipe.name}"
        _checks.has_keys(owner, "stream", [stream], config.data, fix)
        rows, length = config.data[stream].rows, config.data[stream].length
        shapes[stream] = {
            name: jax.ShapeDtypeStruct(
                (rows, length), jnp.int32 if name == "tokens" else jnp.bool_
            )
            for name in COLUMNS
        }
        if "ref_logps" in columns:
            column = jax.ShapeDtypeStruct((rows,), jnp.float32)
            shapes[stream]["ref_logps"] = column
        if "pair" in columns:
            shapes[stream]["pair"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return shapes


def placed(tree: PyTree, mesh: Mesh, model: Model) -> PyTree:
    """Shapes with the shardings that the model's rules give them."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        sharding.by_rules(tree, mesh, model.rules),
    )


def bytes_per_device(built: Pieces) -> int:
    """Bytes of the state, the frozen params and the gradients on one device.

    Frozen leaves and the reference model share memory. Activations, logits and the
    compiled program are not included.
    """
    train = _bytes(built.state.params)
    reference = built.frozen.ref_params
    frozen = _bytes(built.frozen.params if reference is None else reference)
    return _bytes(built.state) + frozen + len(built.recipe.terms) * train


def _bytes(tree: PyTree) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


# Fields of DecoderConfig that are configs, which a run's config has as dicts.
_PARTS = {
    "rope": models.RopeConfig,
    "local_rope": models.RopeConfig,
    "experts": models.ExpertsConfig,
}


def _decoder(fields: dict[str, Any]) -> Model:
    names = [field.name for field in dataclasses.fields(models.DecoderConfig)]
    for name in fields:
        _checks.one_of("The config's model", names, field=name)
    try:
        for name, kind in _PARTS.items():
            if isinstance(fields.get(name), dict):
                fields = fields | {name: kind(**fields[name])}
        return models.make(models.DecoderConfig(**fields))
    except TypeError as error:
        raise ValueError(
            f"The config's model needs every field of DecoderConfig that has no "
            f"default: {error}. Add it to model.fields, or name a model.preset."
        ) from error
