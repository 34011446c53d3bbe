# SPDX-License-Identifier: Apache-2.0
"""The table of names covers every leaf once, and agrees with gguf's own table."""

import dataclasses
import math

import pytest

from jaxunlearn import trees
from jaxunlearn.io import _names
from jaxunlearn.models import decoder


@pytest.fixture
def config(tiny):
    more = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": True}
    return dataclasses.replace(tiny[0].config, **more)


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_every_leaf_is_filled_exactly_once(config, kind):
    shapes = trees.paths(decoder.shapes(config))
    filled = {}
    for tensor in _names.tensors(config, kind).values():
        filled.setdefault(tensor.path, []).append(tensor)
    assert filled.keys() == shapes.keys()
    for path, parts in filled.items():
        assert sum(math.prod(part.shape) for part in parts) == shapes[path].size
        layers = [part.layer for part in parts]
        assert layers == [None] or layers == list(range(config.layers))


def test_names_are_those_of_gguf(config):
    gguf = pytest.importorskip("gguf")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.layers)
    for row in _names.TABLE:
        name = table.get_name(row.hf.format(1), try_suffixes=(".weight", ".bias"))
        assert name == row.gguf.format(1)


def test_only_known_buffers_are_harmless():
    assert _names.buffers(
        ["model.layers.3.self_attn.rotary_emb.inv_freq", "rope_freqs.weight"]
    )
    assert not _names.buffers(["score.weight", "model.layers.0.mlp.experts.0.weight"])
