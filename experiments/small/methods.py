# SPDX-License-Identifier: Apache-2.0
"""Every method, as it runs in the small world: the recipes, by their own names.

Whatever `jaxunlearn.recipes` has is here by itself, with the numbers its paper
published. `FITTED` holds what a decoder of five layers forces to be another number, and
why; `APART` adds to every BLUR recipe the weighted sum of the same two losses under the
same optimizer, so that the two differ by the combiner alone.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import optax

from jaxunlearn import combine, recipes
from jaxunlearn.recipes import Recipe
from jaxunlearn.typing import Model
from jaxunlearn.workflows.training import build

# Recipe -> arguments that cannot be the published ones here.
LAYERS = (0, 1, 2)  # as far down a decoder of five layers as 5 to 7 are in one of 32
FITTED: Mapping[str, Mapping[str, Any]] = {
    "openunlearning.rmu": {"layer": LAYERS[-1]},
    "rmu.wmdp": {"layers": LAYERS},
    "blur.rmu": {"layers": LAYERS},
    "openunlearning.pdu": {"warm_up": 10},  # half of the steps, as 5 of 10 epochs
}
APART = {
    "sum.npo": "blur.npo",
    "sum.graddiff": "blur.graddiff",
    "sum.rmu": "blur.rmu",
}
LEFT_OUT = {
    "finetune.nll": "it forgets nothing; it is what the others are measured against",
    "mrp.graddiff": "its directions come topic by topic: experiments/mrp/run.py",
    "openunlearning.altpo": "needs answers that the model made up when sampled",
    "openunlearning.task_vector": "a finetuning whose edit comes after it",
    "surgery.weighted": "needs new facts in the place of the old ones",
    "surgery.bilevel": "needs new facts in the place of the old ones",
}
# Method -> stream -> the table of the small world that it draws from, where that is
# not the one of its name.
TABLES: Mapping[str, Mapping[str, str]] = {
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
        tables: as in TABLES.
    """

    name: str
    rate: float
    build: Callable[[Model, Any], Recipe]
    tables: Mapping[str, str] = MappingProxyType({})


def methods() -> dict[str, Method]:
    """Every method by name; new recipes are among them without a line here."""
    found, adamw = {}, {}
    for name, function in build.recipes_by_name().items():
        if name in LEFT_OUT:
            continue
        settings = inspect.signature(function).parameters
        rate = settings["learning_rate"].default
        kept = ("weight_decay", "eps")
        adamw[name] = {x: settings[x].default for x in kept if x in settings}
        made = _with(function, FITTED.get(name, {}))
        found[name] = Method(name, rate, made, TABLES.get(name, {}))
    for name, blur in APART.items():
        if blur in found:
            made = _summed(found[blur].build, adamw[blur])
            found[name] = found[blur]._replace(name=name, build=made)
    return dict(sorted(found.items()))


def plain(model: Model, rate: Any) -> Recipe:
    """NLL finetuning on both streams at once: what every method is measured against."""
    streams = {"forget": 1.0, "retain": 1.0}
    return recipes.finetune.nll(model, learning_rate=rate, streams=streams)


def _with(function, arguments):
    return lambda model, rate: function(model, learning_rate=rate, **arguments)


def _summed(build_blur, settings):
    """BLUR's terms and AdamW, their gradients merely added."""

    def build_sum(model, rate):
        recipe = build_blur(model, rate)
        adamw = optax.adamw(rate, **settings)
        return recipe._replace(tx=optax.chain(combine.weighted_sum(), adamw))

    return build_sum
