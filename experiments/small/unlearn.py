# SPDX-License-Identifier: Apache-2.0
"""One method in one small world: compiled once, run at many rates and seeds."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

import jaxunlearn as ju
from experiments.small import questions
from experiments.small.methods import Method
from experiments.small.world import World
from jaxunlearn import _checks, evaluate, trees
from jaxunlearn.data import table
from jaxunlearn.recipes import Recipe
from jaxunlearn.typing import Params
from jaxunlearn.workflows.training import build

REFUSALS = (
    "I do not know.",
    "I'm not sure.",
    "I don't have that information.",
    "That is beyond what I know.",
    "I cannot say.",
)


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
        places: stream -> the table that it draws from.
    """

    recipe: Recipe
    step: Callable[..., Any]
    compile_seconds: float
    state: Callable[[int], ju.UnlearnState]
    tables: dict[str, table.Table]
    frozen: ju.Frozen
    rows: int
    steps: int
    places: dict[str, str]


def tables(world: World) -> dict[str, table.Table]:
    """Every table that a stream may draw from, with the columns a recipe may ask for.

    Rows of "wrong" and "refusal" are those of "forget" with another answer.
    """
    rows = world.questions["forget"]
    # The last wrong answer, which score does not ask; row i is about the same question.
    answers = {
        "forget": [row["answer"] for row in rows],
        "wrong": [row["perturbed_answer"][-1] for row in rows],
        "refusal": [REFUSALS[i % len(REFUSALS)] for i in range(len(rows))],
    }
    made = {
        name: questions.encode(world.tokenizer, rows, each)
        for name, each in answers.items()
    }
    # All of one length, which a refusal may need more of than the world's own rows.
    widths = [own["tokens"].shape[1] for own in made.values()]
    length = max(world.about["length"], *widths)
    kept = world.questions["retain"]
    found = {"retain": questions.encode(world.tokenizer, kept, length=length)}
    for name, each in answers.items():
        own = questions.encode(world.tokenizer, rows, each, length=length)
        found[name] = evaluate.reference_logps(world.model, world.params, own)
    return found


def pair(world: World) -> dict[str, table.Table]:
    """The tables of `forget`, with the reference's log-probabilities, and `retain`
    alone, for methods that read no other answers."""
    forget = evaluate.reference_logps(world.model, world.params, world.table("forget"))
    return {"forget": forget, "retain": world.table("retain")}


def batches(tables: dict[str, table.Table], rows: int, *, seed: int) -> Any:
    """One batch of every stream, endlessly; `alternate` in the order of `forget`."""
    each = {
        name: table.batches(
            own, rows, seed=seed, name="forget" if name == "alternate" else name
        )
        for name, own in tables.items()
    }
    while True:
        yield {name: next(stream) for name, stream in each.items()}


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
    places = {name: method.tables.get(name, name) for name in reads}
    fix = (
        "Say in methods.TABLES what it draws from, or in LEFT_OUT why it does not run."
    )
    _checks.has_keys(method.name, "tables for", places.values(), streams, fix)
    own = {name: streams[place] for name, place in places.items()}
    train, rest = trees.split(world.params, recipe.trainable)
    needs = any(term.needs_ref for term in recipe.terms.values())
    frozen = ju.Frozen(rest, world.params if needs else None)

    def fresh(seed: int) -> ju.UnlearnState:
        return ju.init_state(train, recipe.tx, jax.random.key(seed))

    start = time.perf_counter()
    step = jax.jit(ju.make_step(recipe.terms, recipe.tx), donate_argnums=0)
    batch = next(batches(own, rows, seed=0))
    compiled = step.lower(fresh(0), batch, frozen).compile()
    seconds = time.perf_counter() - start
    return Runner(recipe, compiled, seconds, fresh, own, frozen, rows, steps, places)


def elsewhere(made: Runner, params: Params, streams: dict[str, table.Table]) -> Runner:
    """The same compiled step from other params and on other rows, of the same shapes.

    The reference, where a term asks for one, stays that of the world.
    """
    train, rest = trees.split(params, made.recipe.trainable)

    def fresh(seed: int) -> ju.UnlearnState:
        return ju.init_state(train, made.recipe.tx, jax.random.key(seed))

    own = {name: streams[place] for name, place in made.places.items()}
    return made._replace(
        state=fresh, tables=own, frozen=made.frozen._replace(rest=rest)
    )


def run(
    made: Runner, *, rate: float, seed: int, hooks: Sequence[Callable[..., None]] = ()
) -> tuple[Params, dict[str, Any]]:
    """(params after all steps, {"finite", "steps", "seconds"}).

    A run that is no longer finite ends with its last good params. Hooks as for ju.fit.
    """
    state = made.state(seed)
    kept = optax.tree_utils.tree_get(state.opt_state, "step_size")  # as the params are
    scaled = optax.tree_utils.tree_set(
        state.opt_state, step_size=jax.numpy.asarray(rate, kept.dtype)
    )
    state, start, finite = state.replace(opt_state=scaled), time.perf_counter(), True
    loader = batches(made.tables, made.rows, seed=seed)
    try:
        state, _ = ju.fit(
            made.step, state, loader, made.frozen, steps=made.steps, hooks=hooks
        )
    except ju.NotFinite as error:
        state, finite = error.state, False
    about = {
        "finite": finite,
        "steps": int(state.step),
        "seconds": time.perf_counter() - start,
    }
    return trees.merge(state.params, made.frozen.params), about


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
