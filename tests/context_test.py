# SPDX-License-Identifier: Apache-2.0
"""Sequences split over the context axis: values, split products, and errors."""

import re
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from jaxunlearn import losses, sharding, terms
from tests import sharding_test, tiny

MESHES = [dict(fsdp=2, context=2, tensor=2), dict(fsdp=2, context=4)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.slow
def test_steps_on_sharded_sequences_equal_those_on_one_device(sizes):
    expected, expected_metrics = sharding_test.run(sharding_test.blur_npo, None)
    mesh = sharding.make_mesh(**sizes)
    params, metrics = sharding_test.run(sharding_test.blur_npo, mesh)
    for name, value in expected_metrics.items():
        assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    jax.tree.map(partial(assert_allclose, rtol=0, atol=1e-5), params, expected)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_product_is_split_over_context(sizes):
    rows, length, chunk, vocab = 4, 32, 8, 512
    settings = sharding_test.SETTINGS | dict(vocab=vocab, hidden=48)
    model, params = tiny.tiny_model(**settings)
    mesh = sharding.make_mesh(**sizes)
    term = terms.on_logps(losses.nll, model, "x", reduce="token", chunk=chunk)

    def loss(params, batch):
        total, _ = term(params, {"x": batch}, None, jax.random.key(0))
        return total.mean()

    batch = sharding.put_rows(tiny.tiny_batch(rows, length, vocab=vocab), mesh)
    shards = sharding.by_rules(params, mesh, model.rules)
    with jax.set_mesh(mesh):
        gradient = jax.jit(
            jax.grad(loss), in_shardings=(shards, None), out_shardings=shards
        )
        text = gradient.lower(params, batch).compile().as_text()
    dots = re.findall(r"= f32\[([\d,]+)\]\S* dot\(.*?op_name=\"([^\"]*)\"", text)
    found = {(tuple(map(int, shape.split(","))), name) for shape, name in dots}
    fsdp, context = sizes["fsdp"], sizes["context"]
    tensor = sizes.get("tensor", 1)
    local, width, part = rows // fsdp, settings["width"], vocab // tensor

    unembedding = {shape for shape, name in found if "...v" in name}
    tokens = local * chunk // context  # of every chunk, not all of some chunks
    assert unembedding == {(tokens, part), (tokens, width), (part, width)}

    # Scores and outputs of its local queries, in both passes, and the gradients of all
    # keys and values, which are summed over devices afterwards.
    attention = {tuple(sorted(shape)) for shape, name in found if "bskd" in name}
    queries, heads = length // context, settings["heads"] // tensor
    size = settings["head_dim"]
    pairs = [(length, queries), (queries, size), (length, size)]
    assert attention == {tuple(sorted((local, heads, *pair))) for pair in pairs}

    # The projections: its local tokens by its local units.
    units = {n // tensor for n in (width, settings["hidden"])} | {width}
    forward = {
        s
        for s, name in found
        if re.search(r"/jvp\(\)/while/body/\w+/dot_general$", name)
    }
    assert forward == {(local * queries, n) for n in units}


def test_a_length_that_context_does_not_divide_is_an_error():
    mesh = sharding.make_mesh(fsdp=2, context=4)
    with pytest.raises(ValueError, match="context = 4, got 6 tokens in 'x/tokens'"):
        sharding.put_rows({"x": {"tokens": np.zeros((4, 6))}}, mesh)
    batch = {"tokens": np.zeros((4, 8)), "ref_logps": np.zeros(4)}
    specs = {
        name: x.sharding.spec for name, x in sharding.put_rows(batch, mesh).items()
    }
    rows = sharding.BATCH
    assert specs == {"tokens": P(rows, "context"), "ref_logps": P(rows)}
