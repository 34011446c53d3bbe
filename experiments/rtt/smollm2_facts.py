# SPDX-License-Identifier: Apache-2.0
"""What experiments/rtt/smollm2.py unlearns: three kinds of facts, asked in one wording.

A fact is a row of `jaxunlearn.attacks` with one more column: `stem`, another wording of
its question. Facts of pretraining are chosen by their stem and asked as PROMPT says, so
that the accuracy before unlearning is not 1 by the choice alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

import jaxunlearn as ju
from experiments.rtt.small_facts import option_logps
from jaxunlearn import attacks, evaluate, recipes
from jaxunlearn.data import capitals as facts
from jaxunlearn.data import prose, table
from jaxunlearn.data.benchmarks import rtt_facts
from jaxunlearn.io import hf
from jaxunlearn.typing import Model, Params

Fact = Mapping[str, Any]

PROMPT = "{question} The answer is"
STEM = "The capital of {country} is"
CHOICE_TOKENS = 4  # of an answer to a question of MMLU, at most
NO_QUESTION = ("__", "\n", "following", "of these", "of the above")
PROSE = (4, 64)  # rows, tokens
ROWS = 10  # questions at a time


class Kind(NamedTuple):
    """Facts of one kind in a model that knows them.

    Attributes:
        name: "capitals", "mmlu" or "birthdays".
        model, params: who knows them.
        folds: facts to forget, dealt so that no two folds share one.
        asked: all of these as questions, from attacks.encode_questions.
        tables: {"forget", "alternate", "retain"}: what unlearning draws from;
            `alternate` has the three wrong answers of every fact. "kept": the facts of
            the retain stream as questions.
        about: how they were chosen, and what is known of them before.
    """

    name: str
    model: Model
    params: Params
    folds: Sequence[Sequence[Fact]]
    asked: table.Table
    tables: Mapping[str, table.Table]
    about: Mapping[str, Any]


def capitals() -> tuple[list[Fact], list[Fact]]:
    """(of Europe, of all other continents)."""
    pool = facts.capitals()
    rows: dict[bool, list[Fact]] = {True: [], False: []}
    for fact in pool:
        choices, answer = facts.choices(fact, pool)
        rows[fact.group == "Europe"].append(
            {
                "question": f"What is the capital of {fact.subject}?",
                "stem": fact.prompt(STEM),
                "choices": choices,
                "answer": answer,
            }
        )
    return rows[True], rows[False]


def short(rows: Sequence[Fact], tokenizer: Any, length: int) -> list[Fact]:
    """Questions of MMLU that stand alone and fit into `length` tokens with any answer.

    No two have the same question, none has two like choices.
    """
    found: dict[str, Fact] = {}
    for row in rows:
        question = " ".join(row["question"].split(" ")).strip()
        texts = [PROMPT.replace("{question}", question), *row["choices"]]
        poor = any(x in text.lower() for x in NO_QUESTION for text in texts[1:])
        poor |= any(x in question.lower() for x in NO_QUESTION)
        plain = {choice.strip().casefold() for choice in row["choices"]}
        if poor or not question.endswith("?") or len(plain) < 4:
            continue
        if len(texts[0]) > 6 * length:  # not worth a look at its tokens
            continue
        asked, *answers = (len(tokenizer(f" {text}")["input_ids"]) for text in texts)
        if max(answers) <= CHOICE_TOKENS and asked + CHOICE_TOKENS <= length:
            own = {"question": question, "stem": question, "answer": row["answer"]}
            own["choices"] = [choice.strip() for choice in row["choices"]]
            found.setdefault(question.casefold(), own)
    return list(found.values())


def birthdays(config: ConfigDict) -> tuple[list[Fact], list[Fact]]:
    """(to forget, to keep), of people who never were."""
    size = config.facts // config.folds
    more = -(-config.kept // size)
    rows = rtt_facts.birthdays(folds=config.folds + more, size=size)
    rows = [{**row, "stem": f"{row['name']} was born in"} for row in rows]
    return rows[: config.folds * size], rows[config.folds * size :][: config.kept]


def choose(
    model: Model, params: Params, tokenizer: Any, rows: Sequence[Fact]
) -> tuple[list[Fact], dict[str, int]]:
    """Those answered right after their stem, the surest first, and how many were asked.

    Right is the choice of largest log-probability, by sum and by mean over its tokens;
    sure is the one whose sum is furthest above every wrong choice's.
    """
    asked = [{**row, "question": row["stem"]} for row in rows]
    columns = attacks.encode_questions(model, tokenizer, asked, "choice")
    logps = option_logps(model, params, columns, rows=ROWS)
    per_token = logps / columns["choice_answer"].sum(-1)
    margins = np.minimum(_margin(logps, columns), _margin(per_token, columns))
    order = np.argsort(-_margin(logps, columns), kind="stable")
    right = [rows[i] for i in order if margins[i] > 0]
    return right, {"asked": len(rows), "right": len(right)}


def _margin(logps, columns) -> np.ndarray:
    """[n], how far the right choice is above the best of the wrong ones."""
    right = np.eye(logps.shape[1], dtype=bool)[columns["right"]]
    return logps[right] - np.where(right, -np.inf, logps).max(1)


def known(model: Model, params: Params, columns: table.Table) -> dict[str, float]:
    """`choice`, the fraction answered right, and `probability` of a right token."""
    logps = option_logps(model, params, columns, rows=ROWS)
    right = np.arange(len(logps)), columns["right"]
    tokens = columns["choice_answer"].sum(-1)[right]
    return {
        "choice": float((evaluate.best_choice(logps) == columns["right"]).mean()),
        "probability": float(np.exp(logps[right] / tokens).mean()),
    }


def kept(
    model: Model, params: Params, tables: Mapping[str, table.Table], text: table.Table
) -> dict[str, float]:
    """`retain_loss`, nats an answer token of the retain stream, `retain_choice`, the
    fraction of its facts answered right, and `prose_loss`."""
    found = {}
    for name, rows in (("retain_loss", tables["retain"]), ("prose_loss", text)):
        logps, lengths = evaluate.answer_logps(model, params, rows, batch_size=4)
        found[name] = float(-logps.sum() / lengths.sum())
    return found | {"retain_choice": known(model, params, tables["kept"])["choice"]}


def text(tokenizer: Any) -> dict[str, np.ndarray]:
    """A little prose that nothing trains on."""
    rows, length = PROSE
    held_out = table.encode_text(tokenizer, prose.prose()[1], length=length)
    return {name: column[:rows] for name, column in held_out.items()}


def make(
    name: str,
    model: Model,
    params: Params,
    tokenizer: Any,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    config: ConfigDict,
    about: Mapping[str, Any],
) -> Kind:
    """A Kind of these facts.

    Raises:
        ValueError: if there are fewer than two facts a fold, or none to keep.
    """
    if len(forget) < 2 * config.folds or not retain:
        raise ValueError(
            f"The kind {name!r} needs {2 * config.folds} facts that the model knows "
            f"and one to keep, got {len(forget)} and {len(retain)}. Ask for more of "
            "them, or for fewer folds."
        )
    if "split" in forget[0]:
        splits = dict.fromkeys(row["split"] for row in forget)
        folds = [[row for row in forget if row["split"] == x] for x in splits]
    else:
        folds = attacks.make_folds(forget, config.folds)
    attacks.check_folds(folds)
    flat = [row for fold in folds for row in fold]
    wrong = [
        {**row, "answer": (row["answer"] + step) % len(row["choices"])}
        for row in flat
        for step in (1, 2, 3)
    ]
    rows = {"forget": flat, "alternate": wrong, "retain": retain}
    tables = {
        key: attacks.encode_facts(
            tokenizer, own, "answer", prompt=PROMPT, length=config.length
        )
        for key, own in rows.items()
    }
    tables["forget"] = evaluate.reference_logps(
        model, params, tables["forget"], batch_size=4
    )
    asked, tables["kept"] = (
        attacks.encode_questions(model, tokenizer, own, "choice", prompt=PROMPT)
        for own in (flat, retain)
    )
    about = {"facts": len(flat), "kept": len(retain)} | dict(about)
    about |= known(model, params, asked)
    about |= kept(model, params, tables, text(tokenizer))
    return Kind(name, model, params, folds, asked, tables, about)


def taught(
    model: Model,
    params: Params,
    tokenizer: Any,
    rows: Sequence[Fact],
    how: ConfigDict,
    length: int,
    folder: Path,
) -> Params:
    """The model after it was told these facts, in each wording of `how.wordings`.

    They are told once and lie in `folder` afterwards.
    """
    if (folder / "config.json").exists():
        return hf.load(folder)[1]
    prompts = {"question": PROMPT, "stem": "{question}"}
    columns = table.concat(
        [
            attacks.encode_facts(
                tokenizer,
                [{**row, "question": row[which]} for row in rows],
                "answer",
                prompt=prompts[which],
                length=length,
            )
            for which in how.wordings
        ]
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, how.learning_rate, 4, how.steps)
    recipe = recipes.finetune.nll(model, learning_rate=rate)
    state = ju.init_state(params, recipe.tx, jax.random.key(0))
    step = jax.jit(ju.make_step(recipe.terms, recipe.tx), donate_argnums=0)
    stream = table.streams({"train": columns}, how.rows, seed=0)
    state, _ = ju.fit(step, state, stream, steps=how.steps)
    hf.save(model, state.params, folder, tokenizer=tokenizer)
    return state.params
