# SPDX-License-Identifier: Apache-2.0
"""Gradients of terms by themselves, and the optimizer chains that cannot take them."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import _step as steps
from jaxunlearn import combine, trees
from jaxunlearn.typing import Frozen
from tests import step_test

KEY = step_test.KEY


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_term_gradients_are_those_of_each_mean_over_the_whole_batch(num_microbatches):
    parts, params = step_test.language_terms()
    streams = step_test.language_streams()

    def mean(params, name):
        total, _ = parts[name](params, streams, None, KEY)
        return total.mean()

    run = jax.jit(
        partial(steps.term_gradients, parts, num_microbatches=num_microbatches)
    )
    values, grads, metrics = run(params, streams, Frozen(), KEY)
    assert set(values) == set(grads) == {"forget", "retain"}
    assert set(metrics) == {"forget/nll", "retain/nll"}
    for name in parts:
        value, grad = jax.jit(jax.value_and_grad(mean), static_argnums=1)(params, name)
        assert values[name].dtype == jnp.float32 and values[name].shape == ()
        assert_allclose(values[name], value, rtol=1e-5)
        step_test.close(grads[name], grad)
    assert_allclose(metrics["retain/nll"], values["retain"], rtol=1e-6)


def test_term_gradients_exist_only_for_the_leaves_that_train():
    parts, params = step_test.language_terms()
    train, rest = trees.split(params, r"kernel")
    _, grads, _ = jax.jit(partial(steps.term_gradients, parts))(
        train, step_test.language_streams(), Frozen(rest), KEY
    )
    for name in parts:
        assert trees.paths(grads[name]).keys() == trees.paths(train).keys()


@pytest.mark.parametrize("optimizer", [optax.sgd, optax.adam])
@pytest.mark.parametrize("names", [("forget",), ("forget", "retain")])
def test_a_chain_without_a_combiner_is_refused(optimizer, names):
    tx = optimizer(0.1)
    step = steps.make_step({name: step_test.Noisy(name) for name in names}, tx)
    state = steps.init_state(step_test.toy_params(), tx, KEY)
    with pytest.raises(ValueError, match=r"combiner.*weighted_sum"):
        with jax.numpy_dtype_promotion("standard"):
            jax.jit(step)(state, step_test.toy_streams(), Frozen())


@pytest.mark.parametrize("make", [combine.blur, combine.weighted_sum])
def test_multi_steps_around_a_combiner_is_refused(make):
    tx = optax.MultiSteps(optax.chain(make(), optax.sgd(0.1)), every_k_schedule=2)
    for given in (tx, tx.gradient_transformation()):
        step = steps.make_step(
            {x: step_test.Noisy(x) for x in ("forget", "retain")}, given
        )
        state = steps.init_state(step_test.toy_params(), given, KEY)
        with pytest.raises(ValueError, match="MultiSteps.*num_microbatches"):
            jax.jit(step)(state, step_test.toy_streams(), Frozen())


def test_a_combiner_without_extra_arguments_and_multi_steps_behind_it_work():
    def update(grads, state, params=None):
        return jax.tree.map(jnp.subtract, grads["retain"], grads["forget"]), state

    combiner = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    later = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
    for tx in (combiner, optax.chain(combiner, later.gradient_transformation())):
        step, state = step_test.toy_step(tx=tx)
        with jax.numpy_dtype_promotion("standard"):
            state, metrics = step(state, step_test.toy_streams(), Frozen())
        assert bool(metrics["finite"]) and int(state.step) == 1
