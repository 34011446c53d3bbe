# SPDX-License-Identifier: Apache-2.0
"""Flax modules as Models train like any other, and a Model can be an NNX module."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import _step as step
from jaxunlearn import combine, losses, models, terms, trees, wrap
from jaxunlearn.typing import Frozen
from tests import tiny

VOCAB, WIDTH = 32, 8
KEY = jax.random.key(1)


def mean_so_far(x):
    count = jnp.arange(1, x.shape[1] + 1).astype(x.dtype)
    return jnp.cumsum(x, axis=1) / count[:, None]


class NnxLM(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropouts = nnx.List([nnx.Dropout(rate, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def encode(self, tokens):
        x = self.embed(tokens)
        for layer, dropout in zip(self.layers, self.dropouts, strict=True):
            x = x + dropout(jnp.tanh(layer(mean_so_far(x))))
        return self.norm(x)

    def __call__(self, tokens):
        return self.head(self.encode(tokens))


class LinenLM(linen.Module):
    rate: float = 0.0

    def setup(self):
        self.embed = linen.Embed(VOCAB, WIDTH)
        self.layers = [linen.Dense(WIDTH) for _ in range(2)]
        self.dropout = linen.Dropout(self.rate)
        self.head = linen.Dense(VOCAB)
        self.scale = self.variable("constants", "scale", lambda: jnp.float32(1.5))

    def encode(self, tokens, deterministic=True):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + jnp.tanh(layer(mean_so_far(x)))
            x = self.dropout(x, deterministic=deterministic)
        return x * self.scale.value

    def unembed(self, hidden):
        return self.head(hidden)

    def __call__(self, tokens, deterministic=True):
        return self.head(self.encode(tokens, deterministic))


NNX_SPLIT = dict(
    hidden=lambda module, batch: module.encode(batch["tokens"]),
    unembed=lambda module, hidden: module.head(hidden),
)
SPLITS = {
    "nnx": lambda rate=0.0: models.from_nnx(partial(NnxLM, rate=rate), **NNX_SPLIT),
    "nnx-whole": lambda rate=0.0: models.from_nnx(partial(NnxLM, rate=rate)),
    "linen": lambda rate=0.0: models.from_linen(
        LinenLM(rate), hidden="encode", unembed="unembed"
    ),
    "linen-functions": lambda rate=0.0: models.from_linen(
        LinenLM(rate),
        hidden=lambda m, b: m.encode(b["tokens"], not m.has_rng("dropout")),
        unembed=lambda m, hidden: m.head(hidden),
    ),
    "linen-whole": lambda rate=0.0: models.from_linen(LinenLM(rate)),
}


def streams():
    retain = tiny.tiny_batch(seed=1)
    return {"forget": tiny.tiny_batch(rows=2, seed=2, length=7), "retain": retain}


def plain_loss(logits, batch):
    """Mean negative log-likelihood of answer tokens, and its count."""
    logps = jax.nn.log_softmax(logits[:, :-1])
    logps = jnp.take_along_axis(logps, batch["tokens"][:, 1:, None], -1)[..., 0]
    where = batch["answer"][:, 1:] & batch["mask"][:, :-1] & batch["mask"][:, 1:]
    return -jnp.sum(jnp.where(where, logps, 0.0)) / jnp.sum(where, dtype=jnp.float32)


def plain_logits(name, params, tokens):
    """Logits by Flax itself, with no Model between."""
    if name.startswith("nnx"):
        module = NnxLM(nnx.Rngs(0))
        module.eval()
        state = nnx.state(module, nnx.Param)
        nnx.replace_by_pure_dict(state, nnx.restore_int_paths(params))
        nnx.update(module, state)
        return module(tokens)
    variables = {"params": params, "constants": {"scale": jnp.float32(1.5)}}
    return LinenLM().apply(variables, tokens)


@pytest.mark.parametrize(
    "combiner", [pytest.param("weighted_sum", marks=pytest.mark.slow), "blur"]
)
@pytest.mark.parametrize("name", SPLITS)
def test_a_flax_model_takes_the_step_of_plain_gradients(name, combiner):
    model, params = SPLITS[name]()
    parts = {
        stream: terms.on_logps(losses.nll, model, stream, reduce="token")
        for stream in ("forget", "retain")
    }
    first = {
        "weighted_sum": combine.weighted_sum({"forget": -0.5, "retain": 1.0}),
        "blur": combine.blur(gamma=0.3),
    }[combiner]
    tx = optax.chain(first, optax.sgd(1.0))
    state = step.init_state(params, tx, KEY)
    run = jax.jit(step.make_step(parts, tx), donate_argnums=0)
    state, metrics = run(state, streams(), Frozen())

    def loss(params, batch):
        return plain_loss(plain_logits(name, params, batch["tokens"]), batch)

    grads, graded = {}, jax.jit(jax.value_and_grad(loss))
    for stream, batch in streams().items():
        value, grads[stream] = graded(params, batch)
        assert_allclose(metrics[f"{stream}/loss"], value, rtol=1e-5)
    f, r = grads["forget"], grads["retain"]
    if combiner == "blur":
        factor = 0.3 - trees.vdot(f, r) / trees.vdot(f, f)
    else:
        factor = jnp.float32(-0.5)
    expected = jax.tree.map(lambda p, f, r: p - (r + factor * f), params, f, r)
    assert bool(metrics["finite"])
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-5), state.params, expected)


@pytest.mark.parametrize("name", SPLITS)
def test_params_are_a_plain_nested_dict_with_string_keys(name):
    model, params = SPLITS[name]()

    def check(tree):
        assert type(tree) is dict
        for key, value in tree.items():
            assert type(key) is str
            if not isinstance(value, jax.Array):
                check(value)

    check(params)
    again = model.init(jax.random.key(2))
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, params)
    kernel = "layers/1/kernel" if name.startswith("nnx") else "layers_1/kernel"
    assert not np.array_equal(trees.paths(again)[kernel], trees.paths(params)[kernel])
    batch = tiny.tiny_batch()
    hidden = model.apply(params, batch).hidden
    logits = model.unembed(params, hidden)
    assert hidden.shape[-1] == (VOCAB if name.endswith("whole") else WIDTH)
    assert (logits.shape, logits.dtype) == ((4, 12, VOCAB), jnp.float32)
    expected = plain_logits(name, params, batch["tokens"])
    assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SPLITS)
def test_dropout_is_on_only_with_a_key(name):
    model, params = SPLITS[name](rate=0.5)
    still, _ = SPLITS[name](rate=0.0)
    batch = tiny.tiny_batch()
    run = jax.jit(lambda key: model.apply(params, batch, key=key).hidden)
    a, same, b = run(KEY), run(KEY), run(jax.random.key(9))
    assert_array_equal(a, same)
    assert not np.allclose(a, b)
    quiet = model.apply(params, batch).hidden
    assert_allclose(quiet, still.apply(params, batch).hidden, rtol=1e-5, atol=1e-6)
    assert not np.allclose(quiet, a)


def test_a_finished_nnx_module_keeps_its_params_and_cannot_init():
    module = NnxLM(nnx.Rngs(4), rate=0.5)
    module.norm.mean.set_value(jnp.full(WIDTH, 0.7))
    model, params = models.from_nnx(module, **NNX_SPLIT)
    assert params["head"]["kernel"] is module.head.kernel.get_value()
    with pytest.raises(ValueError, match="needs a factory, got a finished module"):
        model.init(KEY)
    batch, before = tiny.tiny_batch(), nnx.to_pure_dict(nnx.state(module))
    before = jax.tree.map(lambda x: x, before)
    hidden = model.apply(params, batch, key=KEY).hidden
    jax.jit(model.apply)(params, batch, key=KEY)
    after = nnx.to_pure_dict(nnx.state(module))
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )
    module.eval()
    quiet = model.apply(params, batch).hidden
    assert_allclose(quiet, module.encode(batch["tokens"]), rtol=1e-5, atol=1e-6)
    assert not np.allclose(hidden, quiet)


def test_a_module_without_dropout_accepts_a_key():
    model, params = models.from_nnx(
        lambda rngs: nnx.Sequential(
            nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        )
    )
    batch = tiny.tiny_batch()
    hidden = model.apply(params, batch, key=KEY).hidden
    assert_array_equal(hidden, model.apply(params, batch).hidden)


def test_linen_takes_variables_or_params_and_a_sample():
    module, tokens = LinenLM(), jnp.zeros((2, 5), jnp.int32)
    variables = module.init(KEY, tokens)
    batch = tiny.tiny_batch()
    for given in (variables, linen.FrozenDict(variables)):
        model, params = models.from_linen(module, given)
        assert type(params) is dict and set(params) == set(variables["params"])
        assert_allclose(
            model.apply(params, batch).hidden,
            module.apply(variables, batch["tokens"]),
            rtol=1e-6,
        )

    class NeedsMore(linen.Module):
        @linen.compact
        def __call__(self, tokens, topic):
            return linen.Embed(VOCAB, VOCAB)(tokens + topic)

    sample = batch | {"topic": jnp.int32(0)}
    model, params = models.from_linen(
        NeedsMore(),
        sample=sample,
        hidden=lambda module, batch: module(batch["tokens"], batch["topic"]),
        unembed=lambda module, hidden: hidden,
    )
    assert model.apply(params, sample).hidden.shape == (4, 12, VOCAB)
    alone, same = models.from_linen(linen.Embed(VOCAB, VOCAB), params["Embed_0"])
    assert_array_equal(
        alone.apply(same, batch).hidden, model.apply(params, sample).hidden
    )


@pytest.mark.parametrize("name", ["nnx", "linen"])
@pytest.mark.parametrize(
    "call", [{"taps": {"mlp": (0,)}}, {"edits": {"mlp": None}}, {"until": 0}]
)
def test_flax_models_have_no_sites(name, call):
    model, params = SPLITS[name]()
    assert model.sites == {}
    model.apply(params, tiny.tiny_batch(), taps={}, edits={}, until=None)
    with pytest.raises(ValueError, match=f"made by from_{name} has no named sites"):
        model.apply(params, tiny.tiny_batch(), **call)


def test_wrong_modules_are_errors():
    with pytest.raises(TypeError, match="use from_linen"):
        models.from_nnx(3)
    with pytest.raises(TypeError, match="use from_nnx"):
        models.from_linen(NnxLM(nnx.Rngs(0)))
    with pytest.raises(TypeError, match="use from_linen"):
        models.from_nnx(LinenLM())
    for one in ({"hidden": "encode"}, {"unembed": "head"}):
        with pytest.raises(ValueError, match="both hidden and unembed, or neither"):
            models.from_linen(LinenLM(), **one)
        with pytest.raises(ValueError, match="both hidden and unembed, or neither"):
            models.from_nnx(NnxLM, **one)


# The view.


def test_to_nnx_gives_the_module_back_with_trained_params_and_its_statistics():
    module = NnxLM(nnx.Rngs(3), rate=0.5)
    tokens = tiny.tiny_batch(answer=False)["tokens"]
    module(tokens)  # in training mode, so that the batch statistics move
    module.eval()
    model, params = models.from_nnx(module, **NNX_SPLIT)
    same = models.to_nnx(model, params)
    assert type(same) is NnxLM and same is not module
    assert_array_equal(same(tokens), module(tokens))
    assert_array_equal(same.norm.mean[...], module.norm.mean[...])
    trained = jax.tree.map(lambda x: 0.9 * x, params)
    back = models.to_nnx(model, trained)
    hidden = model.apply(trained, {"tokens": tokens, "mask": tokens >= 0}).hidden
    assert_allclose(back(tokens), model.unembed(trained, hidden), rtol=1e-6)
    again, restored = models.from_nnx(back, **NNX_SPLIT)
    jax.tree.map(assert_array_equal, restored, trained)


def test_to_nnx_refuses_other_models_and_incomplete_params():
    decoder, weights = tiny.tiny_model()
    with pytest.raises(TypeError, match="config=DecoderConfig.*nnx_view"):
        models.to_nnx(decoder, weights)
    model, params = SPLITS["nnx"]()
    half, _ = trees.split(params, r"head/.*")
    with pytest.raises(ValueError, match="embed/embedding.*trees.merge"):
        models.to_nnx(model, half)
    low = wrap.lora(model, pattern=r"head/kernel", rank=2)
    added = wrap.add_lora(low, params, jax.random.key(0))
    with pytest.raises(ValueError, match="head/lora_a.*merge_lora"):
        models.to_nnx(low, added)
    merged = wrap.merge_lora(low, added)
    assert_array_equal(
        models.to_nnx(low, merged).head.kernel[...], params["head"]["kernel"]
    )


def test_the_view_shares_the_arrays_and_gives_the_logits():
    model, params = tiny.tiny_model(tied=True)
    view = models.nnx_view(model, params)
    batch = tiny.tiny_batch()
    out = view.params()
    assert type(out) is dict
    assert jax.tree.structure(out) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(out), jax.tree.leaves(params), strict=True)
    assert all(a is b for a, b in pairs)
    expected = model.unembed(params, model.apply(params, batch).hidden)
    logits = view(batch["tokens"], batch["mask"])
    assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    jitted = nnx.jit(lambda view, batch: view(batch["tokens"]))(view, batch)
    assert_allclose(jitted[0], logits[0], rtol=1e-4, atol=1e-5)  # row 0 has no padding


def test_the_view_survives_split_and_merge():
    model, params = tiny.tiny_model()
    view = models.nnx_view(model, params)
    graph, state, rest = nnx.split(view, nnx.Param, ...)
    assert jax.tree.leaves(rest) == []
    assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(params)
    halved = jax.tree.map(lambda x: x / 2, state)
    merged = nnx.merge(graph, halved)
    jax.tree.map(lambda a, b: assert_array_equal(2 * a, b), merged.params(), params)
    nnx.update(view, halved)
    jax.tree.map(assert_array_equal, view.params(), merged.params())
    other = models.nnx_view(model, params)
    assert hash(nnx.graphdef(other)) == hash(graph) and nnx.graphdef(other) == graph


def test_the_view_trains_with_an_nnx_optimizer():
    model, params = tiny.tiny_model()
    view, batch = models.nnx_view(model, params), tiny.tiny_batch()

    def loss(view):
        return plain_loss(view(batch["tokens"], batch["mask"]), batch)

    @nnx.jit
    def train(view, optimizer):
        value, grads = nnx.value_and_grad(loss)(view)
        optimizer.update(view, grads)
        return value

    optimizer = nnx.Optimizer(view, optax.sgd(0.1), wrt=nnx.Param)
    value = train(view, optimizer)

    def plain(params):
        logits = model.unembed(params, model.apply(params, batch).hidden)
        return plain_loss(logits, batch)

    expected_value, grads = jax.jit(jax.value_and_grad(plain))(params)
    assert_allclose(value, expected_value, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    jax.tree.map(
        partial(assert_allclose, rtol=1e-4, atol=1e-5), view.params(), expected
    )
    assert float(train(view, optimizer)) < float(value)


def test_a_view_refuses_params_named_like_its_attributes():
    model, params = tiny.tiny_model()
    with pytest.raises(ValueError, match="'params'"):
        models.nnx_view(model, {"params": params})
