# SPDX-License-Identifier: Apache-2.0
"""LoRA: same outputs at first, only its leaves train, and an exact merge."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jaxunlearn as ju
from jaxunlearn import models, recipes, sharding, trees, wrap
from tests import sharding_test, tiny

KERNELS = r"(blocks/.*|unembed)/kernel"
SETTINGS = sharding_test.SETTINGS | dict(hidden=48)


def low_rank(*, pattern=KERNELS, rank=2, trained=True, **settings):
    """(base model, base params, wrapped model, its params), B not zero if trained."""
    model, params = tiny.tiny_model(**(SETTINGS | settings))
    low = wrap.lora(model, pattern=pattern, rank=rank, alpha=3.0)
    wrapped = wrap.add_lora(low, params, jax.random.key(1))
    if trained:
        rng = np.random.default_rng(0)

        def some(path, x):
            draws = jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32)
            return draws if path.endswith("lora_b") else x

        wrapped = trees.map_with_path(some, wrapped)
    return model, params, low, wrapped


def logits(model, params, batch):
    run = jax.jit(lambda p, b: model.unembed(p, model.apply(p, b).hidden))
    return run(params, batch)


def test_new_leaves_do_not_change_the_outputs():
    model, params, low, wrapped = low_rank(trained=False)
    batch = tiny.tiny_batch(vocab=64)
    expected = logits(model, params, batch)
    assert_array_equal(logits(low, wrapped, batch), expected)
    assert_array_equal(logits(low, params, batch), expected)  # as a reference has it
    a = wrapped["blocks"]["mlp"]["down"]["lora_a"]
    assert a.shape == (3, 48, 2) and 0.5 < jnp.var(a) * 48 < 2
    made = jax.eval_shape(low.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, wrapped)


@pytest.mark.parametrize("pattern", [KERNELS, r"blocks/attention/[qv]/kernel"])
def test_merged_params_give_the_same_logits(pattern):
    model, params, low, wrapped = low_rank(pattern=pattern)
    merged = wrap.merge_lora(low, wrapped)
    assert trees.paths(merged).keys() == trees.paths(params).keys()
    batch = tiny.tiny_batch(vocab=64)
    got, expected = logits(low, wrapped, batch), logits(model, merged, batch)
    scale = jnp.max(jnp.abs(expected))
    assert_allclose(got / scale, expected / scale, rtol=0, atol=1e-5)
    assert jnp.max(jnp.abs(expected - logits(model, params, batch))) > 0.1
    kernel = np.asarray(params["blocks"]["attention"]["q"]["kernel"][1], np.float64)
    a, b = (wrapped["blocks"]["attention"]["q"][f"lora_{x}"][1] for x in "ab")
    by_hand = kernel + 1.5 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    merged_q = merged["blocks"]["attention"]["q"]["kernel"][1]
    assert_allclose(merged_q, by_hand, rtol=0, atol=1e-5)


def test_decoding_with_a_cache_includes_the_products():
    model, params, low, wrapped = low_rank()
    tokens = tiny.tiny_batch(vocab=64, side="left", answer=False)
    merged = wrap.merge_lora(low, wrapped)
    expected, _ = model.decode(merged, tokens, model.init_cache(4, 12))
    hidden, _ = low.decode(wrapped, tokens, low.init_cache(4, 12))
    assert_allclose(hidden, expected, rtol=0, atol=1e-4)


def products(function, *args):
    """The last two dimensions of every matrix product in function(*args)."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield tuple(sorted(equation.outvars[0].aval.shape[-2:]))
            for inner in core.jaxprs_in_params(equation.params):
                yield from walk(inner)

    return set(walk(jax.make_jaxpr(function)(*args).jaxpr))


def test_no_product_has_the_size_of_a_kernel():
    _, _, low, wrapped = low_rank(pattern=r"blocks/mlp/(up|down)/kernel")
    batch = tiny.tiny_batch(4, 10, vocab=64)  # 40 rows, not the 48 units

    def gradient(pattern):
        train, rest = trees.split(wrapped, pattern)

        def loss(train):
            return jnp.sum(low.apply(trees.merge(train, rest), batch).hidden)

        return products(jax.grad(loss), train)

    assert (32, 48) not in gradient(wrap.LORA)
    assert (32, 48) in gradient(r"blocks/mlp/up/kernel")


@pytest.mark.slow
def test_blur_trains_only_the_leaves_and_on_a_mesh_as_on_one_device():
    _, params, low, wrapped = low_rank()
    recipe = recipes.blur.npo(low, gamma=0.1, learning_rate=1e-3)
    step = ju.make_step(recipe.terms, recipe.tx)
    fresh = partial(ju.init_state, tx=recipe.tx, key=jax.random.key(0))
    train, rest = trees.split(wrapped, wrap.LORA)
    state = fresh(train)
    moments = trees.paths(state.opt_state)
    assert not [path for path in moments if path.endswith("kernel")]
    assert [path for path in moments if path.endswith("lora_b")]

    mesh = sharding.make_mesh(fsdp=2, context=2, tensor=2)
    rules = low.rules
    shards = sharding.by_rules(wrapped, mesh, rules)
    down, up = (shards["blocks"]["mlp"][name] for name in ("down", "up"))
    assert down["lora_a"].spec == P(None, "tensor", None)
    assert down["lora_b"].spec == P(None, None, "fsdp")
    assert up["lora_a"].spec == P(None, "fsdp", None)
    cut, cut_rest = trees.split(jax.device_put(wrapped, shards), wrap.LORA)
    cut_state = sharding.create(fresh, mesh, rules, cut)
    jitted = sharding.jit_step(step, mesh, rules, cut_state)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        for _ in range(3):
            batches = sharding_test.streams()
            cut_state, got = jitted(cut_state, batches, ju.Frozen(cut_rest))
            state, expected = jax.jit(step)(state, batches, ju.Frozen(rest))
    assert_allclose(got["forget/loss"], expected["forget/loss"], rtol=1e-4)
    jax.tree.map(
        partial(assert_allclose, rtol=0, atol=1e-5), cut_state.params, state.params
    )
    moved = trees.norm(jax.tree.map(jnp.subtract, state.params, train))
    assert moved > 1e-3


def test_a_flax_model_runs_on_merged_kernels():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(64, 16, rngs=rngs)
            self.head = nnx.Linear(16, 64, rngs=rngs)

        def __call__(self, tokens):
            return self.head(self.embed(tokens))

    model, params = models.from_nnx(lambda rngs: Net(rngs))
    low = wrap.lora(model, pattern="head/kernel", rank=2)
    wrapped = wrap.add_lora(low, params, jax.random.key(0))
    wrapped["head"]["lora_b"] += 1.0
    batch = tiny.tiny_batch(vocab=64)
    got = logits(low, wrapped, batch)
    assert_allclose(got, logits(model, wrap.merge_lora(low, wrapped), batch), rtol=1e-5)
    assert jnp.max(jnp.abs(got - logits(model, params, batch))) > 0.1
    with pytest.raises(ValueError, match="matches 'embed/embedding'"):
        wrap.lora(model, pattern="embed/.*", rank=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pattern="nothing"), "pattern that matches a kernel, got 'nothing'"),
        (dict(pattern="embed/embedding"), "matches 'embed/embedding'; the kernels"),
        (dict(pattern=".*"), "matches kernels only"),
        (dict(rank=0), "rank >= 1"),
        (dict(rank=32), "got rank=32"),
        (dict(alpha=0.0), "alpha > 0"),
    ],
)
def test_impossible_settings_are_errors(settings, message):
    model, _ = tiny.tiny_model(**SETTINGS)
    with pytest.raises(ValueError, match=message):
        wrap.lora(model, **(dict(pattern=KERNELS) | settings))


def test_models_and_params_that_do_not_fit_are_errors():
    model, params, low, wrapped = low_rank()
    with pytest.raises(ValueError, match="without LoRA"):
        wrap.add_lora(model, params, jax.random.key(0))
    with pytest.raises(ValueError, match="without low-rank leaves"):
        wrap.add_lora(low, wrapped, jax.random.key(0))
    with pytest.raises(ValueError, match="lora_a and lora_b, got none"):
        wrap.merge_lora(low, params)
    with pytest.raises(ValueError, match="without LoRA"):
        wrap.lora(low, pattern=KERNELS)
