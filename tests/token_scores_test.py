# SPDX-License-Identifier: Apache-2.0
"""One forward pass a row serves every metric that teacher forcing gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import evaluate, losses, metrics, sharding, terms
from jaxunlearn.terms import _chunks
from tests import tiny


@pytest.fixture(scope="module")
def rows():
    """11 ragged rows as NumPy columns, one of them without an answer."""
    batch = tiny.tiny_batch(rows=11, length=16)
    columns = {name: np.array(column) for name, column in batch.items()}
    columns["answer"][4] = False
    return columns


def full_logits(model, params, columns):
    """(logits [n, L - 1, V], targets, where), every logit at once."""
    hidden = model.apply(params, columns).hidden[:, :-1]
    mask = columns["mask"]
    where = columns["answer"][:, 1:] & mask[:, 1:] & mask[:, :-1]
    return model.unembed(params, hidden), columns["tokens"][:, 1:], where


@pytest.mark.parametrize("size", [4, 16])
def test_scores_equal_those_of_the_full_logits(rows, size):
    model, params = tiny.bigram_model()
    found = evaluate.token_scores(model, params, rows, batch_size=size)
    logits, targets, where = full_logits(model, params, rows)
    assert_array_equal(found.where, where)
    expected = losses.token_logps(logits, targets, where=where)
    assert_allclose(found.logps, expected, rtol=1e-5, atol=1e-5)
    assert_array_equal(found.hits, metrics.greedy_hits(logits, targets) & where)
    standard = metrics.standardised_logps(logits, targets, where=where)
    assert_allclose(found.standardised, standard, rtol=1e-4, atol=1e-4)
    # The premise: not everything is hit, and something is.
    logps, _ = evaluate.answer_logps(model, params, rows)
    assert_allclose(found.logps.sum(1), logps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 8, 512])
def test_only_tokens_that_count_are_unembedded(rows, size, monkeypatch):
    model, params = tiny.bigram_model()
    monkeypatch.setattr(_chunks, "_COUNTED", size)
    shapes = []

    def unembed(params, hidden):
        jax.debug.callback(lambda: shapes.append(hidden.shape))
        return model.unembed(params, hidden)

    def values(logits, targets):
        return {"logps": losses.token_logps(logits, targets)}

    counting = model._replace(unembed=unembed)
    found, where = _chunks.counted_values(counting, params, rows, values)
    expected, _ = terms.target_logps(model, params, rows)
    got = jnp.where(where, found["logps"], 0.0)
    assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    jax.effects_barrier()
    size = min(size, rows["mask"].size)
    assert len(shapes) == -(-int(where.sum()) // size)
    assert set(shapes) == {(1, size, params["embed"].shape[1])}
    silent = dict(rows, answer=np.zeros_like(rows["answer"]))
    found, where = _chunks.counted_values(model, params, silent, values)
    assert not where.any() and not found["logps"].any()


def test_metrics_of_the_scores_are_those_of_the_logits(rows):
    model, params = tiny.bigram_model()
    found = evaluate.token_scores(model, params, rows)
    logits, targets, where = full_logits(model, params, rows)
    pairs = (
        (metrics.mia_min_k(found.standardised, where=found.where),
         metrics.mia_min_k_plus_plus(logits, targets, where=where)),
        (metrics.extraction_strength(found.hits, where=found.where),
         metrics.extraction_strength(
             metrics.greedy_hits(logits, targets), where=where)),
        (metrics.mia_loss(found.logps, where=found.where),
         metrics.mean_nll(
             losses.token_logps(logits, targets, where=where), where=where)),
    )  # fmt: skip
    for ours, theirs in pairs:
        assert np.isnan(ours[4]) and np.isnan(theirs[4])  # without an answer
        assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_hits_are_true_for_greedily_decoded_text():
    model, params = tiny.bigram_model()
    columns = {
        name: np.array(column)
        for name, column in tiny.tiny_batch(rows=3, length=12).items()
    }
    logits, _, where = full_logits(model, params, columns)
    # Each answer token in turn is replaced by the most probable one.
    for t in range(11):
        logits, _, _ = full_logits(model, params, columns)
        best = np.asarray(jnp.argmax(logits[:, t], axis=-1))
        columns["tokens"][:, t + 1] = np.where(
            where[:, t], best, columns["tokens"][:, t + 1]
        )
    found = evaluate.token_scores(model, params, columns)
    assert_array_equal(found.hits, where)
    assert where.any(axis=1).all()


def test_no_array_has_the_size_of_all_logits():
    vocab, count, length = 512, 8, 64
    model, params = tiny.bigram_model(vocab=vocab)
    batch = tiny.tiny_batch(count, length, vocab=vocab)

    def values(logits, targets):
        return (
            metrics.greedy_hits(logits, targets),
            metrics.standardised_logps(logits, targets),
        )

    def scores(params, batch):
        return terms.target_values(model, params, batch, values, chunk=8)

    def slow(params, batch):
        logits, targets, _ = full_logits(model, params, batch)
        return values(logits, targets)

    limit = count * (length - 1) * vocab
    assert tiny.largest_array(slow, params, batch) >= limit
    assert tiny.largest_array(scores, params, batch) < limit


def test_scores_on_a_mesh_equal_those_on_one_device(rows):
    settings = dict(width=32, heads=8, kv_heads=8, head_dim=4, hidden=32)
    model, params = tiny.tiny_model(**settings)
    expected = evaluate.token_scores(model, params, rows, batch_size=4)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, sharding.by_rules(params, mesh, model.rules))
    found = evaluate.token_scores(model, placed, rows, batch_size=4, mesh=mesh)
    for ours, theirs in zip(found, expected, strict=True):
        assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
