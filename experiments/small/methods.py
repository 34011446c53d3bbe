# SPDX-License-Identifier: Apache-2.0
"""Every method, as it runs in the small world: the recipes, by their own names.

Whatever `jaxunlearn.recipes` has is here by itself, with the numbers its paper
published. `FITTED` holds what a decoder of five layers forces to be another number, and
why; `APART` adds to every BLUR recipe the weighted sum of the same two losses under the
same optimizer, so that the two differ by the combiner alone.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from experiments import build
from jaxunlearn import combine, recipes
from jaxunlearn.recipes import Recipe
from jaxunlearn.typing import Model

# Recipe -> arguments that cannot be the published ones here.
FITTED: Mapping[str, Mapping[str, Any]] = {}

APART = {"sum.npo": "blur.npo", "sum.graddiff": "blur.graddiff"}
LEFT_OUT = {"finetune.nll": "it forgets nothing; it is what the others cost more than"}


class Method(NamedTuple):
    """A recipe in the small world.

    Attributes:
        name: such as "blur.npo".
        rate: the published learning rate.
        build: (model, learning rate or schedule) -> Recipe.
    """

    name: str
    rate: float
    build: Callable[[Model, Any], Recipe]


def methods() -> dict[str, Method]:
    """Every method by name; new recipes are among them without a line here."""
    found = {}
    for name, function in build.recipes_by_name().items():
        if name in LEFT_OUT:
            continue
        rate = inspect.signature(function).parameters["lr"].default
        found[name] = Method(name, rate, _with(function, FITTED.get(name, {})))
    for name, other in APART.items():
        found[name] = Method(name, found[other].rate, _summed(found[other].build))
    return dict(sorted(found.items()))


def plain(model: Model, rate: Any) -> Recipe:
    """NLL finetuning on both streams at once: what every method is measured against."""
    streams = {"forget": 1.0, "retain": 1.0}
    return recipes.finetune.nll(model, lr=rate, streams=streams)


def _with(function, arguments):
    return lambda model, rate: function(model, lr=rate, **arguments)


def _summed(build_blur):
    """BLUR's terms and AdamW, their gradients merely added."""

    def build_sum(model, rate):
        recipe = build_blur(model, rate)
        adamw = optax.adamw(rate, weight_decay=0.01)  # BLUR's published decay
        return recipe._replace(tx=optax.chain(combine.weighted_sum(), adamw))

    return build_sum
