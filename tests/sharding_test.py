# SPDX-License-Identifier: Apache-2.0
"""The same step on any mesh: values, shards, the split unembedding, and errors."""

import re
import types
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jaxunlearn as ju
from jaxunlearn import combine, losses, recipes, sharding, terms, trees, wrap
from tests import tiny

SETTINGS = dict(width=32, heads=8, kv_heads=8, head_dim=4, hidden=32, vocab=64)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8), (2, 2, 2)]
ROWS, LENGTH, STEPS = 8, 12, 5


def mesh_of(sizes):
    return sharding.make_mesh(
        **dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    )


def streams():
    forget, retain = (
        tiny.tiny_batch(ROWS, LENGTH, seed=seed, vocab=64) for seed in (0, 1)
    )
    forget["ref_logps"] = jnp.linspace(-9.0, -3.0, ROWS, dtype=jnp.float32)
    return {"forget": forget, "retain": retain}


def blur_npo(model):
    recipe = recipes.blur.npo(model, gamma=0.1, learning_rate=1e-3)
    return recipe.terms, recipe.tx, ".*"


def npo_kl(model):
    npo = partial(losses.npo, beta=0.1)
    parts = {
        "forget": terms.on_logps(npo, model, "forget"),
        "near": terms.on_tokens(losses.kl, model, "retain"),
    }
    tx = optax.chain(combine.weighted_sum({"forget": 1.0, "near": 0.5}))
    return parts, optax.chain(tx, optax.adamw(1e-3)), ".*"


def down_kernels(model):
    """Trains what RMU trains: one kind of kernel; all else is frozen."""
    parts, tx, _ = blur_npo(model)
    return parts, tx, "blocks/mlp/down/kernel"


def run(method, mesh, *, num_microbatches=1, steps=STEPS):
    """(params after some steps, metrics of the last); mesh None is one device."""
    model, params = tiny.tiny_model(**SETTINGS)
    parts, tx, pattern = method(model)
    step = ju.make_step(parts, tx, num_microbatches=num_microbatches)
    key, batches = jax.random.key(0), streams()
    reference = jax.tree.map(lambda x: 0.9 * x, params)
    fresh = partial(ju.init_state, tx=tx)
    if mesh is None:
        jitted = jax.jit(step)
        train, rest = trees.split(params, pattern)
        state = fresh(train, key=key)
    else:
        shards = sharding.by_rules(params, mesh, model.rules)
        train, rest = trees.split(jax.device_put(params, shards), pattern)
        reference = jax.device_put(reference, shards)
        state = sharding.create(fresh, mesh, model.rules, train, key=key)
        jitted = sharding.jit_step(step, mesh, model.rules, state)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        for _ in range(steps):
            state, metrics = jitted(state, batches, ju.Frozen(rest, reference))
    return trees.merge(state.params, rest), metrics


@cache
def on_one_device(method):
    return run(method, None)


def methods_on_meshes():
    """BLUR on every mesh, the others on one of each kind; all but one pair are slow."""
    kinds = [(8, 1, 1), (1, 4, 2), (2, 2, 2)]
    for method in (blur_npo, npo_kl, down_kernels):
        for sizes in MESHES if method is blur_npo else kinds:
            quick = method is blur_npo and sizes == (2, 2, 2)
            marks = [] if quick else [pytest.mark.slow]
            name = f"{method.__name__}-{sizes}"
            yield pytest.param(method, sizes, marks=marks, id=name)


@pytest.mark.parametrize(("method", "sizes"), list(methods_on_meshes()))
def test_five_steps_on_any_mesh_equal_those_on_one_device(method, sizes):
    expected, expected_metrics = on_one_device(method)
    params, metrics = run(method, mesh_of(sizes))
    for name, value in expected_metrics.items():
        rtol = 1e-5 if name.endswith("/loss") else 1e-4
        assert_allclose(metrics[name], value, rtol=rtol, atol=1e-5, err_msg=name)
    jax.tree.map(partial(assert_allclose, rtol=0, atol=1e-5), params, expected)


def explicit_mesh():
    """A mesh as jax makes it by default; it lacks two of the axes of make_mesh."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    assert set(mesh.axis_types) == {AxisType.Explicit}
    return mesh


def test_steps_on_a_mesh_with_explicit_axes_equal_those_on_one_device():
    expected, _ = on_one_device(blur_npo)
    params, _ = run(blur_npo, explicit_mesh())
    jax.tree.map(partial(assert_allclose, rtol=0, atol=1e-5), params, expected)


def test_arrays_on_explicit_axes_are_moved_by_setup_and_refused_by_the_step():
    model, params = tiny.tiny_model(**SETTINGS)
    mesh, recipe = explicit_mesh(), recipes.blur.npo(model)
    recipe = recipe._replace(trainable="blocks/mlp/down/kernel")
    on_explicit = jax.tree.map(
        lambda place: NamedSharding(mesh, place.spec),
        sharding.by_rules(params, mesh, model.rules),
    )
    params = jax.device_put(params, on_explicit)
    step, state, frozen = recipe.setup(model, params, mesh=mesh)
    rows = jax.device_put(streams(), NamedSharding(mesh, P("data")))
    with jax.numpy_dtype_promotion("standard"):
        step.trace(state, rows, frozen)
    train, refused = recipe.split(params)
    with pytest.raises(ValueError, match=r"'params/.*the Explicit axes 'data', 'fsdp'"):
        step(state, rows, refused)
    with pytest.raises(ValueError, match=r"'params/blocks/mlp/down/kernel' with .*Exp"):
        step(state.replace(params=train), rows, frozen)


def test_a_mesh_with_explicit_axes_in_set_mesh_is_refused_by_name():
    model, params = tiny.tiny_model(**SETTINGS)
    mesh, batch = explicit_mesh(), tiny.tiny_batch(vocab=64)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"auto_axes\(mesh\)"):
        jax.eval_shape(model.apply, params, batch)
    with jax.set_mesh(sharding.auto_axes(mesh)):
        jax.eval_shape(model.apply, params, batch)
    assert sharding.auto_axes(mesh_of((2, 2, 2))) is mesh_of((2, 2, 2))


@pytest.mark.slow
def test_microbatches_on_a_mesh_equal_the_whole_batch():
    expected, _ = on_one_device(blur_npo)
    params, _ = run(blur_npo, mesh_of((2, 2, 2)), num_microbatches=2)
    jax.tree.map(partial(assert_allclose, rtol=0, atol=1e-5), params, expected)


def test_params_and_moments_are_placed_in_their_shards():
    model, params = tiny.tiny_model(**SETTINGS)
    _, tx, _ = blur_npo(model)
    mesh = mesh_of((2, 2, 2))
    fresh = partial(ju.init_state, tx=tx, key=jax.random.key(0))
    state = sharding.create(fresh, mesh, model.rules, params)
    kernels = {
        path: x for path, x in trees.paths(state).items() if path.endswith("/up/kernel")
    }
    assert len(kernels) == 3  # the params and both moments
    for leaf in kernels.values():
        assert leaf.sharding.spec == P(None, "fsdp", "tensor")
        assert leaf.addressable_shards[0].data.shape == (3, 16, 16)
    scale = state.params["final_norm"]["scale"]
    assert scale.sharding.is_fully_replicated


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (1, 8, 1)], ids=str)
@pytest.mark.slow
def test_the_unembedding_is_split_over_every_axis(sizes, tied):
    rows, chunk, vocab = 16, 6, 512
    model, params = tiny.tiny_model(**(SETTINGS | dict(vocab=vocab)), tied=tied)
    mesh = mesh_of(sizes)
    term = terms.on_logps(losses.nll, model, "x", reduce="token", chunk=chunk)

    def loss(params, batch):
        total, _ = term(params, {"x": batch}, None, jax.random.key(0))
        return total.mean()

    batch = sharding.put_rows(tiny.tiny_batch(rows, 2 * chunk + 1), mesh)
    shards = sharding.by_rules(params, mesh, model.rules)
    with jax.set_mesh(mesh):
        gradient = jax.jit(
            jax.grad(loss), in_shardings=(shards, None), out_shardings=shards
        )
        text = gradient.lower(params, batch).compile().as_text()
    # What a device computes of logits (again in the backward pass), and of the gradient
    # of the states: its rows and its part of the vocabulary.
    dots = re.findall(r"= f32\[([\d,]+)\]\S* dot\(.*?op_name=\"([^\"]*)\"", text)
    shapes = {shape for shape, name in dots if "...v" in name}
    data, fsdp, tensor = sizes
    tokens, width = rows // (data * fsdp) * chunk, SETTINGS["width"]
    kernel = (
        f"{vocab // tensor},{width}"  # its gradient, summed over devices afterwards
    )
    assert shapes == {f"{tokens},{vocab // tensor}", f"{tokens},{width}", kernel}


@pytest.mark.parametrize(
    ("scope", "groups"), [("global", 1), (["embed/.*", "blocks/.*"], 3)], ids=str
)
@pytest.mark.slow
def test_blurs_products_cost_one_small_all_reduce(scope, groups):
    flags = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
    model, params = tiny.tiny_model(**SETTINGS, **flags)
    mesh = mesh_of((2, 2, 2))
    blur = combine.blur(gamma=0.1, scope=scope)
    shards = sharding.by_rules(params, mesh, model.rules)
    grads = {"forget": jax.tree.map(jnp.cos, params), "retain": params}

    def update(grads, rules=None):
        return blur.update(grads, blur.init(params), rules=rules)

    both = (dict.fromkeys(grads, shards),)
    with jax.set_mesh(mesh):
        jitted = jax.jit(partial(update, rules=model.rules), in_shardings=both)
        text = jitted.lower(grads).compile().as_text()
        found = jitted(grads)
    # Rescaling of tiny and huge gradients sits in a branch of its own, outside ENTRY:
    # it looks for the largest entries too, and gathers no leaf either.
    moved = r"= (\S+|\([^)]*\)) (all-[\w-]+|collective-[\w-]+|reduce-scatter)\("
    entry = re.findall(moved, text[text.index("\nENTRY") :])
    assert entry == [(f"f32[{groups},3]{{1,0}}", "all-reduce")]
    assert {kind for _, kind in re.findall(moved, text)} == {"all-reduce"}
    # Leaves that lie on several devices count once.
    close = partial(assert_allclose, rtol=2e-6, atol=1e-6)
    jax.tree.map(close, found, update(grads))


def test_a_step_reduces_few_scalars():
    """Besides BLUR's products: the norms of both gradients, and counts of tokens."""
    model, params = tiny.tiny_model(**SETTINGS)
    parts, tx, _ = blur_npo(model)
    mesh = mesh_of((2, 2, 2))
    fresh = partial(ju.init_state, tx=tx, key=jax.random.key(0))
    state = sharding.create(fresh, mesh, model.rules, params)
    jitted = sharding.jit_step(ju.make_step(parts, tx), mesh, model.rules, state)
    with jax.numpy_dtype_promotion("standard"):
        text = jitted.lower(state, streams(), ju.Frozen()).compile().as_text()
    lines = [line for line in text.splitlines() if " all-reduce(" in line]
    sums = [line for line in lines if "/psum" in line]
    assert len(sums) == 3
    entry = [line for line in sums if "cond/branch_1_fun/cond" not in line]
    shapes = [re.search(r"= (\S+) all-reduce", line)[1] for line in entry]
    assert sorted(shapes) == ["f32[1,2]{1,0}", "f32[1,3]{1,0}"]


def test_a_state_that_is_not_on_the_mesh_is_refused():
    base, params = tiny.tiny_model(**SETTINGS)
    model = wrap.lora(base, pattern=r"blocks/mlp/down/kernel", rank=2)
    recipe = recipes.blur.npo(model)
    mesh = mesh_of((2, 2, 2))
    train, frozen = recipe.split(wrap.add_lora(model, params, jax.random.key(1)))
    state = ju.init_state(train, recipe.tx, jax.random.key(0))
    step = ju.make_step(recipe.terms, recipe.tx)
    jitted = sharding.jit_step(step, mesh, model.rules, state)
    with pytest.raises(ValueError, match=r"'step'.*sharding\.create"):
        jitted(state, streams(), frozen)
    replicated = sharding.by_rules(state, mesh, [(".*", ())])
    state = jax.device_put(state, replicated)
    with pytest.raises(ValueError, match="'params/blocks/mlp/down/lora_a'"):
        jitted(state, streams(), frozen)


def test_impossible_settings_are_errors():
    count = jax.device_count()
    with pytest.raises(ValueError, match=f"number of devices, {count}, got data=3"):
        sharding.make_mesh(data=3, fsdp=1)
    with pytest.raises(ValueError, match="one of which may be -1"):
        sharding.make_mesh(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="1 or more"):
        sharding.make_mesh(data=0)
    two_slices = [types.SimpleNamespace(slice_index=i // 4) for i in range(8)]
    with pytest.raises(ValueError, match="multiple of the 2 slices, got data=1"):
        sharding.make_mesh(devices=two_slices)


def test_rules_and_rows_that_do_not_fit_are_errors():
    mesh = mesh_of((2, 2, 2))
    tree = {"a": jnp.zeros((6, 3)), "b": jnp.zeros(()), "c": None}
    specs = sharding.by_rules(tree, mesh, [("a", ("fsdp",))])
    assert specs["a"].spec == P("fsdp") and specs["b"].spec == P()
    with pytest.raises(ValueError, match=r"every leaf, got none for 'a'. Add one"):
        sharding.by_rules(tree, mesh, [("x", ())])
    with pytest.raises(ValueError, match=r"dimension of 3 in 2 parts"):
        sharding.by_rules(tree, mesh, [("a", (None, "tensor"))])
    with pytest.raises(ValueError, match=r"at most 2 entries"):
        sharding.by_rules(tree, mesh, [("a", (None, None, "tensor"))])
    with pytest.raises(ValueError, match="fsdb"):
        sharding.by_rules(tree, mesh, [("a", ("fsdb",))])
    with pytest.raises(ValueError, match="= 4, got 6 rows in 'x/tokens'"):
        sharding.put_rows({"x": {"tokens": np.zeros((6, 2))}}, mesh)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_decoders_rules_cover_every_leaf(tied, bias):
    flags = dict(qkv_bias=bias, out_bias=bias, mlp_bias=bias, qk_norm=bias)
    model, params = tiny.tiny_model(**SETTINGS, tied=tied, **flags)
    sharding.by_rules(params, sharding.make_mesh(), model.rules)
