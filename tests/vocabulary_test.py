# SPDX-License-Identifier: Apache-2.0
"""Token ids outside the vocabulary are refused by every function, never clamped."""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxunlearn as ju
from jaxunlearn import attacks, data, edits, evaluate, losses, models, stats, terms
from jaxunlearn.workflows import harness
from tests import tiny

GOOD, BAD = "The capital of Kenya is", "[NEW] The capital of Kenya is"


@pytest.fixture(scope="module")
def world():
    """(model, params, tokenizer with one token more than the model)."""
    tokenizer = tiny.tiny_tokenizer()
    small = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[NEW]"]})
    return *tiny.tiny_model(vocab=small, layers=1), tokenizer


@pytest.fixture(scope="module")
def rows(world):
    """Row 2 has the new token in its prompt."""
    return data.encode(world[2], [GOOD, GOOD, BAD], ["Nairobi."] * 3)


TEXTS = {
    "completions": lambda *w: evaluate.completions(*w, [GOOD, GOOD, BAD]),
    "sample": lambda *w: attacks.sample(*w, [GOOD, GOOD, BAD], key=jax.random.key(0)),
    "few_shot": lambda *w: attacks.few_shot(*w, [GOOD, GOOD, BAD], prefix="Be true."),
    "choose, prompt": lambda *w: evaluate.choose(
        *w, [GOOD, GOOD, BAD], [["Rome", "Nairobi"]] * 3
    ),
    "choose, choice": lambda *w: evaluate.choose(
        *w, [GOOD] * 3, [["Rome", "Nairobi"]] * 2 + [["Rome", "[NEW]"]]
    ),
    "harness": lambda *w: harness.Decoder(*w)._loglikelihood_tokens(
        # The longest row is not that with the new token: rows are sorted by length.
        [(("", ""), w[2].encode(text), [5]) for text in (GOOD + GOOD, GOOD, BAD)]
    ),
}
TABLES = {
    "answer_logps": lambda m, p, rows: evaluate.answer_logps(m, p, rows, batch_size=2),
    "token_scores": lambda m, p, rows: evaluate.token_scores(m, p, rows),
    "reference_logps": lambda m, p, rows: evaluate.reference_logps(m, p, rows),
    "perplexity": lambda m, p, rows: evaluate.perplexity(m, p, rows),
    "source": lambda m, p, rows: evaluate.answer_logps(
        m, p, [{k: x[i] for k, x in rows.items()} for i in range(3)], batch_size=2
    ),
    "generate": lambda m, p, rows: ju.generate(m, p, rows, max_new_tokens=2),
    "activity": lambda m, p, rows: stats.activity(m, p, [rows]),
    "moments": lambda m, p, rows: stats.moments(m, p, [rows], {"mlp": [0]}),
    "fisher": lambda m, p, rows: stats.fisher(
        terms.on_logps(losses.nll, m, "a", reduce="token"),
        p,
        [{"a": rows}],
        key=jax.random.key(0),
    ),
    "gptq": lambda m, p, rows: edits.collect_inputs(m, p, [rows]),
    "steer": lambda m, p, rows: attacks.steer(
        m, p, forget=rows, retain=rows, layers=[0]
    ),
    "relearn": lambda m, p, rows: attacks.relearn(m, p, rows, steps=1, batch_size=3),
    "choice_logps": lambda m, p, rows: evaluate.choice_logps(
        m,
        p,
        {"tokens": rows["tokens"], "mask": rows["mask"]}
        | {"choices": rows["tokens"][:, None, :2] * 0}
        | dict.fromkeys(("choice_mask", "choice_answer"), rows["mask"][:, None, :2]),
    ),
    "choice_logps, choices": lambda m, p, rows: evaluate.choice_logps(
        m,
        p,
        {"tokens": rows["tokens"] * 0, "mask": rows["mask"]}
        | {"choices": rows["tokens"][:, None]}
        | dict.fromkeys(("choice_mask", "choice_answer"), rows["mask"][:, None]),
    ),
    "term": lambda m, p, rows: terms.on_logps(losses.nll, m, "a", reduce="token")(
        p, {"a": rows}, None, jax.random.key(0)
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_with_an_unknown_token_is_refused_by_row(world, name):
    with pytest.raises(ValueError, match=rf"got {len(world[2]) - 1}.* in row 2 "):
        TEXTS[name](*world)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_with_an_unknown_id_is_refused_by_row(world, rows, name):
    row = r"\d" if name == "relearn" else "2"  # of a shuffled batch
    with pytest.raises(ValueError, match=rf"got {len(world[2]) - 1} in row {row} "):
        TABLES[name](*world[:2], rows)


def test_padding_may_be_anything_and_negative_ids_are_refused(world, rows):
    model, params, _ = world
    pad = {k: x[:2].copy() for k, x in rows.items()}
    before = evaluate.answer_logps(model, params, pad)[0]
    pad["tokens"][~pad["mask"]] = model.config.vocab + 7
    assert (~pad["mask"]).any()
    np.testing.assert_array_equal(evaluate.answer_logps(model, params, pad)[0], before)
    pad["tokens"][1, 0] = -100
    with pytest.raises(ValueError, match="got -100 in row 1 at position 0"):
        evaluate.answer_logps(model, params, pad)


def test_a_compiled_loop_shows_ids_outside_the_vocabulary_as_nan(world, rows):
    model, params, _ = world
    parts = {"a": terms.on_logps(losses.nll, model, "a", reduce="token")}
    rows = {name: x[[0, 2]] for name, x in rows.items()}

    @jax.jit
    def gradients(params, batch):
        streams = {"a": batch}
        return ju.term_gradients(parts, params, streams, ju.Frozen(), jax.random.key(0))

    hidden = np.asarray(jax.jit(model.apply)(params, rows).hidden)
    assert np.isfinite(hidden[0]).all() and np.isnan(hidden[1]).any()
    values, grads, _ = gradients(params, rows)
    assert np.isnan(values["a"])
    rows["tokens"][1] = np.where(rows["mask"][1], 5, -7)  # padding may be anything
    values, _, _ = gradients(params, rows)
    assert np.isfinite(values["a"])


def test_models_without_a_config_have_as_many_ids_as_logits():
    model, params = tiny.bigram_model(vocab=7)
    tokens = np.array([[1, 2, 3], [1, 7, 3]], np.int32)
    batch = {"tokens": tokens, "mask": np.ones(tokens.shape, bool)}
    with pytest.raises(ValueError, match="from 0 to 6.*got 7 in row 1 at position 1"):
        evaluate.answer_logps(model, params, batch | {"answer": batch["mask"]})

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 4, rngs=rngs)
            self.head = nnx.Linear(4, 5, rngs=rngs)

        def __call__(self, tokens):
            return self.head(self.embed(tokens))

    model, params = models.from_nnx(Net)
    with pytest.raises(ValueError, match="from 0 to 4.*got 7 in row 1"):
        evaluate.answer_logps(model, params, batch | {"answer": batch["mask"]})
