# SPDX-License-Identifier: Apache-2.0
"""One method in one small world: compiled once, run at many rates and seeds."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

import jaxunlearn as ju
from experiments.shared import ledger
from experiments.small import methods, questions
from experiments.small.methods import Method
from experiments.small.world import World
from jaxunlearn import _checks, data, evaluate, trees
from jaxunlearn.data import table
from jaxunlearn.recipes import Recipe
from jaxunlearn.typing import Params

REFUSALS = (
    "I do not know.",
    "I'm not sure.",
    "I don't have that information.",
    "That is beyond what I know.",
    "I cannot say.",
)

Tables = dict[str, table.Table]


class Runner(NamedTuple):
    """A method that is ready to run in a world.

    Attributes:
        recipe: its learning rate peaks at 1; the state holds the factor.
        step: the compiled step.
        compile_seconds: how long compiling took.
        init: seed -> a new state.
        tables: stream -> the table that it draws from.
        frozen: what does not train, and the reference if a term needs it.
        batch_size: rows of each stream at a step.
        steps: of a run.
        sources: stream -> name of the table that it draws from.
    """

    recipe: Recipe
    step: Callable[..., Any]
    compile_seconds: float
    init: Callable[[int], ju.UnlearnState]
    tables: Tables
    frozen: ju.Frozen
    batch_size: int
    steps: int
    sources: dict[str, str]


def tables(world: World) -> Tables:
    """Every table that a stream may draw from, with the columns a recipe may need.

    Rows of "wrong" and "refusal" are those of "forget" with another answer.
    """
    rows = world.questions["forget"]
    # The last wrong answer, which score does not use; row i has the same question.
    answers = {
        "forget": [row["answer"] for row in rows],
        "wrong": [row["perturbed_answer"][-1] for row in rows],
        "refusal": [REFUSALS[i % len(REFUSALS)] for i in range(len(rows))],
    }
    encoded = [questions.encode(world.tokenizer, rows, x) for x in answers.values()]
    # All have one length, which a refusal may need more of than the world's rows.
    widths = [each["tokens"].shape[1] for each in encoded]
    length = max(world.about["length"], *widths)
    retain = world.questions["retain"]
    found = {"retain": questions.encode(world.tokenizer, retain, length=length)}
    for name, each in answers.items():
        encoded = questions.encode(world.tokenizer, rows, each, length=length)
        found[name] = evaluate.reference_logps(world.model, world.params, encoded)
    return found | data.paired({name: found[name] for name in answers})


def forget_and_retain(world: World) -> Tables:
    """The tables of `forget`, with the reference's log-probabilities, and `retain`."""
    forget = evaluate.reference_logps(world.model, world.params, world.table("forget"))
    return {"forget": forget, "retain": world.table("retain")}


def batches(tables: Tables, batch_size: int, *, seed: int) -> Any:
    """One batch of every stream, endlessly; `alternate` in the order of `forget`."""
    each = {
        name: table.batches(
            rows, batch_size, seed=seed, name="forget" if name == "alternate" else name
        )
        for name, rows in tables.items()
    }
    while True:
        yield {name: next(stream) for name, stream in each.items()}


def runner(
    world: World, method: Method, streams: Tables, *, steps: int, batch_size: int
) -> Runner:
    """Compiles a method's step once for all rates and seeds.

    AdamW's update is proportional to its rate, so the recipe is built with rate 1 and
    its update is multiplied by a number in the optimizer's state. The rate rises for a
    tenth of the steps and falls to zero, both linearly.

    Args:
        world: where it unlearns.
        method: what runs.
        streams: from `tables`.
        steps: updates of a run.
        batch_size: rows of each stream at a step.
    Raises:
        KeyError: if the method reads a stream that is missing.
    """
    recipe = method.build(world.model, rate_schedule(steps))
    scale = optax.inject_hyperparams(optax.scale)(step_size=1.0)
    recipe = recipe._replace(tx=optax.chain(recipe.tx, scale))
    sources = {name: method.sources.get(name, name) for name in recipe.reads()}
    fix = (
        "Name its table in methods.SOURCES, or in methods.EXCLUDED the reason why it "
        "does not run."
    )
    _checks.has_keys(method.name, "tables for", sources.values(), streams, fix)
    start = time.perf_counter()
    step = jax.jit(ju.make_step(recipe.terms, recipe.tx), donate_argnums=0)
    frozen = ju.Frozen(None, world.params if recipe.needs_ref else None)
    unbound = Runner(recipe, step, 0.0, None, {}, frozen, batch_size, steps, sources)
    bound = rebind(unbound, world.params, streams)
    batch = next(batches(bound.tables, batch_size, seed=0))
    compiled = step.lower(bound.init(0), batch, bound.frozen).compile()
    return bound._replace(step=compiled, compile_seconds=time.perf_counter() - start)


def rebind(runner: Runner, params: Params, streams: Tables) -> Runner:
    """The same compiled step from other params and on other rows of the same shapes.

    The reference, where a term needs one, does not change.
    """
    train, frozen = runner.recipe.split(params)

    def init(seed: int) -> ju.UnlearnState:
        return ju.init_state(train, runner.recipe.tx, jax.random.key(seed))

    return runner._replace(
        init=init,
        tables={name: streams[source] for name, source in runner.sources.items()},
        frozen=runner.frozen._replace(params=frozen.params),
    )


def run(
    runner: Runner, *, rate: float, seed: int, hooks: Sequence[Callable[..., None]] = ()
) -> tuple[Params, dict[str, Any]]:
    """(params after all steps, {"finite", "steps", "seconds"}).

    A run that is no longer finite ends with its last finite params. Hooks are as for
    ju.fit.
    """
    state = runner.init(seed)
    dtype = optax.tree_utils.tree_get(state.opt_state, "step_size").dtype
    scaled = optax.tree_utils.tree_set(
        state.opt_state, step_size=jax.numpy.asarray(rate, dtype)
    )
    state, start, finite = state.replace(opt_state=scaled), time.perf_counter(), True
    loader = batches(runner.tables, runner.batch_size, seed=seed)
    try:
        state, _ = ju.fit(
            runner.step, state, loader, runner.frozen, steps=runner.steps, hooks=hooks
        )
    except ju.NotFinite as error:
        state, finite = error.state, False
    about = {
        "finite": finite,
        "steps": int(state.step),
        "seconds": time.perf_counter() - start,
    }
    return trees.merge(state.params, runner.frozen.params), about


def sweep(
    book: ledger.Ledger,
    recipes: Mapping[str, Callable[..., Recipe]],
    config: Any,
    *,
    start: Callable[[str], tuple[World, Tables]],
    measure: Callable[[Params], Mapping[str, Any]],
    score: Callable[[ledger.Line], Any],
) -> None:
    """Adds the runs of ledger.sweep that the ledger lacks.

    Args:
        book: a line of it is `key`, `method`, `rate`, `seed`, what `run` returns and
            what `measure` returns.
        recipes: name -> recipe of (model, learning_rate=).
        config: settings with `rates`, `seeds`, `steps` and `batch_size`.
        start: name -> (the world that it unlearns in, the tables of its streams).
        measure: of the params after a run.
        score: of a line; the rate with the largest one on the first seed runs on the
            other seeds.
    """
    runners: dict[str, Runner] = {}

    def best(name: str) -> float:
        return best_rate(book.lines, name, seed=config.seeds[0], score=score)

    for name, rate, seed in ledger.sweep(recipes, config.rates, config.seeds, best):
        key = f"{name} {rate:.3g} {seed}"
        if not book.lacks(key):
            continue
        if name not in runners:
            method = methods.of_recipe(name, recipes[name])
            sizes = dict(steps=config.steps, batch_size=config.batch_size)
            world, streams = start(name)
            runners[name] = runner(world, method, streams, **sizes)
        params, about = run(runners[name], rate=rate, seed=seed)
        line = {"key": key, "method": name, "rate": rate, "seed": seed, **about}
        book.add(line | dict(measure(params)))


def best_rate(
    lines: Sequence[ledger.Line],
    name: str,
    *,
    seed: int,
    score: Callable[[ledger.Line], Any],
) -> float:
    """The rate of a method with the largest score on a seed; the lower of two that are
    equal."""
    tried = [x for x in lines if (x["method"], x.get("seed")) == (name, seed)]
    return max(tried, key=lambda x: (score(x), -x["rate"]))["rate"]


def rate_schedule(steps: int) -> optax.Schedule:
    """From 0 up to 1 in a tenth of the steps, then down to 0, both linearly."""
    up = max(1, steps // 10)
    return optax.join_schedules(
        [
            optax.linear_schedule(1 / up, 1.0, up - 1),
            optax.linear_schedule(1.0, 0.0, max(1, steps - up)),
        ],
        [up - 1],
    )
