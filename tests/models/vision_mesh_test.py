# SPDX-License-Identifier: Apache-2.0
"""Image models on a mesh: rows are cut, kernels by rule, and the numbers stay."""

from functools import cache, partial

import jax
import optax
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jaxunlearn as ju
from jaxunlearn import combine, losses, recipes, sharding, terms, trees
from jaxunlearn.models import vision
from tests.models.vision_test import KEY, tiny_images, tiny_net

# Output channels of convolutions over fsdp; the rest, as by default, is not sharded.
CUT = ((r"(begin|middle)/.*/kernel", (None, None, None, "fsdp")),)
ROWS, STREAMS = 16, ("forget", "retain")
# Without optimisation, as the suite compiles, the gradient of a maximum may compare an
# entry with one of other last bits, and one device differs from a mesh.
OPTIMISED = {"xla_backend_optimization_level": 1}


def blur(model):
    recipe = recipes.blur.graddiff(model, gamma=0.1, learning_rate=1e-3)
    return recipe.terms, recipe.tx


def both(model):
    parts = {
        "forget": terms.on_logps(losses.ascent, model, "forget"),
        "retain": terms.on_logps(losses.nll, model, "retain"),
    }
    sums = combine.weighted_sum({"forget": 0.3, "retain": 1.0})
    return parts, optax.chain(sums, optax.adam(1e-3))


def run(method, mesh=None, overrides=()):
    """(state after two steps, params with measured statistics, metrics)."""
    model, params = tiny_net(width=0.125, dropout=0.3)  # four channels at least
    rows = {name: tiny_images(ROWS, seed=i) for i, name in enumerate(STREAMS)}
    parts, tx = method(model)
    fresh, step = partial(ju.init_state, tx=tx), ju.make_step(parts, tx)
    with jax.numpy_dtype_promotion("standard"):
        if mesh is None:
            train, rest = trees.split(params, vision.TRAINABLE)
            state, jitted = fresh(train, key=KEY), jax.jit(step)
        else:
            rules = sharding.override(model.rules, overrides, params)
            params = jax.device_put(params, sharding.by_rules(params, mesh, rules))
            train, rest = trees.split(params, vision.TRAINABLE)
            state = sharding.create(fresh, mesh, rules, train, key=KEY)
            jitted = sharding.jit_step(step, mesh, rules, state)
        frozen = ju.Frozen(rest)
        batches = rows if mesh is None else sharding.put_rows(rows, mesh)
        lowered = jitted.lower(state, batches, frozen)
        jitted = lowered.compile(compiler_options=OPTIMISED)
        for _ in range(2):
            state, metrics = jitted(state, batches, frozen)
        full = trees.merge(state.params, rest)
        batch = rows["retain"] if mesh is None else sharding.put_rows(rows, mesh)
        batch = batch if mesh is None else batch["retain"]
        measured = vision.with_batch_stats(model, full, [batch], KEY)
    return state, measured, metrics


on_one_device = cache(run)


@pytest.mark.parametrize(
    ("method", "sizes", "overrides"),
    [
        (blur, dict(data=8), ()),
        (blur, dict(data=2, fsdp=4), CUT),
        (both, dict(data=2, fsdp=4), CUT),
    ],
)
@pytest.mark.slow
def test_steps_on_a_mesh_equal_those_on_one_device(sizes, overrides, method):
    _, expected, expected_metrics = on_one_device(method)
    mesh = sharding.make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1} | sizes)
    _, params, metrics = run(method, mesh, overrides)
    for name in ("forget/loss", "retain/loss"):
        assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
    jax.tree.map(partial(assert_allclose, rtol=1e-4, atol=5e-5), params, expected)


@pytest.mark.slow
def test_kernels_and_their_moments_are_sharded_by_the_rules():
    mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
    state, _, _ = run(both, mesh, CUT)
    kernels = {
        path: x
        for path, x in trees.paths(state).items()
        if path.endswith("kernel") and x.ndim == 4
    }
    assert len(kernels) % 3 == 0 and len(kernels) >= 9  # params and both moments
    for leaf in kernels.values():
        assert leaf.sharding.spec == P(None, None, None, "fsdp")
        assert leaf.addressable_shards[0].data.shape[-1] == leaf.shape[-1] // 4
