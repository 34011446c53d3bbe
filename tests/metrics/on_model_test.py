# SPDX-License-Identifier: Apache-2.0
"""Metrics of a model agree with evaluate and with greedy decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxunlearn as ju
from jaxunlearn import evaluate, losses, metrics, terms
from tests import tiny

pytestmark = pytest.mark.slow  # nearly every test compiles a model


def test_probability_is_that_of_evaluate():
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch()
    logps, where = terms.target_logps(model, params, batch)
    table = {name: np.asarray(x) for name, x in batch.items()}
    sums, lengths = evaluate.answer_logps(model, params, table, batch_size=3)
    found = metrics.probability(logps, where=where)
    np.testing.assert_allclose(found, np.exp(sums / lengths), rtol=1e-5)


def test_greedily_decoded_text_is_fully_extracted():
    model, params = tiny.tiny_model()
    prompt = {
        "tokens": jnp.array([[3, 4, 5], [7, 8, 9]]),
        "mask": jnp.ones((2, 3), bool),
    }
    new = ju.generate(model, params, prompt, max_new_tokens=5)
    tokens = jnp.concatenate([prompt["tokens"], new], axis=1)
    tokens = tokens.at[1, 5].add(1)  # in row 1 the third new token differs
    batch = {"tokens": tokens, "mask": jnp.ones(tokens.shape, bool)}
    logits = model.unembed(params, model.apply(params, batch).hidden[:, :-1])
    hits = metrics.greedy_hits(logits, tokens[:, 1:])
    where = jnp.broadcast_to(jnp.arange(7) >= 2, (2, 7))
    strength = metrics.extraction_strength(hits, where=where)
    assert strength[0] == 1.0
    assert strength[1] <= 2 / 5
    assert metrics.exact_memorization(hits, where=where)[0] == 1.0


def test_gradnorm_of_a_model_counts_every_layer():
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch(rows=1)

    def loss(params):
        logps, where = terms.target_logps(model, params, batch)
        return metrics.mean_nll(logps, where=where)[0]

    gradient = jax.grad(loss)(params)
    found = metrics.mia_gradnorm(gradient, stacked=r"blocks/.*")
    norms = []
    for path, leaf in ju.trees.paths(gradient).items():
        layers = np.asarray(leaf) if path.startswith("blocks/") else [np.asarray(leaf)]
        norms += [np.linalg.norm(np.ravel(layer)) for layer in layers]
    np.testing.assert_allclose(found, np.mean(norms), rtol=1e-5)


def test_min_k_plus_plus_on_a_model_needs_no_other_alignment():
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch()
    logps, where = terms.target_logps(model, params, batch)
    logits = model.unembed(params, model.apply(params, batch).hidden[:, :-1])
    targets = batch["tokens"][:, 1:]
    again = losses.token_logps(logits, targets, where=where)
    np.testing.assert_allclose(again, logps, rtol=1e-4, atol=1e-5)
    scores = metrics.mia_min_k_plus_plus(logits, targets, where=where)
    assert np.isfinite(scores).all()
