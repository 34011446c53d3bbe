# SPDX-License-Identifier: Apache-2.0
"""Moments in few bytes: their size, their mean, and Adam with them against float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxunlearn as ju
from jaxunlearn import combine, recipes, sharding, trees
from jaxunlearn.combine import _moments
from tests import tiny

SHAPE = (64, 128)


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """optax's Adam relies on promotions that these tests forbid elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def chain(moments, **more):
    tx = optax.chain(combine.weighted_sum(), optax.adamw(1e-2, **more))
    return combine.with_moments(tx, moments)


def drawn(seed=0, shape=SHAPE):
    """Values over eight orders of magnitude, of both signs, some of them 0."""
    rng = np.random.default_rng(seed)
    values = rng.choice([-1.0, 1.0, 1.0], shape) * 10 ** rng.uniform(-8, 0, shape)
    values[0], values[1, :5] = 0.0, 0.0
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("form", [_moments._SIGNED, _moments._SQUARES])
def test_codes_lie_next_to_the_value_and_are_right_on_average(form):
    x = drawn()
    x, (largest, power) = x if form == _moments._SIGNED else jnp.abs(x), form
    keys = jax.random.split(jax.random.key(1), 100)

    @jax.jit
    def there_and_back(x):
        codes, scales = jax.vmap(lambda key: _moments._encoded(x, key, form))(keys)
        return codes, _moments._decoded(codes, scales, form)

    codes, found = there_and_back(x)
    assert codes.dtype.itemsize == 1 and np.abs(codes.astype(int)).max() == largest
    assert np.array_equal(np.sign(found[0]), np.sign(x))  # only 0 becomes 0
    rows = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30)
    place = largest * (np.abs(x) / rows) ** (1 / power)
    low, high = (rows * (code / largest) ** power for code in (place - 1.01, place + 1))
    inside = (np.abs(found) <= 1.001 * high) & (np.abs(found) >= 0.999 * low)
    assert inside[:, place > 2].all()
    wide = place > largest / 4
    error = (found.mean(0) / np.where(x == 0, 1, x))[wide] - 1
    assert abs(error.mean()) < 1e-3 and np.abs(error).max() < 0.1


@pytest.mark.parametrize("moments", ["int8", "bfloat16"])
def test_second_moments_decay_as_in_float32(moments):
    """Rounding to the nearest value would leave most of them where they are."""
    params = {"a": jnp.zeros(SHAPE)}
    gradient = {"a": jnp.abs(drawn()) + 1e-3}
    tx, plain = chain(moments, b2=0.999), chain("float32", b2=0.999)
    state, wanted = tx.init(params), plain.init(params)
    for tree in (gradient, *[{"a": jnp.zeros(SHAPE)}] * 60):
        _, state = jax.jit(tx.update)({"x": tree}, state, params)
        _, wanted = jax.jit(plain.update)({"x": tree}, wanted, params)
    nu = state.inner[1][0].nu["a"]
    if moments == "int8":
        (scale,) = (s for path, s in state.scales.items() if path.endswith("nu/a"))
        nu = _moments._decoded(nu, scale, _moments._SQUARES)
    want = wanted[1][0].nu["a"]
    rows = want.max(-1, keepdims=True)
    large = want > 0.01 * rows
    ratio = nu.astype(jnp.float32)[large] / want[large]
    assert abs(float(ratio.mean()) - 1) < 0.01
    assert float(jnp.abs(ratio - 1).max()) < 0.5


@pytest.mark.parametrize("moments", ["int8", "bfloat16"])
def test_adam_reaches_what_float32_reaches(moments):
    """A quadratic of badly scaled curvatures, with noise."""
    curvature = jnp.asarray(
        10 ** np.random.default_rng(0).uniform(-2, 2, SHAPE), jnp.float32
    )
    start = {"a": jnp.ones(SHAPE)}

    def run(moments):
        tx = chain(moments, weight_decay=0.0)

        def step(carry, key):
            params, state = carry
            noise = 0.1 * jax.random.normal(key, SHAPE)
            grads = {"a": curvature * (params["a"] + noise)}
            updates, state = tx.update({"x": grads}, state, params)
            largest = jnp.abs(updates["a"]).max()
            return (optax.apply_updates(params, updates), state), largest

        keys = jax.random.split(jax.random.key(3), 150)
        carry, largest = jax.lax.scan(step, (start, tx.init(start)), keys)
        return carry[0]["a"], largest

    found, largest = jax.jit(partial(run, moments))()
    wanted, _ = jax.jit(partial(run, "float32"))()
    rms = [float(jnp.sqrt(jnp.mean(x * x))) for x in (found, wanted)]
    assert rms[1] < 0.2 and abs(rms[0] / rms[1] - 1) < 0.1
    assert float(jnp.sqrt(jnp.mean((found - wanted) ** 2))) < 0.03
    assert largest.max() < 0.04  # four times the learning rate


def test_the_state_takes_two_bytes_for_each_param_and_goes_with_the_rules():
    settings = dict(width=64, heads=8, kv_heads=8, head_dim=8, hidden=64, vocab=64)
    model, params = tiny.tiny_model(**settings)
    recipe = recipes.blur.npo(model)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    tx = combine.with_moments(recipe.tx, "int8")
    fresh = partial(ju.init_state, tx=tx, key=jax.random.key(0))
    shapes = jax.eval_shape(fresh, params)
    sizes = {p: x.size * x.dtype.itemsize for p, x in trees.paths(shapes).items()}
    of_kernels = {
        part: sum(n for p, n in sizes.items() if p.startswith(part) and "kernel" in p)
        for part in ("params", "opt_state")
    }
    assert of_kernels["opt_state"] < 0.54 * of_kernels["params"]  # 2/4, and scales
    found = sharding.by_rules(shapes, mesh, model.rules)
    kernels = [p for p in sizes if p.endswith("mlp/up/kernel")]
    assert len(kernels) == 5  # the params, two moments and their scales
    for path in kernels:
        place, scale = trees.paths(found)[path], "/scales/" in path
        assert place.spec == (
            sharding.PartitionSpec(None, "fsdp", None if scale else "tensor")
        )


def test_other_states_stay_as_they_are():
    params = {"a": jnp.ones(SHAPE), "b": jnp.ones((4, 4)), "c": jnp.ones(8192)}
    state = chain("int8").init(params)
    dtypes = {k: x.dtype for k, x in trees.paths(state.inner).items() if "/mu/" in k}
    assert [str(dtypes[k])[:5] for k in sorted(dtypes)] == ["int8", "float", "float"]
    assert combine.with_moments(optax.sgd(0.1), "float32").init(params) is not None
    with pytest.raises(ValueError, match="moments"):
        combine.with_moments(optax.sgd(0.1), "int4")
    with pytest.raises(ValueError, match="params"):
        chain("int8").update({"x": params}, state)
