# SPDX-License-Identifier: Apache-2.0
"""Loading onto a mesh: the same numbers, in their shards, and no more than a share."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxunlearn import sharding, trees
from jaxunlearn.io import _safetensors, hf
from jaxunlearn.models import decoder
from tests.io import share

MESHES = [dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2), dict(tensor=8)]
FAMILIES = {
    "llama": dict(qkv_bias=True, out_bias=True, mlp_bias=True),
    "phi3": {},
}


def assert_same(a, b):
    assert trees.paths(a).keys() == trees.paths(b).keys()
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tiny, tmp_path_factory):
    """A folder whose tensors hold a layer of one leaf, or of several side by side."""
    config = dataclasses.replace(
        tiny[0].config, family=request.param, **FAMILIES[request.param]
    )
    model = decoder.make(config)
    params = model.init(jax.random.key(1))
    params = jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape) / 7, params)
    folder = tmp_path_factory.mktemp(request.param)
    hf.save(model, params, folder)
    return folder


@pytest.fixture(params=MESHES, ids=str)
def mesh(request):
    return sharding.make_mesh(**({"fsdp": 1} | request.param))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_equal_a_load_on_one_device(saved, mesh, dtype, monkeypatch):
    monkeypatch.setattr(_safetensors, "_MAPPED_BYTES", 500)  # several maps per tensor
    _, expected, _ = hf.load(saved, dtype=dtype)
    model, params, _ = hf.load(saved, dtype=dtype, mesh=mesh)
    assert_same(params, expected)
    wanted = sharding.by_rules(expected, mesh, model.rules)
    for path, leaf in trees.paths(params).items():
        assert leaf.sharding == trees.paths(wanted)[path], path
        assert leaf.dtype == dtype
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    parts = mesh.shape["fsdp"], mesh.shape["tensor"]
    shard = (2, 32 // parts[0], 48 // parts[1])
    assert kernel.addressable_shards[0].data.shape == shard


def test_rules_may_shard_layers(saved):
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    rules = [(r"blocks/.*/kernel", ("fsdp", None, "tensor")), (r".*", ())]
    _, params, _ = hf.load(saved, mesh=mesh, rules=rules)
    assert_same(params, hf.load(saved)[1])
    assert params["blocks"]["mlp"]["up"]["kernel"].sharding.spec == P(*rules[0][1])
    assert params["embed"]["embedding"].sharding.is_fully_replicated


def test_sharded_params_can_be_saved_and_donated(saved, tmp_path):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model, params, _ = hf.load(saved, mesh=mesh)
    expected = jax.tree.map(np.array, hf.load(saved)[1])
    hf.save(model, params, tmp_path / "again")
    assert_same(hf.load(tmp_path / "again")[1], expected)
    add = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    assert_same(add(params), jax.tree.map(lambda x: x + 1, expected))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_each_piece_is_read_once(saved, monkeypatch):
    """Replicas share a reading, and what is read adds up to the tensors of the file."""
    read, sizes = _safetensors.read, []

    def counted(entry, index):
        values = read(entry, index)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(_safetensors, "read", counted)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    _, params, _ = hf.load(saved, mesh=mesh)
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(params))
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    assert max(sizes) <= largest / 4


def test_rules_that_do_not_fit_are_errors(saved, mentions):
    mesh = sharding.make_mesh(fsdp=8)
    for rules, part in (
        ([(r"embed/.*", ("fsdp",))], "'blocks/attention/"),
        ([(r".*", ("rows",))], "'rows'"),
        ([(r".*", (None, None, "fsdp", None))], "at most"),
    ):
        with pytest.raises(ValueError) as info:
            hf.load(saved, mesh=mesh, rules=rules)
        mentions(info, part)
    with pytest.raises(ValueError) as info:
        hf.load(saved, mesh=sharding.make_mesh(fsdp=1, data=1, tensor=8), rules=[])
    mentions(info, "none for")
    with pytest.raises(ValueError) as info:
        hf.load(saved, rules=[(r".*", ())])
    mentions(info, "mesh=None", "sharding.make_mesh")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.slow
def test_a_process_with_too_little_memory_for_the_model_loads_its_shards(
    tiny, tmp_path
):
    sizes = dict(vocab=8192, width=1024, layers=4, heads=8, kv_heads=8, head_dim=128)
    config = dataclasses.replace(
        tiny[0].config, family="phi3", hidden=8192, **sizes
    )  # 537 MB, of which up, gate and down have 134 MB each
    share.write_sparse(tmp_path, config)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    run = [sys.executable, "-m", "tests.io.share", str(tmp_path), address]
    started = [
        subprocess.Popen(
            [*run, rank],
            cwd=Path(share.__file__).parents[2],
            env=os.environ | {"XLA_FLAGS": devices},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        ended = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], ended
    reports = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    for report in reports:
        assert 0.5 <= report["held"] < 0.501  # half of the devices
        assert report["grew"] < 0.65  # the highest resident memory, while it loaded
        assert report["plain"] == "no memory"
        assert report["free"] > 0.55  # when that failed: room for the share once more
    for path, expected in {
        "embed/embedding": 1,
        "blocks/mlp/up/kernel": 4,  # the last leaf of a fused tensor, in four layers
        "blocks/mlp/down/kernel": 4,
        "final_norm/scale": 8,  # whole on every device
    }.items():
        assert sum(report["marks"][path] for report in reports) == expected, path
