# SPDX-License-Identifier: Apache-2.0
"""Every method, as it runs in the small world: the recipes, by their names.

Every recipe of `jaxunlearn.recipes` is included automatically, with the numbers that
its paper published. `ADAPTED` holds arguments that a decoder of five layers forces to
be another number; `SUMS` adds to every BLUR recipe the weighted sum of the same two
losses under the same optimizer, so that the two differ by the combiner alone.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import optax

from jaxunlearn import combine, recipes
from jaxunlearn.recipes import Recipe
from jaxunlearn.typing import Model

# Recipe -> arguments that cannot be the published ones here.
LAYERS = (0, 1, 2)  # as far down a decoder of five layers as 5 to 7 are in one of 32
ADAPTED: Mapping[str, Mapping[str, Any]] = {
    "openunlearning.rmu": {"layer": LAYERS[-1]},
    "rmu.wmdp": {"layers": LAYERS},
    "blur.rmu": {"layers": LAYERS},
    "openunlearning.pdu": {"warmup_steps": 10},  # half of the steps, as 5 of 10 epochs
}
SUMS = {
    "sum.npo": "blur.npo",
    "sum.graddiff": "blur.graddiff",
    "sum.rmu": "blur.rmu",
}
EXCLUDED = {
    "finetune.nll": "it forgets nothing; the others are compared with it",
    "mrp.graddiff": "its directions come topic by topic: experiments/mrp/run.py",
    "openunlearning.altpo": "needs answers that the model made up when sampled",
    "openunlearning.task_vector": "a finetuning whose edit comes after it",
    "surgery.weighted": "needs new facts in the place of the old ones",
    "surgery.bilevel": "needs new facts in the place of the old ones",
}
# Method -> stream -> the table of the small world that it draws from, where that is
# not the one of its name.
SOURCES: Mapping[str, Mapping[str, str]] = {
    "openunlearning.dpo": {"alternate": "wrong"},
    "openunlearning.idkdpo": {"alternate": "refusal"},
    "openunlearning.incorrect": {"alternate": "wrong"},
}


class Method(NamedTuple):
    """A recipe in the small world.

    Attributes:
        name: such as "blur.npo".
        rate: the published learning rate.
        build: (model, learning rate or schedule) -> Recipe.
        sources: stream -> the table that it draws from, as in SOURCES.
    """

    name: str
    rate: float
    build: Callable[[Model, Any], Recipe]
    sources: Mapping[str, str] = MappingProxyType({})


def methods() -> dict[str, Method]:
    """Every method by name; new recipes are among them without a line here."""
    found, adamw = {}, {}
    for name, recipe in recipes.by_name().items():
        if name in EXCLUDED:
            continue
        settings = inspect.signature(recipe).parameters
        rate = settings["learning_rate"].default
        optimizer = ("weight_decay", "eps")
        adamw[name] = {x: settings[x].default for x in optimizer if x in settings}
        found[name] = of_recipe(
            name, recipe, rate, SOURCES.get(name, {}), **ADAPTED.get(name, {})
        )
    for name, blur in SUMS.items():
        if blur in found:
            build_sum = _summed(found[blur].build, adamw[blur])
            found[name] = found[blur]._replace(name=name, build=build_sum)
    return dict(sorted(found.items()))


def of_recipe(
    name: str,
    recipe: Callable[..., Recipe],
    rate: float = 0.0,
    sources: Mapping[str, str] = MappingProxyType({}),
    **arguments: Any,
) -> Method:
    """The method of a recipe(model, learning_rate=, **arguments)."""

    def build_recipe(model, learning_rate):
        return recipe(model, learning_rate=learning_rate, **arguments)

    return Method(name, rate, build_recipe, sources)


def finetune(model: Model, rate: Any) -> Recipe:
    """NLL finetuning on both streams: the baseline that forgets nothing."""
    streams = {"forget": 1.0, "retain": 1.0}
    return recipes.finetune.nll(model, learning_rate=rate, streams=streams)


def _summed(build_blur, settings):
    """BLUR's terms and AdamW with a weighted sum of the gradients."""

    def build_sum(model, rate):
        recipe = build_blur(model, rate)
        adamw = optax.adamw(rate, **settings)
        return recipe._replace(tx=optax.chain(combine.weighted_sum(), adamw))

    return build_sum
