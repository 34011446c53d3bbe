# SPDX-License-Identifier: Apache-2.0
"""Dataset-condensation-driven unlearning: the parts of a network train in turns (Khan
2024, https://arxiv.org/abs/2402.00195).

    plan = condensation.unlearn(models, learning_rate=3e-3, middle_learning_rate=3e-3)
    stages = plan.stages(epoch_steps)
    states, frozen, log = fit_stages(steps, states, batches, stages, frozen)

The model has three parts. In each round `begin` trains on the reduced retain set; then,
in all but the last `threshold` rounds, `final` trains on a few stored images (the
remembrance set). At the end `middle` trains on the reduced set. Each part has a
separate Adam state.

*Paper and code*: defaults are the released code's. It takes the remembrance images from
the test set, so that the test accuracy is measured on training images: take them from
training or validation images instead. For the forgetting of a class its threshold is
larger than the number of rounds, so that `final` never trains and the class is not
forgotten.
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
REDUCED, KEPT, ALL = "reduced", "kept", "all"  # streams: KEPT is the remembrance set
STREAMS = MappingProxyType({"begin": REDUCED, "middle": REDUCED, "final": KEPT})


class Plan(NamedTuple):
    """The recipe of each part, and the schedule of stages.

    Attributes:
        parts: a Recipe for each part, on its stream in STREAMS.
        rounds: number of rounds.
        threshold: the last `threshold` rounds do not train `final`.
        begin_epochs: epochs of `begin` over the reduced set in each round.
        middle_epochs: epochs of `middle` over the reduced set at the end.
        final_steps: updates of `final` in a round, each on the full remembrance set.
    """

    parts: Mapping[str, Recipe]
    rounds: int
    threshold: int
    begin_epochs: int
    final_steps: int
    middle_epochs: int

    def stages(self, epoch_steps: int) -> list[Stage]:
        """The stages in order; an epoch of the reduced set is `epoch_steps` updates."""
        _checks.positive_int("condensation.Plan", epoch_steps=epoch_steps)
        found = []
        for number in range(self.rounds):
            found.append(Stage("begin", epoch_steps * self.begin_epochs))
            if number < self.rounds - self.threshold:
                found.append(Stage("final", self.final_steps))
        return [*found, Stage("middle", epoch_steps * self.middle_epochs)]


class Offline(NamedTuple):
    """Preparation before unlearning: `final` is trained to work with the stored images.

    Attributes:
        parts: a Recipe for "final", on the remembrance set, and for "middle", on all
            images.
        rounds: number of alternations of `final` and `middle`.
        epochs: epochs of each in a round.
    """

    parts: Mapping[str, Recipe]
    rounds: int
    epochs: int

    def stages(self, kept_steps: int, all_steps: int) -> list[Stage]:
        """The stages in order, given the updates of an epoch of each stream."""
        _checks.positive_int(
            "condensation.Offline", kept_steps=kept_steps, all_steps=all_steps
        )
        pair = [
            Stage("final", self.epochs * kept_steps),
            Stage("middle", self.epochs * all_steps),
        ]
        return pair * self.rounds


def offline(
    models: Mapping[str, Model],
    *,
    learning_rate: Rate = 1e-4,
    middle_learning_rate: Rate = 1e-5,
    rounds: int = 10,
    epochs: int = 20,
) -> Offline:
    """The paper's offline stage: `final` on the remembrance set, `middle` on all.

    All images include those to be forgotten later. For the condensed model
    (`models.vision` "translator") the released code takes 1e-3 for both and a newly
    initialised `final` in every round: run one round at a time.

    Args:
        models: the networks for "middle" and "final"; see `unlearn`.
        learning_rate: of `final`.
        middle_learning_rate: of `middle`.
        rounds, epochs: see `Offline`.
    Raises:
        KeyError: if a part has no model. ValueError: for counts below 1.
    """
    owner = "condensation.offline"
    names = ("middle", "final")
    _checks.has_keys(owner, "models of", names, models, "Make one for both parts.")
    _checks.positive_int(owner, rounds=rounds, epochs=epochs)
    parts = {
        "middle": _part(models["middle"], "middle", middle_learning_rate, ALL),
        "final": _part(models["final"], "final", learning_rate),
    }
    return Offline(parts, rounds, epochs)


def unlearn(
    models: Mapping[str, Model],
    *,
    learning_rate: Rate = 3e-3,
    middle_learning_rate: Rate = 3e-3,
    rounds: int = 30,
    threshold: int = 25,
    begin_epochs: int = 1,
    final_steps: int = 10,
    middle_epochs: int = 1,
) -> Plan:
    """Modular unlearning, with defaults for the small CNN and random images.

    | what is forgotten | learning rates (middle) | rounds | final_steps | threshold |
    | --- | --- | --- | --- | --- |
    | images, CNN | 3e-3 (3e-3) | 30 | 10 | 25 |
    | images, MLP and ResNet-18 | 1e-3 (1e-4) | 30 | 15 | 15 |
    | images, VGG-16 | 1e-3 (1e-4) | 30 | 10 | 15 |
    | a class, CNN | 1e-3 (1e-3) | 10 | 10 | 25 |
    | a class, the others | 1e-3 (1e-4) | 10 | 15 (VGG 10) | 15 |

    Args:
        models: the network for each part, from models.vision.make(config,
            train_parts=(part,)), so that what is frozen runs as it will be used.
        learning_rate: of `begin` and `final`.
        middle_learning_rate: of `middle`.
        The others: see `Plan`.
    Raises:
        KeyError: if a part has no model. ValueError: for counts below 1 (threshold
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
            models[part],
            part,
            middle_learning_rate if part == "middle" else learning_rate,
        )
        for part in PARTS
    }
    return Plan(parts, threshold=threshold, **counts)


def _part(
    model: Model, part: str, learning_rate: Rate, stream: str | None = None
) -> Recipe:
    """Cross-entropy on the part's stream, with Adam, over the leaves of this part."""
    term = terms.on_logps(losses.nll, model, stream or STREAMS[part])
    tx = optax.chain(combine.weighted_sum(), optax.adam(learning_rate))
    return Recipe({"retain": term}, tx, rf"{part}/.*")
