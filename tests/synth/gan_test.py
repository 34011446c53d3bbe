# SPDX-License-Identifier: Apache-2.0
"""GANs in one step, wrong labels, and a toy problem that forgets a class."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxunlearn as ju
from jaxunlearn import combine, evaluate, losses, recipes, synth, terms, trees
from jaxunlearn.data import images, table
from jaxunlearn.models import gan as gans
from jaxunlearn.models import vision

pytestmark = pytest.mark.slow  # nearly every test compiles a model

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
CLASSES = 4


@pytest.fixture(autouse=True)
def adam_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def blobs(rows=160, seed=0):
    """Images of four classes, each with a different bright quarter."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % CLASSES
    pixels = rng.random((rows, *SHAPE)) * 0.3
    for quarter in range(CLASSES):
        y, x = divmod(quarter, 2)
        pixels[labels == quarter, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 0.6
    return images.table(pixels, labels, classes=CLASSES)


def small_gan(**settings):
    how = dict(latent=8, width=8, ups=1, norm=False) | settings
    return gans.make(gans.GanConfig(SHAPE, **how))


def test_networks_have_the_shapes_and_ranges_of_images():
    net = gans.make(gans.GanConfig((8, 12, 1), ups=2, width=2, latent=5))
    params = net.init(KEY)
    drawn = net.generate(params["generator"], jax.random.normal(KEY, (3, 5)))
    assert drawn.shape == (3, 8, 12, 1)
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
    assert net.discriminate(params["discriminator"], drawn).shape == (3,)
    whole = gans.make(gans.GanConfig())
    shapes = jax.eval_shape(whole.init, KEY)
    assert shapes["generator"]["Dense_0"]["kernel"].shape == (100, 4 * 4 * 256)
    latents = jax.ShapeDtypeStruct((3, 100), jnp.float32)
    out = jax.eval_shape(whole.generate, shapes["generator"], latents)
    assert out.shape == (3, 32, 32, 3)
    with pytest.raises(ValueError, match=r"ups = 8 .*28, 28"):
        gans.make(gans.GanConfig((28, 28, 1)))


@pytest.mark.parametrize("loss", ["nonsaturating", "hinge", "relativistic"])
def test_a_term_has_gradients_only_for_its_network(loss):
    net, batch = small_gan(), blobs(8)
    params = {"forget": net.init(KEY)}
    real = net.discriminate(
        params["forget"]["discriminator"], jnp.asarray(batch["image"])
    )
    latents = jax.random.normal(KEY, (8, 8))
    drawn = net.generate(params["forget"]["generator"], latents)
    made = net.discriminate(params["forget"]["discriminator"], drawn)
    d, g = np.asarray(real, np.float64), np.asarray(made, np.float64)
    wanted = {
        "nonsaturating": (
            np.log1p(np.exp(-d)) + np.log1p(np.exp(g)),
            np.log1p(np.exp(-g)),
        ),
        "hinge": (np.maximum(1 - d, 0) + np.maximum(1 + g, 0), -g),
        "relativistic": (np.log1p(np.exp(g - d)), np.log1p(np.exp(d - g))),
    }[loss]
    for trains, values in zip(("discriminator", "generator"), wanted, strict=True):
        term = synth.GanTerm(net, "forget", trains, loss, 0.0)

        def mean(params, term=term):
            return term(params, {"forget": batch}, None, KEY)[0].mean()

        assert_allclose(mean(params), values.mean(), rtol=1e-5, atol=1e-7)
        grads = trees.paths(jax.grad(mean)(params))
        for path, x in grads.items():
            if f"/{trains}/" not in path:
                assert not jnp.any(x), path
        assert any(jnp.any(x) for p, x in grads.items() if f"/{trains}/" in p)


def test_the_penalty_is_the_squared_slope_at_real_images():
    net, batch = small_gan(), blobs(4)
    params = {"forget": net.init(KEY)}
    plain, paid = (
        synth.GanTerm(net, "forget", "discriminator", "hinge", r1) for r1 in (0.0, 2e2)
    )
    a, b = (t(params, {"forget": batch}, None, KEY)[0].sum for t in (plain, paid))
    judge = net.discriminate
    slope = jax.vmap(
        jax.grad(lambda x: judge(params["forget"]["discriminator"], x[None])[0])
    )(jnp.asarray(batch["image"]))
    assert_allclose(b - a, 100 * jnp.sum(slope**2), rtol=1e-3, atol=1e-6)


def test_generators_learn_the_images_of_their_stream():
    data = blobs()
    split = images.split_class(data, 0)
    streams = {"forget": split.forget, "retain": split.retain}
    net = small_gan(width=16)
    how = dict(batch_size=32, loss="relativistic", r1=1.0, learning_rate=5e-3)
    params, log = synth.fit_gans(net, streams, key=KEY, steps=150, **how)
    assert len(log) == 150 and set(params) == {"forget", "retain"}
    drawn = {
        name: synth.draw_images(
            net.generate,
            params[name]["generator"],
            100,
            latent=8,
            key=KEY,
            batch_size=64,
        )
        for name in streams
    }
    assert drawn["forget"].shape == (100, *SHAPE)
    bright = {k: x.mean(0)[..., 0] for k, x in drawn.items()}
    assert bright["forget"][:2, :2].mean() > 2 * bright["forget"][2:, 2:].mean()
    assert bright["retain"][:2, :2].mean() < bright["retain"][2:, 2:].mean()
    again = synth.draw_images(
        net.generate,
        params["forget"]["generator"],
        100,
        latent=8,
        key=KEY,
        batch_size=64,
    )
    assert_array_equal(again, drawn["forget"])


def test_a_gan_that_diverges_stops_with_the_last_good_networks():
    net, data = small_gan(), {"forget": blobs(32)}
    seen = []

    def keep(state, entry):
        seen.append(jax.device_get(state.params))

    with pytest.raises(synth.Diverged, match="max_loss=3.0 in the last 3") as error:
        synth.fit_gans(
            net,
            data,
            key=KEY,
            steps=400,
            batch_size=16,
            loss="hinge",
            learning_rate=0.5,
            max_loss=3.0,
            patience=3,
            snapshot_every=1,
            hooks=[keep],
        )
    found = error.value
    assert len(found.log) < 400 and found.step == len(found.log) - 3
    good = seen[found.step - 1] if found.step else {"forget": net.init(KEY)}
    jax.tree.map(assert_array_equal, found.params, good)
    broken = net._replace(
        discriminate=lambda *which: net.discriminate(*which) * jnp.nan
    )
    with pytest.raises(synth.Diverged, match="finite losses") as error:
        synth.fit_gans(broken, data, key=KEY, steps=5, batch_size=16)
    assert error.value.step == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(error.value.params))


def test_a_large_loss_at_the_last_step_raises_diverged():
    how = dict(key=KEY, steps=6, batch_size=16, loss="hinge", learning_rate=5.0)
    with pytest.raises(
        synth.Diverged, match=r"max_loss=3.0 in the last [1-6] .*learning_rate"
    ) as error:
        synth.fit_gans(
            small_gan(), {"forget": blobs(32)}, max_loss=3.0, snapshot_every=1, **how
        )
    found = error.value
    assert len(found.log) == 6 and found.step < 6
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.params))


@pytest.mark.parametrize("loss", ["nonsaturating", "hinge", "relativistic"])
def test_right_is_the_accuracy_of_the_discriminator(loss):
    net, batch = small_gan(), blobs(15)
    params = {"forget": net.init(KEY)}
    of = params["forget"]["discriminator"]["Dense_0"]
    of["bias"] = of["bias"] + 3  # the relativistic loss does not depend on it
    judge = partial(net.discriminate, params["forget"]["discriminator"])
    latents = jax.random.normal(KEY, (15, 8))
    real = judge(jnp.asarray(batch["image"]))
    made = judge(net.generate(params["forget"]["generator"], latents))
    wanted = ((real > 0).mean() + (made < 0).mean()) / 2
    if loss == "relativistic":
        wanted = (real > made).mean()
    term = synth.GanTerm(net, "forget", "discriminator", loss, 0.0)
    _, reports = term(params, {"forget": batch}, None, KEY)
    assert_allclose(reports["right"].mean(), wanted, rtol=1e-6)
    assert (wanted == 0.5) == (loss != "relativistic")


@pytest.mark.parametrize("rule", ["reflect", "shift", "random_wrong", "least_likely"])
@pytest.mark.parametrize("classes", [2, 3, 4, 7, 10])
def test_no_label_stays_the_same(rule, classes):
    labels = np.tile(np.arange(classes), 200)
    logits = np.random.default_rng(0).normal(size=(len(labels), classes))
    new = synth.invert_labels(labels, classes, rule=rule, key=KEY, logits=logits)
    assert (new != labels).all() and new.min() >= 0 and new.max() < classes
    again = synth.invert_labels(labels, classes, rule=rule, key=KEY, logits=logits)
    assert_array_equal(new, again)
    if rule == "reflect" and classes % 2 == 0:
        assert_array_equal(new, classes - 1 - labels)
    if rule == "random_wrong":
        assert len(np.unique(new[labels == 0])) == classes - 1


def test_invalid_rules_and_missing_arguments_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'reflect'"):
        synth.invert_labels([0], 2, rule="reflekt")
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        synth.invert_labels([0, 2], 2)
    with pytest.raises(ValueError, match="needs a key"):
        synth.invert_labels([0], 2, rule="random_wrong")
    with pytest.raises(ValueError, match="needs logits"):
        synth.invert_labels([0], 2, rule="least_likely")
    with pytest.raises(ValueError, match="Did you mean 'hinge'"):
        synth.fit_gans(small_gan(), {"a": blobs(8)}, key=KEY, steps=1, loss="hing")


def test_the_mixture_has_every_row_and_wrong_labels_for_forget():
    split = images.split_class(blobs(40), 1)
    drawn = images.table(np.full((6, *SHAPE), 0.5), np.full(6, 1), classes=CLASSES)
    mixed = synth.build_mixture(
        forget=split.forget,
        retain=split.retain,
        drawn_forget=drawn,
        drawn_retain=drawn,
        num_classes=CLASSES,
        rule="shift",
    )
    counts = np.bincount(mixed["source"], minlength=4)
    assert_array_equal(counts, [30, 6, 10, 6])
    labels = images.labels_of(mixed)
    assert_array_equal(labels[:30], images.labels_of(split.retain))
    assert set(labels[30:36]) == {1} and set(labels[36:]) == {2}
    assert_array_equal(mixed["image"][:30], split.retain["image"])
    held = np.tile([3.0, 2.0, 1.0, 0.0], (10, 1))
    logits = {"forget": held, "forget drawn": -held[:6]}
    how = dict(forget=split.forget, retain=split.retain, drawn_forget=drawn)
    how |= dict(num_classes=CLASSES, rule="least_likely")
    mixed = synth.build_mixture(logits=logits, **how)
    assert set(images.labels_of(mixed)[30:40]) == {3}
    assert set(images.labels_of(mixed)[40:]) == {0}
    del logits["forget drawn"]
    with pytest.raises(ValueError, match="needs logits .n, 4. .* got none"):
        synth.build_mixture(logits=logits, **how)


def test_pseudo_labels_are_predictions_without_dropout():
    config = vision.VisionConfig("mlp", shape=SHAPE, classes=CLASSES, width=0.1)
    model = vision.make(config)
    params, data = model.init(KEY), blobs(10)
    found, sure = synth.pseudo_label(model, params, data["image"], batch_size=4)
    logits = model.unembed(params, vision.features(model, params, data))
    assert_array_equal(images.labels_of(found), logits.argmax(1))
    assert_allclose(sure, jax.nn.softmax(logits).max(1), rtol=1e-5)


def test_multi_gan_forgets_a_class_and_retains_the_others():
    data = blobs()
    split = images.split_class(data, 0)
    config = vision.VisionConfig("mlp", shape=SHAPE, classes=CLASSES, width=0.1)
    model = vision.make(config)

    def trained(params, recipe, tables, steps):
        train, rest = trees.split(params, vision.TRAINABLE)
        state = ju.init_state(train, recipe.tx, KEY)
        step = jax.jit(ju.make_step(recipe.terms, recipe.tx), donate_argnums=0)
        loader = table.streams(tables, 32, seed=0)
        state, _ = ju.fit(step, state, loader, ju.Frozen(rest), steps=steps)
        return trees.merge(state.params, rest)

    def accuracy(params, data):
        return evaluate.token_scores(model, params, data).hits.mean()

    term = terms.on_logps(losses.nll, model, "train")
    tx = optax.chain(combine.weighted_sum(), optax.adam(1e-2))
    first = recipes.Recipe({"train": term}, tx)
    params = trained(model.init(KEY), first, {"train": data}, 80)
    assert accuracy(params, data) > 0.98
    net = small_gan(width=16)
    streams = {"forget": split.forget, "retain": split.retain}
    how = dict(batch_size=32, loss="relativistic", r1=1.0, learning_rate=5e-3)
    pairs, _ = synth.fit_gans(net, streams, key=KEY, steps=120, **how)
    drawn = {
        name: synth.pseudo_label(
            model,
            params,
            synth.draw_images(
                net.generate, pairs[name]["generator"], 40, latent=8, key=KEY
            ),
        )[0]
        for name in streams
    }
    mixed = synth.build_mixture(
        forget=split.forget,
        retain=split.retain,
        drawn_forget=drawn["forget"],
        drawn_retain=drawn["retain"],
        num_classes=CLASSES,
        rule="random_wrong",
        key=KEY,
    )
    tune = recipes.finetune.nll(model, learning_rate=1e-2, streams={"mixed": 1.0})
    new = trained(params, tune, {"mixed": mixed}, 60)
    assert accuracy(new, split.forget) < 0.1
    assert accuracy(new, split.retain) > accuracy(params, split.retain) - 0.02
