# SPDX-License-Identifier: Apache-2.0
"""One method in one small world: compiled once, run at many rates and seeds."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import jaxunlearn as ju
from experiments import build
from experiments.small.methods import Method
from experiments.small.world import World
from jaxunlearn import evaluate, trees
from jaxunlearn.data import table
from jaxunlearn.recipes import Recipe
from jaxunlearn.typing import Params


class Runner(NamedTuple):
    """A method ready to run in a world.

    Attributes:
        recipe: with a rate of 1 at its peak, times a rate that the state holds.
        step: compiled.
        compile_seconds: how long that took.
        state: seed -> a fresh state.
        tables: what the streams draw from.
        frozen: what does not train, and the reference if a term asks for it.
        rows: of each stream at a step.
        steps: of a run.
    """

    recipe: Recipe
    step: Callable[..., Any]
    compile_seconds: float
    state: Callable[[int], ju.UnlearnState]
    tables: dict[str, table.Table]
    frozen: ju.Frozen
    rows: int
    steps: int


def tables(world: World) -> dict[str, table.Table]:
    """Every stream that a recipe may read, with every column it may ask for."""
    forget = world.table("forget")
    return {
        "forget": evaluate.reference_logps(world.model, world.params, forget),
        "retain": world.table("retain"),
    }


def runner(
    world: World,
    method: Method,
    streams: dict[str, table.Table],
    *,
    steps: int,
    rows: int,
) -> Runner:
    """Compiles a method's step once for all rates and seeds.

    AdamW's update is proportional to its rate, so the recipe is built with rate 1 and
    what it gives is multiplied by a number in the optimizer's state. The rate rises for
    a tenth of the steps and falls to zero, both linearly.

    Args:
        world: where it unlearns.
        method: what is run.
        streams: from `tables`.
        steps: updates of a run.
        rows: of each stream at a step.
    Raises:
        KeyError: if the method reads a stream that is not there.
    """
    recipe = method.build(world.model, shape(steps))
    scale = optax.inject_hyperparams(optax.scale)(step_size=1.0)
    recipe = recipe._replace(tx=optax.chain(recipe.tx, scale))
    reads = build.reads(recipe)
    own = {name: streams[name] for name in reads}
    train, rest = trees.split(world.params, recipe.trainable)
    needs = any(term.needs_ref for term in recipe.terms.values())
    frozen = ju.Frozen(rest, world.params if needs else None)

    def fresh(seed: int) -> ju.UnlearnState:
        return ju.init_state(train, recipe.tx, jax.random.key(seed))

    start = time.perf_counter()
    step = jax.jit(ju.make_step(recipe.terms, recipe.tx), donate_argnums=0)
    batch = next(table.streams(own, rows, seed=0))
    compiled = step.lower(fresh(0), batch, frozen).compile()
    seconds = time.perf_counter() - start
    return Runner(recipe, compiled, seconds, fresh, own, frozen, rows, steps)


def run(made: Runner, *, rate: float, seed: int) -> tuple[Params, dict[str, Any]]:
    """(params after all steps, {"finite", "steps", "seconds"}).

    A run that is no longer finite ends with its last good params.
    """
    state = made.state(seed)
    scaled = optax.tree_utils.tree_set(
        state.opt_state, step_size=jax.numpy.float32(rate)
    )
    state, start, finite = state.replace(opt_state=scaled), time.perf_counter(), True
    loader = table.streams(made.tables, made.rows, seed=seed)
    try:
        state, _ = ju.fit(made.step, state, loader, made.frozen, steps=made.steps)
    except ju.NotFinite as error:
        state, finite = error.state, False
    about = {
        "finite": finite,
        "steps": int(state.step),
        "seconds": time.perf_counter() - start,
    }
    return trees.merge(state.params, made.frozen.rest), about


def shape(steps: int) -> optax.Schedule:
    """From 0 up to 1 in a tenth of the steps, then down to 0, both linearly."""
    up = max(1, steps // 10)
    return optax.join_schedules(
        [
            optax.linear_schedule(1 / up, 1.0, up - 1),
            optax.linear_schedule(1.0, 0.0, max(1, steps - up)),
        ],
        [up - 1],
    )
