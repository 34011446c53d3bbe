# SPDX-License-Identifier: Apache-2.0
"""Plans on pretend devices: the compiled step is the one that runs; FLOPs; memory."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import pytest

import jaxunlearn as ju
from jaxunlearn import plan, recipes, sharding, trees
from tests import tiny

SETTINGS = dict(width=32, heads=4, kv_heads=4, head_dim=8, hidden=64, vocab=64)
ROWS, LENGTH = 8, 12


def parts(**settings):
    model, params = tiny.tiny_model(**(SETTINGS | settings))
    recipe = recipes.blur.npo(model, gamma=0.1, learning_rate=1e-3)
    streams = {
        name: tiny.tiny_batch(ROWS, LENGTH, seed=seed, vocab=64)
        | {"ref_logps": jnp.zeros(ROWS)}
        for seed, name in enumerate(("forget", "retain"))
    }
    return model, params, recipe, streams


@functools.cache
def report(**settings):
    model, params, recipe, streams = parts(**settings)
    mesh, texts = sharding.make_mesh(fsdp=4, tensor=2), []
    fresh = functools.partial(ju.init_state, tx=recipe.tx)
    shards = sharding.by_rules(params, mesh, model.rules)
    params = jax.device_put(params, shards)
    state = sharding.create(fresh, mesh, model.rules, params, key=jax.random.key(0))
    plain = ju.make_step(recipe.terms, recipe.tx)
    step = sharding.jit_step(plain, mesh, model.rules, state)
    chip = plan.CHIPS["v5e"]._replace(hbm_bytes=64 * 2.0**20)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        made = plan.compile_step(
            step,
            mesh,
            model,
            shaped(state),
            streams,
            terms=recipe.terms,
            chip=chip,
            text_callback=texts.append,
        )
        run = step.lower(state, streams, ju.Frozen()).compile().as_text()
    return made, texts[0], run


def shaped(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def program(text):
    """Its instructions without the places they were written at."""
    lines = (
        line for line in text.splitlines() if line.startswith(("  ", "%", "ENTRY"))
    )
    return [re.sub(r",? ?metadata={[^}]*}", "", line) for line in lines]


def test_the_plan_compiles_the_step_that_runs():
    _, text, run = report()
    assert len(program(text)) > 1000 and program(text) == program(run)


def test_memory_is_counted_and_agrees_with_xla():
    made, _, _ = report()
    kinds = made.memory
    _, params, _, _ = parts()
    full = sum(x.size * 4 for x in jax.tree.leaves(params))
    scales = sum(
        x.size * 4 for p, x in trees.paths(params).items() if p.endswith("scale")
    )
    assert kinds["params"] == (full - scales) / 8 + scales
    assert kinds["gradients"] == 2 * kinds["params"]
    counted = sum(kinds[k] for k in ("params", "optimizer", "frozen", "batch"))
    # Streams hold a column that no term reads, which XLA drops from the arguments.
    assert counted - kinds["batch"] < made.xla["arguments"] <= counted
    assert made.xla["aliased"] >= 0.99 * (kinds["params"] + kinds["optimizer"])
    assert made.peak == sum(made.xla.values()) - 2 * made.xla["aliased"]
    assert made.fits and made.hbm == 64 * 2**20


def test_times_and_mfu_follow_from_the_counts():
    made, _, _ = report()
    chip = plan.CHIPS["v5e"]
    seconds = made.seconds
    assert seconds["compute"] == made.hardware_flops / (8 * chip.flops)
    sent = sum(each.bytes for each in made.collectives.values())
    assert sent > 0 and seconds["ici"] == sent / chip.ici_rate
    bounds = [seconds[k] for k in ("compute", "hbm", "ici")]
    assert seconds["serial"] == sum(bounds) and seconds["overlapped"] == max(bounds)
    low, high = made.mfu
    best = made.model_flops / (8 * chip.flops)
    assert low == pytest.approx(best / seconds["serial"])
    assert high == pytest.approx(best / seconds["overlapped"])


def test_model_flops_by_hand():
    model, params, recipe, streams = parts()
    v, d, f, n = 64, 32, 64, 3
    kernels = n * (4 * d * d + 3 * d * f) + d * v
    scores = 4 * d * n * LENGTH * (LENGTH + 1) / 2
    full = plan.model_flops(model, params, None, recipe.terms, streams)
    assert full == 2 * ROWS * (LENGTH * 6 * kernels + 3 * scores)
    train, rest = trees.split(params, "blocks/mlp/down/kernel")
    some = plan.model_flops(model, train, rest, recipe.terms, streams)
    assert full - some == 2 * ROWS * LENGTH * 2 * (kernels - n * d * f)


def test_dot_flops_count_loops_and_ignore_unused_code():
    def f(x, kernels):
        wasted = x @ x.T
        y = jax.lax.scan(lambda x, k: (x @ k, wasted.sum()), x, kernels)[0]
        return jax.lax.cond(y.sum() > 0, lambda: y @ kernels[0], lambda: y)

    jaxpr = jax.make_jaxpr(f)(jnp.ones((4, 8)), jnp.ones((5, 8, 8)))
    assert plan.dot_flops(jaxpr) == 6 * 2 * 4 * 8 * 8


@pytest.mark.slow
def test_recomputation_is_hardware_flops_only():
    none, full = report(remat="none")[0], report(remat="full")[0]
    assert none.model_flops == full.model_flops
    assert 1.15 < full.hardware_flops / none.hardware_flops < 1.4


def test_unknown_topologies_are_errors():
    with pytest.raises(ValueError, match="such as 'v5p:4x4x4'.*got 'v5p-128'"):
        plan.topology_devices("v5p-128")
    with pytest.raises(ValueError, match="got chip='v5x'. Did you mean"):
        plan.topology_devices("v5x:2x2")
    with pytest.raises(ValueError, match="8 CPU devices.*got 'cpu:9'"):
        plan.topology_devices("cpu:9")
    with pytest.raises(NotImplementedError, match="h100:8"):
        plan.topology_devices("h100:8")
    assert len(plan.topology_devices("cpu:4")) == 4


@pytest.mark.parametrize(
    ("kind", "count", "tflops"),
    [
        ("NVIDIA H200", 1, 989),
        ("NVIDIA H100 80GB HBM3", 8, 8 * 989),
        ("NVIDIA A100-SXM4-80GB", 1, 312),
        ("TPU v5 lite", 4, 4 * 197),
        ("TPU v5p", 4, 4 * 459),
        ("TPU v6 lite", 1, 918),
        ("cpu", 8, None),
    ],
)
def test_peaks_are_known_by_the_kind_of_a_device(kind, count, tflops):
    devices = [types.SimpleNamespace(device_kind=kind, id=i) for i in range(count)]
    found = plan.peak_flops(devices)
    assert found == (None if tflops is None else tflops * 1e12)


def test_two_cores_of_a_v4_chip_share_its_peak():
    cores = [
        types.SimpleNamespace(device_kind="TPU v4", id=i, coords=(i // 2, 0, 0))
        for i in range(8)
    ]
    assert plan.peak_flops(cores) == 4 * 275e12
