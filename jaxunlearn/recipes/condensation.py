# SPDX-License-Identifier: Apache-2.0
"""Dataset-condensation-driven unlearning: which part of a network trains when (Khan
2024, https://arxiv.org/abs/2402.00195).

    plan = condensation.unlearn(models, learning_rate=3e-3, lr_middle=3e-3)
    stages = plan.stages(epoch=steps_of_an_epoch)
    states, rest, log = fit_stages(steps, states, batches, stages, rest)

The model is three parts. Rounds alternate: `begin` trains on the reduced retain set,
then, in all but the last `threshold` rounds, `final` on a few kept images (the
remembrance set); at the end `middle` trains on the reduced set again. Each part keeps
its own Adam.

*Paper and code*: numbers are the released code's. It takes the remembrance images from
the test set, which then measures itself: take them from training or validation images.
For whole classes its threshold exceeds the number of rounds, so that `final` never
trains and the class is not forgotten.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import optax

from jaxunlearn import _checks, combine, losses, terms
from jaxunlearn._fit import Stage
from jaxunlearn.recipes._recipe import Rate, Recipe
from jaxunlearn.typing import Model

PARTS = ("begin", "middle", "final")
REDUCED, KEPT, ALL = "reduced", "kept", "all"  # streams
STREAMS = MappingProxyType({"begin": REDUCED, "middle": REDUCED, "final": KEPT})


class Plan(NamedTuple):
    """What trains, on what, and when.

    Attributes:
        parts: a Recipe for each part, on the stream that STREAMS names.
        rounds, threshold: rounds in all, and how many of the last leave `final` alone.
        begin_epochs, middle_epochs: over the reduced set; of a round, and at the end.
        final_steps: updates of `final` in a round; each takes the whole kept set.
    """

    parts: Mapping[str, Recipe]
    rounds: int
    threshold: int
    begin_epochs: int
    final_steps: int
    middle_epochs: int

    def stages(self, epoch: int) -> list[Stage]:
        """The stages in order, `epoch` updates to an epoch of the reduced set."""
        _checks.positive_int("condensation.Plan", epoch=epoch)
        found = []
        for number in range(self.rounds):
            found.append(Stage("begin", epoch * self.begin_epochs))
            if number < self.rounds - self.threshold:
                found.append(Stage("final", self.final_steps))
        return [*found, Stage("middle", epoch * self.middle_epochs)]


class Offline(NamedTuple):
    """Before anything is forgotten: `final` learns to do with the kept images.

    Attributes:
        parts: a Recipe for "final", on the kept images, and for "middle", on all.
        rounds, epochs: `final` and `middle` train in turns, so often and so long.
    """

    parts: Mapping[str, Recipe]
    rounds: int
    epochs: int

    def stages(self, kept: int, whole: int) -> list[Stage]:
        """The stages in order, with so many updates to an epoch of both streams."""
        _checks.positive_int("condensation.Offline", kept=kept, whole=whole)
        pair = [
            Stage("final", self.epochs * kept),
            Stage("middle", self.epochs * whole),
        ]
        return pair * self.rounds


def offline(
    models: Mapping[str, Model],
    *,
    learning_rate: Rate = 1e-4,
    lr_middle: Rate = 1e-5,
    rounds: int = 10,
    epochs: int = 20,
) -> Offline:
    """The paper's offline stage: `final` on the kept images, `middle` on all.

    All images means those to be forgotten too, so do it before. For its condensed model
    (`models.vision` "translator") the code takes 1e-3 for both and a fresh `final` in
    every round: run one round at a time.

    Args:
        models: the networks for "middle" and "final"; see `unlearn`.
        learning_rate: of `final`; lr_middle of `middle`.
        rounds, epochs: see `Offline`.
    Raises:
        KeyError: if a part has no model. ValueError: for numbers below 1.
    """
    owner = "condensation.offline"
    names = ("middle", "final")
    _checks.has_keys(owner, "models of", names, models, "Make one for both parts.")
    _checks.positive_int(owner, rounds=rounds, epochs=epochs)
    parts = {
        "middle": _part(models["middle"], "middle", lr_middle, ALL),
        "final": _part(models["final"], "final", learning_rate),
    }
    return Offline(parts, rounds, epochs)


def unlearn(
    models: Mapping[str, Model],
    *,
    learning_rate: Rate = 3e-3,
    lr_middle: Rate = 3e-3,
    rounds: int = 30,
    threshold: int = 25,
    begin_epochs: int = 1,
    final_steps: int = 10,
    middle_epochs: int = 1,
) -> Plan:
    """Modular unlearning with the numbers for the small CNN and random images.

    | what is forgotten | lr | lr_middle | rounds | final_steps | threshold |
    | --- | --- | --- | --- | --- | --- |
    | images, CNN | 3e-3 | 3e-3 | 30 | 10 | 25 |
    | images, MLP and ResNet-18 | 1e-3 | 1e-4 | 30 | 15 | 15 |
    | images, VGG-16 | 1e-3 | 1e-4 | 30 | 10 | 15 |
    | a class, CNN | 1e-3 | 1e-3 | 10 | 10 | 25 |
    | a class, the others | 1e-3 | 1e-4 | 10 | 15 (VGG 10) | 15 |

    Args:
        models: the network for each part, from models.vision.make(config,
            train_parts=(part,)), so that what is frozen runs as it will be used.
        learning_rate: of `begin` and `final`; lr_middle of `middle`.
        The others: see `Plan`.
    Raises:
        KeyError: if a part has no model. ValueError: for numbers below 1 (threshold
            below 0).
    """
    owner = "condensation.unlearn"
    _checks.has_keys(owner, "models of", PARTS, models, "Make one for every part.")
    _checks.not_negative(owner, threshold=threshold)
    counts = dict(
        rounds=rounds,
        begin_epochs=begin_epochs,
        final_steps=final_steps,
        middle_epochs=middle_epochs,
    )
    _checks.positive_int(owner, **counts)
    parts = {
        part: _part(
            models[part], part, lr_middle if part == "middle" else learning_rate
        )
        for part in PARTS
    }
    return Plan(parts, threshold=threshold, **counts)


def _part(
    model: Model, part: str, learning_rate: Rate, stream: str | None = None
) -> Recipe:
    """Cross-entropy on the part's stream, by Adam, of this part's leaves alone."""
    term = terms.on_logps(losses.nll, model, stream or STREAMS[part])
    tx = optax.chain(combine.weighted_sum(), optax.adam(learning_rate))
    return Recipe({"retain": term}, tx, rf"{part}/.*")
