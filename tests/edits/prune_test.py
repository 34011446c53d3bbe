# SPDX-License-Identifier: Apache-2.0
"""Selective pruning: selection of units, and that pruning equals masking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import edits, models, sharding, stats, trees, wrap
from jaxunlearn.io import hf
from jaxunlearn.models import decoder
from jaxunlearn.typing import Site
from tests import tiny

BIASED = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
DECODERS = {
    "gated": dict(),
    "gated, biases": BIASED,
    "plain gelu": dict(gated=False, activation="gelu", **BIASED),
    "plain relu, parallel, no groups": dict(
        gated=False, activation="relu", parallel=True, kv_heads=4
    ),
    "norms after, one value head": dict(post_norms=True, kv_heads=1, qk_norm=True),
}
UNITS = {"mlp": 24, "attention": 16}


def some(name, share=0.4, seed=0, units=None):
    """A mask of the site's units in three layers."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.random((3, units or UNITS[name])) < share)


def logits(model, params, edit=None):
    batch = tiny.tiny_batch(answer=False)

    @jax.jit
    def run(params):
        out = model.apply(params, batch, edits=edit or {})
        return model.unembed(params, out.hidden)

    return np.asarray(run(params))[np.asarray(batch["mask"])]


def masked(gone, means=None):
    """An edit of the forward pass that replaces removed units by 0 or a mean."""
    means = jnp.zeros(gone.shape) if means is None else means
    return lambda value, layer: jnp.where(gone[layer], means[layer], value)


@pytest.mark.parametrize("site", UNITS)
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.slow
def test_pruning_is_masking_the_units(name, site):
    model, params = tiny.tiny_model(**DECODERS[name])
    gone = some(site)
    pruned = edits.prune_units(model, params, {site: gone})
    wanted = logits(model, params, {site: masked(gone)})
    assert np.abs(wanted - logits(model, params)).max() > 0.1
    assert_allclose(logits(model, pruned), wanted, atol=1e-5)


def test_two_sites_can_be_pruned_in_one_call():
    model, params = tiny.tiny_model()
    gone = {site: some(site) for site in UNITS}
    wanted = logits(model, params, {site: masked(x) for site, x in gone.items()})
    for prune in (edits.prune_units, jax.jit(edits.prune_units, static_argnums=0)):
        pruned = prune(model, params, gone)
        assert_allclose(logits(model, pruned), wanted, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_shared_value_unit_is_removed_from_all_its_heads(kv_heads):
    model, params = tiny.tiny_model(kv_heads=kv_heads, qkv_bias=True)
    shared = some("attention", units=4 * kv_heads)
    pruned = edits.prune_units(model, params, {"attention": shared})
    each = np.repeat(np.asarray(shared).reshape(3, kv_heads, 1, 4), 4 // kv_heads, 2)
    each = jnp.asarray(each.reshape(3, 16))
    wanted = logits(model, params, {"attention": masked(each)})
    assert_allclose(logits(model, pruned), wanted, atol=1e-5)
    values = pruned["blocks"]["attention"]["v"]
    assert_array_equal(np.asarray(values["bias"] == 0), np.asarray(shared))
    assert_array_equal((np.asarray(values["kernel"]) == 0).all(1), np.asarray(shared))


def test_a_value_that_another_head_reads_is_not_removed():
    model, params = tiny.tiny_model()  # heads 0 and 1 read value head 0
    gone = jnp.zeros((3, 16), bool).at[:, 0].set(True)
    pruned = edits.prune_units(model, params, {"attention": gone})
    v, new = (p["blocks"]["attention"]["v"]["kernel"] for p in (params, pruned))
    assert_array_equal(v, new)


def test_a_removed_unit_is_inactive_and_has_no_gradient():
    model, params = tiny.tiny_model(gated=False, activation="gelu", mlp_bias=True)
    gone = some("mlp")
    pruned = edits.prune_units(model, params, {"mlp": gone})
    batch = tiny.tiny_batch(answer=False)
    found = stats.activity(model, pruned, [batch])["mlp"]
    assert_array_equal(np.asarray(found.abs == 0), np.asarray(gone))

    def loss(params):
        return jnp.sum(jnp.square(model.apply(params, batch).hidden))

    mlp = jax.jit(jax.grad(loss))(pruned)["blocks"]["mlp"]
    dead = np.asarray(gone)
    assert not np.asarray(mlp["up"]["kernel"]).transpose(0, 2, 1)[dead].any()
    assert not np.asarray(mlp["down"]["kernel"])[dead].any()


@pytest.mark.parametrize("site", UNITS)
def test_an_offset_replaces_units_by_their_mean(site):
    model, params = tiny.tiny_model(**DECODERS["plain gelu"])
    means = stats.activity(model, params, [tiny.tiny_batch(answer=False)], (site,))
    means, gone = means[site].mean, some(site)
    pruned = edits.prune_units(model, params, {site: gone}, offset={site: means})
    wanted = logits(model, params, {site: masked(gone, means)})
    assert_allclose(logits(model, pruned), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="needs a bias at .*Leave the offset out"):
        edits.prune_units(*tiny.tiny_model(), {site: gone}, offset={site: means})


def test_lora_of_a_kernel_is_pruned_with_it():
    model, params = tiny.tiny_model(mlp_bias=True)
    model = wrap.lora(model, pattern=r"blocks/mlp/(gate|up|down)/kernel", rank=2)
    params = wrap.add_lora(model, params, jax.random.key(0))
    params = trees.map_with_path(
        lambda path, x: x + 0.1 if path.endswith("lora_b") else x, params
    )
    gone = some("mlp")
    pruned = edits.prune_units(model, params, {"mlp": gone})
    wanted = logits(model, params, {"mlp": masked(gone)})
    assert_allclose(logits(model, pruned), wanted, atol=1e-5)
    with pytest.raises(ValueError, match=r"Merge them first \(wrap.merge_lora\)"):
        edits.prune_units(model, params, {"mlp": gone}, offset={"mlp": gone})


def test_removing_nothing_is_the_identity_and_dtypes_do_not_change():
    model, params = tiny.tiny_model()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    none = {site: jnp.zeros((3, n), bool) for site, n in UNITS.items()}
    pruned = edits.prune_units(model, params, none)
    jax.tree.map(assert_array_equal, pruned, params)
    pruned = edits.prune_units(model, params, {"mlp": some("mlp")})
    assert {x.dtype for x in jax.tree.leaves(pruned)} == {jnp.bfloat16.dtype}


def test_sharding_does_not_change():
    model, params = tiny.tiny_model()
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    cut = jax.device_put(params, sharding.by_rules(params, mesh, decoder.RULES))
    gone = {site: some(site) for site in UNITS}
    wanted, found = (edits.prune_units(model, p, gone) for p in (params, cut))
    jax.tree.map(assert_array_equal, found, wanted)
    for x, y in zip(jax.tree.leaves(cut), jax.tree.leaves(found), strict=True):
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize(
    "name", ["gated, biases", pytest.param("plain gelu", marks=pytest.mark.slow)]
)
def test_smaller_matrices_give_the_same_logits(name):
    model, params = tiny.tiny_model(**DECODERS[name])
    scores = jax.random.uniform(jax.random.key(0), (3, 24))
    gone = {"mlp": edits.select_units(scores, 0.25, per_layer=True)}
    assert_array_equal(gone["mlp"].sum(1), [6, 6, 6])
    small = edits.remove_units(model, params, gone)
    assert small["blocks"]["mlp"]["down"]["kernel"].shape == (3, 18, 16)
    smaller = models.resized(model, small)
    assert smaller.config.hidden == smaller.sites["mlp"].units == 18
    wanted = logits(model, edits.prune_units(model, params, gone))
    assert_allclose(logits(smaller, small), wanted, atol=1e-5)


def test_layers_that_lose_different_counts_are_padded_or_refused():
    model, params = tiny.tiny_model()
    gone = {"mlp": jnp.arange(24)[None] < jnp.array([[3], [9], [5]])}
    with pytest.raises(ValueError, match="3 to 9 of 24 at 'mlp'.*per_layer=True, "):
        edits.remove_units(model, params, gone)
    small = edits.remove_units(model, params, gone, pad=True)
    smaller = models.resized(model, small)
    assert smaller.config.hidden == 21
    wanted = logits(model, params, {"mlp": masked(gone["mlp"])})
    assert_allclose(logits(smaller, small), wanted, atol=1e-5)


def test_a_smaller_model_is_saved_smaller(tmp_path):
    model, params = tiny.tiny_model()
    gone = {"mlp": jnp.tile(jnp.arange(24) % 3 == 0, (3, 1))}
    small = edits.remove_units(model, params, gone)
    smaller = models.resized(model, small)
    hf.save(smaller, small, tmp_path)
    again, loaded, *_ = hf.load(tmp_path)
    assert again.config.hidden == 16
    assert_allclose(logits(again, loaded), logits(smaller, small), atol=1e-6)


def test_units_that_cannot_be_removed_are_refused():
    model, params = tiny.tiny_model()
    with pytest.raises(ValueError, match="'attention'.*Use prune_units"):
        edits.remove_units(model, params, {"attention": some("attention")})
    with pytest.raises(ValueError, match="at least one unit .* 24 of 24"):
        edits.remove_units(model, params, {"mlp": jnp.ones((3, 24), bool)})
    with pytest.raises(ValueError, match="resized needs a model of models.make"):
        models.resized(model._replace(config=None), params)


SITES = [
    (dict(mpl=(3, 24)), ValueError, "site='mpl'.*Did you mean 'mlp'"),
    (dict(block=(3, 16)), ValueError, "got 'block'.* 'attention', 'mlp'"),
    (dict(mlp=(4, 24)), ValueError, r"\(3, 24\) at 'mlp', got \(4, 24\)"),
    (dict(mlp=(3, 23)), ValueError, r"\(3, 24\) at 'mlp', got \(3, 23\)"),
    (dict(attention=(3, 9)), ValueError, r"\(3, 16\) or \(3, 8\) at 'attention'"),
]


@pytest.mark.parametrize(("shapes", "error", "words"), SITES)
def test_sites_layers_and_units_that_do_not_exist(shapes, error, words):
    removed = {site: jnp.ones(shape, bool) for site, shape in shapes.items()}
    with pytest.raises(error, match=words):
        edits.prune_units(*tiny.tiny_model(), removed)


def test_other_bad_arguments_of_pruning():
    model, params = tiny.tiny_model()
    with pytest.raises(TypeError, match="boolean mask at 'mlp', got dtype float32"):
        edits.prune_units(model, params, {"mlp": jnp.ones((3, 24))})
    with pytest.raises(ValueError, match="offset only for sites .* got 'attention'"):
        edits.prune_units(model, params, {}, offset={"attention": some("attention")})
    with pytest.raises(KeyError, match="reads leaves 'blocks/mlp/down/kernel'"):
        edits.prune_units(model, {"blocks": {}}, {"mlp": some("mlp")})
    mismatched = model._replace(
        sites={"mlp": Site(16, 3, "blocks/mlp/down/kernel", axis=0)}
    )
    with pytest.raises(ValueError, match="3 layers and 16 units at 'mlp', got shape"):
        edits.prune_units(mismatched, params, {"mlp": jnp.ones((3, 16), bool)})


def test_a_score_is_forget_over_retain_plus_eps():
    forget = jnp.array([[1.0, 0.01, 2.0]])
    retain = jnp.array([[0.5, 0.0, 0.0]])
    found = edits.unit_scores(forget=forget, retain=retain, eps=0.1)
    assert_allclose(found, [[1 / 0.6, 0.1, 20.0]], rtol=1e-6)
    found = edits.unit_scores(forget=forget, retain=retain, eps=1e-6)
    assert found[0, 1] > 1000 * found[0, 0]
    low = forget.astype(jnp.bfloat16)
    assert edits.unit_scores(forget=low, retain=low).dtype == jnp.float32
    with pytest.raises(ValueError, match="eps > 0"):
        edits.unit_scores(forget=forget, retain=retain, eps=0.0)
    with pytest.raises(ValueError, match="one shape"):
        edits.unit_scores(forget=forget, retain=retain[:, :2])


@pytest.mark.parametrize("wrapper", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_highest_scores_of_all_layers_are_selected(wrapper):
    scores = jnp.array([[5.0, 1.0, 4.0, 0.0], [3.0, 9.0, 2.0, 8.0]])
    found = wrapper(lambda x: edits.select_units(x, 0.5))(scores)
    assert_array_equal(found, [[1, 0, 1, 0], [0, 1, 0, 1]])
    found = wrapper(lambda x: edits.select_units(x, 0.25, per_layer=True))(scores)
    assert_array_equal(found, [[1, 0, 0, 0], [0, 1, 0, 0]])
    found = wrapper(lambda x: edits.select_units(x, 0.25, removed=x > 7.0))(scores)
    assert_array_equal(found, [[1, 0, 1, 0], [0, 1, 0, 1]])


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.0, 0), (1.0, 200), (0.29, 58), (0.004, 0), (0.0149, 2)]
)
def test_fractions_are_rounded_down_to_a_number_of_units(fraction, count):
    scores = jnp.arange(200.0).reshape(2, 100)
    assert edits.select_units(scores, fraction).sum() == count


def test_steps_remove_new_units_until_none_is_left():
    scores = jnp.zeros((2, 50))  # all scores are tied
    gone = None
    for step in range(1, 12):
        gone = edits.select_units(scores, 0.1, removed=gone)
        assert gone.sum() == min(10 * step, 100)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fractions_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\], got fraction="):
        edits.select_units(jnp.ones((2, 3)), fraction)


def test_bad_scores():
    scores = jnp.ones((3, 4)).at[1, 2].set(jnp.nan)
    with pytest.raises(ValueError, match="without NaN, got 1 in layers 1"):
        edits.select_units(scores, 0.5)
    with pytest.raises(ValueError, match=r"\[layers, units\], got shape \(4,\)"):
        edits.select_units(jnp.ones(4), 0.5)
    with pytest.raises(ValueError, match="one shape"):
        edits.select_units(jnp.ones((3, 4)), 0.5, removed=jnp.ones((3, 5), bool))


def test_a_unit_active_only_on_the_forget_set_is_removed_first():
    model, params = tiny.tiny_model(gated=False, activation="relu", mlp_bias=True)
    # Blocks write nothing, and other units are active on every token. Unit 7 of layer 1
    # is active only on token 5, whose embedding has a separate axis.
    embed = params["embed"]["embedding"].at[:, 0].set(0.0).at[5, 0].set(50.0)
    blocks = params["blocks"]
    mlp, o = blocks["mlp"], blocks["attention"]["o"]
    kernel = mlp["up"]["kernel"].at[1, :, 7].set(0.0).at[1, 0, 7].set(5.0)
    bias = (mlp["up"]["bias"] + 1.0).at[1, 7].set(-2.0)
    quiet = jax.tree.map(jnp.zeros_like, {"down": mlp["down"], "o": o})
    mlp = mlp | {"up": {"kernel": kernel, "bias": bias}, "down": quiet["down"]}
    attention = blocks["attention"] | {"o": quiet["o"]}
    params = params | {
        "embed": {"embedding": embed},
        "blocks": {"attention": attention, "mlp": mlp},
    }
    tokens = jnp.full((2, 6), 5), jnp.arange(8, 20).reshape(2, 6)
    forget, retain = (
        stats.activity(model, params, [{"tokens": x, "mask": x >= 0}])["mlp"]
        for x in tokens
    )
    for name in ("abs", "rms", "freq"):
        scores = edits.unit_scores(
            forget=getattr(forget, name), retain=getattr(retain, name)
        )
        gone = edits.select_units(scores, 0.014)  # one of 72
        assert_array_equal(jnp.argwhere(gone), [[1, 7]])
