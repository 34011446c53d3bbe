# SPDX-License-Identifier: Apache-2.0
"""Recipes: defaults, forgetting and retaining, and combined gradients."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from numpy.testing import assert_allclose

import jaxunlearn as ju
from jaxunlearn import combine, losses, recipes, terms, trees
from jaxunlearn.recipes import blur, openunlearning
from tests import tiny

RECIPES = {
    "blur.npo": blur.npo,
    "blur.graddiff": blur.graddiff,
    "ascent": openunlearning.ascent,
    "graddiff": openunlearning.graddiff,
    "npo": openunlearning.npo,
    "simnpo": openunlearning.simnpo,
}
# As documented by the papers' code; lr is the AdamW learning rate.
BLUR = {"gamma": 1.0, "learning_rate": 1e-5, "weight_decay": 0.01, "clip": None}
SUM = {"learning_rate": 1e-5, "weight_decay": 0.0, "clip": 1.0}
WEIGHTS = {"gamma": 1.0, "alpha": 1.0}
RETAIN = {"retain": {"retain": 1.0}}
SORT = RETAIN | {"retain_loss": "nll"}
DEFAULTS = {
    "blur.npo": BLUR | RETAIN | {"beta": 0.1},
    "blur.graddiff": BLUR | RETAIN,
    "ascent": SUM,
    "graddiff": SUM | WEIGHTS | SORT,
    "npo": SUM | WEIGHTS | SORT | {"beta": 0.1},
    "simnpo": SUM | {"gamma": 0.125, "alpha": 1.0, "beta": 4.5, "delta": 0.0} | SORT,
}
FORGETS = [name for name in RECIPES if name != "ascent"]
SLOW = pytest.mark.slow
each = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        yield


@pytest.fixture
def bare(monkeypatch):
    """AdamW out of the way: what reaches it is what tx.update returns."""
    calls = []

    def identity(learning_rate, **kwargs):
        calls.append({"learning_rate": learning_rate} | kwargs)
        return optax.identity()

    monkeypatch.setattr(optax, "adamw", identity)
    return calls


def small():
    return tiny.bigram_model()


def streams():
    forget = tiny.tiny_batch()
    return {
        "forget": forget | {"ref_logps": -jnp.arange(6.0, 10.0)},
        "retain": tiny.tiny_batch(length=9, side="left", seed=1),
        "prose": tiny.tiny_batch(rows=2, length=16, seed=2, answer=False),
    }


def gradient(term, params):
    """Of the term's mean."""

    def mean(params):
        total, _ = term(params, streams(), None, jax.random.key(0))
        return jnp.sum(total.mean())

    return jax.jit(jax.grad(mean))(params)


def run(recipe, steps=10):
    """Log of a few steps, always on one batch."""
    step, state, frozen = recipe.setup(*small())
    return ju.fit(step, state, [streams()] * steps, frozen, steps=steps)


def close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(partial(assert_allclose, rtol=rtol, atol=atol), actual, expected)


@each
def test_defaults_are_the_documented_numbers(name):
    model, *settings = inspect.signature(RECIPES[name]).parameters.values()
    assert model.name == "model"
    assert {p.kind for p in settings} == {inspect.Parameter.KEYWORD_ONLY}
    assert {p.name: p.default for p in settings} == DEFAULTS[name]


@each
def test_settings_reach_adamw_and_every_leaf_trains(name, bare):
    model, params = small()
    recipe = RECIPES[name](model)
    ramp = optax.linear_schedule(0.0, 1e-3, 5)
    RECIPES[name](model, learning_rate=ramp, weight_decay=0.3)
    assert bare[0] == {"eps": 1e-8} | {
        key: DEFAULTS[name][key] for key in ("learning_rate", "weight_decay")
    }
    assert bare[1] == {"learning_rate": ramp, "weight_decay": 0.3, "eps": 1e-8}
    train, rest = trees.split(params, recipe.trainable)
    assert not jax.tree.leaves(rest)
    assert isinstance(recipe, recipes.Recipe)


@each
def test_a_few_steps_forget_and_retain(name):
    model, _ = small()
    # SimNPO hardly pushes what is unlikely already, as everything is in a random model.
    settings = {"gamma": 1.0, "beta": 0.5} if name == "simnpo" else {}
    state, log = run(RECIPES[name](model, learning_rate=1e-3, **settings))
    assert int(state.step) == len(log) == 10
    prefix = "" if name.startswith("blur") else "total/"

    def change(metric):
        return log[-1][prefix + metric] - log[0][prefix + metric]

    assert change("forget/loss") < 0
    assert change("forget/nll") > 0.05
    if name == "ascent":
        assert not any("retain" in metric for metric in log[0])
    else:
        assert change("retain/loss") < 0


# Weighted sums.


def parts(name, model, beta=0.2, delta=0.3):
    """The recipe's terms written apart."""
    forget = {
        "ascent": (losses.ascent, "token"),
        "graddiff": (losses.ascent, "token"),
        "npo": (partial(losses.npo, beta=beta), "sequence"),
        "simnpo": (partial(losses.simnpo, beta=beta, delta=delta), "sequence"),
    }[name]
    retain = {
        stream: terms.on_logps(losses.nll, model, stream, reduce="token")
        for stream in ("retain", "prose")
    }
    term = terms.on_logps(forget[0], model, "forget", reduce=forget[1])
    return {"forget": term} | ({} if name == "ascent" else retain)


@pytest.mark.parametrize("name", ["ascent", "graddiff", "npo", "simnpo"])
def test_the_joint_gradient_is_the_weighted_sum(name, bare):
    model, params = small()
    settings = {
        "ascent": {},
        "graddiff": {"gamma": 0.5, "alpha": 2.0},
        "npo": {"gamma": 0.5, "alpha": 2.0, "beta": 0.2},
        "simnpo": {"gamma": 0.5, "alpha": 2.0, "beta": 0.2, "delta": 0.3},
    }[name]
    weights = {"forget": 1.0}
    if settings:
        settings |= {"retain": {"retain": 1.0, "prose": 0.25}}
        weights = {"forget": 0.5, "retain": 2.0, "prose": 0.5}
    recipe = RECIPES[name](model, clip=None, **settings)
    assert list(recipe.terms) == ["total"]
    grads = {k: gradient(term, params) for k, term in recipe.terms.items()}
    update, _ = recipe.tx.update(grads, recipe.tx.init(params), params)

    apart = {k: gradient(term, params) for k, term in parts(name, model).items()}
    tx = combine.weighted_sum(weights)
    expected, _ = tx.update(apart, tx.init(params))
    close(update, expected)
    assert float(trees.norm(expected)) > 0.1


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("blur.npo", "npo") else pytest.param(name, marks=SLOW)
        for name in RECIPES
    ],
)
def test_a_clip_bounds_the_combined_update(name, bare):
    model, params = small()
    updates = []
    for clip in (None, 0.01):
        recipe = RECIPES[name](model, clip=clip)
        grads = {k: gradient(term, params) for k, term in recipe.terms.items()}
        update, _ = recipe.tx.update(grads, recipe.tx.init(params), params)
        updates.append(update)
    free, clipped = updates
    size = float(trees.norm(free))
    assert size > 0.1
    assert_allclose(trees.norm(clipped), 0.01, rtol=1e-5)
    close(clipped, jax.tree.map(lambda x: x * (0.01 / size), free))


# BLUR.


@pytest.mark.parametrize("gamma", [0.1, 1.0])
@pytest.mark.parametrize("name", ["blur.npo", "blur.graddiff"])
def test_blur_lowers_the_forget_loss_at_rate_gamma(name, gamma, bare):
    model, params = small()
    recipe = RECIPES[name](model, gamma=gamma)
    assert set(recipe.terms) == {"forget", "retain"}
    grads = {k: gradient(term, params) for k, term in recipe.terms.items()}
    u, state = recipe.tx.update(grads, recipe.tx.init(params), params)
    forget, retain = grads["forget"], grads["retain"]
    square = trees.vdot(forget, forget)
    assert_allclose(trees.vdot(u, forget), gamma * square, rtol=1e-4)
    # What remains of the retain gradient is untouched: u = g_r + xi g_f.
    xi = gamma - trees.vdot(retain, forget) / square
    close(u, jax.tree.map(lambda r, f: r + xi * f, retain, forget), 1e-4, 1e-5)
    (stats,) = [s for _, s in optax.tree_utils.tree_get_all_with_path(state, "stats")]
    assert_allclose(stats["xi"], xi, rtol=1e-4)


def test_gamma_may_follow_a_schedule(bare):
    model, params = small()
    recipe = blur.npo(model, gamma=optax.linear_schedule(0.0, 1.0, 4))
    grads = {k: gradient(term, params) for k, term in recipe.terms.items()}
    state, rates = recipe.tx.init(params), []
    square = trees.vdot(grads["forget"], grads["forget"])
    for _ in range(3):
        u, state = recipe.tx.update(grads, state, params)
        rates.append(float(trees.vdot(u, grads["forget"]) / square))
    assert_allclose(rates, [0.0, 0.25, 0.5], atol=1e-4)


@pytest.mark.parametrize(
    "name", ["blur.npo", pytest.param("blur.graddiff", marks=SLOW)]
)
def test_several_retain_streams_are_one_upper_objective(name):
    model, params = small()
    weights = {"retain": 0.5, "prose": 2.0}
    recipe = RECIPES[name](model, retain=weights, learning_rate=1e-3)
    assert recipe.terms["retain"].reads == ("retain", "prose")
    apart = [
        gradient(terms.on_logps(losses.nll, model, k, reduce="token"), params)
        for k in weights
    ]
    expected = jax.tree.map(lambda a, b: 0.5 * a + 2.0 * b, *apart)
    close(gradient(recipe.terms["retain"], params), expected)
    _, log = run(recipe)
    assert log[-1]["forget/nll"] > log[0]["forget/nll"]
    for metric in ("retain/loss", "retain/retain/loss", "retain/prose/loss"):
        assert log[-1][metric] < log[0][metric]
    total = 0.5 * log[0]["retain/retain/loss"] + 2 * log[0]["retain/prose/loss"]
    assert log[0]["retain/loss"] == pytest.approx(total, rel=1e-5)


def test_one_retain_stream_of_another_weight_or_name_is_weighted_too():
    model, params = small()
    plain = gradient(terms.on_logps(losses.nll, model, "prose", reduce="token"), params)
    term = blur.npo(model, retain={"prose": 3.0}).terms["retain"]
    assert term.reads == ("prose",)
    close(gradient(term, params), jax.tree.map(lambda x: 3.0 * x, plain))
    term = blur.npo(model, retain={"prose": 1.0}).terms["retain"]
    close(gradient(term, params), plain)


@pytest.mark.parametrize("name", FORGETS)
def test_no_step_changes_the_default_streams(name):
    # Mappings as defaults are shared by every call.
    default = inspect.signature(RECIPES[name]).parameters["retain"].default
    with pytest.raises(TypeError):
        default["more"] = 1.0


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("name", ["rmu.wmdp", "blur.rmu"])
def test_the_steps_of_rmu_are_those_of_its_authors_optimizer(name, size):
    """AdamW with eps 1e-6; gradients of 4096 units' mean are about as small."""
    model, params = tiny.tiny_model(layers=1, remat="none")
    make = {"rmu.wmdp": recipes.rmu.wmdp, "blur.rmu": blur.rmu}[name]
    recipe = make(model, layers=(0,))
    train, _ = trees.split(params, recipe.trainable)
    draw = [
        jax.tree.map(lambda x, f=f: size * f(7.0 * jnp.cumsum(x, axis=-1)), train)
        for f in (jnp.sin, jnp.cos)
    ]
    adamw = optax.adamw(5e-5, eps=1e-6, weight_decay=0.0)
    if name == "rmu.wmdp":
        grads = {"total": draw[0]}
        theirs = draw[0]
    else:
        grads = dict(zip(("forget", "retain"), draw, strict=True))
        f, r = draw
        part = trees.vdot(r, f) / trees.vdot(f, f)
        theirs = jax.tree.map(lambda f, r: f + 800.0 * (r - part * f), f, r)
    wanted, _ = adamw.update(theirs, adamw.init(train), train)
    found, _ = recipe.tx.update(grads, recipe.tx.init(train), train)
    close(found, wanted, rtol=1e-3, atol=1e-9)


# Errors.


def test_wrong_settings_are_errors():
    model, _ = small()
    for make in (blur.npo, openunlearning.npo, openunlearning.simnpo):
        with pytest.raises(ValueError, match="beta > 0"):
            run(make(model, beta=-0.1), steps=1)
    for make in (blur.npo, blur.graddiff):
        with pytest.raises(ValueError, match="gamma >= 0, got gamma=-1"):
            make(model, gamma=-1.0)
        with pytest.raises(ValueError, match="at least one"):
            make(model, retain={})
    for make in (openunlearning.npo, openunlearning.graddiff):
        with pytest.raises(ValueError, match="finite"):
            make(model, gamma=float("nan"))


def test_a_loader_without_the_reference_column_is_an_error():
    model, _ = small()
    recipe = blur.npo(model)
    _, params = small()
    state = ju.init_state(params, recipe.tx, jax.random.key(0))
    data = streams()
    del data["forget"]["ref_logps"]
    with pytest.raises(KeyError, match="'ref_logps'.*evaluate.reference_logps"):
        ju.make_step(recipe.terms, recipe.tx)(state, data, ju.Frozen())


@each
def test_no_recipe_needs_a_second_model(name):
    model, _ = small()
    assert not any(term.needs_ref for term in RECIPES[name](model).terms.values())


@pytest.mark.parametrize("forget", ["npo", "graddiff"])
@pytest.mark.parametrize("retain, needs_ref", [("nll", False), ("kl", True)])
def test_sure_takes_either_retain_loss(forget, retain, needs_ref):
    model, _ = tiny.tiny_model()
    made = getattr(recipes.sure, forget)(model, retain_loss=retain)
    assert made.terms["retain"].needs_ref == needs_ref
    assert not made.terms["forget"].needs_ref
    with pytest.raises(ValueError, match="retain_loss to be one of 'nll', 'kl'"):
        getattr(recipes.sure, forget)(model, retain_loss="js")


def test_sure_as_released_applies_npo_to_raw_logits():
    model, params = small()
    batch, key = {"forget": tiny.tiny_batch(2, 8)}, jax.random.key(0)
    term = recipes.sure.npo(model, compat="released").terms["forget"]
    ref = jax.tree.map(lambda x: 0.9 * x, params)
    total, _ = term(params, batch, ref, key)
    logits, ref_logits = (
        model.unembed(p, model.apply(p, batch["forget"]).hidden)[:, :-1]
        for p in (params, ref)
    )
    where = terms.target_logps(model, params, batch["forget"])[1]
    direct = losses.npo_logits(logits, ref_logits, beta=0.1, where=where[:, -7:])
    assert_allclose(total.sum, direct.sum(), rtol=1e-5)
