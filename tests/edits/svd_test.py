# SPDX-License-Identifier: Apache-2.0
"""Singular directions of values: same function, ordered units, exact pruning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import edits, sharding, trees, wrap
from jaxunlearn.models import decoder
from tests import tiny
from tests.edits.prune_test import DECODERS, logits, masked, some


@pytest.mark.parametrize("name", DECODERS)
def test_the_function_does_not_change(name):
    model, params = tiny.tiny_model(**DECODERS[name])
    rotated = edits.svd_values(model, params)
    moved = rotated["blocks"]["attention"]["v"]["kernel"]
    assert np.abs(moved - params["blocks"]["attention"]["v"]["kernel"]).max() > 0.1
    assert_allclose(logits(model, rotated), logits(model, params), atol=1e-4)
    changed = {
        path
        for path, x in trees.paths(rotated).items()
        if np.any(np.asarray(x != trees.paths(params)[path]))
    }
    assert changed <= {
        "blocks/attention/v/kernel",
        "blocks/attention/v/bias",
        "blocks/attention/o/kernel",
    }


def test_units_are_singular_directions_by_decreasing_value():
    model, params = tiny.tiny_model(kv_heads=2)
    rotated = edits.svd_values(model, params)["blocks"]["attention"]
    old = params["blocks"]["attention"]
    for layer in range(3):
        for head in range(2):
            mine = slice(4 * head, 4 * head + 4)
            v = np.asarray(rotated["v"]["kernel"][layer][:, mine])
            gram = v.T @ v  # of u s^(1/2)
            s = np.diag(gram)
            assert_allclose(gram, np.diag(s), atol=1e-5)
            assert (np.diff(s) <= 1e-6).all()
            # Query heads 2 g and 2 g + 1 read value head g.
            rows = np.asarray(old["o"]["kernel"][layer]).reshape(2, 2, 4, -1)[head]
            whole = np.asarray(old["v"]["kernel"][layer][:, mine]) @ np.concatenate(
                list(rows), axis=1
            )
            wanted = np.linalg.svd(whole, compute_uv=False)[:4]
            assert_allclose(s, wanted, rtol=1e-4)


def test_a_zero_direction_of_the_values_still_passes_their_bias():
    model, params = tiny.tiny_model(qkv_bias=True)
    params = trees.map_with_path(
        lambda p, x: (
            x.at[:, :, 0].set(0).at[:, :, 1].set(x[:, :, 2])
            if p == "blocks/attention/v/kernel"
            else x
        ),
        params,
    )
    rotated = edits.svd_values(model, params)
    assert_allclose(logits(model, rotated), logits(model, params), atol=1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(rotated))


def test_pruning_singular_directions_equals_masking_them():
    model, params = tiny.tiny_model(**DECODERS["gated, biases"])
    rotated = edits.svd_values(model, params)
    gone = some("attention")
    pruned = edits.prune_units(model, rotated, {"attention": gone})
    wanted = logits(model, rotated, {"attention": masked(gone)})
    assert_allclose(logits(model, pruned), wanted, atol=1e-5)


def test_dtypes_and_sharding_do_not_change():
    model, params = tiny.tiny_model()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert {x.dtype for x in jax.tree.leaves(edits.svd_values(model, half))} == {
        jnp.bfloat16.dtype
    }
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    cut = jax.device_put(params, sharding.by_rules(params, mesh, decoder.RULES))
    found = edits.svd_values(model, cut)
    for x, y in zip(jax.tree.leaves(cut), jax.tree.leaves(found), strict=True):
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
    assert_allclose(logits(model, found), logits(model, params), atol=1e-4)


def test_unsuitable_models_are_refused():
    model, params = tiny.tiny_model()
    with pytest.raises(ValueError, match="site 'attention' is written by one kernel"):
        edits.svd_values(model._replace(sites={}), params)
    with pytest.raises(KeyError, match="reads leaves 'blocks/attention/v/kernel'"):
        edits.svd_values(model, {"blocks": {}})
    low = wrap.lora(model, pattern=r"blocks/attention/v/kernel", rank=2)
    with pytest.raises(ValueError, match="Merge them first"):
        edits.svd_values(model, wrap.add_lora(low, params, jax.random.key(0)))
    wide = tiny.tiny_model(width=16, head_dim=20)
    with pytest.raises(ValueError, match="at least as wide as a head of 20"):
        edits.svd_values(*wide)
