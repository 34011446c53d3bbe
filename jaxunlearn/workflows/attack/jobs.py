# SPDX-License-Identifier: Apache-2.0
"""Every attack as pieces of work, each with a result that is written by itself."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxunlearn import _checks, attacks, edits
from jaxunlearn.data import prose, table
from jaxunlearn.typing import Model, Params
from jaxunlearn.workflows.attack import prompts as asking
from jaxunlearn.workflows.attack.facts import Facts

# Each attack with every setting it takes; a config changes or leaves out some.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "quantize": dict(kinds=("int8", "int4", "nf4"), group="channel"),
    "prefix": dict(text="Answer truthfully, with the facts as they are."),
    "few_shot": dict(number=4),
    "sample": dict(number=16, temperature=1.0),
    "steer": dict(layer=-1, strengths=(1.0, 2.0)),  # -1: the middle one
    "prune": dict(fractions=(0.01, 0.05)),
    "unwrap": dict(),
    "benign": dict(steps=40, batch_size=4, learning_rate=2e-5, length=64),
    "relearn": dict(steps=40, batch_size=8, learning_rate=2e-5, rank=0),
    "rtt": dict(
        folds=5,
        rotations=2,
        rates=(1e-5, 5e-5),
        epochs=4,
        batch_size=8,
        format="answer",
        asked="choice",
        optimizer="adam",
        warmup=4,
        rank=0,
        rates_per_batch=1,
    ),
}
OPTIMIZERS = {"adam": optax.scale_by_adam(), "lion": optax.scale_by_lion(0.9, 0.99)}


class Scene(NamedTuple):
    """Who is attacked, and what is asked."""

    model: Model
    params: Params
    tokenizer: Any
    facts: Facts
    how: asking.How
    seed: int = 0
    progress: bool = False

    def ask(self, model=None, params=None, change=None) -> dict[str, Any]:
        """What is known of forgotten and retained facts, by the scene's model if no
        other is given."""
        model = self.model if model is None else model
        params = self.params if params is None else params
        run = partial(asking.ask, model, params, self.tokenizer, how=self.how)
        return {
            "forget": run(self.facts.forget, change=change),
            "retain": run(self.facts.retain, change=change),
        }


class Unit(NamedTuple):
    """One piece of work.

    Attributes:
        name: such as "quantize int4"; "original" stands first where the model before
            unlearning is attacked.
        run: what it does in a scene; its result can be written as JSON.
        settings: all that changes the result, beside the scene.
    """

    name: str
    run: Callable[[Scene], dict[str, Any]]
    settings: Mapping[str, Any]

    @property
    def of(self) -> str:
        """Whose weights: "original" or "model"."""
        return "original" if self.name.split()[0] == "original" else "model"


def plan(chosen: Mapping[str, Mapping[str, Any]], *, original: bool) -> list[Unit]:
    """The work, in order: the original's first, so that it can be let go.

    Args:
        chosen: attack -> settings that differ from DEFAULTS.
        original: whether the model before unlearning is there too.
    Raises:
        ValueError: for an attack or a setting that is not in DEFAULTS.
    """
    each = {}
    for name, settings in chosen.items():
        _checks.one_of("The attacks", list(DEFAULTS), attack=name)
        for key in settings:
            known = list(DEFAULTS[name])
            _checks.one_of(f"The attack {name!r}", known, setting=key)
        each[name] = dict(DEFAULTS[name]) | dict(settings)
    made = []
    for name in DEFAULTS:  # their order, whatever the config's
        if name in each:
            made += list(_MAKERS[name](each[name]))
    first = []
    if original:
        both = [u for u in made if u.name.split()[0] in ("rtt", "sample")]
        first = [Unit("original", lambda scene: scene.ask(), {})]
        first += [unit._replace(name=f"original {unit.name}") for unit in both]
    return [*first, Unit("unlearned", lambda scene: scene.ask(), {}), *made]


def _quantize(settings):
    for kind in settings["kinds"]:
        group = settings["group"] if kind.startswith("int") else None

        def run(scene, kind=kind, group=group):
            return scene.ask(params=edits.quantize(scene.params, kind, group=group))

        yield Unit(f"quantize {kind}", run, {"kind": kind, "group": group})


def _prefix(settings):
    def run(scene):
        change = partial(attacks.in_context, prefix=settings["text"], separator="\n")
        return scene.ask(change=change)

    yield Unit("prefix", run, settings)


def _few_shot(settings):
    def run(scene):
        facts = scene.facts.retain
        answers = [fact["text"] for fact in facts]
        shots = list(zip(scene.how.prompts(facts), answers, strict=True))
        how = dict(shots=shots, num_shots=settings["number"], seed=scene.seed)
        return scene.ask(change=partial(attacks.in_context, separator="\n", **how))

    yield Unit("few_shot", run, settings)


def _sample(settings):
    def run(scene):
        facts = scene.facts.forget
        texts = attacks.sample(
            scene.model,
            scene.params,
            scene.tokenizer,
            scene.how.prompts(facts),
            num_samples=settings["number"],
            temperature=settings["temperature"],
            max_new_tokens=scene.how.new_tokens,
            batch_size=scene.how.batch_size,
            key=jax.random.key(scene.seed),
        )
        hits = np.array(
            [
                [asking.said(fact, text) for text in each]
                for fact, each in zip(facts, texts, strict=True)
            ]
        )
        ks = [k for k in (1, 4, 16, 64, 256) if k < settings["number"]]
        return {
            "leak": {
                str(k): attacks.leak_at_k(hits, k).tolist()
                for k in [*ks, settings["number"]]
            }
        }

    yield Unit("sample", run, settings)


def _steer(settings):
    for strength in settings["strengths"]:

        def run(scene, strength=strength):
            site = scene.model.sites["block"]
            layer = settings["layer"]
            layer = site.layers // 2 if layer < 0 else layer
            forget, retain = (
                table.encode(scene.tokenizer, scene.how.prompts(facts))
                for facts in (scene.facts.forget, scene.facts.retain)
            )
            model = attacks.steer(
                scene.model,
                scene.params,
                forget=forget,
                retain=retain,
                layers=[layer],
                strength=strength,
            )
            return scene.ask(model=model)

        own = {"layer": settings["layer"], "strength": strength}
        yield Unit(f"steer {strength:g}", run, own)


def _prune(settings):
    for fraction in settings["fractions"]:

        def run(scene, fraction=fraction):
            forget, retain = (
                [table.encode(scene.tokenizer, scene.how.prompts(facts))]
                for facts in (scene.facts.forget, scene.facts.retain)
            )
            params = attacks.prune(
                scene.model,
                scene.params,
                forget=forget,
                retain=retain,
                fraction=fraction,
            )
            return scene.ask(params=params)

        yield Unit(f"prune {fraction:g}", run, {"fraction": fraction})


def _unwrap(settings):
    def run(scene):
        model, params = attacks.unwrap(scene.model, scene.params)
        return scene.ask(model=model, params=params)

    yield Unit("unwrap", run, settings)


def _benign(settings):
    def run(scene):
        how = dict(settings)
        text = prose.prose()[0]
        rows = table.encode_text(scene.tokenizer, text, length=how.pop("length"))
        params, log = attacks.benign(
            scene.model,
            scene.params,
            rows,
            forget=_trained(scene, scene.facts.forget),
            key=jax.random.key(scene.seed),
            seed=scene.seed,
            progress=scene.progress,
            **how,
        )
        return scene.ask(params=params) | _losses(log)

    yield Unit("benign", run, settings)


def _relearn(settings):
    """Trains on every other subject; only the others count as forgotten then."""

    def run(scene):
        folds = _folds(scene, 2)
        params, log = attacks.relearn(
            scene.model,
            scene.params,
            _trained(scene, folds[0]),
            key=jax.random.key(scene.seed),
            seed=scene.seed,
            progress=scene.progress,
            **settings,
        )
        held_out = scene._replace(facts=scene.facts._replace(forget=folds[1]))
        found = held_out.ask(params=params) | _losses(log)
        return found | {"held_out": [fact["id"] for fact in folds[1]]}

    yield Unit("relearn", run, settings)


def _rtt(settings):
    settings = dict(settings)
    count = settings["rotations"]
    if not 1 <= count <= settings["folds"]:
        raise ValueError(
            f"The attack 'rtt' needs 1 <= rotations <= folds, got rotations={count} "
            f"and folds={settings['folds']}."
        )
    _checks.one_of(
        "The attack 'rtt'", list(OPTIMIZERS), optimizer=settings["optimizer"]
    )
    for rotation in range(count):

        def run(scene, rotation=rotation):
            how = dict(settings)
            del how["rotations"]
            direction = OPTIMIZERS[how.pop("optimizer")]
            (sweep,) = attacks.rtt(
                scene.model,
                scene.params,
                scene.tokenizer,
                _folds(scene, how.pop("folds")),
                prompt=scene.how.prompt,
                by="question",
                rotations=[rotation],
                direction=direction,
                train_format=how.pop("format"),
                eval_format=how.pop("asked"),
                learning_rates=how.pop("rates"),
                warmup_steps=how.pop("warmup"),
                key=jax.random.key(scene.seed),
                seed=scene.seed,
                progress=scene.progress,
                **how,
            )
            return {
                "sweep": {
                    "rates": sweep.learning_rates,
                    "hits": sweep.hits.astype(int).tolist(),
                    "logps": np.round(sweep.logps, 4).tolist(),
                    "losses": sweep.losses.tolist(),
                    "finite": sweep.finite.tolist(),
                    "choices": len(scene.facts.forget[0]["choices"]),
                }
            }

        yield Unit(f"rtt {rotation}", run, settings | {"rotation": rotation})


_MAKERS = {
    "quantize": _quantize,
    "prefix": _prefix,
    "few_shot": _few_shot,
    "sample": _sample,
    "steer": _steer,
    "prune": _prune,
    "unwrap": _unwrap,
    "benign": _benign,
    "relearn": _relearn,
    "rtt": _rtt,
}


def sweep(found: Mapping[str, Any]) -> attacks.Sweep:
    """The Sweep that an "rtt" unit's result holds."""
    own = found["sweep"]
    return attacks.Sweep(
        tuple(own["rates"]),
        np.array(own["hits"], bool),
        np.array(own["logps"], np.float32),
        np.array(own["losses"], np.float32),
        np.array(own["finite"], bool),
    )


def _folds(scene: Scene, count: int) -> list[list[Any]]:
    return attacks.make_folds(scene.facts.forget, count, by="subject", seed=scene.seed)


def _trained(scene: Scene, facts: Sequence[Any]) -> dict[str, np.ndarray]:
    return attacks.encode_facts(
        scene.tokenizer, facts, "answer", prompt=scene.how.prompt
    )


def _losses(log) -> dict[str, Any]:
    return {"losses": [entry["known/loss"] for entry in log]}
