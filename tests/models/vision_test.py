# SPDX-License-Identifier: Apache-2.0
"""Image models are models like any other; their statistics are data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from numpy.testing import assert_allclose, assert_array_equal

import jaxunlearn as ju
from jaxunlearn import (
    combine,
    data,
    evaluate,
    losses,
    metrics,
    models,
    recipes,
    terms,
    trees,
    wrap,
)
from jaxunlearn.data import images
from jaxunlearn.models import _vision_net, vision
from jaxunlearn.typing import Model, Outputs

pytestmark = pytest.mark.slow  # nearly every test compiles a model

KEY = jax.random.key(0)


def tiny_net(family="cnn", **settings):
    settings = dict(shape=(16, 16, 1), classes=4, width=0.03, depth=3) | settings
    model = vision.make(vision.VisionConfig(family, **settings))
    return model, model.init(KEY)


def tiny_images(rows=8, shape=(16, 16, 1), seed=0, classes=4):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (rows, *shape), np.uint8)
    return images.table(pixels, np.arange(rows) % classes, classes=classes)


def fitted(model, params, parts, tx, streams, steps=3, num_microbatches=1, ref=None):
    train, rest = trees.split(params, vision.TRAINABLE)
    with jax.numpy_dtype_promotion("standard"):
        state = ju.init_state(train, tx, KEY)
        step = jax.jit(ju.make_step(parts, tx, num_microbatches=num_microbatches))
        return ju.fit(step, state, [streams] * steps, ju.Frozen(rest, ref), steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize("family", vision.FAMILIES)
def test_every_family_returns_logits_of_its_classes_and_learns(family):
    shape = (32, 32, 1) if family in ("vgg16", "translator") else (16, 16, 1)
    width = 0.05 if family == "vit" else 0.03
    model, params = tiny_net(family, shape=shape, width=width, dropout=0.0)
    batch = tiny_images(shape=shape)
    hidden = model.apply(params, batch).hidden
    assert hidden.shape[:2] == (8, 2)
    logits = model.unembed(params, hidden[:, 0])
    assert logits.shape == (8, 4) and logits.dtype == jnp.float32
    assert set(params) - {"batch_stats"} == set(vision.PARTS)
    term = terms.on_logps(losses.nll, model, "train")
    tx = optax.chain(combine.weighted_sum(), optax.adam(1e-2))
    state, log = fitted(model, params, {"train": term}, tx, {"train": batch})
    assert int(state.step) == 3 and log[0]["finite"]
    moved = jax.tree.map(lambda a, b: (a != b).any(), state.params, params_of(params))
    assert all(map(bool, jax.tree.leaves(moved["final"]["head"])))


@pytest.mark.parametrize("shape", [(8, 16, 1), (32, 32, 3)])
def test_the_translator_encodes_to_an_eighth_and_decodes_to_an_image(shape):
    model, params = tiny_net("translator", shape=shape)
    image = jnp.zeros((2, *shape), jnp.float32)

    def ends(net, image):
        code = net.begin(image, False)
        return code, net.middle(code, False)

    net, variables = _vision_net.Net(model.config), vision._variables(params)
    code, back = net.apply(variables, image, method=ends)
    assert code.shape[:3] == (2, shape[0] // 8, shape[1] // 8)
    assert back.shape == image.shape


def test_pooling_is_the_windows_maximum_and_ties_share_the_gradient():
    x = jax.random.normal(KEY, (2, 7, 6, 3))
    pool = partial(_vision_net._pool, None, train=False)

    def slow(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    assert_array_equal(pool(x), slow(x))
    found, wanted = (
        jax.grad(lambda x, f=f: (f(x) ** 3).sum())(x) for f in (pool, slow)
    )
    assert_array_equal(found, wanted)
    assert jnp.isnan(pool(x.at[0, 1, 1, 0].set(jnp.nan))[0, 0, 0, 0])
    shared = jax.grad(lambda x: pool(x).sum())(jnp.ones((1, 2, 2, 1)))
    assert_array_equal(shared, jnp.full((1, 2, 2, 1), 0.25))


def params_of(params):
    return trees.split(params, vision.TRAINABLE)[0]


def test_layers_have_the_sizes_of_the_papers():
    sizes = {}
    for family in vision.FAMILIES[:4]:
        model = vision.make(vision.VisionConfig(family))
        shapes = trees.paths(params_of(jax.eval_shape(model.init, KEY)))
        sizes[family] = sum(x.size for x in shapes.values())
    assert sizes["mlp"] == 3072 * 512 + 512 + 512 * 128 + 128 + 128 * 10 + 10
    assert sizes["resnet18"] == 11_173_962  # with a 3 x 3 stem
    convolutions = 27 * 32 + 9 * (32 * 64 + 64 * 128 + 128 * 256) + 2 * 480
    assert sizes["cnn"] == convolutions + 1024 * 1024 + 1024 + 1024 * 10 + 10
    assert sizes["vgg16"] == 14_714_688 + 5130


def test_a_term_is_the_cross_entropy_of_the_label():
    model, params = tiny_net()
    batch = tiny_images()
    logits = model.unembed(params, vision.features(model, params, batch))
    labels = jnp.asarray(images.labels_of(batch))
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    term = terms.on_logps(losses.nll, model, "train")
    train, rest = trees.split(params, vision.TRAINABLE)
    total, _ = term(trees.merge(train, rest), {"train": batch}, None, None)
    assert int(total.count) == 8
    assert_allclose(total.mean(), wanted.mean(), rtol=1e-5)
    scores = evaluate.token_scores(model, params, batch, batch_size=3)
    assert_allclose(-scores.logps[:, 0], wanted, rtol=1e-4, atol=1e-6)
    assert_array_equal(scores.hits[:, 0], logits.argmax(1) == labels)
    assert scores.where.all()
    assert_allclose(
        metrics.mean_nll(jnp.asarray(scores.logps)), wanted, rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_recipes_for_language_models_run_on_images():
    model, params = tiny_net()
    forget = evaluate.reference_logps(model, params, tiny_images())
    streams = {"forget": forget, "retain": tiny_images(12, seed=1)}
    for make in (
        partial(recipes.blur.npo, model),
        partial(recipes.blur.graddiff, model),
        partial(recipes.sure.npo, model, percentile=50.0),
        partial(recipes.openunlearning.undial, model),
    ):
        recipe = make(learning_rate=1e-3)
        state, log = fitted(
            model, params, recipe.terms, recipe.tx, streams, steps=2, ref=params
        )
        assert all(entry["finite"] for entry in log) and int(state.step) == 2


def test_joint_terms_read_the_images_of_all_streams():
    model, params = tiny_net("mlp")
    streams = {"a": tiny_images(4), "b": tiny_images(8, seed=1)}
    parts = {name: terms.on_logps(losses.nll, model, name) for name in streams}
    total, _ = terms.joint(parts, {"a": 1.0, "b": -2.0})(params, streams, None, None)
    a, b = (parts[n](params, streams, None, None)[0].mean() for n in streams)
    assert_allclose(jnp.sum(total.mean()), a - 2 * b, rtol=1e-6)
    streams["b"] = images.as_float(streams["b"])
    with pytest.raises(ValueError, match="one shape and dtype in all streams"):
        terms.joint(parts)(params, streams, None, None)


def test_batch_statistics_are_measured_exactly():
    model, params = tiny_net()
    batch = tiny_images(8)
    stats = params["batch_stats"]["begin"]["BatchNorm_0"]
    assert_array_equal(stats["mean"], 0)
    halves = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]
    new = vision.with_batch_stats(model, params, halves)
    image = (jnp.asarray(batch["image"], jnp.float32) / 255 - 0.5) / 0.25
    kernel = params["begin"]["Conv_0"]["kernel"]
    x = jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = new["batch_stats"]["begin"]["BatchNorm_0"]
    assert_allclose(got["mean"], x.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    assert_allclose(got["var"], x.var((0, 1, 2)), rtol=1e-4, atol=1e-6)
    assert_array_equal(params["batch_stats"]["begin"]["BatchNorm_0"]["mean"], 0)
    assert new["begin"] is params["begin"]
    with pytest.raises(ValueError, match="at least one batch"):
        vision.with_batch_stats(model, params, [])
    plain, without = tiny_net(norm="none")
    assert vision.with_batch_stats(plain, without, []) is without


def test_the_variance_of_a_constant_is_not_negative():
    seen = {"mean": jnp.linspace(1.0, 99.0, 50), "var": jnp.zeros(50)}

    def apply(params, batch, **_):
        return Outputs(batch["image"], {"statistics": {"begin": {"norm": seen}}})

    model = Model(lambda key: None, apply, lambda params, hidden: hidden, {})
    params = {"batch_stats": {"begin": {"norm": jax.tree.map(jnp.ones_like, seen)}}}
    new = vision.with_batch_stats(model, params, [tiny_images()] * 7)
    found = new["batch_stats"]["begin"]["norm"]
    assert (found["var"] >= 0).all() and found["var"].max() < 0.1


def test_training_does_not_change_the_batch_statistics():
    model, params = tiny_net()
    batch = tiny_images()

    def loss(params):
        return jnp.sum(model.apply(params, batch).hidden ** 2)

    grads = jax.grad(loss)(params)
    assert all((x == 0).all() for x in jax.tree.leaves(grads["batch_stats"]))
    assert any((x != 0).any() for x in jax.tree.leaves(grads["begin"]))


def test_only_the_train_parts_normalise_by_the_batch():
    model, params = tiny_net(dropout=0.0)
    frozen = vision.make(model.config, train_parts=("final",))
    batch = tiny_images()
    still = vision.features(model, params, batch)
    assert_array_equal(frozen.apply(params, batch, key=KEY).hidden[:, 0], still)
    training = model.apply(params, batch, key=KEY).hidden[:, 0]
    assert jnp.abs(training - still).max() > 1e-3


def test_dropout_is_on_exactly_when_there_is_a_key():
    model, params = tiny_net(norm="none", dropout=0.5, width=0.1)
    batch = tiny_images()
    a, b = (model.apply(params, batch, key=r).hidden for r in jax.random.split(KEY))
    assert (a != b).any()
    assert_array_equal(
        model.apply(params, batch).hidden, model.apply(params, batch).hidden
    )


def test_augmentation_shifts_and_mirrors_only_in_training():
    model, params = tiny_net("mlp")
    other = wrap.augment(model, pad=2)
    batch = tiny_images()
    assert_array_equal(
        other.apply(params, batch).hidden, model.apply(params, batch).hidden
    )
    seen = other.apply(params, batch, key=KEY).hidden
    assert (seen != model.apply(params, batch, key=KEY).hidden).any()
    from jaxunlearn.wrap import _augment

    image = jnp.asarray(batch["image"])
    assert_array_equal(_augment.shifted(image, KEY, 0, False), image)
    moved = np.asarray(_augment.shifted(image, KEY, 2, True))
    wide = np.pad(batch["image"], ((0, 0), (2, 2), (2, 2), (0, 0)))
    for row in range(8):
        options = [
            wide[row, i : i + 16, j : j + 16][:, ::side]
            for i in range(5)
            for j in range(5)
            for side in (1, -1)
        ]
        assert any((moved[row] == option).all() for option in options)
    with pytest.raises(ValueError, match="pad >= 0, got pad=-1"):
        wrap.augment(model, pad=-1)


def test_a_run_streams_images_and_resumes_at_the_same_row():
    table = tiny_images(10)
    first, second = (
        next(data.streams({"r": table}, 4, seed=0, skip=k)) for k in (0, 1)
    )
    assert first["r"]["image"].shape == (4, 16, 16, 1)
    assert (first["r"]["image"] != second["r"]["image"]).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": np.zeros((2, 16, 16), np.uint8)}, ValueError, r"\[B, 16, 16, 1\]"),
        ({"image": np.zeros((2, 8, 8, 1), np.uint8)}, ValueError, "got shape"),
        ({"image": np.zeros((2, 16, 16, 1), np.int32)}, TypeError, "got int32"),
    ],
)
def test_wrong_images_are_refused(change, error, message):
    model, params = tiny_net()
    with pytest.raises(error, match=message):
        model.apply(params, change)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'vgg16'"):
        vision.make(vision.VisionConfig("vgg"))
    with pytest.raises(ValueError, match="at least 32 x 32 pixels for 'vgg16'"):
        vision.make(vision.VisionConfig("vgg16", shape=(28, 28, 1)))
    with pytest.raises(ValueError, match="sides that 8 divides for 'translator'"):
        vision.make(vision.VisionConfig("translator", shape=(32, 30, 1)))
    with pytest.raises(ValueError, match="train_parts to be one of"):
        vision.make(vision.VisionConfig(), train_parts=("head",))
    model, params = tiny_net()
    with pytest.raises(ValueError, match="until=1"):
        model.apply(params, tiny_images(), until=1)
    with pytest.raises(KeyError, match="data.images.table"):
        model.apply(params, {"tokens": jnp.zeros((2, 2))})
    assert models.vision is vision
