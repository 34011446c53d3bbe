# SPDX-License-Identifier: Apache-2.0
"""The decoder equals a slow one written in NumPy, and keeps its promises."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import models, trees
from jaxunlearn.models import decoder
from tests import tiny

SETTINGS = {
    "plain": {},
    "tied-biased": {
        "tied": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    "qk-norm": {"qk_norm": True, "family": "qwen3", "kv_heads": 4},
    "windows": {"windows": (3, None, 1), "kv_heads": 1},
}


@partial(jax.jit, static_argnums=0)
def hidden_of(model, params, batch):
    """Hidden states, compiled once per model and shape."""
    return model.apply(params, batch).hidden


@partial(jax.jit, static_argnums=0)
def gradients(model, params, batch):
    """(gradients of a loss on real tokens, hidden states with zeros elsewhere)."""

    def loss(params):
        hidden = model.apply(params, batch).hidden
        hidden = jnp.where(batch["mask"][..., None], hidden, 0.0)
        return jnp.sum(jnp.sin(hidden)), hidden

    return jax.grad(loss, has_aux=True)(params)


@pytest.fixture(params=SETTINGS)
def setting(request):
    return tiny.tiny_model(**SETTINGS[request.param])


def slow_decoder(config, params, batch):
    """Hidden states and sites of a decoder, in NumPy float64 with loops over heads."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    mask, tokens = np.asarray(batch["mask"]), np.asarray(batch["tokens"])
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    size, group = config.head_dim, config.heads // config.kv_heads
    waves = config.rope.theta ** (-np.arange(0, size, 2) / size)
    angles = positions[..., None] * waves
    cos, sin = np.cos(angles), np.sin(angles)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rotate(x):
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def dense(layer, x, n):
        return x @ layer["kernel"][n] + (layer["bias"][n] if "bias" in layer else 0.0)

    x = p["embed"]["embedding"][tokens]
    sites = {name: [] for name in decoder.make(config).sites}
    length = tokens.shape[1]
    for n in range(config.layers):
        attention, mlp = p["blocks"]["attention"], p["blocks"]["mlp"]
        visible = np.tril(np.ones((length, length), bool)) & mask[:, None, :]
        window = (config.windows or [None] * config.layers)[n]
        if window is not None:
            visible &= positions[:, :, None] - positions[:, None, :] < window
        read = h = norm(x, attention["norm"]["scale"][n])
        q, k, v = (dense(attention[name], h, n) for name in "qkv")
        heads = []
        for head in range(config.heads):
            columns = slice(head * size, (head + 1) * size)
            shared = slice(head // group * size, (head // group + 1) * size)
            a, b = q[..., columns], k[..., shared]
            if config.qk_norm:
                a = norm(a, attention["q_norm"]["scale"][n])
                b = norm(b, attention["k_norm"]["scale"][n])
            scores = rotate(a) @ rotate(b).swapaxes(1, 2) / np.sqrt(size)
            scores = np.where(visible, scores, -1e30)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            heads.append(weights @ v[..., shared])
        mixed = np.concatenate(heads, axis=-1)
        attended = dense(attention["o"], mixed, n)
        x = x + attended
        h = norm(x, mlp["norm"]["scale"][n])
        gate = dense(mlp["gate"], h, n)
        units = gate / (1 + np.exp(-gate)) * dense(mlp["up"], h, n)
        added = dense(mlp["down"], units, n)
        x = x + added
        values = {"attention_in": read, "attention": mixed, "mlp_in": h, "mlp": units}
        values |= {"attention_out": attended, "mlp_out": added, "block": x}
        for site, value in values.items():
            sites[site].append(value)
    return norm(x, p["final_norm"]["scale"]), sites


@pytest.mark.parametrize(
    ("side", "wrap"),
    [
        pytest.param("left", jax.jit, id="left-jit"),
        pytest.param("right", jax.jit, id="right-jit"),
        pytest.param("holes", lambda f: f, id="holes-eager"),
        pytest.param("left", lambda f: f, id="left-eager", marks=pytest.mark.slow),
        pytest.param("right", lambda f: f, id="right-eager", marks=pytest.mark.slow),
        pytest.param("holes", jax.jit, id="holes-jit", marks=pytest.mark.slow),
    ],
)
def test_equals_the_slow_decoder_at_real_tokens(setting, side, wrap):
    model, params = setting
    batch = tiny.tiny_batch(side="left" if side == "left" else "right")
    if side == "holes":
        holes = jnp.arange(12) % 5 == jnp.arange(4)[:, None]
        batch["mask"] = batch["mask"] & ~holes
    taps = {"mlp": (2, 0), "attention": (1,), "block": (0, 1, 2)}
    taps |= {
        "attention_in": (1, 2),
        "mlp_in": (0,),
        "mlp_out": (2,),
        "attention_out": (1,),
    }
    out = wrap(partial(model.apply, taps=taps))(params, batch)
    hidden, sites = slow_decoder(model.config, params, batch)
    real = np.asarray(batch["mask"])
    assert_allclose(out.hidden[real], hidden[real], rtol=1e-4, atol=1e-4)
    assert set(out.taps) == set(taps)
    for site, layers in taps.items():
        assert out.taps[site].shape == (len(layers), 4, 12, model.sites[site].units)
        for value, layer in zip(out.taps[site], layers, strict=True):
            assert_allclose(value[real], sites[site][layer][real], rtol=1e-4, atol=1e-4)
    logits = model.unembed(params, out.hidden)
    if model.config.tied:
        kernel = np.asarray(params["embed"]["embedding"]).T
    else:
        kernel = np.asarray(params["unembed"]["kernel"])
    assert logits.dtype == jnp.float32
    assert_allclose(logits, np.asarray(out.hidden) @ kernel, rtol=1e-4, atol=1e-4)


def test_every_remat_setting_gives_the_same_gradients():
    batch, grads, flops = tiny.tiny_batch(), {}, {}
    for remat in ("none", "dots", "mlp", "full"):
        model, params = tiny.tiny_model(remat=remat)

        def loss(params, model=model):
            out = model.apply(params, batch, taps={"mlp": (1,)})
            hidden = jnp.where(batch["mask"][..., None], out.hidden, 0.0)
            return jnp.sum(jnp.sin(hidden)) + jnp.sum(out.taps["mlp"][:, 0] ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        grads[remat], flops[remat] = compiled(params), compiled.cost_analysis()["flops"]
    assert flops["none"] <= flops["dots"] < flops["mlp"] < flops["full"]
    for remat in ("dots", "mlp", "full"):
        jax.tree.map(
            partial(assert_allclose, rtol=1e-4, atol=1e-5), grads[remat], grads["none"]
        )
    assert float(trees.norm(grads["none"])) > 1.0


@pytest.mark.parametrize("windows", [None, (2, None, 4)], ids=["full", "windows"])
def test_padding_does_not_change_real_tokens(windows):
    model, params = tiny.tiny_model(windows=windows)
    left, right = tiny.tiny_batch(side="left"), tiny.tiny_batch(side="right")
    assert not np.array_equal(left["mask"], right["mask"])
    hidden = [hidden_of(model, params, b)[b["mask"]] for b in (left, right)]
    assert_allclose(*hidden, rtol=1e-5, atol=1e-5)
    row = int(jnp.argmin(right["mask"].sum(axis=1)))
    tokens = right["tokens"][row][right["mask"][row]][None]
    alone = {"tokens": tokens, "mask": jnp.ones(tokens.shape, jnp.bool_)}
    expected = hidden_of(model, params, right)[row][right["mask"][row]]
    assert_allclose(hidden_of(model, params, alone)[0], expected, atol=1e-5)


@pytest.mark.parametrize("junk", [0, 31, -1, -100, 10**6])
@pytest.mark.parametrize("side", ["left", "right"])
def test_junk_under_the_mask_changes_nothing(side, junk):
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch(side=side)
    dirty = batch | {"tokens": jnp.where(batch["mask"], batch["tokens"], junk)}
    grads, hidden = gradients(model, params, dirty)
    expected_grads, expected = gradients(model, params, batch)
    assert_array_equal(hidden, expected)
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-5), grads, expected_grads)


def test_future_tokens_do_not_change_the_past():
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch(rows=2)
    changed = batch["tokens"].at[0, 7].set((batch["tokens"][0, 7] + 1) % 32)
    hidden = hidden_of(model, params, batch)
    other = hidden_of(model, params, batch | {"tokens": changed})
    assert_array_equal(hidden[0, :7], other[0, :7])
    assert_array_equal(hidden[1], other[1])
    assert np.all(np.abs(hidden[0, 7:] - other[0, 7:]).max(axis=-1) > 1e-3)


def test_grouped_heads_equal_repeated_heads():
    model, params = tiny.tiny_model(qkv_bias=True)
    wide = models.make(dataclasses.replace(model.config, kv_heads=4))

    def repeat(path, x):
        if not path.startswith(("blocks/attention/k/", "blocks/attention/v/")):
            return x
        heads = x.reshape(*x.shape[:-1], 2, 4)
        return jnp.repeat(heads, 2, axis=-2).reshape(*x.shape[:-1], 16)

    batch = tiny.tiny_batch()
    expected = hidden_of(model, params, batch)
    hidden = hidden_of(wide, trees.map_with_path(repeat, params), batch)
    assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)


def test_a_window_as_long_as_the_sequence_changes_nothing():
    plain, params = tiny.tiny_model()
    batch = tiny.tiny_batch(length=12)
    expected = hidden_of(plain, params, batch)
    for window, same in ((12, True), (11, False)):
        model = models.make(dataclasses.replace(plain.config, windows=(window,) * 3))
        hidden = hidden_of(model, params, batch)
        assert np.allclose(hidden, expected, atol=1e-5) is same


def test_edits_that_change_nothing_are_the_identity():
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch()
    edits = dict.fromkeys(("attention", "mlp", "block"), lambda value, layer: value)
    edited = jax.jit(partial(model.apply, edits=edits))(params, batch)
    assert_array_equal(hidden_of(model, params, batch), edited.hidden)


@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_zeroing_a_unit_equals_zeroing_its_row_of_the_reader(site):
    model, params = tiny.tiny_model()
    batch, place = tiny.tiny_batch(), model.sites[site]
    assert place.axis == 0 and place.layers == 3
    layer, unit = 1, place.units - 2

    def zero(value, index):
        return jnp.where(index == layer, value.at[..., unit].set(0.0), value)

    pruned = trees.map_with_path(
        lambda path, x: x.at[layer, unit].set(0.0) if path == place.reader else x,
        params,
    )
    taps = {site: (layer,)}
    edited = model.apply(params, batch, edits={site: zero}, taps=taps)
    expected = hidden_of(model, pruned, batch)
    assert_allclose(edited.hidden, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(expected, hidden_of(model, params, batch), atol=1e-3)
    assert_array_equal(edited.taps[site][..., unit], 0.0)  # taps are read after edits


def test_an_edit_of_the_block_reaches_the_next_block():
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch()

    def blank(value, layer):
        return jnp.where(layer == 2, jnp.ones_like(value), value)

    hidden = model.apply(params, batch, edits={"block": blank}).hidden
    expected = jnp.broadcast_to(params["final_norm"]["scale"], hidden.shape)
    assert_allclose(hidden, expected, rtol=1e-5)


@pytest.mark.parametrize("until", [0, 1, 2])
def test_until_ends_with_the_tap_of_that_block(until):
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch()

    @jax.jit
    def run(params):
        def loss(params):
            out = model.apply(params, batch, until=until, taps={"mlp": (until,)})
            return out.hidden.sum(), out.hidden

        grads, hidden = jax.grad(loss, has_aux=True)(params)
        block = model.apply(params, batch, taps={"block": (until,)}).taps["block"][0]
        return grads, hidden, block

    grads, hidden, expected = run(params)
    assert_allclose(hidden, expected, rtol=1e-5, atol=1e-6)
    down = grads["blocks"]["mlp"]["down"]["kernel"]
    assert [bool(jnp.any(layer != 0)) for layer in down] == [
        layer <= until for layer in range(3)
    ]


def test_bfloat16_compute_leaves_params_and_logits_float32():
    model, params = tiny.tiny_model(compute_dtype="bfloat16")
    exact, _ = tiny.tiny_model()
    batch = tiny.tiny_batch()

    @jax.jit
    def run(params):
        def loss(params):
            hidden = model.apply(params, batch).hidden
            logits = model.unembed(params, hidden)
            return logits.sum(), (hidden, logits)

        grads, (hidden, logits) = jax.grad(loss, has_aux=True)(params)
        return grads, hidden, logits

    grads, hidden, logits = run(params)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    dtypes = {x.dtype for x in jax.tree.leaves((params, grads))}
    assert dtypes == {jnp.dtype(jnp.float32)}
    expected = exact.unembed(params, hidden_of(exact, params, batch))
    error = np.abs(logits - expected)[batch["mask"]].max() / np.abs(expected).max()
    assert 0 < error < 0.1
    assert model.init_cache(2, 4)["keys"][0].dtype == jnp.bfloat16


def test_init_returns_the_leaves_of_shapes(setting):
    model, _ = setting
    params = model.init(jax.random.key(1))
    expected = decoder.shapes(model.config)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for path, leaf in trees.paths(params).items():
        assert (leaf.shape, leaf.dtype) == (
            trees.paths(expected)[path].shape,
            jnp.float32,
        )
        if path.endswith("bias"):
            assert_array_equal(leaf, 0.0)
        elif path.endswith("scale"):
            assert_array_equal(leaf, 1.0)
        else:
            assert_allclose(np.std(leaf), 0.02, rtol=0.2)
    assert ("unembed" in params) is not model.config.tied
    for site in model.sites.values():
        if site.reader is not None:
            shape = trees.paths(params)[site.reader].shape
            assert (shape[0], shape[1 + site.axis]) == (site.layers, site.units)
        for path in site.readers:
            shape = trees.paths(params)[path].shape
            assert (shape[0], shape[1]) == (site.layers, site.units)


ERRORS = {
    "long": (dict(length=65), {}, "at most 64 tokens, got 65"),
    "tap-site": ({}, {"taps": {"mpl": (0,)}}, "Did you mean 'mlp'"),
    "edit-site": ({}, {"edits": {"logits": lambda x, n: x}}, "'attention_in', 'attent"),
    "tap-layer": ({}, {"taps": {"mlp": (3,)}}, "layers 0 to 2, got .*mlp"),
    "tap-negative": ({}, {"taps": {"mlp": (-1,)}}, "got .* at 'mlp'"),
    "tap-twice": ({}, {"taps": {"mlp": (1, 1)}}, "got .* at 'mlp'"),
    "tap-none": ({}, {"taps": {"mlp": ()}}, "got .* at 'mlp'"),
    "tap-late": ({}, {"taps": {"mlp": (2,)}, "until": 1}, "layers 0 to 1, got .*mlp"),
    "until": ({}, {"until": 3}, "layers 0 to 2, got until=3"),
    "until-negative": ({}, {"until": -1}, "got until=-1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_calls_are_errors(case):
    batch, call, message = ERRORS[case]
    model, params = tiny.tiny_model()
    with pytest.raises(ValueError, match=message):
        model.apply(params, tiny.tiny_batch(**batch), **call)


def test_a_missing_mask_or_a_wrong_shape_is_an_error():
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch()
    with pytest.raises(KeyError, match="'mask', but there is 'tokens'"):
        model.apply(params, {"tokens": batch["tokens"]})
    with pytest.raises(ValueError, match="arrays of one shape"):
        model.apply(params, batch | {"mask": batch["mask"][:, 1:]})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"kv_heads": 3}, "kv_heads that divide heads"),
        ({"windows": (4,)}, "windows per layer, got 1"),
        ({"remat": "some"}, "remat"),
        ({"layers": 0}, "layers >= 1"),
        ({"compute_dtype": "float31"}, "compute_dtype"),
    ],
)
def test_wrong_settings_are_errors(field, message):
    with pytest.raises(ValueError, match=message):
        tiny.tiny_model(**field)
