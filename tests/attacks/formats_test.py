# SPDX-License-Identifier: Apache-2.0
"""Train formats, decoded from their tokens, and questions."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxunlearn import attacks, data, evaluate
from tests import tiny

FACTS = [
    {
        "question": "The capital of France?",
        "choices": ["Nairobi", "Paris", "Sarajevo"],
        "answer": 1,
        "statement": "The capital of France is Paris.",
    },
    {
        "question": "A young cat?",
        "choices": ["kitten", "puppy", "river"],
        "answer": 0,
        "statement": ["A young cat is called a kitten.", "A kitten is young."],
    },
]
LETTERED = "The capital of France?\nA. Nairobi\nB. Paris\nC. Sarajevo\nAnswer:"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


def read(tokenizer, table, row):
    """(the text of a row, the text of the tokens in the loss)."""
    tokens, mask = table["tokens"][row], table["mask"][row]
    read = tokens[table["answer"][row]]
    return tokenizer.decode(tokens[mask]), tokenizer.decode(read)


@pytest.mark.parametrize(
    ("format", "text", "loss"),
    [
        ("letter", f"{LETTERED} B", " B"),
        ("letter_answer", f"{LETTERED} B. Paris", " B. Paris"),
        ("text", f"{LETTERED} B. Paris", f"{LETTERED} B. Paris"),
        ("answer", "Q: The capital of France? Paris", " Paris"),
        ("statement", *["The capital of France is Paris."] * 2),
    ],
)
def test_formats(tokenizer, format, text, loss):
    how = dict(prompt_format=data.PromptFormat(prompt="Q: {question}"))
    table = attacks.encode_facts(tokenizer, FACTS, format, **how)
    assert read(tokenizer, table, 0) == (text, loss)
    assert len(table["tokens"]) == (3 if format == "statement" else 2)
    longer = attacks.encode_facts(tokenizer, FACTS, format, length=80, **how)
    assert longer["tokens"].shape[1] == 80


def test_the_choice_of_highest_logp_is_the_answer_of_choose(tokenizer):
    model, params = tiny.tiny_model(vocab=len(tokenizer), positions=96)
    for format, options in (
        ("letter", [list("ABC")] * 2),
        ("choice", [fact["choices"] for fact in FACTS]),
    ):
        table = attacks.encode_questions(model, tokenizer, FACTS, format)
        assert table["right"].tolist() == [1, 0]
        prompts = [fact["question"] for fact in FACTS]
        if format == "letter":
            prompts = [LETTERED, "A young cat?\nA. kitten\nB. puppy\nC. river\nAnswer:"]
        chosen = evaluate.choose(model, params, tokenizer, prompts, options)
        table.pop("right")
        logps = jax.jit(partial(evaluate.choice_logps, model))(params, table)
        logps = np.asarray(logps)
        assert logps.shape == (2, 3)
        np.testing.assert_array_equal(logps.argmax(1), chosen)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(answer=3), "3 choices and answer=3"),
        (dict(answer="Paris"), "answer='Paris'"),
        (dict(choices=["Paris"], answer=0), "2 to 8 choices"),
    ],
)
def test_bad_facts_are_named(tokenizer, change, match):
    bad = [FACTS[0], FACTS[1] | change]
    with pytest.raises(ValueError, match=r"fact 1 \('A young cat\?'\).*" + match):
        attacks.encode_facts(tokenizer, bad, "letter")


def test_other_errors(tokenizer):
    model, _ = tiny.tiny_model(vocab=len(tokenizer))
    for encode in (
        attacks.encode_facts,
        lambda *x: attacks.encode_questions(model, *x),
    ):
        with pytest.raises(ValueError, match="at least one fact"):
            encode(tokenizer, [])
        with pytest.raises(ValueError, match="'letterr'.*Did you mean 'letter'"):
            encode(tokenizer, FACTS, "letterr")
    bare = [{k: v for k, v in fact.items() if k != "statement"} for fact in FACTS]
    with pytest.raises(KeyError, match="'statement'.*Add them"):
        attacks.encode_facts(tokenizer, bare, "statement")
    four = [FACTS[0], FACTS[1] | {"choices": list("wxyz")}]
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        attacks.encode_questions(model, tokenizer, four)
