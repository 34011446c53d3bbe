# SPDX-License-Identifier: Apache-2.0
"""A decoder with mixtures of experts: padding, sites, edits, LoRA, metrics, meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import jaxunlearn as ju
from jaxunlearn import (
    combine,
    edits,
    losses,
    models,
    plan,
    sharding,
    terms,
    trees,
    wrap,
)
from jaxunlearn.models import _experts

ROWS, LENGTH, VOCAB = 8, 6, 32
DOWN = "blocks/mlp/experts/down/kernel"


@pytest.fixture(scope="module")
def made():
    """(model, params) with large random weights, so that routers choose clearly."""
    config = models.DecoderConfig(
        family="qwen2_moe",
        vocab=VOCAB,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=4,
        hidden=8,
        positions=16,
        experts=models.ExpertsConfig(4, 2, normalize=False, shared_hidden=4),
    )
    model = models.make(config)
    params = jax.tree.map(lambda x: 10 * x, model.init(jax.random.key(0)))
    return model, params


def batch(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.ones((ROWS, LENGTH), bool)
    mask[1, :2], mask[2, 4:] = False, False
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    return jax.tree.map(jnp.asarray, {"tokens": tokens, "mask": mask})


@pytest.fixture(scope="module")
def traced(made):
    """Outputs with the sites of experts, jitted once for all tests."""
    model, _ = made
    taps = {"router": (0, 1), "experts": (0, 1), "mlp_in": (0, 1)}
    return jax.jit(partial(model.apply, taps=taps))


def test_padding_and_other_rows_change_nothing(made, traced):
    _, params = made
    rows = batch()
    junk = jnp.where(rows["mask"], rows["tokens"], 31 - rows["tokens"])
    one, other = (
        traced(params, rows | {"tokens": tokens}) for tokens in (rows["tokens"], junk)
    )
    real = np.asarray(rows["mask"])
    assert_allclose(one.hidden[real], other.hidden[real], rtol=1e-6, atol=1e-6)
    assert_allclose(one.routing.tokens, other.routing.tokens)
    assert_allclose(one.routing.probs, other.routing.probs, rtol=1e-6)


def test_sites_and_routing_agree_with_numpy(made, traced):
    model, params = made
    rows = batch()
    out = traced(params, rows)
    assert set(out.taps) <= set(model.sites) and "mlp" not in model.sites
    kernel = np.asarray(params["blocks"]["mlp"]["router"]["kernel"])
    logits = np.einsum("nbld,nde->nble", out.taps["mlp_in"], kernel)
    assert_allclose(out.taps["router"], logits, rtol=1e-4, atol=1e-5)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    chosen = np.argsort(-probs, axis=-1, kind="stable")[..., :2]
    hot = np.zeros_like(probs)
    np.put_along_axis(hot, chosen, 1.0, axis=-1)
    assert_allclose(out.taps["experts"], hot * probs, rtol=1e-4, atol=1e-6)
    real = np.asarray(rows["mask"])[None, :, :, None]
    assert_allclose(out.routing.tokens, (hot * real).sum(2))
    assert_allclose(out.routing.probs, (probs * real).sum(2), rtol=1e-5)


def test_pruned_experts_are_those_whose_weight_is_zero(made, traced):
    model, params = made
    gone = jnp.zeros((2, 4), jnp.bool_).at[0, 1].set(True).at[1, 3].set(True)
    pruned = edits.prune_units(model, params, {"experts": gone})
    changed = trees.paths(
        jax.tree.map(lambda a, b: bool(jnp.any(a != b)), pruned, params)
    )
    assert [path for path, differs in changed.items() if differs] == [DOWN]

    def mask(value, layer):
        return jnp.where(gone[layer], 0.0, value)

    rows = batch()
    edited = jax.jit(partial(model.apply, edits={"experts": mask}))(params, rows)
    assert_allclose(traced(pruned, rows).hidden, edited.hidden, rtol=1e-4, atol=1e-5)
    assert not np.allclose(edited.hidden, traced(params, rows).hidden, atol=1e-3)
    with pytest.raises(ValueError, match="experts"):
        edits.remove_units(model, params, {"experts": gone})


def test_rounding_leaves_routers_and_calibration_refuses_experts(made):
    model, params = made
    rounded = trees.paths(edits.quantize(params, "int4"))
    for path, x in trees.paths(params).items():
        stays = not path.endswith("kernel") or "rout" in path or "shared_gate" in path
        assert (x is rounded[path]) == (stays or "unembed" in path), path
    one = params["blocks"]["mlp"]["experts"]["up"]["kernel"][1, 2]
    alone = edits.quantize({"blocks": {"up": {"kernel": one[None]}}}, "int4")
    expected = alone["blocks"]["up"]["kernel"][0]
    assert_allclose(rounded["blocks/mlp/experts/up/kernel"][1, 2], expected)
    with pytest.raises(ValueError, match="mlp/experts/down"):
        edits.gptq(model, params, [batch()])


def streams():
    forget = batch() | {"ref_logps": jnp.linspace(-9.0, -3.0, ROWS)}
    return {"forget": forget, "retain": batch(1)}


def parts_of(model):
    npo = partial(losses.npo, beta=0.1)
    retain = terms.on_logps(losses.nll, model, "retain", reduce="token")
    balance = terms.load_balance(model, "retain")
    return {
        "forget": terms.on_logps(npo, model, "forget"),
        "rest": terms.joint(
            {"retain": retain, "balance": balance}, {"retain": 1.0, "balance": 0.1}
        ),
    }


TX = optax.chain(combine.weighted_sum(), optax.sgd(0.01))


@pytest.fixture(scope="module")
def one_step(made):
    """(low-rank model, its params, state after a step, metrics) on one device."""
    model, params = made
    low = wrap.lora(model, pattern=r"blocks/.*/(up|down|q|router)/kernel", rank=2)
    params = wrap.add_lora(low, params, jax.random.key(1))
    b = params["blocks"]["mlp"]["experts"]["down"]
    b["lora_b"] = jax.random.normal(jax.random.key(2), b["lora_b"].shape)
    step = jax.jit(ju.make_step(parts_of(low), TX))
    state, metrics = step(
        ju.init_state(params, TX, jax.random.key(0)), streams(), ju.Frozen()
    )
    return low, params, state, metrics


@pytest.mark.slow
def test_load_balance_is_that_of_transformers(made, one_step, traced):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    low, params, _, metrics = one_step
    plain = wrap.merge_lora(low, params)
    rows = batch(1)
    out = traced(plain, rows)
    logits = [torch.tensor(np.asarray(x)).reshape(-1, 4) for x in out.taps["router"]]
    mask = torch.tensor(np.asarray(rows["mask"]))
    expected = module.load_balancing_loss_func(tuple(logits), 4, 2, mask)
    assert_allclose(metrics["rest/balance/loss"], float(expected), rtol=1e-5)
    assert_allclose(metrics["rest/retain/load_balance"], float(expected), rtol=1e-5)
    tokens = np.asarray(out.routing.tokens).sum(1)
    shares = tokens / tokens.sum(-1, keepdims=True)
    assert_allclose(metrics["rest/retain/expert_share_max"], shares.max(), rtol=1e-6)
    assert_allclose(metrics["rest/retain/expert_share_min"], shares.min(), rtol=1e-6)
    assert metrics["forget/dropped"] == 0 and metrics["finite"]


@pytest.mark.slow
def test_low_rank_experts_equal_merged_kernels(made, one_step, traced):
    low, params, _, _ = one_step
    rows = batch(1)
    hidden = jax.jit(low.apply)(params, rows).hidden
    merged = traced(wrap.merge_lora(low, params), rows).hidden
    assert_allclose(hidden, merged, rtol=1e-3, atol=1e-4)


MESHES = [
    dict(data=2, fsdp=1, expert=2, tensor=2),
    dict(fsdp=2, expert=4),
    dict(fsdp=2, context=2, tensor=2),
    dict(fsdp=2, expert=2, context=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_step_on_a_mesh_equals_that_on_one_device(one_step, sizes):
    """Experts, their gradients and their low-rank leaves are split."""
    low, params, expected, expected_metrics = one_step
    mesh = sharding.make_mesh(**sizes)
    placed = jax.device_put(params, sharding.by_rules(params, mesh, low.rules))
    down = placed["blocks"]["mlp"]["experts"]["down"]["kernel"]
    parts = mesh.shape["expert"] * mesh.shape["tensor"]
    assert down.sharding.shard_shape(down.shape)[1] == 4 // parts
    fresh = partial(ju.init_state, tx=TX)
    state = sharding.create(fresh, mesh, low.rules, placed, key=jax.random.key(0))
    step = sharding.jit_step(ju.make_step(parts_of(low), TX), mesh, low.rules, state)
    state, metrics = step(state, streams(), ju.Frozen())
    for name, value in expected_metrics.items():
        assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    jax.tree.map(
        partial(assert_allclose, rtol=0, atol=1e-5), state.params, expected.params
    )


@pytest.mark.parametrize("rows", [8, 3], ids="{} rows".format)
def test_experts_on_a_mesh_equal_a_plain_sum_over_all_experts(rows):
    """Values and gradients, also where the mesh does not divide the rows."""
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = {"gate": (4, 8, 6), "up": (4, 8, 6), "down": (4, 6, 8)}
    kernels = {
        # Small enough that outputs are near 1: sin of large ones magnifies rounding.
        name: {"kernel": 0.4 * jax.random.normal(key, size)}
        for key, (name, size) in zip(keys[:3], sizes.items(), strict=True)
    }
    x = jax.random.normal(keys[3], (rows, 4, 8))
    logits = jax.random.normal(keys[4], (rows, 4, 4))
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), 2)

    def grouped(kernels, x, weights):
        out = _experts.run(kernels, x, weights, chosen, jax.nn.silu)
        return jnp.sum(jnp.sin(out))

    def plain(kernels, x, weights):
        gate, up, down = (kernels[name]["kernel"] for name in ("gate", "up", "down"))
        each = jax.nn.silu(jnp.einsum("bld,edf->blef", x, gate))
        each = each * jnp.einsum("bld,edf->blef", x, up)
        each = jnp.einsum("blef,efd->bled", each, down)
        each = jnp.take_along_axis(each, chosen[..., None], axis=2)
        return jnp.sum(jnp.sin(jnp.einsum("blkd,blk->bld", each, weights)))

    arguments = (kernels, x, weights)
    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(*arguments)
    with jax.set_mesh(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        found = jax.jit(jax.value_and_grad(grouped, argnums=(0, 1, 2)))(*arguments)
    jax.tree.map(partial(assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_plans_count_the_experts_that_compute_a_token(made):
    model, params = made
    dense = sum(
        x.size
        for p, x in trees.paths(params).items()
        if p.endswith("kernel") and "/experts/" not in p
    )
    experts = 2 * 3 * 16 * 8 * 2  # layers, kernels, width, hidden, experts of a token
    term = {"retain": terms.on_logps(losses.nll, model, "retain", reduce="token")}
    rows = {"retain": batch(1)}
    pairs = LENGTH * (LENGTH + 1) / 2
    attention = 3 * ROWS * 2 * 4.0 * 4 * 4 * pairs
    flops = plan.model_flops(model, params, None, term, rows)
    assert flops == ROWS * LENGTH * 6.0 * (dense + experts) + attention
    forward = jax.make_jaxpr(model.apply)(params, batch())
    product = plan.dot_flops(forward)
    hidden = ROWS * LENGTH * 2 * 2 * 3 * 16 * 8 * 2  # all pairs of token and expert
    assert product > hidden
    assert product < 2 * (hidden + ROWS * LENGTH * 2.0 * dense)
