# SPDX-License-Identifier: Apache-2.0
"""Loading and saving folders: round trips, placement, failed saves, refusals."""

import dataclasses
import errno
import json
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxunlearn import sharding, trees
from jaxunlearn.io import _safetensors, hf


def assert_same(a, b):
    assert trees.paths(a).keys() == trees.paths(b).keys()
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rewrite(folder, change):
    """Applies `change` to the tensors of a single-file folder."""
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize("max_bytes", [5_000, 20_000, 10**9])
def test_round_trip_is_exact(tiny, tmp_path, max_bytes):
    model, params = tiny
    hf.save(model, params, tmp_path, max_shard_bytes=max_bytes)
    again, loaded, tokenizer = hf.load(tmp_path)
    assert_same(loaded, params)
    assert tokenizer is None
    assert dataclasses.replace(again.config, source="{}") == model.config
    assert (tmp_path / "model.safetensors").is_file() == (max_bytes == 10**9)
    hf.save(again, loaded, tmp_path / "second", max_shard_bytes=max_bytes)
    for name in ("config.json", "model.safetensors"):
        if (tmp_path / name).is_file():
            first, second = tmp_path / name, tmp_path / "second" / name
            assert first.read_bytes() == second.read_bytes()


def test_the_official_reader_opens_our_files(tiny, folder):
    _, params = tiny
    with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        q = file.get_tensor("model.layers.1.self_attn.q_proj.weight")
    assert "lm_head.weight" in names
    np.testing.assert_array_equal(q.T, params["blocks"]["attention"]["q"]["kernel"][1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_files_round_once(tiny, tmp_path, dtype):
    model, params = tiny
    hf.save(model, params, tmp_path, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    rounded = jax.tree.map(lambda x: x.astype(dtype), params)
    _, loaded, _ = hf.load(tmp_path, dtype=dtype)
    assert_same(loaded, rounded)
    _, wide, _ = hf.load(tmp_path)
    assert_same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))


def test_float64_and_float16_files_load(folder):
    before = hf.load(folder)[1]

    def widen(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float64)

    rewrite(folder, widen)
    assert_same(hf.load(folder)[1], before)


def test_float16_refuses_values_that_are_too_large(tiny, tmp_path, mentions):
    model, params = tiny
    params = jax.tree.map(lambda x: x * 1e8, params)
    with pytest.raises(ValueError) as info:
        hf.save(model, params, tmp_path / "new", dtype="float16")
    mentions(info, "dtype='float16'", "model.embed_tokens.weight", "bfloat16")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "gguf"])
@pytest.mark.parametrize("sharded", [False, True])
def test_loading_past_the_range_of_float16_is_refused(tiny, tmp_path, stored, sharded):
    model, params = tiny
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    fits = {**params, "blocks": dict(params["blocks"])}
    fits["blocks"]["mlp"] = dict(params["blocks"]["mlp"])
    fits["blocks"]["mlp"]["up"] = {"kernel": kernel.at[1, 0, 0].set(65504.0)}
    large = {**fits, "blocks": dict(fits["blocks"])}
    large["blocks"]["mlp"] = dict(fits["blocks"]["mlp"])
    large["blocks"]["mlp"]["up"] = {"kernel": kernel.at[1, 0, 0].set(-98304.0)}
    name = "blk.1.ffn_up.weight" if stored == "gguf" else "layers.1.mlp.up_proj.weight"
    for place, values in (("fits", fits), ("large", large)):
        if stored == "gguf":
            pytest.importorskip("gguf")
            hf.save_gguf(model, values, tmp_path / f"{place}.gguf", scheme="f32")
        else:
            hf.save(model, values, tmp_path / place, dtype=stored)
    ending = ".gguf" if stored == "gguf" else ""
    mesh = dict(mesh=sharding.make_mesh(fsdp=2, devices=jax.devices()[:2]))
    mesh = mesh if sharded else {}
    with pytest.raises(ValueError, match=f"98304 in '.*{name}'"):
        hf.load(tmp_path / f"large{ending}", dtype="float16", **mesh)
    if not sharded:
        bfloat16 = hf.load(tmp_path / f"large{ending}", dtype="bfloat16")[1]
        assert bfloat16["blocks"]["mlp"]["up"]["kernel"][1, 0, 0] == -98304.0
        if stored != "bfloat16":  # which rounds the largest value of float16 up
            half = hf.load(tmp_path / f"fits{ending}", dtype="float16")[1]
            assert np.isfinite(half["blocks"]["mlp"]["up"]["kernel"]).all()


def test_load_sets_how_the_model_runs(folder):
    model, params, _ = hf.load(folder, compute_dtype="bfloat16", remat="none")
    assert model.config.compute_dtype == "bfloat16"
    assert model.config.remat == "none"
    assert params["embed"]["embedding"].dtype == jnp.float32


def test_loaded_params_can_be_donated(folder):
    _, params, _ = hf.load(folder)
    expected = jax.tree.map(lambda x: np.array(x) + 1, params)
    moved = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(
        params
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert_same(moved, expected)


def test_rotary_buffers_and_an_equal_tied_head_are_ignored(tiny, tmp_path, mentions):
    model, params = tiny
    config = dataclasses.replace(model.config, tied=True)
    params = {name: leaf for name, leaf in params.items() if name != "unembed"}
    hf.save(model._replace(config=config), params, tmp_path)
    embedding = np.asarray(params["embed"]["embedding"])

    def extras(tensors, head):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = head

    rewrite(tmp_path, lambda tensors: extras(tensors, embedding))
    assert_same(hf.load(tmp_path)[1], params)
    rewrite(tmp_path, lambda tensors: extras(tensors, embedding + 1))
    with pytest.raises(ValueError) as info:
        hf.load(tmp_path)
    mentions(info, "lm_head.weight", "tie_word_embeddings", "Set")


def test_generation_settings_and_unknown_ones_survive(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"initializer_range": 0.07, "eos_token_id": [2, 5], "note": "kept"}
    (folder / "config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": [2, 5, 7], "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    model, params, _ = hf.load(folder)
    hf.save(model, params, folder / "again")
    assert json.loads((folder / "again/config.json").read_text()) == settings
    saved = json.loads((folder / "again/generation_config.json").read_text())
    assert saved == generation


def test_a_smaller_save_removes_earlier_shards(tiny, tmp_path):
    model, params = tiny
    for max_bytes in (10_000, 10**9, 20_000):
        hf.save(model, params, tmp_path, max_shard_bytes=max_bytes)
        assert_same(hf.load(tmp_path)[1], params)
        single = (tmp_path / "model.safetensors").is_file()
        shards = list(tmp_path.glob("model-*.safetensors"))
        assert single == (max_bytes == 10**9) == (not shards)
        totals = {shard.name.split("-of-")[1] for shard in shards}
        assert len(totals) == (0 if single else 1)


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_leaves_the_earlier_save(
    tiny, tmp_path, monkeypatch, mentions, earlier
):
    model, params = tiny
    target = tmp_path / "model"
    if earlier:
        hf.save(model, params, target)
    before = sorted(file.name for file in tmp_path.rglob("*"))
    write, calls = _safetensors._write_shard, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(_safetensors, "_write_shard", full)
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(OSError) as info:
        hf.save(model, other, target, max_shard_bytes=10_000)
    assert info.value.errno == errno.ENOSPC
    state = "unchanged" if earlier else "removed"
    mentions(info, "hf.save needs", target, "No space left", state, "bfloat16")
    assert sorted(file.name for file in tmp_path.rglob("*")) == before
    if earlier:
        assert_same(hf.load(target)[1], params)


def test_save_refuses_other_params(tiny, tmp_path, mentions):
    model, params = tiny
    half, _ = trees.split(params, r"blocks/mlp/.*")
    with pytest.raises(ValueError) as info:
        hf.save(model, half, tmp_path / "new")
    mentions(info, "missing", "'embed/embedding'", "trees.merge")
    wrong = params | {"final_norm": {"scale": jnp.ones(3), "more": jnp.ones(2)}}
    with pytest.raises(ValueError) as info:
        hf.save(model, wrong, tmp_path / "new")
    mentions(info, "final_norm/more", "final_norm/scale should be (32,) and is (3,)")
    with pytest.raises(ValueError) as info:
        hf.save(model._replace(config=None), params, tmp_path / "new")
    mentions(info, "hf.save needs", "config=None")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as info:
        hf.save(model, params, tmp_path / "file")
    mentions(info, "needs a folder", tmp_path / "file")
    with pytest.raises(ValueError, match="dtype.*float31"):
        hf.save(model, params, tmp_path / "new", dtype="float31")
    assert not (tmp_path / "new").exists()


def test_wrong_tensors_are_reported_together(folder, mentions):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((2, 5), np.float32)

    rewrite(folder, change)
    with pytest.raises(ValueError) as info:
        hf.load(folder)
    mentions(
        info,
        "hf.load needs exactly the 21 tensors",
        folder,
        "2 missing: 'model.norm.weight', 'model.layers.1.mlp.up_proj.weight'",
        "1 unexpected: 'model.layers.2.mlp.up_proj.weight'",
        "model.layers.0.self_attn.k_proj.weight should be (16, 32) and is (2, 5)",
        "config.json",
    )


def test_truncated_and_corrupt_files(folder, mentions):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]

    def refusal(data):
        file.write_bytes(data)
        with pytest.raises(ValueError) as info:
            hf.load(folder)
        mentions(info, "hf.load needs", file)
        return info

    mentions(refusal(content[:-100]), "truncated", len(content), len(content) - 100)
    mentions(refusal(content[: 8 + length // 2]), "truncated")
    mentions(refusal(content[:5]), "header length")
    mentions(refusal(b"\xff" * 8 + content[8:]), "header length")
    mentions(
        refusal(content[:8] + b"#" * length + content[8 + length :]), "does not parse"
    )
    text = content[8 : 8 + length].replace(b"[64,32]", b"[65,32]", 1)
    mentions(refusal(content[:8] + text + content[8 + length :]), "bytes for")


def test_tensors_of_an_unsupported_dtype_are_refused(folder, mentions):
    def change(tensors):
        tensors["model.norm.weight"] = np.ones(32, np.int8)

    rewrite(folder, change)
    with pytest.raises(ValueError) as info:
        hf.load(folder)
    mentions(info, "'BF16'", "'I8'", "'model.norm.weight'", "original release")


def test_paths_without_a_model_are_refused(
    tiny, folder, tmp_path, mentions, monkeypatch
):
    with pytest.raises(FileNotFoundError) as info:
        hf.load(tmp_path / "absent")
    mentions(info, "hf.load needs a folder", tmp_path / "absent")

    with pytest.raises(ValueError) as info:
        hf.load(folder / "model.safetensors")
    mentions(info, "needs a folder", "model.safetensors")

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError) as info:
        hf.load(empty)
    mentions(info, "needs config.json", empty, "nothing")

    (empty / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError) as info:
        hf.load(empty)
    mentions(info, "needs weights", "'config.json'")

    (empty / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError) as info:
        hf.load(empty)
    mentions(info, "safetensors", "'pytorch_model.bin'", "torch", "python -c")
    mentions(
        info, f"M.from_pretrained('{empty}').save_pretrained('{empty}-safetensors'"
    )

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PermissionError) as info:
        hf.load(folder)
    mentions(info, "needs to read", folder, "Permission denied")


def test_a_download_without_a_network_is_an_error(mentions, monkeypatch):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(OSError) as info:
        hf.load("nobody-at-all/no-such-model")
    mentions(info, "nobody-at-all/no-such-model", "download failed", "local folder")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError) as info:
        hf.load("nobody-at-all/no-such-model")
    mentions(info, "huggingface_hub", "jaxunlearn[hf]")
