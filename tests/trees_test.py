# SPDX-License-Identifier: Apache-2.0
"""Paths, split and merge, and float32 products of trees."""

import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from jaxunlearn import trees
from tests import tiny

NAMES = st.sampled_from(["a", "b", "kernel", "mlp"])
TREES = st.recursive(
    st.integers(0, 9).map(np.float32),
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))


def test_paths_join_keys_with_slashes_in_tree_order():
    tree = {"b": {"y": 2, "x": 1}, "a": {"0": 0}, "list": [3, {"z": 4}]}
    assert trees.paths(tree) == {
        "a/0": 0,
        "b/x": 1,
        "b/y": 2,
        "list/0": 3,
        "list/1/z": 4,
    }
    assert list(trees.paths(tree).values()) == jax.tree.leaves(tree)


def test_map_with_path_gets_path_and_leaves():
    tree = {"a": {"b": 1}, "c": 2}
    mapped = trees.map_with_path(lambda path, x, y: (path, x, y), tree, tree)
    assert mapped == {"a": {"b": ("a/b", 1, 1)}, "c": ("c", 2, 2)}


@hypothesis.given(TREES, st.data())
def test_merge_undoes_split(tree, data):
    chosen = data.draw(st.sets(st.sampled_from(sorted(trees.paths(tree))), min_size=1))
    pattern = "|".join(re.escape(path) for path in chosen)
    matching, rest = trees.split(tree, pattern)
    assert set(trees.paths(matching)) == chosen
    assert set(trees.paths(rest)) == set(trees.paths(tree)) - chosen
    for merged in (trees.merge(matching, rest), trees.merge(rest, matching)):
        assert jax.tree.structure(merged) == jax.tree.structure(tree)
        assert all(
            a is b
            for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tree), strict=True)
        )


def test_split_matches_complete_paths_only():
    tree = {"mlp": {"down": 1, "downer": 2}, "x": {"mlp": {"down": 3}}}
    matching, rest = trees.split(tree, "mlp/down")
    assert matching == {
        "mlp": {"down": 1, "downer": None},
        "x": {"mlp": {"down": None}},
    }
    assert rest == {"mlp": {"down": None, "downer": 2}, "x": {"mlp": {"down": 3}}}


def test_split_of_everything_leaves_a_rest_without_leaves():
    tree = {"a": 1, "b": {"c": 2}}
    matching, rest = trees.split(tree, ".*")
    assert matching == tree and jax.tree.leaves(rest) == []
    assert trees.merge(tree, None) is tree


def test_split_names_the_leaves_if_none_matches():
    _, params = tiny.tiny_model()
    with pytest.raises(ValueError, match=r"'mlp/\.\*'.*'blocks/attention/k/kernel'"):
        trees.split(params, "mlp/.*")


def test_merge_refuses_overlapping_halves():
    with pytest.raises(ValueError, match="in both"):
        trees.merge({"a": 1, "b": None}, {"a": 1, "b": 2})


def test_gradients_exist_only_for_the_half_that_trains():
    model, params = tiny.tiny_model()
    train, rest = trees.split(params, r"blocks/mlp/down/kernel|final_norm/scale")
    batch = tiny.tiny_batch()

    def loss(params):
        return jnp.sum(jnp.sin(model.apply(params, batch).hidden))

    grads = jax.grad(lambda half: loss(trees.merge(half, rest)))(train)
    whole = trees.paths(jax.grad(loss)(params))
    assert list(trees.paths(grads)) == ["blocks/mlp/down/kernel", "final_norm/scale"]
    for path, leaf in trees.paths(grads).items():
        assert_allclose(leaf, whole[path], rtol=1e-4, atol=1e-5)


def test_inner_products_accumulate_in_float32():
    ones = {"a": jnp.ones([2**12], jnp.bfloat16), "b": {"c": jnp.ones([5, 2])}}
    twos = jax.tree.map(lambda x: x + x, ones)
    assert trees.vdot(ones, twos).dtype == jnp.float32
    assert float(trees.vdot(ones, twos)) == 2 * (2**12 + 10)  # bfloat16 stops at 256
    assert_allclose(trees.norm(twos), 2 * np.sqrt(2**12 + 10), rtol=1e-6)
    assert float(trees.vdot({"a": None}, {"a": None})) == 0.0
    assert float(trees.norm({})) == 0.0


def test_layers_of_a_stacked_leaf_train_and_merge_back():
    _, params = tiny.tiny_model()
    train, rest = trees.split(params, r"blocks/mlp/(down|up)/kernel@0,2")
    down = params["blocks"]["mlp"]["down"]["kernel"]
    chosen = trees.paths(train)
    assert list(chosen) == [
        f"blocks/mlp/{name}/kernel/layers:0,2" for name in ("down", "up")
    ]
    assert_allclose(train["blocks"]["mlp"]["down"]["kernel"]["layers:0,2"], down[::2])
    for halves in ((train, rest), (rest, train)):
        jax.tree.map(assert_allclose, trees.merge(*halves), params)
    moved = trees.merge(jax.tree.map(lambda x: x + 1, train), rest)
    change = moved["blocks"]["mlp"]["down"]["kernel"] - down
    assert_allclose(change, np.broadcast_to([[[1]], [[0]], [[1]]], down.shape), 1e-5)
    shapes = jax.eval_shape(lambda: params)
    train, rest = trees.split(shapes, r"blocks/mlp/down/kernel@1")
    assert [x.shape for x in jax.tree.leaves(train)] == [(1, *down.shape[1:])]
    assert trees.merge(train, rest) == shapes
    for wrong in ("@3", "@1,0", "@", "@1,x"):
        with pytest.raises(ValueError, match="ascending"):
            trees.split(params, "blocks/mlp/down/kernel" + wrong)
