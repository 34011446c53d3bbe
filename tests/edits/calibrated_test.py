# SPDX-License-Identifier: Apache-2.0
"""GPTQ, AWQ and LLM.int8, compared with direct implementations and plain rounding."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import edits, sharding, trees
from jaxunlearn.models import decoder
from jaxunlearn.typing import Model, Outputs, Site
from tests import tiny

pytestmark = pytest.mark.slow  # nearly every test compiles a model

UP = "blocks/up/kernel"
WIDE = dict(width=32, hidden=64, heads=4, kv_heads=2, head_dim=8, layers=2)


def reading(x):
    """(a model with one kernel that reads x [tokens, in], its batch)."""
    x = jnp.asarray(x, jnp.float32)

    def apply(params, batch, *, taps, until):
        return Outputs(None, {"up": x[batch["tokens"]][None]})

    site = Site(x.shape[1], 1, readers=(UP,))
    tokens = jnp.arange(len(x))[None]
    batch = {"tokens": tokens, "mask": jnp.ones_like(tokens, jnp.bool_)}
    return Model(None, apply, None, {"up": site}), [batch]


def params_of(w):
    return {"blocks": {"up": {"kernel": jnp.asarray(w, jnp.float32)[None]}}}


def one(params):
    return np.asarray(params["blocks"]["up"]["kernel"][0])


def correlated(rows, inputs, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs))


def calibration():
    return [tiny.tiny_batch(8, 24, seed=seed, answer=False) for seed in (0, 1)]


def output_errors(params, new, inputs, model):
    """||(W' - W)^T X|| of each layer of each kernel."""
    errors = {}
    for name, site in model.sites.items():
        for path in site.readers:
            gap = np.asarray(trees.paths(new)[path] - trees.paths(params)[path])
            gram = np.asarray(inputs[name].gram)
            errors[path] = np.einsum("nio,nij,njo->n", gap, gram, gap)
    return errors


def test_inputs_are_summed_over_real_tokens_of_all_batches():
    model, params = tiny.tiny_model()
    batches = calibration()
    got = edits.collect_inputs(model, params, batches, layers=(1, 2))
    readers = [path for site in model.sites.values() for path in site.readers]
    kernels = [path for path in trees.paths(params) if "kernel" in path]
    assert sorted([*readers, "unembed/kernel"]) == sorted(kernels)
    layers = dict.fromkeys(model.sites, (1, 2))
    apply = jax.jit(lambda params, batch: model.apply(params, batch, taps=layers).taps)
    taps = [jax.tree.map(np.asarray, apply(params, b)) for b in batches]
    for name, site in model.sites.items():
        if not site.readers:
            assert name not in got
            continue
        rows = [
            tapped[name][:, b["mask"]] for tapped, b in zip(taps, batches, strict=True)
        ]
        x = np.concatenate(rows, axis=1)
        assert x.shape[2] == site.units
        gram = np.einsum("nri,nrj->nij", x, x)
        assert_allclose(got[name].gram, gram, rtol=1e-4, atol=1e-3)
        assert_allclose(got[name].mean, np.abs(x).mean(1), rtol=1e-4)
        assert_allclose(got[name].largest, np.abs(x).max(1), rtol=1e-5)


def test_gptq_by_hand():
    # Inputs 0 and 1 are equal, 2 is orthogonal: 1 compensates for 0, 2 does not.
    model, batch = reading([[1, 1, 0], [0, 0, 1], [2, 2, 0], [0, 0, -3]])
    w = np.array([[0.4], [2.3], [7.0]])  # one scale, 1
    new = edits.gptq(model, params_of(w), batch, damping=1e-6)
    assert_allclose(one(new)[:, 0], [0.0, 3.0, 7.0], rtol=1e-5)
    plain = edits.quantize(params_of(w))
    assert_allclose(one(plain)[:, 0], [0.0, 2.0, 7.0], rtol=1e-5)


def slow_gptq(w, x, largest, damping=0.01):
    """Optimal brain surgery in float64, with a new inverse for every input."""
    hessian = 2 * x.T @ x
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    w, scale = w.copy(), np.abs(w).max(0) / largest
    for j in range(len(w)):
        inverse = np.linalg.inv(hessian[j:, j:])
        q = scale * np.clip(np.round(w[j] / scale), -largest - 1, largest)
        w[j:] -= inverse[:, :1] * (w[j] - q) / inverse[0, 0]
        w[j] = q
    return w


@pytest.mark.parametrize("kind, largest", [("int4", 7), ("int3", 3)])
@pytest.mark.parametrize("inputs", [24, 160])  # within one block of 128, and in two
def test_gptq_equals_a_direct_implementation(kind, largest, inputs):
    x = correlated(3 * inputs, inputs)
    w = np.random.default_rng(1).normal(size=(inputs, 5))
    model, batch = reading(x)
    new = one(edits.gptq(model, params_of(w), batch, kind))
    slow = slow_gptq(w, x, largest)
    # In float32 a weight near a midpoint may get the other code, and all later ones
    # differ. This is rare among columns, and the total errors are similar.
    same = np.isclose(new, slow, rtol=1e-3, atol=1e-3).all(0)
    assert same.mean() >= 0.6, same
    errors = [np.linalg.norm(x @ (v - w)) for v in (new, slow)]
    assert_allclose(*errors, rtol=0.05)


@pytest.mark.parametrize("group", ["tensor", "channel", 8])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_gptq_of_uncorrelated_inputs_is_plain_rounding(group, scheme):
    model, batch = reading(np.diag(np.arange(1, 25)))
    params = params_of(np.random.default_rng(0).normal(size=(24, 6)))
    settings = dict(group=group, scheme=scheme)
    new = edits.gptq(model, params, batch, "int3", **settings)
    assert_array_equal(one(new), one(edits.quantize(params, "int3", **settings)))


@pytest.mark.parametrize("group", ["channel", 8])
@pytest.mark.parametrize("kind", ["int4", "int3"])
def test_gptq_does_not_change_a_model_on_its_grid(kind, group):
    model, params = tiny.tiny_model(**WIDE)
    once = edits.quantize(params, kind, group=group)
    twice = edits.gptq(model, once, calibration(), kind, group=group)
    jax.tree.map(assert_array_equal, twice, once)


def test_gptq_rounds_weights_of_inputs_never_seen():
    model, batch = reading(correlated(30, 8) * (np.arange(8) != 3))
    params = params_of(np.random.default_rng(0).normal(size=(8, 6)))
    new = one(edits.gptq(model, params, batch))
    assert_array_equal(new[3], one(edits.quantize(params))[3])


@pytest.mark.parametrize("group", ["channel", 16])
@pytest.mark.parametrize("kind", ["int4", "int3"])
def test_gptq_beats_rounding_on_every_linear_layer(kind, group):
    model, params = tiny.tiny_model(**WIDE)
    batches = calibration()
    inputs = edits.collect_inputs(model, params, batches)
    measured = partial(output_errors, params, inputs=inputs, model=model)
    plain = measured(edits.quantize(params, kind, group=group))
    ours = measured(edits.gptq(model, params, batches, kind, group=group))
    assert len(plain) == 7
    for path in plain:
        assert (ours[path] < plain[path]).all(), (path, ours[path], plain[path])


def test_one_layer_per_pass_uses_the_quantized_layers_before_it():
    model, params = tiny.tiny_model(**WIDE)
    batches = calibration()
    edit = partial(
        edits.gptq, model, batches=batches, kind="int3", pattern=r"blocks/mlp/.*/kernel"
    )
    each = edit(params, layers_per_pass=1)
    both = edit(params)

    def first_of(a, b):  # layer 0 of a, layer 1 of b
        def leaf(path, x, y):
            return jnp.stack([x[0], y[1]]) if path.startswith("blocks") else x

        return trees.map_with_path(leaf, a, b)

    after = edit(first_of(both, params))
    jax.tree.map(
        partial(assert_allclose, rtol=1e-3, atol=1e-5), each, first_of(both, after)
    )
    kernel = "blocks/mlp/down/kernel"
    assert not np.allclose(trees.paths(each)[kernel], trees.paths(both)[kernel])


def test_awq_scales_up_weights_of_large_inputs():
    x = np.random.default_rng(0).normal(size=(256, 64))
    x[:, :4] *= 30
    w = np.random.default_rng(1).normal(size=(64, 32))
    model, batch = reading(x)
    new = edits.awq(model, params_of(w), batch)
    plain = edits.quantize(params_of(w), scheme="asymmetric")
    ours, theirs = (np.linalg.norm(x @ (one(p) - w)) for p in (new, plain))
    assert ours < 0.7 * theirs


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", ["channel", 16])
def test_awq_is_never_worse_than_rounding_by_its_measure(group, scheme):
    model, params = tiny.tiny_model(**WIDE)
    batches = calibration()
    inputs = edits.collect_inputs(model, params, batches)
    settings = dict(kind="int3", group=group, scheme=scheme)
    measured = partial(output_errors, params, inputs=inputs, model=model)
    ours = measured(edits.awq(model, params, batches, **settings))
    plain = measured(edits.quantize(params, **settings))
    better = 0
    for site in model.sites.values():
        if site.readers:
            a, b = (sum(e[path] for path in site.readers) for e in (ours, plain))
            assert (a <= b * (1 + 1e-4)).all(), (site, a, b)
            better += (a < 0.99 * b).sum()
    assert better >= 4  # of 8


def test_awq_without_a_search_is_plain_rounding():
    model, params = tiny.tiny_model(**WIDE)
    new = edits.awq(model, params, calibration(), "int3", group=16, steps=1)
    plain = edits.quantize(params, "int3", group=16, scheme="asymmetric")
    jax.tree.map(assert_array_equal, new, plain)


def test_llm_int8_keeps_the_weights_of_outliers():
    x = np.random.default_rng(0).uniform(-1, 1, size=(64, 8))
    x[5, 2], x[9, 6] = 6.0, -7.0  # one token makes an outlier
    x[3, 4] = 5.9
    w = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    w[2] *= 100  # would change every scale
    model, batch = reading(x)
    new = one(edits.llm_int8(model, params_of(w), batch))
    kept = np.isin(np.arange(8), (2, 6))
    assert_array_equal(new[kept], w[kept])
    rest = np.where(kept[:, None], 0, w)
    assert_array_equal(new[~kept], one(edits.quantize(params_of(rest), "int8"))[~kept])
    assert not np.array_equal(new[~kept], w[~kept])
    none = edits.llm_int8(model, params_of(w), batch, threshold=10.0)
    assert_array_equal(one(none), one(edits.quantize(params_of(w), "int8")))


EDITS = {
    "gptq": partial(edits.gptq, kind="int4", group=8),
    "awq": partial(edits.awq, kind="int4", group=8),
    "llm_int8": partial(edits.llm_int8, threshold=2.0),
}


@pytest.mark.parametrize("name", EDITS)
def test_only_linear_kernels_change_and_dtypes_do_not(name):
    model, params = tiny.tiny_model()
    half = trees.map_with_path(
        lambda p, x: x.astype(jnp.bfloat16) if p.endswith("kernel") else x, params
    )
    new = EDITS[name](model, half, calibration())
    for path, x in trees.paths(half).items():
        y = trees.paths(new)[path]
        linear = path.startswith("blocks/") and path.endswith("/kernel")
        assert y.dtype == x.dtype and np.array_equal(x, y) is not linear, path
    last = EDITS[name](model, params, calibration(), pattern=r".*/down/kernel")
    changed = {
        p for p, x in trees.paths(params).items() if trees.paths(last)[p] is not x
    }
    assert changed == {"blocks/mlp/down/kernel"}


@pytest.mark.parametrize("name", EDITS)
def test_jit_equals_eager(name):
    model, params = tiny.tiny_model()
    edit = partial(EDITS[name], model, batches=calibration())
    jax.tree.map(
        partial(assert_allclose, rtol=1e-4, atol=1e-6),
        jax.jit(edit)(params),
        edit(params),
    )


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.slow
def test_sharded_leaves_give_the_values_of_one_device_and_keep_their_sharding(name):
    model, params = tiny.tiny_model(**WIDE)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    cut = jax.device_put(params, sharding.by_rules(params, mesh, decoder.RULES))
    batches = calibration()
    whole = EDITS[name](model, params, batches)
    new = EDITS[name](model, cut, [sharding.put_rows(b, mesh) for b in batches])
    for path, x in trees.paths(whole).items():
        y = trees.paths(new)[path]
        place = trees.paths(cut)[path].sharding
        assert y.sharding.is_equivalent_to(place, y.ndim)
        # Another order of summation may change a weight at a midpoint and later ones.
        assert np.isclose(x, y, rtol=1e-3, atol=1e-5).mean() > 0.97, path


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_donated_leaves_are_freed_and_others_are_not(name):
    model, params = tiny.tiny_model()
    kept = jax.tree.map(jnp.copy, params)
    run = partial(getattr(edits, name), model, batches=calibration(), layers_per_pass=2)
    new = run(params=params)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    same = run(params=kept, donate=True)
    for path, x in trees.paths(kept).items():
        assert x.is_deleted() == bool(re.fullmatch(r"blocks/.*/kernel", path)), path
        assert jnp.array_equal(trees.paths(same)[path], trees.paths(new)[path]), path


def test_invalid_arguments_are_refused():
    model, params = tiny.tiny_model()
    batches = calibration()
    refused = partial(pytest.raises, ValueError)
    with refused(match="gptq needs kind to be one of 'int8', .* got kind='nf4'"):
        edits.gptq(model, params, batches, "nf4")
    with refused(match="awq needs a group that divides .* group=7 and 'blocks/att"):
        edits.awq(model, params, batches, group=7)
    with refused(match="gptq needs a pattern .* got 'unembed/kernel'"):
        edits.gptq(model, params, batches, pattern=".*/kernel")
    with refused(match="got sites 'attention_in', .* and 0 batches. Use models.make"):
        edits.llm_int8(model, params, [])
    with refused(match="got sites nothing and 2 batches"):
        edits.collect_inputs(model._replace(sites={}), params, batches)
    few = [tiny.tiny_batch(1, 12, answer=False)]
    for edit in (edits.gptq, edits.awq):
        with refused(match=r"at least as many .* 12 tokens .* Pass more rows"):
            edit(model, params, few)
    blank = [few[0] | {"mask": jnp.zeros_like(few[0]["mask"])}]
    for edit in (edits.gptq, edits.awq, edits.llm_int8):
        with refused(match="1 batches whose mask is False"):
            edit(model, params, blank)
    with refused(match="damping > 0"):
        edits.gptq(model, params, batches, damping=0.0)
    nan = jax.tree.map(lambda x: x * jnp.nan, params["embed"])
    for edit in (edits.gptq, edits.awq, edits.llm_int8):
        with refused(match="needs finite inputs, .* the site 'attention'"):
            edit(model, params | {"embed": nan}, batches)
