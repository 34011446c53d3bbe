# SPDX-License-Identifier: Apache-2.0
"""Activity of units: against NumPy, in any batches, on a mesh, and of nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import sharding, stats
from jaxunlearn.models import decoder
from jaxunlearn.typing import Model, Outputs, Site
from tests import tiny


def showing(values):
    """A model whose site `units` shows values [tokens, units], a row each token."""
    values = jnp.asarray(values, jnp.float32)

    def apply(params, batch, *, taps):
        return Outputs(None, {"units": values[batch["tokens"]][None]})

    return Model(None, apply, None, {"units": Site(values.shape[1], 1)})


def row(tokens, real=None):
    tokens = jnp.asarray(tokens)[None]
    mask = jnp.ones(tokens.shape, bool) if real is None else jnp.asarray(real)[None]
    return {"tokens": tokens, "mask": mask}


def by_name(z):
    """The statistics by their definitions, of [..., tokens, units]."""
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


def test_a_hand_worked_value():
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


def test_rows_may_be_cut_into_batches_in_any_way():
    z = np.random.default_rng(0).normal(size=(60, 5)) + np.arange(5)
    model = showing(z)
    cuts = [0, 1, 4, 20, 21, 40, 52, 60]
    pieces = (row(np.arange(a, b)) for a, b in zip(cuts, cuts[1:], strict=False))
    found = stats.activity(model, {}, pieces, ["units"])["units"]
    assert found.count == 60
    assert_same(found, by_name(z[None]), rtol=2e-6)


def test_a_small_variance_far_from_zero_is_kept():
    z = 1000 + np.random.default_rng(0).normal(size=(64, 3))
    z = z.astype(np.float32).astype(np.float64)
    pieces = [row(np.arange(a, a + 8)) for a in range(0, 64, 8)]
    found = stats.activity(showing(z), {}, pieces, ["units"])["units"]
    assert_allclose(found.std, z.std(0)[None], rtol=1e-3)


@pytest.mark.parametrize("gated", [True, False])
def test_the_decoders_units_are_what_the_taps_show_of_real_tokens(gated):
    model, params = tiny.tiny_model(gated=gated)
    batches = [tiny.tiny_batch(seed=seed, answer=False) for seed in (0, 1)]
    found = stats.activity(model, params, batches, ("mlp", "attention"))
    for name in ("mlp", "attention"):
        z = [
            np.asarray(model.apply(params, b, taps={name: (0, 1, 2)}).taps[name])[
                :, np.asarray(b["mask"])
            ]
            for b in batches
        ]
        wanted = by_name(np.concatenate(z, axis=1).astype(np.float64))
        assert_same(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_a_mesh_gives_what_one_device_gives():
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
    site = Site(12, 1, repeats=(2, 3))  # units (group, head, place): 2 x 2 x 3
    found = stats.activity(showing(z), {}, [row(np.arange(50))], ["units"])["units"]
    shared = z.reshape(50, 2, 2, 3).transpose(0, 2, 1, 3).reshape(100, 6)
    pooled = stats.pooled(found, site)
    assert pooled.count == 100
    assert_same(pooled, by_name(shared[None]), rtol=1e-5)
    alone = stats.pooled(found, Site(12, 1, repeats=(1, 3)))
    assert_same(alone, found._asdict(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"\(1, 8\), got \(1, 12\)"):
        stats.pooled(found, Site(8, 1))


@pytest.mark.parametrize("batches", [[], [row([0, 0], [False, False])]])
def test_nothing_has_no_statistics(batches):
    with pytest.raises(ValueError, match="at least one real token"):
        stats.activity(showing(np.ones((1, 2))), {}, batches, ["units"])


def test_a_site_that_does_not_exist_is_named():
    model, params = tiny.tiny_model()
    with pytest.raises(ValueError, match="site='mpl'.*Did you mean 'mlp'"):
        stats.activity(model, params, [], ["mpl"])
