# SPDX-License-Identifier: Apache-2.0
"""Results are read one behind those that are started, and programs compiled once."""

import jax
import numpy as np
import pytest

from jaxunlearn import evaluate
from jaxunlearn._ahead import one_behind
from tests import tiny


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_result_is_given_once_after_the_next_was_started(count):
    events = []

    def started(i):
        events.append(f"start {i}")
        return i

    for i in one_behind(map(started, range(count))):
        events.append(f"read {i}")
    wanted = ["start 0"] if count else []
    for i in range(1, count):
        wanted += [f"start {i}", f"read {i - 1}"]
    assert events == wanted + ([f"read {count - 1}"] if count else [])


@pytest.mark.parametrize("site", ["packed", "scores", "choices"])
def test_evaluation_starts_a_batch_before_it_reads_the_last_one(monkeypatch, site):
    events = []

    def spy(started):
        for i, result in enumerate(started):
            events.append(f"start {i}")
            yield result

    def reads(started):
        for i, result in enumerate(one_behind(spy(started))):
            events.append(f"read {i}")
            yield result

    monkeypatch.setattr(evaluate, "one_behind", reads)
    monkeypatch.setattr(evaluate._packed, "one_behind", reads)
    monkeypatch.setattr(evaluate._packed, "supports", lambda *_: site == "packed")
    monkeypatch.setattr(evaluate._packed, "WIDTH", 16)
    tokenizer = tiny.tiny_tokenizer()
    model, params = tiny.tiny_model(vocab=len(tokenizer), layers=1)
    if site != "choices":
        table = {name: np.asarray(x) for name, x in tiny.tiny_batch(5).items()}
        evaluate.answer_logps(model, params, table, batch_size=2)
    else:
        how = dict(prompts=["The sea"] * 5, choices=[["is", "was"]] * 5, batch_size=4)
        evaluate.choose(model, params, tokenizer, **how)
    count = len(events) // 2
    assert count > 1
    wanted = [x for i in range(1, count) for x in (f"start {i}", f"read {i - 1}")]
    assert events == ["start 0", *wanted, f"read {count - 1}"]


def test_a_second_evaluation_of_equal_shapes_compiles_nothing():
    """Other params, and the same rows in another order."""
    tokenizer = tiny.tiny_tokenizer()
    model, params = tiny.tiny_model(vocab=len(tokenizer), layers=1)
    rows = {name: np.asarray(x) for name, x in tiny.tiny_batch(11, 16).items()}
    choices = [["is", "was here"]] * 3

    def run(params, order, prompts):
        part = {name: column[order] for name, column in rows.items()}
        evaluate.answer_logps(model, params, part, batch_size=4)
        evaluate.token_scores(model, params, part, batch_size=4)
        evaluate.perplexity(model, params, part, batch_size=4)
        how = dict(max_new_tokens=2, batch_size=2)
        evaluate.completions(model, params, tokenizer, prompts, **how)
        evaluate.choose(model, params, tokenizer, prompts, choices, batch_size=4)

    prompts = ["The sea", "The capital of France", "A young dog is"]
    run(params, np.arange(11), prompts)
    half = jax.tree.map(lambda x: x * 0.5, params)
    with tiny.compilations() as compiled:
        run(half, np.random.default_rng(0).permutation(11), prompts[::-1])
    assert compiled == []
