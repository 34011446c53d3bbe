# SPDX-License-Identifier: Apache-2.0
"""Several processes, slices, and rules that override a model's."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxunlearn import sharding
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


def start(output, devices, *join):
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ['XLA_FLAGS']} {count}"  # of a flag, the last value counts
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    command = [sys.executable, "-m", "tests.two_processes", str(output), *join]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one_of_eight(tmp_path):
    """Each reads half of the rows, and no other; all collectives go over loopback."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    pair = [
        start(tmp_path / "two.npz", 4, coordinator, "2", str(process))
        for process in (0, 1)
    ]
    try:
        for process in pair:
            finish(process)
    finally:
        for process in pair:
            process.kill()
    finish(start(tmp_path / "one.npz", 8))
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert set(one) == set(two) and len(one) > 10
    for name in one:
        if name != "log:seconds":
            np.testing.assert_allclose(
                two[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name
            )
    read = np.load(tmp_path / "one.npz.0.npz")
    shares = [np.load(tmp_path / f"two.npz.{process}.npz") for process in (0, 1)]
    assert read["scored"].tolist() == list(range(24))
    for name, rows in read.items():
        halves = [share[name].reshape(-1, 4) for share in shares]
        np.testing.assert_array_equal(np.hstack(halves), rows.reshape(-1, 8))


@dataclasses.dataclass(frozen=True)
class Stub:
    """As much of a device as laying out a mesh needs."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "stub"
    client: object = None


def test_only_data_crosses_slices():
    devices = [Stub(i, slice_index=i % 2) for i in range(16)]
    mesh = sharding.make_mesh(data=4, fsdp=2, tensor=2, devices=devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "expert": 1} | {
        "context": 1,
        "tensor": 2,
    }
    found = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for rows in found:  # a replica lies on one slice
        assert len(set(rows.flat)) == 1
    assert sorted(found[:, 0, 0, 0, 0]) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="multiple of the 2 slices, got data=1"):
        sharding.make_mesh(data=1, fsdp=8, tensor=2, devices=devices)


def test_override_puts_rules_first_and_they_must_match_a_leaf():
    model, params = tiny.tiny_model()
    mesh = sharding.make_mesh()
    rules = sharding.override(model.rules, [(r"mlp/down/kernel", ())], params)
    shards = sharding.by_rules(params, mesh, rules)
    assert shards["blocks"]["mlp"]["down"]["kernel"].spec == P()
    assert shards["blocks"]["mlp"]["up"]["kernel"].spec != P()
    with pytest.raises(ValueError, match="'mlp/down/kernl', which matches none of"):
        sharding.override(model.rules, [(r"mlp/down/kernl", ())], params)


def test_initialize_accepts_one_process_and_refuses_bad_arguments():
    sharding.initialize("localhost:1234", 1, 0)
    assert jax.process_count() == 1
    with pytest.raises(ValueError, match="no num_processes and no process_id"):
        sharding.initialize("localhost:1234")
    with pytest.raises(ValueError, match="got process_id=2"):
        sharding.initialize("localhost:1234", 2, 2)
    with pytest.raises(ValueError, match="'host:port', got 'localhost'"):
        sharding.initialize("localhost", 2, 0)
    jax.devices()
    with pytest.raises(RuntimeError, match="the first call of the script"):
        sharding.initialize("localhost:1234", 2, 0)
