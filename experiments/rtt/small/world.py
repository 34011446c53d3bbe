# SPDX-License-Identifier: Apache-2.0
"""RTT's small world: made-up authors, in pretraining or finetuned in.

Facts are those of the authors to forget, in folds that share no author. Two measures on
the fold held out: *choice*, whether the answer (of TOFU a paraphrase) has a larger
log-probability a token than three wrong ones in its wording; and *verbatim*, the
probability of a token of the answer itself. A method runs at the rate that forgets most
while the loss on rows to retain is at most `max_loss` nats a token on the first seed.

Attacked too are the original, the retrained model, and, as a negative control, the
original on authors that no model ever saw. For facts finetuned in, the retrained model
is finetuned on them, unlearned and attacked.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import optax

import jaxunlearn as ju
from experiments.rtt.jobs import ADAM, Job, option_logps
from experiments.shared import command, ledger
from experiments.small import biographies, methods, questions, score, unlearn, world
from jaxunlearn import attacks, evaluate, recipes
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params

CONFIG = world.CONFIG
METHODS = {
    "GradDiff": "openunlearning.graddiff",
    "NPO": "openunlearning.npo",
    "RMU": "openunlearning.rmu",
    "BLUR-NPO": "blur.npo",
    "incorrect answer": "openunlearning.incorrect",
}
FINETUNED = ("GradDiff", "incorrect answer")  # on facts finetuned in, as in the paper
# By method, around where it begins to forget in experiments/comparison.
RATES: Mapping[str, Sequence[float]] = MappingProxyType(
    {
        "GradDiff": (1e-4, 3e-4),
        "NPO": (1e-4, 2e-4),
        "RMU": (1e-3, 2e-3),
        "BLUR-NPO": (1e-4, 2e-4),
        "incorrect answer": (1e-3, 2e-3),
    }
)


class SmallConfig(NamedTuple):
    """Settings of RTT in the small world.

    Attributes:
        rates: of unlearning, by method.
        seeds: of unlearning and of the attack.
        steps, batch_size: of unlearning; rows of each stream at a step.
        num_facts: at most so many, evenly spaced, are dealt into folds.
        num_folds: how many folds.
        attack_rates: learning rates of the attack on the first seed; on other seeds it
            runs at the best of them.
        epochs, attack_batch_size: of the attack.
        max_loss: bound on the loss on rows to retain, nats a token.
        finetune: (steps of 32 rows, learning rate) that finetune the facts into the
            retrained model.
        num_scored: rows that experiments.small.score uses.
    """

    rates: Mapping[str, Sequence[float]] = RATES
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 20
    batch_size: int = 8
    num_facts: int = 48
    num_folds: int = 5
    # At 1e-3 the original itself loses facts held out: on four folds, verbatim 0.99
    # before, 0.71 after three epochs and 0.96 at 3e-4; the retrained model gains no
    # more by it.
    attack_rates: Sequence[float] = (1e-4, 3e-4)
    epochs: int = 3
    attack_batch_size: int = 8
    max_loss: float = 0.4
    finetune: tuple[int, float] = (60, 1e-3)
    num_scored: Mapping[str, int] = MappingProxyType({"forget": 48, "retain": 40})


SETTINGS = SmallConfig()


class Folds(NamedTuple):
    """Facts in folds.

    Attributes:
        train: fold -> table to train on.
        held_out: fold -> questions of five choices: the right one, three wrong ones in
            the same wording, and the answer once more.
    """

    train: Sequence[table.Table]
    held_out: Sequence[table.Table]


class Facts(NamedTuple):
    """As experiments.rtt.run.Facts."""

    model: Model
    params: Params
    tables: Mapping[str, table.Table]


class Small:
    """The small world, as experiments.rtt.run reads it."""

    def __init__(self, small: world.World, config: SmallConfig, file: Path):
        """
        Args:
            small: where the methods run.
            config: rates, seeds and sizes.
            file: of the ledger.
        """
        self.small, self.config, self.file = small, config, file
        self.head = ledger.head(config, world=small.digest)
        known = methods.methods()
        self.methods = {name: known[recipe] for name, recipe in METHODS.items()}
        self.made: dict[str, Facts] = {}

    @cached_property
    def folds(self) -> Folds:
        """The facts to forget."""
        return deal(self.small, self.small.questions["forget"], self.config)

    @cached_property
    def never_seen(self) -> Folds:
        """Facts that no model saw: the negative control."""
        return deal(self.small, never_seen(self.small, self.config), self.config)

    @cached_property
    def scorer(self) -> score.Scorer:
        return score.scorer(self.small, rows=self.config.num_scored)

    def jobs(self) -> Iterator[Job]:
        """Stopped early, they leave folds of all seeds."""
        first, folds = self.config.seeds[0], range(self.config.num_folds)
        for fold in folds:
            for who in ("original", "retrained", "never seen"):
                yield Job("pretrained", who, fold, first)
        for fold in folds:
            for seed in self.config.seeds:
                for name in METHODS:
                    yield Job("pretrained", name, fold, seed, name)
        for fold in folds:
            yield Job("finetuned", "finetuned original", fold, first)
        for name in FINETUNED:
            for fold in folds:
                yield Job("finetuned", f"finetuned {name}", fold, first, name)

    def facts(self, of: str) -> Facts:
        """The facts to forget in the original ("pretrained") or the finetuned model."""
        if of not in self.made:
            small = self.small
            if of == "finetuned":
                small = small._replace(params=finetuned(small, self.config))
            tables = unlearn.tables(small)
            self.made[of] = Facts(small.model, small.params, tables)
        return self.made[of]

    def describe(self, of: str) -> None:
        return None

    def reference(self, job: Job) -> Params:
        if job.of == "finetuned":
            return self.facts("finetuned").params
        return self.small.retrained if job.who == "retrained" else self.small.params

    def rates(self, method: str) -> Sequence[float]:
        return self.config.rates[method]

    def pick(self, swept: Sequence[ledger.Line], of: str) -> tuple[ledger.Line, bool]:
        """The run that forgets most within the bound, or loses least; all rates run."""
        return pick(swept, self.config.max_loss), False

    def measure(self, of: str, params: Params) -> dict[str, Any]:
        """The loss on rows to retain, score.summary, and what is known of the facts."""
        small, config = self.small, self.config
        rows = small.questions["retain"][: config.num_scored["retain"]]
        encoded = questions.encode(small.tokenizer, rows, length=small.about["length"])
        logps, lengths = evaluate.answer_logps(
            small.model, params, encoded, batch_size=40
        )
        found = {"retain_loss": float(-np.mean(logps / lengths))}
        found |= score.summary(self.scorer, params)
        columns = table.concat([dict(fold) for fold in self.folds.held_out])
        logps = option_logps(small.model, params, columns, batch_size=32)
        choice, verbatim = _measures(logps, columns)
        return found | {
            "facts": {
                "choice": float(choice.mean()),
                "verbatim": float(verbatim.mean()),
            }
        }

    def attack(
        self, job: Job, params: Params, lines: Sequence[ledger.Line]
    ) -> dict[str, Any]:
        """By measure, [rates, epochs + 1] means over the fold held out."""
        config, folds = self.config, self.folds
        if job.who == "never seen":
            folds = self.never_seen
        rates = config.attack_rates
        if job.seed != config.seeds[0]:
            rates = best_rates(lines, job.who)
        train = [rows for i, rows in enumerate(folds.train) if i != job.fold]
        held_out = folds.held_out[job.fold]
        sweep = attacks.retrain(
            self.small.model,
            params,
            table.concat(train),
            held_out,
            learning_rates=rates,
            epochs=config.epochs,
            batch_size=config.attack_batch_size,
            direction=ADAM,
            warmup_steps=4,
            seed=job.seed,
        )
        choice, verbatim = _measures(sweep.logps, held_out)
        return {
            "choice": choice.mean(-1).tolist(),
            "verbatim": verbatim.mean(-1).tolist(),
            "rates": list(sweep.learning_rates),
            "facts": len(held_out["choice_answer"]),
            "losses": sweep.losses.tolist(),
            "finite": sweep.finite.tolist(),
        }


def make(found: command.Arguments) -> Small:
    """The world of a command line."""
    small = world.make(found.config, progress=True)
    output = Path(found.config.output).expanduser()
    return Small(small, found.settings, output / f"{small.digest}.rtt.jsonl")


def about(made: Small) -> dict[str, Any]:
    """What the results say of the world."""
    return {"parameters": made.small.about["parameters"]}


def _measures(logps, columns) -> tuple[np.ndarray, np.ndarray]:
    """(choice, verbatim), each [..., facts]."""
    per_token = logps / columns["choice_answer"].sum(-1)
    right = evaluate.best_choice(per_token[..., :4]) == 0
    return right, np.exp(per_token[..., 4])


def deal(
    small: world.World, rows: Sequence[questions.Row], config: SmallConfig
) -> Folds:
    """Rows in folds by author, encoded to train on and to be scored.

    Raises:
        ValueError: if there are fewer authors than folds.
    """
    rows = [row for row in rows if len(row.get("perturbed_answer", ())) >= 3]
    if len(rows) > config.num_facts:
        spaced = np.linspace(0, len(rows), config.num_facts, endpoint=False)
        rows = [rows[i] for i in spaced.astype(int)]
    folds = attacks.make_folds(rows, config.num_folds, by="author")
    attacks.check_folds(folds, ("author", "question"))
    flat = [row for fold in folds for row in fold]
    facts = [
        {
            "question": row["question"],
            "choices": [*_choices(row), row["answer"]],
            "answer": 0,
        }
        for row in flat
    ]
    train = questions.encode(small.tokenizer, flat)
    held_out = attacks.encode_questions(small.model, small.tokenizer, facts, "choice")
    ends = np.cumsum([0, *map(len, folds)])
    cuts = [range(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    parts = ([table.select(x, cut) for cut in cuts] for x in (train, held_out))
    return Folds(*parts)


def _choices(row: questions.Row) -> list[str]:
    """The answer, or else its paraphrase, and three wrong ones in its wording."""
    wrong = biographies.wrong_answers(row)
    if wrong is not None:
        return [row["answer"], *wrong[:3]]
    return [row["paraphrased_answer"], *row["perturbed_answer"][:3]]


def never_seen(small: world.World, config: SmallConfig) -> list[questions.Row]:
    """Made-up authors of whom no model saw a fact."""
    seen = {row["author"] for rows in small.questions.values() for row in rows}
    count = 2 * -(-config.num_facts // len(biographies.FACTS)) + len(seen)
    count = min(count, len(biographies.GIVEN) * len(biographies.FAMILY) - 1)
    rows = biographies.rows(forget=count, retain=1, seed=7)["forget"]
    return [row for row in rows if row["author"] not in seen]


def finetuned(small: world.World, config: SmallConfig) -> Params:
    """The retrained model after finetuning on the facts that it never saw."""
    steps, rate = config.finetune
    schedule = optax.linear_schedule(rate, 0.0, steps)
    recipe = recipes.finetune.nll(small.model, learning_rate=schedule)
    step, state, frozen = recipe.setup(small.model, small.retrained)
    stream = table.streams({"train": small.table("forget")}, 32, seed=0)
    state, _ = ju.fit(step, state, stream, frozen, steps=steps)
    return state.params


def pick(swept: Sequence[ledger.Line], max_loss: float) -> ledger.Line:
    """Of one method's runs the one that forgets most with its retain loss in bounds."""
    within = [x for x in swept if x["finite"] and x["retain_loss"] <= max_loss]
    if not within:
        return min(swept, key=lambda x: x["retain_loss"])
    return min(within, key=lambda x: x["forget_probability"])


def best_rates(lines: Sequence[ledger.Line], who: str) -> list[float]:
    """The rate of an attack that recovered most on the seed it was swept on.

    By the best epoch of each fold, verbatim; one rate in a list.
    """
    swept = [x for x in lines if x["kind"] == "rtt" and x["who"] == who]
    swept = [x for x in swept if x["seed"] == swept[0]["seed"]]
    best = np.mean([np.max(x["verbatim"], axis=1) for x in swept], axis=0)
    return [swept[0]["rates"][int(best.argmax())]]
