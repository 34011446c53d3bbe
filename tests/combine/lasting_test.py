# SPDX-License-Identifier: Apache-2.0
"""Combiners of methods that resist relearning: agree and collapse, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import combine, edits


def grads(forget, retain):
    return {
        name: {"w": jnp.array(x, jnp.float32)}
        for name, x in (("forget", forget), ("retain", retain))
    }


def test_agree_moves_entries_whose_signs_are_those_of_the_average():
    tx = combine.agree(momentum=0.5, strength=10.0)
    state = tx.init({"w": jnp.zeros(4)})
    first = grads([3.0, -4.0, 1.0, 5.0], [1.0, -1.0, -1.0, 0.0])
    update, state = tx.update(first, state)
    assert_allclose(update["w"], [1 + 6.0, -1 - 8.0, -1.0, 0.0], rtol=1e-6)
    assert_allclose(state.stats["agree"], 0.5)
    # The average is now 0.25 - 0.05 > 0 in entry 0, though the gradient is negative.
    second = grads([1.0, 0.0, 0.0, 0.0], [-0.1, 0.0, 0.0, 0.0])
    update, _ = tx.update(second, state)
    assert_allclose(update["w"], [-0.1 + 10.0, 0.0, 0.0, 0.0], rtol=1e-6)


def test_agree_without_normalisation_and_with_bad_settings():
    tx = combine.agree(normalize=False, momentum=0.0)
    both = grads([2.0, 2.0], [1.0, -1.0])
    update, _ = tx.update(both, tx.init({"w": jnp.zeros(2)}))
    assert_allclose(update["w"], [3.0, -1.0])
    with pytest.raises(ValueError, match="momentum=1"):
        combine.agree(momentum=1.0)
    with pytest.raises(ValueError, match="two different terms"):
        combine.agree(upper="forget")


def matrices(seed):
    x = np.random.default_rng(seed).normal(size=(2, 12, 9))
    return {"mlp": {"kernel": jnp.asarray(x, jnp.float32), "bias": jnp.ones((2, 9))}}


@pytest.mark.parametrize("basis", [None, "retain"])
def test_collapse_filters_one_term_as_the_edit_does_until_the_next_refresh(basis):
    tx = combine.collapse(
        combine.weighted_sum(), rank=3, basis=basis, momentum=0.0, refresh=2
    )
    update = jax.jit(tx.update)
    state = tx.init(matrices(0))
    first, kernel = {}, None
    for step in range(3):
        both = {"forget": matrices(2 * step), "retain": matrices(2 * step + 1)}
        first = both if step % 2 == 0 else first
        result, state = update(both, state)
        kernel = edits.collapse(
            {"kernel": both["forget"]["mlp"]["kernel"]},
            3,
            basis={"kernel": first[basis or "forget"]["mlp"]["kernel"]},
        )["kernel"]
        assert_allclose(
            result["mlp"]["kernel"], kernel + both["retain"]["mlp"]["kernel"], atol=2e-5
        )
        assert_allclose(result["mlp"]["bias"], 2.0)
        assert 0 < state.stats["removed"] < 1


def test_collapse_refuses_params_without_matrices_and_bad_settings():
    tx = combine.collapse(combine.weighted_sum(), rank=2, power=float("inf"))
    with pytest.raises(ValueError, match="kernel"):
        tx.init({"norm": {"scale": jnp.ones(3)}})
    with pytest.raises(ValueError, match="refresh"):
        combine.collapse(combine.weighted_sum(), rank=2, refresh=0)
    with pytest.raises(ValueError, match="power"):
        combine.collapse(combine.weighted_sum(), rank=2, power=-1.0)
