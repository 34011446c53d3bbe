# SPDX-License-Identifier: Apache-2.0
"""Terms equal a plain implementation, without an array of all logits."""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import losses, terms
from jaxunlearn.typing import Total
from tests import tiny

RNG = jax.random.key(0)
ROWS, LENGTH = 4, 12


def plain_logps(model, params, batch):
    """(logps [B, L - 1], where) with every logit at once."""
    logits = model.unembed(params, model.apply(params, batch).hidden)
    logps = jax.nn.log_softmax(logits[:, :-1])
    logps = jnp.take_along_axis(logps, batch["tokens"][:, 1:, None], -1)[..., 0]
    mask = batch["mask"]
    where = batch.get("answer", mask)[:, 1:] & mask[:, 1:] & mask[:, :-1]
    return jnp.where(where, logps, 0.0), where


def plain_sequences(value):
    def run(model, params, batch, ref):
        logps, where = plain_logps(model, params, batch)
        lengths = where.sum(axis=1)
        values = value(logps.sum(axis=1), batch, jnp.maximum(lengths, 1).astype(float))
        return Total(jnp.where(lengths > 0, values, 0.0).sum(), (lengths > 0).sum())

    return run


def plain_tokens(sign):
    def run(model, params, batch, ref):
        logps, where = plain_logps(model, params, batch)
        return Total(sign * logps.sum(), where.sum())

    return run


def plain_kl(model, params, batch, ref):
    p, q = (
        jax.nn.log_softmax(model.unembed(x, model.apply(x, batch).hidden))[:, :-1]
        for x in (params, ref)
    )
    _, where = plain_logps(model, params, batch)
    values = jnp.sum(jnp.exp(q) * (q - p), axis=-1)
    return Total(jnp.where(where, values, 0.0).sum(), where.sum())


def log_sigmoid_loss(x, beta):
    return -2 / beta * jnp.log(1 / (1 + jnp.exp(-beta * x)))


KINDS = {
    "nll": (
        partial(terms.on_logps, losses.nll, reduce="token"),
        plain_tokens(-1.0),
    ),
    "ascent": (
        partial(terms.on_logps, losses.ascent),
        plain_sequences(lambda logps, batch, lengths: logps),
    ),
    "npo": (
        partial(terms.on_logps, partial(losses.npo, beta=0.3)),
        plain_sequences(
            lambda logps, batch, lengths: log_sigmoid_loss(
                batch["ref_logps"] - logps, 0.3
            )
        ),
    ),
    "simnpo": (
        partial(terms.on_logps, partial(losses.simnpo, beta=0.7, delta=0.1)),
        plain_sequences(
            lambda logps, batch, lengths: log_sigmoid_loss(-logps / lengths - 0.1, 0.7)
        ),
    ),
    "kl": (partial(terms.on_tokens, losses.kl), plain_kl),
}


def batch_for(side="left", *, rows=ROWS, length=LENGTH, seed=0, vocab=32):
    """A padded batch in which row 1 has no answer."""
    batch = tiny.tiny_batch(rows, length, side=side, seed=seed, vocab=vocab)
    batch["answer"] = batch["answer"].at[1].set(False)
    return batch | {"ref_logps": jnp.linspace(-9.0, -3.0, rows, dtype=jnp.float32)}


def reference():
    """Other params for the small model."""
    _, params = tiny.bigram_model()
    return jax.tree.map(lambda x: 0.9 * x, params)


def graded(term, batch, stream="forget"):
    """jitted params -> ((sum, (count, metrics)), gradient of the sum)."""

    @partial(jax.jit, static_argnums=0)
    def run(term, params, batch, ref):
        def loss(params):
            total, metrics = term(params, {stream: batch}, ref, RNG)
            return jnp.sum(total.sum), (total.count, metrics)

        return jax.value_and_grad(loss, has_aux=True)(params)

    _, params = tiny.bigram_model()
    return run(term, params, batch, reference())


def close(actual, expected, rtol=2e-5, atol=2e-5):
    jax.tree.map(partial(assert_allclose, rtol=rtol, atol=atol), actual, expected)


@pytest.fixture(scope="module")
def plain():
    """Kind and side -> ((sum, count), gradient), by the plain implementation."""
    model, params = tiny.bigram_model()
    made = {}

    def get(kind, side):
        if (kind, side) not in made:

            def loss(params):
                total = KINDS[kind][1](model, params, batch_for(side), reference())
                return total.sum, total.count

            grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
            made[kind, side] = grad(params)
        return made[kind, side]

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("chunk", "side"),
    [
        (None, "left"),
        (1, "right"),
        (4, "left"),
        pytest.param(100, "left", marks=pytest.mark.slow),
    ],
)
def test_equals_the_plain_implementation_for_any_chunk(plain, kind, chunk, side):
    model, _ = tiny.bigram_model()
    term = KINDS[kind][0](model=model, stream="forget", chunk=chunk)
    (value, (count, _)), grads = graded(term, batch_for(side))
    (expected, expected_count), expected_grads = plain(kind, side)
    assert int(count) == int(expected_count) > 0
    assert abs(float(expected)) > 0.1
    assert_allclose(value, expected, rtol=2e-5)
    close(grads, expected_grads, atol=1e-4)


def test_target_logps_equal_the_plain_ones():
    model, params = tiny.bigram_model()
    for side in ("left", "right"):
        batch = batch_for(side)
        logps, where = terms.target_logps(model, params, batch, chunk=3)
        logps, where = np.asarray(logps), np.asarray(where)
        expected, expected_where = plain_logps(model, params, batch)
        assert logps.shape == where.shape == (ROWS, LENGTH - 1)
        assert_allclose(logps, expected, rtol=1e-4, atol=1e-5)
        assert_array_equal(where, expected_where)
        assert_array_equal(logps[~where], 0.0)


MASKS = hnp.arrays(bool, (ROWS, LENGTH))
LENGTHS = st.lists(st.integers(1, LENGTH), min_size=ROWS, max_size=ROWS)
run_nll = jax.jit(
    lambda params, batch: terms.target_logps(tiny.bigram_model()[0], params, batch)
)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(answer=MASKS, lengths=LENGTHS, left=st.booleans())
def test_answer_tokens_after_a_real_token_count(answer, lengths, left):
    model, params = tiny.bigram_model()
    place = np.arange(LENGTH)[None]
    lengths = np.array(lengths)[:, None]
    mask = place >= LENGTH - lengths if left else place < lengths
    tokens = tiny.tiny_batch()["tokens"]
    batch = {"tokens": tokens, "mask": jnp.array(mask), "answer": jnp.array(answer)}
    logps, where = map(np.asarray, run_nll(params, batch))
    for row in range(ROWS):
        real = np.flatnonzero(mask[row])
        counted = {t for t in real[1:] if answer[row, t]}
        assert set(np.flatnonzero(where[row]) + 1) == counted
    assert_array_equal(logps[~where], 0.0)
    assert np.all(logps[where] < 0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_array_of_all_logits_ever_exists(kind):
    vocab = 512
    model, params = tiny.bigram_model(vocab=vocab)
    batch = batch_for(vocab=vocab)
    term = KINDS[kind][0](model=model, stream="forget")

    def fast(params, batch):
        return term(params, {"forget": batch}, params, RNG)[0].sum

    def slow(params, batch):
        return KINDS[kind][1](model, params, batch, params).sum

    limit = ROWS * (LENGTH - 1) * vocab
    assert tiny.largest_array(jax.value_and_grad(slow), params, batch) >= limit
    assert tiny.largest_array(jax.value_and_grad(fast), params, batch) < limit


@pytest.mark.parametrize("kind", KINDS)
def test_masked_entries_reach_neither_value_nor_gradient(kind):
    model, _ = tiny.bigram_model()
    term = KINDS[kind][0](model=model, stream="forget")
    batch = batch_for("right")
    mask = batch["mask"]
    dirty = batch | {
        "tokens": jnp.where(mask, batch["tokens"], -100),
        "answer": batch["answer"] | ~mask,
        "ref_logps": batch["ref_logps"].at[1].set(jnp.nan),  # of the row without answer
        "another": jnp.full(3, jnp.nan),
    }
    (value, (count, metrics)), grads = graded(term, dirty)
    (expected, (expected_count, expected_metrics)), expected_grads = graded(term, batch)
    assert int(count) == int(expected_count)
    close((value, metrics, grads), (expected, expected_metrics, expected_grads))


def test_rows_without_an_answer_do_not_count():
    model, params = tiny.bigram_model()
    batch = batch_for()
    one_token = batch["mask"] & (jnp.cumsum(batch["mask"], axis=1) == 1)
    token = terms.on_logps(losses.nll, model, "forget", reduce="token")
    sequence = terms.on_logps(losses.nll, model, "forget")
    some, _ = sequence(params, {"forget": batch}, None, RNG)
    assert int(some.count) == ROWS - 1
    for answer in (jnp.zeros_like(batch["mask"]), one_token):
        streams = {"forget": batch | {"answer": answer}}
        for term in (token, sequence):
            total, metrics = term(params, streams, None, RNG)
            assert (float(total.sum), int(total.count)) == (0.0, 0)
            assert float(total.mean()) == 0.0
            assert float(metrics["nll"].mean()) == 0.0


def test_without_an_answer_column_every_real_token_counts():
    model, params = tiny.bigram_model()
    batch = {k: v for k, v in batch_for().items() if k != "answer"}
    term = terms.on_logps(losses.nll, model, "forget", reduce="token")
    total, metrics = term(params, {"forget": batch}, None, RNG)
    assert int(total.count) == int(batch["mask"].sum()) - ROWS
    logps, _ = plain_logps(model, params, batch)
    assert_allclose(total.mean(), metrics["nll"].mean(), rtol=1e-6)
    assert_allclose(total.sum, -logps.sum(), rtol=1e-5)


def test_lengths_are_counted_by_the_term_and_columns_come_from_the_batch():
    model, params = tiny.bigram_model()
    seen = {}

    def loss(logps, lengths, weight, scale=2.0):
        seen.update(lengths=lengths, weight=weight, scale=scale)
        return weight * logps / lengths

    batch = batch_for() | {"weight": jnp.arange(4.0), "lengths": jnp.full(4, 99.0)}
    term = terms.on_logps(loss, model, "forget")
    total, _ = term(params, {"forget": batch}, None, RNG)
    logps, where = plain_logps(model, params, batch)
    logps, lengths = np.asarray(logps), np.maximum(where.sum(axis=1), 1)
    assert_array_equal(seen["lengths"], lengths)
    assert_array_equal(seen["weight"], batch["weight"])
    assert seen["lengths"].dtype == jnp.float32 and seen["scale"] == 2.0
    expected = np.sum(np.arange(4.0) * logps.sum(axis=1) / lengths)
    assert_allclose(total.sum, expected, rtol=1e-5)


def test_the_reference_has_no_gradient_and_kl_to_itself_is_zero():
    model, params = tiny.bigram_model()
    term = terms.on_tokens(losses.kl, model, "forget")
    assert term.needs_ref
    assert not terms.on_tokens(lambda logits, where=None: logits, model, "x").needs_ref
    assert not terms.on_logps(losses.nll, model, "x").needs_ref

    def value(params, ref):
        return term(params, {"forget": batch_for()}, ref, RNG)[0].sum

    assert_allclose(value(params, params), 0.0, atol=1e-5)
    grads = jax.jit(jax.grad(value, argnums=1))(params, reference())
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(grads))


def test_a_loss_on_logits_without_a_reference():
    model, params = tiny.bigram_model()

    def entropy(logits, *, where):
        logps = jax.nn.log_softmax(logits)
        return jnp.where(where, -jnp.sum(jnp.exp(logps) * logps, axis=-1), 0.0)

    term = terms.on_tokens(entropy, model, "forget", chunk=5)
    total, metrics = term(params, {"forget": batch_for()}, None, RNG)
    assert metrics == {}
    assert 0 < float(total.mean()) < np.log(32)


def test_missing_streams_and_columns_are_named():
    model, params = tiny.bigram_model()
    term = KINDS["npo"][0](model=model, stream="forget")
    with pytest.raises(KeyError, match="stream 'forget', but there is 'retain'"):
        term(params, {"retain": batch_for()}, None, RNG)
    batch = {name: x for name, x in batch_for().items() if name != "ref_logps"}
    with pytest.raises(KeyError, match="on 'forget' reads columns 'ref_logps'.*'mask'"):
        term(params, {"forget": batch}, None, RNG)
    with pytest.raises(KeyError, match="columns 'tokens', 'mask'"):
        term(params, {"forget": {"ref_logps": batch_for()["ref_logps"]}}, None, RNG)
    joint = terms.joint({"a": term})
    with pytest.raises(KeyError, match="'ref_logps'"):
        joint(params, {"forget": batch}, None, RNG)


def test_a_missing_reference_is_an_error():
    model, params = tiny.bigram_model()
    term = KINDS["kl"][0](model=model, stream="forget")
    for each in (term, terms.joint({"kl": term})):
        with pytest.raises(ValueError, match="ref_params"):
            each(params, {"forget": batch_for()}, None, RNG)


def test_wrong_settings_are_errors():
    model, params = tiny.bigram_model()
    with pytest.raises(ValueError, match="Did you mean 'token'"):
        terms.on_logps(losses.nll, model, "forget", reduce="tokens")
    for bind in (terms.on_logps, terms.on_tokens):
        loss = losses.nll if bind is terms.on_logps else losses.kl
        with pytest.raises(ValueError, match="chunk >= 1, got chunk=0"):
            term = bind(loss, model, "forget", chunk=0)
            term(params, {"forget": batch_for()}, params, RNG)
