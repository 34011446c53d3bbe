# SPDX-License-Identifier: Apache-2.0
"""Facts of RTT in SmolLM2: three sets, how they are chosen, taught and scored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax

import jaxunlearn as ju
from experiments.rtt.jobs import option_logps
from jaxunlearn import attacks, data, evaluate, recipes
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
    """Questions of MMLU that need no context and fit into `length` tokens with any
    answer.

    Each question occurs once, and its four choices differ.
    """
    found: dict[str, Fact] = {}
    for row in rows:
        question = " ".join(row["question"].split(" ")).strip()
        texts = [PROMPT.replace("{question}", question), *row["choices"]]
        unfit = any(x in text.lower() for x in NO_QUESTION for text in texts[1:])
        unfit |= any(x in question.lower() for x in NO_QUESTION)
        different = {choice.strip().casefold() for choice in row["choices"]}
        if unfit or not question.endswith("?") or len(different) < 4:
            continue
        if len(texts[0]) > 6 * length:  # too long, whatever its tokens are
            continue
        in_prompt, *answers = (
            len(tokenizer(f" {text}")["input_ids"]) for text in texts
        )
        if max(answers) <= CHOICE_TOKENS and in_prompt + CHOICE_TOKENS <= length:
            fact = {"question": question, "stem": question, "answer": row["answer"]}
            fact["choices"] = [choice.strip() for choice in row["choices"]]
            found.setdefault(question.casefold(), fact)
    return list(found.values())


def birthdays(config: Any) -> tuple[list[Fact], list[Fact]]:
    """(to forget, to retain), of made-up people."""
    size = config.num_facts // config.num_folds
    more = -(-config.num_retain // size)
    rows = rtt_facts.birthdays(folds=config.num_folds + more, size=size)
    rows = [{**row, "stem": f"{row['name']} was born in"} for row in rows]
    count = config.num_folds * size
    return rows[:count], rows[count:][: config.num_retain]


def choose(
    model: Model, params: Params, tokenizer: Any, rows: Sequence[Fact]
) -> tuple[list[Fact], dict[str, int]]:
    """The facts answered right after their stem, the largest margin first, and counts.

    Right is the choice of largest log-probability, by sum and by mean over its tokens;
    the margin is that of the sum above the best wrong choice.
    """
    stems = [{**row, "question": row["stem"]} for row in rows]
    columns = attacks.encode_questions(model, tokenizer, stems, "choice")
    logps = option_logps(model, params, columns, batch_size=ROWS)
    per_token = logps / columns["choice_answer"].sum(-1)
    margins = np.minimum(_margin(logps, columns), _margin(per_token, columns))
    order = np.argsort(-_margin(logps, columns), kind="stable")
    right = [rows[i] for i in order if margins[i] > 0]
    return right, {"candidates": len(rows), "correct": len(right)}


def _margin(logps, columns) -> np.ndarray:
    """[n], how far the right choice is above the best of the wrong ones."""
    right = np.eye(logps.shape[1], dtype=bool)[columns["right"]]
    return logps[right] - np.where(right, -np.inf, logps).max(1)


def known(model: Model, params: Params, columns: table.Table) -> dict[str, float]:
    """`choice`, the fraction answered right, and `probability` of a right token."""
    logps = option_logps(model, params, columns, batch_size=ROWS)
    right = np.arange(len(logps)), columns["right"]
    tokens = columns["choice_answer"].sum(-1)[right]
    return {
        "choice": float((evaluate.best_choice(logps) == columns["right"]).mean()),
        "probability": float(np.exp(logps[right] / tokens).mean()),
    }


def retained(model, params, retain, columns, text) -> dict[str, float]:
    """`retain_loss`, nats an answer token of the retain stream, `retain_choice`, the
    fraction of its facts answered right, and `prose_loss`."""
    found = {}
    for name, rows in (("retain_loss", retain), ("prose_loss", text)):
        logps, lengths = evaluate.answer_logps(model, params, rows, batch_size=4)
        found[name] = float(-logps.sum() / lengths.sum())
    return found | {"retain_choice": known(model, params, columns)["choice"]}


def text(tokenizer: Any) -> dict[str, np.ndarray]:
    """A little prose that nothing trains on."""
    rows, length = PROSE
    encoded = table.encode_text(tokenizer, prose.prose()[1], length=length)
    return {name: column[:rows] for name, column in encoded.items()}


def finetuned(
    model: Model,
    params: Params,
    tokenizer: Any,
    rows: Sequence[Fact],
    settings: Mapping[str, Any],
    length: int,
    folder: Path,
) -> Params:
    """The model after finetuning on these facts, in each wording of the settings.

    It is saved in `folder`, and loaded from there when it is needed again.
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
                prompt_format=data.PromptFormat(prompt=prompts[which]),
                length=length,
            )
            for which in settings["wordings"]
        ]
    )
    steps = settings["steps"]
    rate = optax.warmup_cosine_decay_schedule(0.0, settings["learning_rate"], 4, steps)
    recipe = recipes.finetune.nll(model, learning_rate=rate)
    step, state, frozen = recipe.setup(model, params)
    stream = table.streams({"train": columns}, settings["batch_size"], seed=0)
    state, _ = ju.fit(step, state, stream, frozen, steps=steps)
    hf.save(model, state.params, folder, tokenizer=tokenizer)
    return state.params
