# SPDX-License-Identifier: Apache-2.0
"""Terms at other parameters: values by hand and gradients by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jaxunlearn as ju
from jaxunlearn import losses, terms, trees
from jaxunlearn.typing import Total
from tests import tiny


class Quadratic:
    """sum over the leaves of c * w^2 / 2, with c from the batch."""

    reads, needs_ref = ("rows",), False

    def __call__(self, params, streams, ref_params, key):
        c = streams["rows"]["c"]
        loss = sum(jnp.sum(x * x) for x in jax.tree.leaves(params)) / 2
        return Total(jnp.sum(c) * loss, jnp.int32(c.size)), {}


PARAMS = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
STREAMS = {"rows": {"c": jnp.ones(2)}}
KEY = jax.random.key(0)


def gradient(term, params=PARAMS, ref_params=None):
    def mean(params):
        return term(params, STREAMS, ref_params, KEY)[0].mean()

    return jax.value_and_grad(mean)(params)


def test_the_gradient_of_sam_is_that_at_the_ascended_point():
    term = terms.displaced(Quadratic(), terms.ascend(Quadratic(), radius=0.5))
    value, found = gradient(term)  # w + 0.5 w / |w| with |w| = 5: 1.1 w
    assert_allclose(value, 1.1**2 * 25 / 2, rtol=1e-6)
    assert_allclose(found["a"], [3.3, 0.0], rtol=1e-6)
    assert_allclose(found["b"], [4.4], rtol=1e-6)


def test_only_the_named_leaves_move():
    move = terms.ascend(Quadratic(), radius=0.5)
    _, found = gradient(terms.displaced(Quadratic(), move, leaves="a"))
    assert_allclose(found["a"], [3.5, 0.0], rtol=1e-6)
    assert_allclose(found["b"], [4.0], rtol=1e-6)


def test_an_attackers_steps_and_the_way_to_the_reference():
    move = terms.descend(Quadratic(), learning_rate=0.1, steps=2)
    _, found = gradient(terms.displaced(Quadratic(), move))
    assert_allclose(found["b"], [4 * 0.9**2], rtol=1e-6)
    ref = {"a": jnp.zeros(2), "b": jnp.array([8.0])}
    halfway = terms.displaced(Quadratic(), terms.toward_reference(0.5))
    assert halfway.needs_ref
    _, found = gradient(halfway, ref_params=ref)
    assert_allclose(found["b"], [6.0], rtol=1e-6)
    with pytest.raises(ValueError, match="ref_params=None"):
        gradient(halfway)


def test_random_displacements_are_averaged_over_draws():
    term = terms.displaced(Quadratic(), terms.gaussian(0.1), draws=400)
    value, found = gradient(term)
    assert_allclose(value, (25 + 3 * 0.01) / 2, rtol=0.01)
    assert_allclose(found["b"], [4.0], rtol=0.01)


def test_a_gradient_of_zero_moves_nothing():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    term = terms.displaced(Quadratic(), terms.ascend(Quadratic(), radius=1.0))
    _, found = gradient(term, zeros)
    assert not any(jnp.any(x) for x in jax.tree.leaves(found))


def test_finite_differences_of_a_language_model():
    model, params = tiny.bigram_model()
    forget = terms.on_logps(losses.nll, model, "forget", reduce="token")
    streams = {"forget": tiny.tiny_batch()}
    term = terms.displaced(forget, terms.ascend(forget, radius=0.3), leaves="kernel")

    @jax.jit
    def parts(params):
        moving, rest = trees.split(params, "kernel")
        d = term.move(moving, rest, streams, None, KEY)
        there = trees.merge(ju.edits.add(moving, d), rest)
        return there, term(params, streams, None, KEY)[0].mean()

    @jax.jit
    def at(params):
        return forget(params, streams, None, KEY)[0].mean()

    there, value = parts(params)
    assert_allclose(value, at(there), rtol=1e-6)
    assert_allclose(
        trees.norm(jax.tree.map(jnp.subtract, there, params)), 0.3, rtol=1e-5
    )
    # At a fixed displacement: with d free to follow, another slope would be found.
    grads = jax.grad(lambda p: term(p, streams, None, KEY)[0].mean())(params)
    rng = np.random.default_rng(0)
    way = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
    )
    ends = [
        at(jax.tree.map(lambda x, d, h=h: x + h * d, there, way)) for h in (-1e-2, 1e-2)
    ]
    assert_allclose(trees.vdot(grads, way), (ends[1] - ends[0]) / 2e-2, rtol=5e-3)


def test_a_step_reads_the_streams_of_term_and_move():
    model, params = tiny.bigram_model()
    forget, retain = (
        terms.on_logps(losses.nll, model, name, reduce="token")
        for name in ("forget", "retain")
    )
    attacked = terms.displaced(forget, terms.descend(retain, learning_rate=1, steps=1))
    assert attacked.reads == ("forget", "retain")
    streams = {name: tiny.tiny_batch(seed=i) for i, name in enumerate(attacked.reads)}
    values, grads, _ = jax.jit(
        lambda p: ju.term_gradients({"f": attacked}, p, streams, ju.Frozen(), KEY, 2)
    )(params)
    assert jnp.isfinite(values["f"]) and jnp.any(grads["f"]["kernel"])


def test_bad_settings():
    for bad in (
        lambda: terms.ascend(Quadratic(), radius=0),
        lambda: terms.gaussian(-1),
        lambda: terms.descend(Quadratic(), learning_rate=1.0, steps=0),
        lambda: terms.toward_reference(2.0),
        lambda: terms.displaced(Quadratic(), terms.gaussian(1.0), draws=0),
    ):
        with pytest.raises(ValueError):
            bad()
