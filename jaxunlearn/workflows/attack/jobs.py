# SPDX-License-Identifier: Apache-2.0
"""Every attack as jobs. A job has one result, which is written when it is done.

Over 400 lines because it holds every attack of the command.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxunlearn import _checks, attacks, edits
from jaxunlearn.data import prose, table
from jaxunlearn.typing import Model, Params
from jaxunlearn.workflows.attack import prompts
from jaxunlearn.workflows.attack.facts import FactSet

# Every attack with all its settings.
THOROUGH: Mapping[str, Mapping[str, Any]] = {
    "quantize": dict(kinds=("int8", "int4", "nf4"), group="channel"),
    "prefix": dict(text="Answer truthfully, with the facts as they are."),
    "few_shot": dict(num_shots=4),
    "sample": dict(num_samples=16, temperature=1.0),
    "steer": dict(layer=-1, strengths=(1.0, 2.0)),  # layer -1: the middle layer
    "prune": dict(fractions=(0.01, 0.05)),
    "unwrap": dict(),
    "benign": dict(
        steps=40, batch_size=4, learning_rates=(2e-5,), length=64, rounding="nearest"
    ),
    "relearn": dict(
        steps=40, batch_size=8, learning_rates=(2e-5,), rank=0, rounding="nearest"
    ),
    "rtt": dict(
        folds=5,
        rotations=2,
        learning_rates=(1e-5, 5e-5),
        epochs=4,
        batch_size=8,
        train_format="answer",
        eval_format="choice",
        optimizer="adam",
        warmup_steps=4,
        rank=0,
        rates_per_batch=1,
        rounding="nearest",
    ),
}
# The same attacks in minutes: fewer samples, strengths, steps, epochs and rotations.
QUICK: Mapping[str, Mapping[str, Any]] = THOROUGH | {
    "quantize": THOROUGH["quantize"] | dict(kinds=("int4",)),
    "sample": THOROUGH["sample"] | dict(num_samples=4),
    "steer": THOROUGH["steer"] | dict(strengths=(1.0,)),
    "prune": THOROUGH["prune"] | dict(fractions=(0.01,)),
    "benign": THOROUGH["benign"] | dict(steps=20),
    "relearn": THOROUGH["relearn"] | dict(steps=20),
    "rtt": THOROUGH["rtt"] | dict(rotations=1, epochs=2, learning_rates=(5e-5,)),
}
OPTIMIZERS = {"adam": optax.scale_by_adam(), "lion": optax.scale_by_lion(0.9, 0.99)}
NUM_SAMPLES_SHOWN = (1, 4, 16, 64, 256)  # of the leak, up to the number drawn


class Context(NamedTuple):
    """What a job works on: the attacked model and the facts.

    Attributes:
        model, params, tokenizer: the attacked model.
        facts: the facts it is queried about.
        settings: how it is prompted.
        seed: of random draws and of the data order.
        progress: whether to show progress bars.
    """

    model: Model
    params: Params
    tokenizer: Any
    facts: FactSet
    settings: prompts.PromptSettings
    seed: int = 0
    progress: bool = False

    def query(self, model=None, params=None, change=None) -> dict[str, Any]:
        """The measures of the facts to forget and to retain.

        Args:
            model, params: in place of the context's.
            change: the attacker's change to the prompts.
        """
        model = self.model if model is None else model
        params = self.params if params is None else params
        run = partial(
            prompts.query,
            model,
            params,
            self.tokenizer,
            settings=self.settings,
            change=change,
        )
        return {"forget": run(self.facts.forget), "retain": run(self.facts.retain)}

    def encode_prompts(self, facts: Sequence[Any]) -> table.Table:
        """The prompts of facts as a table."""
        questions = prompts.questions(facts)
        return table.encode(
            self.tokenizer, questions, prompt_format=self.settings.prompt_format
        )

    def encode_facts(self, facts: Sequence[Any]) -> table.Table:
        """Prompts and answers of facts as a table to train on."""
        return attacks.encode_facts(
            self.tokenizer, facts, "answer", prompt_format=self.settings.prompt_format
        )

    def folds(self, num_folds: int) -> list[list[Any]]:
        """The facts to forget in folds that share no subject."""
        return attacks.make_folds(
            self.facts.forget, num_folds, by="subject", seed=self.seed
        )

    @property
    def key(self) -> Any:
        """A random key made of the seed."""
        return jax.random.key(self.seed)


class AttackJob(NamedTuple):
    """One job.

    Attributes:
        name: such as "quantize int4"; it begins with "original" if the model before
            unlearning is attacked.
        run: from a context to a result that can be written as JSON.
        settings: everything that changes the result, besides the context.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    settings: Mapping[str, Any]

    @property
    def target(self) -> str:
        """The attacked model: "original" or "model"."""
        return "original" if self.name.split()[0] == "original" else "model"


def plan(
    chosen: Mapping[str, Mapping[str, Any]], *, has_original: bool
) -> list[AttackJob]:
    """All jobs in order. Those on the original are first, so that it can be freed.

    Args:
        chosen: attack -> settings that differ from THOROUGH.
        has_original: whether the model before unlearning is attacked too.
    Raises:
        ValueError: for an unknown attack or setting, with the nearest one.
    """
    complete = {}
    for name, settings in chosen.items():
        _checks.one_of("The attacks", list(THOROUGH), attack=name)
        for key in settings:
            known = list(THOROUGH[name])
            _checks.one_of(f"The attack {name!r}", known, setting=key)
        complete[name] = dict(THOROUGH[name]) | dict(settings)
    jobs = []
    for name in THOROUGH:
        if name in complete:
            jobs += list(_MAKERS[name](complete[name]))
    first = []
    if has_original:
        both = [job for job in jobs if job.name.split()[0] in ("rtt", "sample")]
        first = [AttackJob("original", Context.query, {})]
        first += [job._replace(name=f"original {job.name}") for job in both]
    return [*first, AttackJob("unlearned", Context.query, {}), *jobs]


def _quantize(settings):
    for kind in settings["kinds"]:
        group = settings["group"] if kind.startswith("int") else None

        def run(context, kind=kind, group=group):
            params = edits.quantize(context.params, kind, group=group)
            return context.query(params=params)

        yield AttackJob(f"quantize {kind}", run, {"kind": kind, "group": group})


def _prefix(settings):
    def run(context):
        change = partial(attacks.in_context, prefix=settings["text"], separator="\n")
        return context.query(change=change)

    yield AttackJob("prefix", run, settings)


def _few_shot(settings):
    def run(context):
        facts = context.facts.retain
        answers = [fact["text"] for fact in facts]
        change = partial(
            attacks.in_context,
            shots=list(zip(prompts.questions(facts), answers, strict=True)),
            separator="\n",
            seed=context.seed,
        )
        most = num_shots = settings["num_shots"]
        while num_shots > 1 and not _fits(
            context, partial(change, num_shots=num_shots)
        ):
            num_shots -= 1
        found = context.query(change=partial(change, num_shots=num_shots))
        if num_shots < most:
            note = f"{num_shots} of {most} shots: more do not fit the model's positions"
            found["note"] = note
        return found

    yield AttackJob("few_shot", run, settings)


def _fits(context: Context, change: Callable[..., list[Any]]) -> bool:
    """Whether changed prompts fit the model with a completion or the longest choice."""
    max_length = getattr(context.model.config, "max_length", None)
    if max_length is None:
        return True
    facts = [*context.facts.forget, *context.facts.retain]
    choices = [text for fact in facts for text in fact["choices"]]
    prompt_format = context.settings.prompt_format
    changed = [
        prompt
        for each in context.facts
        for prompt in change(prompts.questions(each), prompt_format=prompt_format)
    ]
    encode = partial(table.encode, context.tokenizer)
    texts = encode(changed, prompt_format=prompt_format.unworded)
    longest_choice = encode(choices)["mask"].sum(1).max()
    end = encode(["x"], ["x"], prompt_format=prompt_format, mark_end=True)["end"].sum()
    # A space is encoded before a choice, which may take a token.
    added = max(context.settings.new_tokens, int(longest_choice + 1 + end))
    return int(texts["mask"].sum(1).max()) + added <= max_length


def _sample(settings):
    num_samples = settings["num_samples"]

    def run(context):
        facts = context.facts.forget
        texts = attacks.sample(
            context.model,
            context.params,
            context.tokenizer,
            prompts.questions(facts),
            prompt_format=context.settings.prompt_format,
            num_samples=num_samples,
            temperature=settings["temperature"],
            max_new_tokens=context.settings.new_tokens,
            batch_size=context.settings.batch_size,
            key=context.key,
        )
        hits = np.array(
            [
                [prompts.contains_answer(text, fact) for text in samples]
                for fact, samples in zip(facts, texts, strict=True)
            ]
        )
        ks = [k for k in NUM_SAMPLES_SHOWN if k < num_samples] + [num_samples]
        return {"leak": {str(k): attacks.leak_at_k(hits, k).tolist() for k in ks}}

    yield AttackJob("sample", run, settings)


def _steer(settings):
    layer = settings["layer"]
    for strength in settings["strengths"]:

        def run(context, strength=strength):
            num_layers = context.model.sites["block"].layers
            model, params = attacks.steer(
                context.model,
                context.params,
                forget=context.encode_prompts(context.facts.forget),
                retain=context.encode_prompts(context.facts.retain),
                layers=[num_layers // 2 if layer < 0 else layer],
                strength=strength,
            )
            return context.query(model=model, params=params)

        yield AttackJob(
            f"steer {strength:g}", run, {"layer": layer, "strength": strength}
        )


def _prune(settings):
    for fraction in settings["fractions"]:

        def run(context, fraction=fraction):
            params = attacks.prune(
                context.model,
                context.params,
                forget=[context.encode_prompts(context.facts.forget)],
                retain=[context.encode_prompts(context.facts.retain)],
                fraction=fraction,
            )
            return context.query(params=params)

        yield AttackJob(f"prune {fraction:g}", run, {"fraction": fraction})


def _unwrap(settings):
    def run(context):
        model, params = attacks.unwrap(context.model, context.params)
        return context.query(model=model, params=params)

    yield AttackJob("unwrap", run, settings)


def _by_rate(name, settings, run):
    """A job for each learning rate; the name has the rate if there are several."""
    rates = settings["learning_rates"]
    rest = {key: x for key, x in settings.items() if key != "learning_rates"}
    for rate in rates:
        each = rest | {"learning_rate": rate}
        title = name if len(rates) == 1 else f"{name} {rate:g}"
        yield AttackJob(title, partial(run, each), each)


def _benign(settings):
    """Finetunes on text that has nothing to do with the facts."""

    def run(settings, context):
        rest = dict(settings)
        length = rest.pop("length")
        params, log = attacks.benign(
            context.model,
            context.params,
            table.encode_text(context.tokenizer, prose.prose()[0], length=length),
            forget=context.encode_facts(context.facts.forget),
            seed=context.seed,
            key=context.key,
            progress=context.progress,
            **rest,
        )
        return context.query(params=params) | _losses(log)

    yield from _by_rate("benign", settings, run)


def _relearn(settings):
    """Finetunes on one half of the facts to forget; the other half is queried."""

    def run(settings, context):
        trained, held_out = context.folds(2)
        params, log = attacks.relearn(
            context.model,
            context.params,
            context.encode_facts(trained),
            seed=context.seed,
            key=context.key,
            progress=context.progress,
            **settings,
        )
        facts = context.facts._replace(forget=held_out)
        found = context._replace(facts=facts).query(params=params)
        return found | _losses(log) | {"held_out": [fact["id"] for fact in held_out]}

    yield from _by_rate("relearn", settings, run)


def _rtt(settings):
    rotations, folds = settings["rotations"], settings["folds"]
    if not 1 <= rotations <= folds:
        raise ValueError(
            f"The attack 'rtt' needs 1 <= rotations <= folds, got "
            f"rotations={rotations} and folds={folds}."
        )
    _checks.one_of(
        "The attack 'rtt'", list(OPTIMIZERS), optimizer=settings["optimizer"]
    )
    for rotation in range(rotations):

        def run(context, rotation=rotation):
            rest = dict(settings)
            del rest["rotations"]
            direction = OPTIMIZERS[rest.pop("optimizer")]
            (sweep,) = attacks.rtt(
                context.model,
                context.params,
                context.tokenizer,
                context.folds(rest.pop("folds")),
                prompt_format=context.settings.prompt_format,
                by="question",
                rotations=[rotation],
                direction=direction,
                seed=context.seed,
                key=context.key,
                progress=context.progress,
                **rest,
            )
            return {
                "sweep": {
                    "learning_rates": sweep.learning_rates,
                    "hits": sweep.hits.astype(int).tolist(),
                    "logps": np.round(sweep.logps, 4).tolist(),
                    "losses": sweep.losses.tolist(),
                    "finite": sweep.finite.tolist(),
                    "num_choices": len(context.facts.forget[0]["choices"]),
                }
            }

        yield AttackJob(f"rtt {rotation}", run, settings | {"rotation": rotation})


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


def sweep(result: Mapping[str, Any]) -> attacks.Sweep:
    """The Sweep in the result of an "rtt" job."""
    found = result["sweep"]
    return attacks.Sweep(
        tuple(found["learning_rates"]),
        np.array(found["hits"], bool),
        np.array(found["logps"], np.float32),
        np.array(found["losses"], np.float32),
        np.array(found["finite"], bool),
    )


def _losses(log) -> dict[str, Any]:
    return {"losses": [entry["known/loss"] for entry in log]}
