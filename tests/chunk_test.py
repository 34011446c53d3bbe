# SPDX-License-Identifier: Apache-2.0
"""The default number of tokens that a term unembeds at a time."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxunlearn import losses, plan, sharding, terms
from jaxunlearn.terms import _chunks
from tests import tiny

WIDTH, VOCAB, ROWS, LENGTH = 32, 512, 8, 65


@pytest.mark.parametrize(
    ("sizes", "max_logits", "chunk"),
    [
        (None, None, 32),
        (dict(fsdp=1, tensor=8), None, 32),  # rows are not sharded
        (dict(fsdp=8), None, LENGTH - 1),
        (dict(fsdp=8), 40 * VOCAB, 40),
        (dict(fsdp=4, tensor=2), 40 * VOCAB, 40),
        (dict(fsdp=8), 1, 32),
    ],
)
def test_a_chunk_has_few_tokens_unless_rows_are_sharded(
    monkeypatch, sizes, max_logits, chunk
):
    model, params = tiny.tiny_model(width=WIDTH, vocab=VOCAB, positions=LENGTH)
    batch = tiny.tiny_batch(ROWS, LENGTH)
    if max_logits is not None:
        monkeypatch.setattr(_chunks, "_MAX_LOGITS", max_logits)
    devices = jax.devices()[:1] if sizes is None else None
    mesh = sharding.make_mesh(devices=devices, **({"fsdp": 1} | (sizes or {})))
    with jax.set_mesh(mesh):
        made = jax.make_jaxpr(lambda p, b: terms.target_logps(model, p, b)[0])
        text = str(made(params, batch))
    shapes = {
        int(tokens)
        for rows, tokens in re.findall(rf"f32\[(\d+),(\d+),{VOCAB}\]", text)
        if int(rows) == ROWS
    }
    assert shapes == {chunk}


@pytest.mark.parametrize(
    ("rows", "length", "chunk"),
    [(2, 513, 128), (8, 513, 32), (300, 513, 32), (1, 65, 32), (1, 2, 1)],
)
def test_few_rows_unembed_more_tokens_each(rows, length, chunk):
    model, params = tiny.tiny_model(width=WIDTH, vocab=VOCAB, positions=length)
    hidden = jnp.zeros((rows, length, WIDTH))
    assert _chunks.chunk_size(model, params, hidden) == chunk


def test_few_chunks_send_less_on_a_mesh():
    model, params = tiny.tiny_model(width=WIDTH, vocab=VOCAB, positions=LENGTH)
    mesh = sharding.make_mesh(fsdp=8)
    shards = sharding.by_rules(params, mesh, model.rules)
    batch = sharding.put_rows({"x": tiny.tiny_batch(ROWS, LENGTH)}, mesh)

    def sent(chunk):
        term = terms.on_logps(losses.nll, model, "x", reduce="token", chunk=chunk)

        def loss(params, batch):
            return term(params, batch, None, jax.random.key(0))[0].mean()

        with jax.set_mesh(mesh):
            grad = jax.jit(jax.grad(loss), in_shardings=(shards, None))
            text = grad.lower(params, batch).compile().as_text()
        return sum(moved.bytes for moved in plan.collectives(text).values())

    kernel = 4 * WIDTH * VOCAB
    assert sent(32) - sent(None) > kernel / 2  # 32: what it is without a mesh
