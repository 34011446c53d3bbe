# SPDX-License-Identifier: Apache-2.0
"""One step: microbatches, donation, values that are not finite, and randomness."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import _step as steps
from jaxunlearn import combine, losses, terms, trees
from jaxunlearn.typing import Frozen, Total
from tests import tiny

KEY = jax.random.key(7)


@dataclasses.dataclass(frozen=True)
class Noisy:
    """mean over rows of (x w - y + noise)^2 / 2, to test the step without a decoder."""

    stream: str
    noise: float = 0.0
    needs_ref: bool = False

    @property
    def reads(self):
        return (self.stream,)

    def __call__(self, params, streams, ref, key):
        batch = streams[self.stream]
        count = jnp.int32(batch["x"].shape[0])
        draw = jax.random.normal(key, batch["y"].shape)
        error = batch["x"] @ params["w"] + params["b"] - batch["y"] + self.noise * draw
        total = Total(0.5 * jnp.sum(error**2), count)
        return total, {"draw": Total(jnp.sum(draw), count)}


def adam(optimizer=optax.adam, rate=0.1):
    """optax's Adam, which relies on promotions that these tests forbid elsewhere."""
    tx = optimizer(rate)

    def update(grads, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(grads, state, params)

    return optax.GradientTransformation(tx.init, update)


def toy_params():
    return {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.float32(0.25)}


def toy_streams(seed=0, rows=4):
    rng = np.random.default_rng(seed)
    return {
        name: {
            "x": jnp.asarray(rng.normal(size=(rows, 3)), jnp.float32),
            "y": jnp.asarray(rng.normal(size=rows), jnp.float32),
        }
        for name in ("forget", "retain")
    }


def toy_step(noise=0.0, tx=None, **kwargs):
    parts = {name: Noisy(name, noise) for name in ("forget", "retain")}
    tx = optax.chain(combine.blur(gamma=0.1), adam()) if tx is None else tx
    step = jax.jit(steps.make_step(parts, tx, **kwargs), donate_argnums=0)
    return step, steps.init_state(toy_params(), tx, KEY)


def language_terms():
    model, params = tiny.bigram_model()
    parts = {
        "forget": terms.on_logps(partial(losses.npo, beta=0.1), model, "forget"),
        "retain": terms.on_logps(losses.nll, model, "retain", reduce="token"),
    }
    return parts, params


def language_streams(rows=4):
    """Ragged: rows differ in how many tokens count, and one has no answer."""
    batch = tiny.tiny_batch(rows=rows)
    batch["answer"] = batch["answer"].at[1].set(False)
    ref_logps = -jnp.arange(5.0, 5.0 + rows)
    return {
        "forget": batch | {"ref_logps": ref_logps},
        "retain": tiny.tiny_batch(rows=rows, length=9, side="left", seed=1),
    }


def close(actual, expected, rtol=1e-6, atol=1e-6):
    jax.tree.map(partial(assert_allclose, rtol=rtol, atol=atol), actual, expected)


def identical(actual, expected):
    def compare(a, b):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert_array_equal(a, b)

    jax.tree.map(compare, actual, expected)


def copied(tree):
    """A copy that no donation can reach."""
    return jax.tree.map(jnp.copy, tree)


COMBINERS = {
    "blur": lambda: combine.blur(gamma=0.1),
    "weighted_sum": lambda: combine.weighted_sum({"forget": 0.5, "retain": 2.0}),
    "joint": lambda: combine.weighted_sum(),
}


@pytest.mark.parametrize(
    "name",
    [
        "blur",
        *(pytest.param(x, marks=pytest.mark.slow) for x in COMBINERS if x != "blur"),
    ],
)
def test_ragged_microbatches_equal_the_whole_batch(name):
    parts, params = language_terms()
    if name == "joint":
        parts = {"both": terms.joint(parts, {"forget": 0.5, "retain": 2.0})}
    tx = optax.chain(COMBINERS[name](), optax.sgd(0.1))
    results = []
    for num_microbatches in (1, 4) if name == "blur" else (1, 2):
        step = jax.jit(steps.make_step(parts, tx, num_microbatches=num_microbatches))
        state = steps.init_state(params, tx, KEY)
        state, metrics = step(state, language_streams(), Frozen())
        results.append((state.params, metrics))
    assert all(jnp.shape(value) == () for value in results[0][1].values())
    for new, metrics in results[1:]:
        close(new, results[0][0])
        close(metrics, results[0][1], rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max() > 1e-4, new, params)
    assert all(jax.tree.leaves(moved))


def test_the_joint_step_equals_the_weighted_sum_step():
    parts, params = language_terms()
    weights = {"forget": 0.5, "retain": 2.0}
    new, metrics = {}, {}
    joint = {"both": terms.joint(parts, weights)}
    for name, chosen, given in (("apart", parts, weights), ("joint", joint, None)):
        tx = optax.chain(combine.weighted_sum(given), optax.sgd(0.1))
        run = jax.jit(steps.make_step(chosen, tx))
        state = steps.init_state(params, tx, KEY)
        state, metrics[name] = run(state, language_streams(), Frozen())
        new[name] = state.params
    close(new["apart"], new["joint"])
    for key in ("forget/loss", "retain/loss", "forget/nll", "retain/nll"):
        assert_allclose(
            metrics["apart"][key], metrics["joint"][f"both/{key}"], rtol=1e-5
        )
    loss = sum(weights[k] * metrics["apart"][f"{k}/loss"] for k in weights)
    assert_allclose(metrics["joint"]["both/loss"], loss, rtol=1e-5)


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_the_update_is_that_of_the_combined_gradients(num_microbatches):
    tx = optax.chain(
        combine.weighted_sum({"forget": -1.0, "retain": 3.0}), optax.sgd(0.1)
    )
    step, state = toy_step(tx=tx, num_microbatches=num_microbatches)
    streams, params = toy_streams(), toy_params()

    def loss(params, name):
        return Noisy(name)(params, streams, None, KEY)[0].mean()

    grads = {name: jax.grad(loss)(params, name) for name in streams}
    state, metrics = step(state, streams, Frozen())
    expected = jax.tree.map(
        lambda p, f, r: p - 0.1 * (3 * r - f), params, grads["forget"], grads["retain"]
    )
    close(state.params, expected)
    for name in streams:
        assert_allclose(metrics[f"{name}/loss"], loss(params, name), rtol=1e-6)
        peak = trees.norm(grads[name])
        assert_allclose(metrics[f"{name}/grad_norm"], peak, rtol=1e-6)
    assert float(metrics["combine/weight/retain"]) == 3.0
    assert int(state.step) == 1 and bool(metrics["finite"])


def test_donating_the_state_leaves_the_params_alive():
    tx = optax.chain(combine.blur(), adam())
    params, key = toy_params(), jax.random.key(3)
    before = copied((params, key))
    parts = {name: Noisy(name) for name in ("forget", "retain")}
    step = jax.jit(steps.make_step(parts, tx), donate_argnums=0)
    first = steps.init_state(params, tx, key)
    frozen, streams = Frozen(None, params), toy_streams()
    state = first
    for _ in range(3):
        state, _ = step(state, streams, frozen)
    assert first.params["w"].is_deleted() and first.step.is_deleted()
    identical((params, key), before)
    assert not params["w"].is_deleted()


@pytest.mark.parametrize(
    "bad", [jnp.nan, jnp.inf, 1e30], ids=["nan", "inf", "overflow"]
)
@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(bad, num_microbatches):
    step, state = toy_step(noise=0.1, num_microbatches=num_microbatches)
    _, expected = toy_step(noise=0.1)
    streams = toy_streams()
    state, _ = step(state, streams, Frozen())
    expected, _ = step(expected, streams, Frozen())
    before = copied(state)
    y = streams["forget"]["y"].at[2].set(bad)
    broken = streams | {"forget": streams["forget"] | {"y": y}}
    state, metrics = step(state, broken, Frozen())
    assert not bool(metrics["finite"])
    identical(state, before)
    assert int(state.step) == 1
    state, metrics = step(state, streams, Frozen())
    expected, _ = step(expected, streams, Frozen())
    assert bool(metrics["finite"]) and int(state.step) == 2
    identical(state, expected)


def test_a_gradient_that_is_not_finite_changes_nothing():
    class Root(Noisy):
        """A finite loss, sqrt(0), with an infinite gradient."""

        def __call__(self, params, streams, ref, key):
            return Total(jnp.sqrt(params["b"] * 0.0), jnp.int32(1)), {}

    tx = optax.chain(combine.weighted_sum(), adam())
    parts = {"forget": Root("forget"), "retain": Noisy("retain")}
    step = jax.jit(steps.make_step(parts, tx))
    state = steps.init_state(toy_params(), tx, KEY)
    new, metrics = step(state, toy_streams(), Frozen())
    assert float(metrics["forget/loss"]) == 0.0
    assert not bool(metrics["finite"])
    identical(new, state)


@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(key):
    step, state = toy_step(noise=0.5, num_microbatches=2)
    state = state.replace(key=key(5))
    half, draws = None, []
    for number in range(4):
        if number == 2:
            half = jax.tree.map(jnp.copy, state)
        state, metrics = step(state, toy_streams(number), Frozen())
        draws.append(float(metrics["forget/draw"]))
        draws.append(float(metrics["retain/draw"]))
    assert len(set(draws)) == 8  # every step and every term draws its own numbers
    again, _ = toy_step(noise=0.5, num_microbatches=2)
    for number in (2, 3):
        half, _ = again(half, toy_streams(number), Frozen())
    identical(half, state)
    other, unequal = toy_step(noise=0.5, num_microbatches=2)
    for number in range(4):
        unequal, _ = other(unequal, toy_streams(number), Frozen())
    assert not np.array_equal(unequal.params["w"], state.params["w"])


def test_microbatches_draw_different_numbers():
    step, state = toy_step(noise=1.0, num_microbatches=2)
    _, metrics = step(state, toy_streams(rows=2), Frozen())
    key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 0)
    a, b = (jax.random.normal(r, (1,))[0] for r in jax.random.split(key, 2))
    assert float(a) != float(b)
    assert_allclose(metrics["forget/draw"], (a + b) / 2, rtol=1e-6)


def test_only_the_trained_half_moves_and_has_optimizer_state():
    parts, params = language_terms()
    train, rest = trees.split(params, r"kernel")
    before = copied(rest)
    tx = optax.chain(combine.blur(), adam(optax.adamw, 1e-2))
    step = jax.jit(steps.make_step(parts, tx), donate_argnums=0)
    state = steps.init_state(train, tx, KEY)
    arrays = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert [x.shape for x in arrays] == [(16, 16)] * 2  # the two moments
    for _ in range(2):
        state, metrics = step(state, language_streams(), Frozen(rest))
    assert bool(metrics["finite"])
    assert list(trees.paths(state.params)) == ["kernel"]
    identical(rest, before)
    merged = trees.paths(trees.merge(state.params, rest))
    for path, leaf in trees.paths(params).items():
        same = np.array_equal(leaf, merged[path])
        assert same is (path != "kernel")


def test_a_reference_is_read_from_frozen():
    model, params = tiny.bigram_model()
    parts = {"near": terms.on_tokens(losses.kl, model, "retain")}
    tx = optax.chain(combine.weighted_sum(), optax.sgd(0.1))
    step = jax.jit(steps.make_step(parts, tx, num_microbatches=2))
    state = steps.init_state(params, tx, KEY)
    other = jax.tree.map(lambda x: 0.9 * x, params)
    same, metrics = step(state, language_streams(), Frozen(None, params))
    assert_allclose(metrics["near/loss"], 0.0, atol=1e-6)
    close(same.params, params, atol=1e-5)
    _, metrics = step(state, language_streams(), Frozen(None, other))
    assert float(metrics["near/loss"]) > 1e-3
    with pytest.raises(ValueError, match="needs the reference model"):
        step(state, language_streams(), Frozen())


@pytest.mark.parametrize("name", ["blur", "weighted_sum", "penalty"])
def test_a_chain_after_the_combiner_works_and_compiles_once(name):
    ramp = optax.linear_schedule(0.0, 1.0, 10)
    make = {
        "blur": lambda: combine.blur(gamma=ramp),
        "weighted_sum": lambda: combine.weighted_sum({"forget": ramp, "retain": 1.0}),
        "penalty": lambda: combine.penalty(strength=ramp),
    }[name]
    tx = optax.chain(make(), optax.clip_by_global_norm(1.0), adam(optax.adamw, 1e-2))
    step, state = toy_step(tx=tx)
    value = []
    for number in range(20):
        state, metrics = step(state, toy_streams(), Frozen())
        value.append(float(metrics["retain/loss"]))
        assert bool(metrics["finite"]) and int(state.step) == number + 1
    assert step._cache_size() == 1
    assert value[-1] < value[0]
    assert any(key.startswith("combine/") for key in metrics)


def test_a_clip_acts_on_the_combined_update():
    tx = optax.chain(
        combine.weighted_sum(), optax.clip_by_global_norm(1e-3), optax.sgd(1.0)
    )
    step, state = toy_step(tx=tx)
    new, _ = step(state, toy_streams(), Frozen())
    moved = jax.tree.map(lambda a, b: a - b, new.params, toy_params())
    assert_allclose(trees.norm(moved), 1e-3, rtol=1e-3)


def test_state_can_be_shaped_without_arrays():
    tx = optax.chain(combine.blur(), adam())
    shape = jax.eval_shape(
        partial(steps.init_state, tx=tx), toy_params(), key=jax.random.key(0)
    )
    state = steps.init_state(toy_params(), tx, jax.random.key(0))
    assert jax.tree.structure(shape) == jax.tree.structure(state)


def test_rows_that_microbatches_do_not_divide_are_an_error():
    step, state = toy_step(num_microbatches=3)
    with pytest.raises(ValueError, match="divide by num_microbatches=3, got 4 rows"):
        step(state, toy_streams(rows=4), Frozen())


def test_a_missing_stream_names_term_and_streams():
    step, state = toy_step()
    streams = {"forget": toy_streams()["forget"], "holdout": {}}
    message = "Term 'retain' reads stream 'retain', but there is 'forget', 'holdout'"
    with pytest.raises(KeyError, match=message):
        step(state, streams, Frozen())


def test_wrong_settings_are_errors():
    tx = combine.weighted_sum()
    with pytest.raises(ValueError, match="at least one term"):
        steps.make_step({}, tx)
    for num_microbatches, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="num_microbatches"):
            steps.make_step({"a": Noisy("a")}, tx, num_microbatches=num_microbatches)
        with pytest.raises(error, match="num_microbatches"):
            steps.term_gradients(
                {"a": Noisy("a")}, {}, toy_streams(), Frozen(), KEY, num_microbatches
            )
    with pytest.raises(ValueError, match="at least one term"):
        steps.term_gradients({}, {}, {}, Frozen(), KEY)
