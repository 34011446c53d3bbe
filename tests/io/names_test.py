# SPDX-License-Identifier: Apache-2.0
"""The table of names covers every leaf once and agrees with that of gguf."""

import dataclasses

import numpy as np
import pytest

from jaxunlearn import trees
from jaxunlearn.io import _names
from jaxunlearn.models import decoder


@pytest.fixture
def config(tiny):
    more = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": True}
    return dataclasses.replace(tiny[0].config, **more)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "hf"), ("llama", "gguf"), ("phi3", "hf")]
)
def test_every_leaf_is_filled_exactly_once(config, family, kind):
    config = dataclasses.replace(config, family=family, qk_norm=family == "llama")
    shapes = trees.paths(decoder.shapes(config))
    filled = {path: np.zeros(leaf.shape, int) for path, leaf in shapes.items()}
    for tensor in _names.tensors(config, kind).values():
        ones = np.ones(tensor.shape, int)
        for part in tensor.parts:
            leaf = filled[part.path]
            leaf = leaf if part.layer is None else leaf[part.layer]
            full = tuple(slice(0, size) for size in leaf.shape)
            for here, there in _names.cuts(tensor, part, full):
                leaf[here] += ones[there].T if tensor.transpose else ones[there]
                ones[there] = 0
        assert not ones.any()
    for path, counts in filled.items():
        assert np.all(counts == 1), path


@pytest.mark.parametrize("piece", [(0, 12), (2, 4), (3, 11), (5, 6)])
@pytest.mark.parametrize("transposed", [False, True])
def test_pieces_of_leaves_that_alternate_by_head(piece, transposed):
    """Three heads of four units a leaf, on an axis that starts with another leaf's."""
    part = _names.Part("k", None, 3, 2, 4)
    tensor = _names.Tensor((18, 5) if transposed else (5, 18), transposed, (part,))
    file = np.arange(90).reshape(tensor.shape)
    ours = (
        file.T if transposed else file
    )  # [in, out]: q0 k0 q1 k1 q2 k2, q with two units
    full = ours.reshape(5, 3, 6)[:, :, 2:].reshape(5, 12)
    index = (slice(1, 3), slice(*piece))
    found = np.full(full[index].shape, -1)
    for here, there in _names.cuts(tensor, part, index):
        found[here] = file[there].T if transposed else file[there]
    assert np.array_equal(found, full[index])


@pytest.mark.parametrize("transposed", [False, True])
def test_leaves_are_concatenated_or_alternate_by_head(config, transposed):
    """Two heads of one unit each: the file holds q0 k0 q1 k1, or q0 q1 k0 k1."""
    for groups, order in ((2, [0, 2, 1, 3]), (1, [0, 1, 2, 3])):
        size = 2 // groups
        parts = [_names.Part("q", None, groups, 0, size)]
        parts += [_names.Part("k", None, groups, size, size)]
        tensor = _names.Tensor(
            (4, 3) if transposed else (3, 4), transposed, tuple(parts)
        )
        full = np.arange(12).reshape(3, 4)  # [in, out]: q0 q1 k0 k1 as we keep them
        file = np.empty(tensor.shape, int)
        for part, leaf in zip(parts, (full[:, :2], full[:, 2:]), strict=True):
            for here, there in _names.cuts(tensor, part, (slice(0, 3), slice(0, 2))):
                file[there] = leaf[here].T if transposed else leaf[here]
        assert np.array_equal((file.T if transposed else file), full[:, order])


def test_names_are_those_of_gguf(config):
    gguf = pytest.importorskip("gguf")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.layers)
    for name, theirs in zip(
        _names.tensors(config, "hf"), _names.tensors(config, "gguf"), strict=True
    ):
        assert table.get_name(name, try_suffixes=(".weight", ".bias")) == theirs


def test_names_of_olmo2_are_those_of_gguf(config):
    gguf = pytest.importorskip("gguf")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OLMO2, config.layers)
    norms = {"pre_norms": False, "post_norms": True, "qk_norm_over": "all"}
    config = dataclasses.replace(config, family="olmo2", **norms)
    for name, theirs in zip(
        _names.tensors(config, "hf"), _names.tensors(config, "gguf"), strict=True
    ):
        assert table.get_name(name, try_suffixes=(".weight", ".bias")) == theirs


def test_only_known_buffers_are_ignored():
    assert _names.buffers(
        ["model.layers.3.self_attn.rotary_emb.inv_freq", "rope_freqs.weight"]
    )
    assert not _names.buffers(["score.weight", "model.layers.0.mlp.experts.0.weight"])
