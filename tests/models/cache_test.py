# SPDX-License-Identifier: Apache-2.0
"""Running tokens onto the end of a cache equals one pass over all of them."""

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import sharding
from tests import tiny

SETTINGS = {
    "plain": {},
    "windows": {"windows": (3, None, 1), "kv_heads": 1},
    "qk-norm": {"qk_norm": True},
}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.slow
def test_decoding_with_a_cache_equals_one_pass(name, side, platform, monkeypatch):
    # Layers in separate arrays, or stacked and scanned.
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    model, params = tiny.tiny_model(**SETTINGS[name])
    batch = tiny.tiny_batch(rows=3, length=10, side=side, answer=False)
    expected = model.apply(params, batch).hidden
    extend = jax.jit(model.decode)
    for cuts in ((10,), (6, 1, 3), (1,) * 10):
        cache, start, pieces = model.init_cache(3, 13), 0, []
        assert isinstance(cache["keys"], tuple) == (platform == "cpu")
        for size in cuts:
            piece = {name: x[:, start : start + size] for name, x in batch.items()}
            hidden, cache = extend(params, piece, cache)
            pieces.append(hidden)
            start += size
        hidden = jnp.concatenate(pieces, axis=1)
        real = batch["mask"]
        assert_allclose(hidden[real], expected[real], rtol=1e-4, atol=1e-5)
        assert int(cache["used"]) == 10


def test_prepared_params_decode_the_same():
    model, params = tiny.tiny_model(windows=(3, None, None))
    batch = tiny.tiny_batch(rows=3, length=10, answer=False)
    expected, _ = model.decode(params, batch, model.init_cache(3, 10))
    ready = model.prepare_decode(params)
    assert isinstance(ready["blocks"], tuple) and len(ready["blocks"]) == 3
    assert model.prepare_decode(ready) is ready
    hidden, _ = model.decode(ready, batch, model.init_cache(3, 10))
    assert_allclose(hidden, expected, rtol=1e-6)


@pytest.mark.slow
def test_decoding_continues_after_the_last_real_token_of_a_right_padded_prompt():
    model, params = tiny.tiny_model(windows=(3, None, None))
    prompt = tiny.tiny_batch(rows=3, length=8, side="right", answer=False)
    new = {"tokens": jnp.array([[3], [5], [7]]), "mask": jnp.ones((3, 1), jnp.bool_)}
    _, cache = model.decode(params, prompt, model.init_cache(3, 9))
    hidden, _ = model.decode(params, new, cache)
    left = tiny.tiny_batch(rows=3, length=8, side="left", answer=False)
    both = {name: jnp.concatenate([left[name], new[name]], axis=1) for name in new}
    expected = model.apply(params, both).hidden[:, -1:]
    assert_allclose(hidden, expected, rtol=1e-4, atol=1e-5)


def test_prepared_kernels_have_the_compute_dtype_and_decode_the_same():
    settings = dict(compute_dtype="bfloat16", qkv_bias=True, tied=True)
    model, params = tiny.tiny_model(**settings)
    batch = tiny.tiny_batch(rows=3, length=10, answer=False)
    expected, _ = model.decode(params, batch, model.init_cache(3, 10))
    ready = model.prepare_decode(params)
    dtypes = {
        path[-1].key: leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(ready)
    }
    assert dtypes == {
        "kernel": jnp.bfloat16,
        "embedding": jnp.float32,
        "unembedding": jnp.bfloat16,
        "scale": jnp.float32,
        "bias": jnp.float32,
    }
    hidden, _ = model.decode(ready, batch, model.init_cache(3, 10))
    assert_allclose(hidden.astype(float), expected.astype(float), rtol=1e-6)
    assert_allclose(model.unembed(ready, hidden), model.unembed(params, hidden))
