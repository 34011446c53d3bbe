# SPDX-License-Identifier: Apache-2.0
"""attention="tokamax" and unembed="tokamax" give what XLA's forms give.

Where the library is installed, it runs (its forms for CPUs). Elsewhere a module with
the same two functions, written from their documentation, takes its place, and the tests
are of what is passed to it and of the mesh.
"""

import importlib.util
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import losses, models, sharding, terms, wrap
from jaxunlearn.models import _kernels
from tests import tiny

# Axes that the mesh of 2 * 2 * 2 devices divides.
SETTINGS = dict(width=32, heads=8, kv_heads=4, head_dim=4, hidden=32, vocab=64)


def attention(q, k, v, *, scale, is_causal, key_value_seq_lengths, **more):
    """Attention in which a window and a cap of the scores may be given."""
    assert is_causal
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = scale * jnp.einsum("blhd,bshd->bhls", q, k)
    if more["logits_soft_cap"]:
        cap = more["logits_soft_cap"]
        scores = cap * jnp.tanh(scores / cap)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    seen = distance >= 0
    if more["local_window_size"]:
        before, after = more["local_window_size"]
        seen &= (distance <= before) & (distance >= -after)
    real = jnp.arange(length)[None, None] < key_value_seq_lengths[:, None, None]
    scores = jnp.where((seen[None] & real)[:, None], scores, -1e30)
    return jnp.einsum("bhls,bshd->blhd", jax.nn.softmax(scores, axis=-1), v)


def cross_entropy(x, labels, weights, *, reduction):
    assert reduction == "none" and x.ndim == 2 and labels.ndim == 1
    logps = jax.nn.log_softmax(x @ weights, axis=-1)
    return -jnp.take_along_axis(logps, labels[:, None], axis=1)[:, 0]


@pytest.fixture
def tokamax(monkeypatch):
    if importlib.util.find_spec("tokamax") is None:
        module = types.ModuleType("tokamax")
        module.dot_product_attention = attention
        module.linear_softmax_cross_entropy_loss = cross_entropy
        monkeypatch.setitem(sys.modules, "tokamax", module)


def gradient(mesh=None, lora=False, **settings):
    """(log-probabilities, gradients) of a term on left-padded rows."""
    model, params = tiny.tiny_model(**(SETTINGS | settings))
    if lora:
        model = wrap.lora(model, pattern="blocks/mlp/up/kernel", rank=2)
        params = wrap.add_lora(model, params, jax.random.key(1))
    term = terms.on_logps(losses.ascent, model, "x")
    batch = tiny.tiny_batch(8, 12, side="left", vocab=64)

    def loss(params, batch):
        total, _ = term(params, {"x": batch}, None, jax.random.key(0))
        logps = terms.target_logps(model, params, batch)[0]
        return total.mean(), logps

    run = jax.jit(jax.grad(loss, has_aux=True))
    if mesh is None:
        return run(params, batch)
    params = jax.device_put(params, sharding.by_rules(params, mesh, model.rules))
    with jax.set_mesh(mesh):
        return run(params, sharding.put_rows(batch, mesh))


def same(a, b):
    jax.tree.map(partial(assert_allclose, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        dict(windows=(3, None, 3), attention_softcap=2.0, attention_scale=0.3),
    ],
    ids=["plain", "windows and cap"],
)
def test_its_attention_equals_xlas(tokamax, settings):
    found = gradient(attention="tokamax", **settings)
    same(found, gradient(attention="xla", **settings))


@pytest.mark.parametrize(
    "tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=str
)
def test_its_cross_entropy_equals_chunks_of_logits(tokamax, tied):
    same(gradient(unembed="tokamax", tied=tied), gradient(tied=tied))


@pytest.mark.slow
def test_both_on_a_mesh_and_with_lora_equal_xlas(tokamax):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    both = dict(attention="tokamax", unembed="tokamax")
    same(gradient(mesh, **both), gradient())
    same(gradient(lora=True, **both), gradient(lora=True))


def test_it_is_chosen_by_name_alone(tokamax, monkeypatch):
    model, _ = tiny.tiny_model(**SETTINGS, attention="tokamax")
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(sharding, "platform", lambda name=platform: name)
        assert _kernels.choose(model.config) == "tokamax"
    auto, _ = tiny.tiny_model(**SETTINGS, attention="auto")
    assert _kernels.choose(auto.config) != "tokamax"


def test_without_the_library_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ImportError, match=r"'jaxunlearn\[tokamax\]'"):
        gradient(attention="tokamax")
    with pytest.raises(ImportError, match="unembed='tokamax' needs the library"):
        gradient(unembed="tokamax")


@pytest.mark.parametrize(
    "setting", [dict(logit_softcap=30.0), dict(logit_divisor=8.0)], ids=str
)
def test_logits_that_it_cannot_compute_are_refused(setting):
    with pytest.raises(ValueError, match="without cap, divisor and bias"):
        tiny.tiny_model(unembed="tokamax", **setting)


def test_lora_on_the_unembedding_is_refused(tokamax):
    base, _ = tiny.tiny_model(**SETTINGS, unembed="tokamax")
    model = wrap.lora(base, pattern="unembed/kernel", rank=2)
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = tiny.tiny_batch(4, 8, vocab=64)
    with pytest.raises(ValueError, match="an unembedding without LoRA"):
        jax.eval_shape(partial(terms.target_logps, model), params, batch)
    assert models.make(base.config).target_logps is not None
