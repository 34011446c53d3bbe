# SPDX-License-Identifier: Apache-2.0
"""Weights in several files: the index, copies, and files of other libraries."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxunlearn.io import hf


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_shards_and_their_index(tiny, tmp_path, mentions):
    model, params = tiny
    hf.save(model, params, tmp_path, max_shard_bytes=10_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    places = index.read_text()

    shards[1].rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError) as info:
        hf.load(tmp_path)
    mentions(info, "needs every shard", shards[1].name)
    (tmp_path / "elsewhere").rename(shards[1])

    index.unlink()
    with pytest.raises(FileNotFoundError) as info:
        hf.load(tmp_path)
    mentions(info, "model.safetensors.index.json", "no index")

    index.write_text("{")
    with pytest.raises(ValueError) as info:
        hf.load(tmp_path)
    mentions(info, "unreadable index")

    index.write_text(places)
    tensors = safetensors.numpy.load_file(shards[1])
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ValueError) as info:
        hf.load(tmp_path)
    mentions(info, next(iter(tensors)), shards[1].name)

    embedding = np.asarray(params["embed"]["embedding"])
    name = "model.embed_tokens.weight"
    safetensors.numpy.save_file(tensors | {name: embedding}, shards[1])
    assert_same(hf.load(tmp_path)[1], params)
    safetensors.numpy.save_file(tensors | {name: embedding + 1}, shards[1])
    with pytest.raises(ValueError) as info:
        hf.load(tmp_path)
    mentions(info, name, shards[0].name, shards[1].name)


def test_tensors_that_the_index_does_not_list(tiny, tmp_path):
    model, params = tiny
    hf.save(model, params, tmp_path, max_shard_bytes=10_000)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = tmp_path / index["weight_map"].pop("model.norm.weight")
    file.write_text(json.dumps(index))
    tensors = safetensors.numpy.load_file(shard) | {"extra.weight": np.ones(3)}
    safetensors.numpy.save_file(tensors, shard)
    with pytest.warns(UserWarning, match=r"'extra\.weight', 'model\.norm\.weight'"):
        assert_same(hf.load(tmp_path)[1], params)


def test_weights_of_another_library_are_not_read(tiny, tmp_path):
    model, params = tiny
    hf.save(model, params, tmp_path)
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        safetensors.numpy.save_file({"tok.weight": np.ones(3)}, tmp_path / name)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert_same(hf.load(tmp_path)[1], params)


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000 + b"]" * 100_000]
)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_settings_that_do_not_parse_are_named(tiny, tmp_path, mentions, name, content):
    model, params = tiny
    hf.save(model, params, tmp_path, max_shard_bytes=10_000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as info:
        hf.load(tmp_path)
    mentions(info, "hf.load needs", tmp_path / name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_attention_heads", 0), ("hidden_size", "32"), ("intermediate_size", [8, 9])],
)
def test_sizes_that_are_no_numbers_are_named(folder, mentions, name, value):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises((TypeError, ValueError)) as info:
        hf.load(folder)
    mentions(info, name, repr(value), file)
