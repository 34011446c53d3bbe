# SPDX-License-Identifier: Apache-2.0
"""Activity of units compared with NumPy, on a mesh, and Fisher information."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import edits, losses, sharding, stats, terms, trees
from jaxunlearn.models import decoder
from jaxunlearn.typing import Frozen, Model, Outputs, Site
from tests import tiny


def showing(values):
    """A model whose site `units` has values [tokens, units]; row i is for token i."""
    values = jnp.asarray(values, jnp.float32)

    def apply(params, batch, *, taps):
        return Outputs(None, {"units": values[batch["tokens"]][None]})

    return Model(None, apply, None, {"units": Site(values.shape[1], 1)})


def row(tokens, real=None):
    tokens = jnp.asarray(tokens)[None]
    mask = jnp.ones(tokens.shape, bool) if real is None else jnp.asarray(real)[None]
    return {"tokens": tokens, "mask": mask}


def by_name(z):
    """The statistics of [..., tokens, units] by their definitions."""
    mean = z.mean(-2)
    return {
        "mean": mean,
        "abs": np.abs(z).mean(-2),
        "rms": np.sqrt((z**2).mean(-2)),
        "freq": (z > 0).mean(-2),
        "std": z.std(-2),
    }


def assert_same(found, wanted, **tolerance):
    for name, x in wanted.items():
        assert_allclose(getattr(found, name), x, err_msg=name, **tolerance)


def test_a_hand_computed_value():
    model = showing([[3.0], [-1.0], [0.0], [np.nan]])
    found = stats.activity(
        model, {}, [row([0, 1, 2, 3], [True, True, True, False])], ["units"]
    )["units"]
    assert found.count == 3
    assert_allclose(found.mean, [[2 / 3]], rtol=1e-6)
    assert_allclose(found.abs, [[4 / 3]], rtol=1e-6)
    assert_allclose(found.rms, [[np.sqrt(10 / 3)]], rtol=1e-6)
    assert_allclose(found.freq, [[1 / 3]], rtol=1e-6)
    assert_allclose(found.std, [[np.sqrt(26) / 3]], rtol=1e-6)


def test_the_result_does_not_depend_on_the_batches():
    z = np.random.default_rng(0).normal(size=(60, 5)) + np.arange(5)
    model = showing(z)
    cuts = [0, 1, 4, 20, 21, 40, 52, 60]
    pieces = (row(np.arange(a, b)) for a, b in zip(cuts, cuts[1:], strict=False))
    found = stats.activity(model, {}, pieces, ["units"])["units"]
    assert found.count == 60
    assert_same(found, by_name(z[None]), rtol=2e-6)


def test_a_small_variance_far_from_zero_is_accurate():
    z = 1000 + np.random.default_rng(0).normal(size=(64, 3))
    z = z.astype(np.float32).astype(np.float64)
    pieces = [row(np.arange(a, a + 8)) for a in range(0, 64, 8)]
    found = stats.activity(showing(z), {}, pieces, ["units"])["units"]
    assert_allclose(found.std, z.std(0)[None], rtol=1e-3)


@pytest.mark.parametrize("gated", [True, False])
def test_the_statistics_are_those_of_taps_at_real_tokens(gated):
    model, params = tiny.tiny_model(gated=gated)
    batches = [tiny.tiny_batch(seed=seed, answer=False) for seed in (0, 1)]
    found = stats.activity(model, params, batches, ("mlp", "attention"))

    @jax.jit
    def taps(params, batch):
        layers = dict.fromkeys(("mlp", "attention"), (0, 1, 2))
        return model.apply(params, batch, taps=layers).taps

    for name in ("mlp", "attention"):
        z = [
            np.asarray(taps(params, b)[name])[:, np.asarray(b["mask"])] for b in batches
        ]
        wanted = by_name(np.concatenate(z, axis=1).astype(np.float64))
        assert_same(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_a_mesh_gives_the_values_of_one_device():
    model, params = tiny.tiny_model()
    batches = [tiny.tiny_batch(8, seed=seed, answer=False) for seed in (0, 1)]
    wanted = stats.activity(model, params, batches)["mlp"]
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    cut = jax.device_put(params, sharding.by_rules(params, mesh, decoder.RULES))
    found = stats.activity(model, cut, batches, mesh=mesh)["mlp"]
    assert found.count == wanted.count
    assert_same(found, wanted._asdict(), rtol=1e-5, atol=1e-6)


def test_pooled_is_over_all_heads_that_share_a_unit():
    z = np.random.default_rng(0).normal(size=(50, 12)) + np.arange(12)
    site = Site(12, 1, grouping=(2, 3))  # units (group, head, place): 2 x 2 x 3
    found = stats.activity(showing(z), {}, [row(np.arange(50))], ["units"])["units"]
    shared = z.reshape(50, 2, 2, 3).transpose(0, 2, 1, 3).reshape(100, 6)
    pooled = stats.pooled(found, site)
    assert pooled.count == 100
    assert_same(pooled, by_name(shared[None]), rtol=1e-5)
    alone = stats.pooled(found, Site(12, 1, grouping=(1, 3)))
    assert_same(alone, found._asdict(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(1, 8\), .* got \(1, 12\)"):
        stats.pooled(found, Site(8, 1))


@pytest.mark.parametrize("batches", [[], [row([0, 0], [False, False])]])
def test_batches_without_real_tokens_are_refused(batches):
    with pytest.raises(ValueError, match="at least one real token"):
        stats.activity(showing(np.ones((1, 2))), {}, batches, ["units"])


def test_a_site_that_does_not_exist_is_named():
    model, params = tiny.tiny_model()
    with pytest.raises(ValueError, match="site='mpl'.*Did you mean 'mlp'"):
        stats.activity(model, params, [], ["mpl"])


def test_sixty_four_bits_change_nothing():
    z = np.random.default_rng(0).normal(size=(12, 3))
    pieces = [row(np.arange(6)), row(np.arange(6, 12))]
    with jax.enable_x64(True):
        found = stats.activity(showing(z), {}, pieces, ["units"])["units"]
    assert {x.dtype.name for x in found} == {"int32", "float32"}
    assert_same(found, by_name(z[None]), rtol=2e-6)


def fisher_of(params, batches, **kwargs):
    model, _ = tiny.tiny_model()
    term = terms.on_logps(losses.nll, model, "forget")
    streams = [{"forget": batch} for batch in batches]
    return term, stats.fisher(term, params, streams, jax.random.key(0), **kwargs)


def test_fisher_is_the_mean_of_each_rows_squared_gradient():
    _, params = tiny.tiny_model()
    batches = [tiny.tiny_batch(seed=seed) for seed in (0, 1)]
    batches[1]["answer"] = batches[1]["answer"].at[2].set(False)  # counts nothing
    term, found = fisher_of(params, batches)

    @jax.jit
    @jax.grad
    def gradient(params, piece):
        return term(params, {"forget": piece}, None, jax.random.key(0))[0].mean().sum()

    rows = [{k: x[i : i + 1] for k, x in b.items()} for b in batches for i in range(4)]
    grads = [gradient(params, piece) for n, piece in enumerate(rows) if n != 6]
    wanted = jax.tree.map(lambda *g: sum(np.square(x) for x in g) / 7, *grads)
    for path, x in trees.paths(found).items():
        scale = np.abs(trees.paths(wanted)[path]).max()
        assert_allclose(x, trees.paths(wanted)[path], atol=1e-5 * scale, err_msg=path)


@pytest.mark.slow
def test_fisher_on_a_mesh_equals_that_on_one_device():
    _, params = tiny.tiny_model()
    batches = [tiny.tiny_batch(8, seed=seed) for seed in (0, 1)]
    _, wanted = fisher_of(params, batches, microbatch_size=4)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    cut = jax.device_put(params, sharding.by_rules(params, mesh, decoder.RULES))
    _, found = fisher_of(cut, batches, microbatch_size=4, mesh=mesh)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


@pytest.mark.slow
def test_dampening_by_fisher_affects_the_forget_row_most():
    _, params = tiny.tiny_model()
    forget, retain = (tiny.tiny_batch(4, seed=seed) for seed in (0, 1))
    term, f = fisher_of(params, [forget])
    _, d = fisher_of(params, [forget, retain])
    new = edits.dampen(params, forget=f, all_data=d, alpha=1.9)

    @jax.jit
    def loss(params, batch):
        return term(params, {"forget": batch}, None, jax.random.key(0))[0].mean()

    def increase(batch):
        return float(loss(new, batch) - loss(params, batch))

    assert increase(forget) > increase(retain)


def test_fisher_of_bad_batches():
    _, params = tiny.tiny_model()
    batch = tiny.tiny_batch()
    with pytest.raises(ValueError, match="microbatch_size=3 and a batch of 4"):
        fisher_of(params, [batch], microbatch_size=3)
    with pytest.raises(ValueError, match="term counts something, got none"):
        fisher_of(params, [])
    silent = batch | {"answer": jnp.zeros_like(batch["answer"])}
    with pytest.raises(ValueError, match="term counts something, got none"):
        fisher_of(params, [silent])
    term, _ = fisher_of(params, [batch])
    with pytest.raises(KeyError, match="reads stream 'forget', but there is 'x'"):
        stats.fisher(term, params, [{"x": batch}], jax.random.key(0))


def gradient_of(params, batches, frozen=Frozen(), **kwargs):
    model, _ = tiny.bigram_model()
    term = terms.on_logps(losses.nll, model, "forget", reduce="token")
    streams = [{"forget": batch} for batch in batches]
    return stats.gradient(term, params, streams, frozen, **kwargs)


def test_the_gradient_is_that_of_the_mean_over_the_table_in_any_batches():
    model, params = tiny.bigram_model()
    batch = tiny.tiny_batch(rows=6)
    batch["answer"] = batch["answer"].at[4:].set(False)  # the last batch counts nothing

    def mean(params):
        logps, where = terms.target_logps(model, params, batch)
        return -logps.sum() / where.sum().astype(jnp.float32)

    wanted = jax.grad(mean)(params)
    pieces = [{k: x[i : i + 2] for k, x in batch.items()} for i in (0, 2, 4)]
    found = gradient_of(params, iter(pieces))
    jax.tree.map(lambda x, y: assert_allclose(x, y, atol=1e-7), found, wanted)
    kernel, rest = trees.split(params, "kernel")
    part = gradient_of(kernel, pieces, Frozen(rest))
    assert part["embed"] is None
    assert_allclose(part["kernel"], wanted["kernel"], atol=1e-7)


def test_the_gradient_on_a_mesh_equals_that_on_one_device():
    _, params = tiny.bigram_model()
    batches = [tiny.tiny_batch(8, seed=seed) for seed in (0, 1)]
    wanted = gradient_of(params, batches)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    cut = jax.device_put(params, sharding.by_rules(params, mesh, [(".*", ("fsdp",))]))
    found = gradient_of(cut, batches, mesh=mesh)
    jax.tree.map(lambda x, y: assert_allclose(x, y, atol=1e-6), found, wanted)


def test_a_gradient_of_no_rows_is_refused():
    _, params = tiny.bigram_model()
    with pytest.raises(ValueError, match="term counts something, got none"):
        gradient_of(params, [])
