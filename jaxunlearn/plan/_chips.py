# SPDX-License-Identifier: Apache-2.0
"""Public peak numbers of chips, and the devices of described topologies."""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from jaxunlearn import _checks

GIB = 2.0**30


class Chip(NamedTuple):
    """Peak numbers of one chip.

    Attributes:
        flops: bfloat16 FLOP/s.
        hbm_bytes: capacity of its memory, bytes.
        hbm_rate: bandwidth of that memory, bytes/s.
        ici_rate: bytes/s that a chip can send over all links to its neighbours, half of
            the vendor's number, which counts both directions.
    """

    flops: float
    hbm_bytes: float
    hbm_rate: float
    ici_rate: float


CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1.2e12, 150e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 1.638e12, 400e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7.38e12, 600e9),
}
"""From the tables "key specifications" on Google Cloud's pages about each TPU version,
in 2026. These give capacities in GB or GiB; both are taken as 2^30 bytes."""

GPUS = {
    "a100": Chip(312e12, 80 * GIB, 2.039e12, 300e9),
    "h100": Chip(989e12, 80 * GIB, 3.35e12, 450e9),
    "h200": Chip(989e12, 141 * GIB, 4.8e12, 450e9),
}
"""NVIDIA's SXM modules, from its data sheets, without sparsity; ici_rate is NVLink's.
These GPUs cannot be described to the compiler: they serve to rate a measured step."""

# Part of jax's device_kind, in lower case -> name; the first that is found counts.
_KINDS = {
    "v5 lite": "v5e",
    "v5e": "v5e",
    "v5": "v5p",
    "v6": "v6e",
    "v4": "v4",
    "tpu7x": "tpu7x",
    "h200": "h200",
    "h100": "h100",
    "a100": "a100",
}


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """bfloat16 FLOP/s of devices of this machine together; None for an unknown kind.

    The numbers are those of CHIPS and GPUS. On v4 and tpu7x two devices are one chip.
    """
    kind = devices[0].device_kind.lower()
    name = next((name for part, name in _KINDS.items() if part in kind), None)
    if name is None:
        return None
    if name in GPUS:
        return GPUS[name].flops * len(devices)
    return CHIPS[name].flops * len(devices) / per_chip(devices)


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology, for a mesh.

    Args:
        topology: chip and shape, such as "v5e:8x8" or "v5p:4x4x4", which the TPU
            compiler describes without a TPU; or "cpu:8", devices of this process.
    Returns:
        Devices. On v4 and tpu7x a device is one of the two cores of a chip.
    Raises:
        ValueError: for an unknown chip or shape, or more CPU devices than exist.
        ImportError: for a TPU topology without libtpu.
        NotImplementedError: for GPUs, whose compiler needs a GPU.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not found:
        raise ValueError(
            "plan.topology_devices needs a topology such as 'v5p:4x4x4', 'v5e:8x8' or "
            f"'cpu:8', got {topology!r}."
        )
    kind, shape = found.groups()
    if kind == "cpu":
        return _cpus(shape, topology)
    if kind in ("gpu", "cuda", "rocm", "h100", "h200", "a100", "b200"):
        raise NotImplementedError(
            f"plan.topology_devices needs a TPU or CPU topology, got {topology!r}: jax "
            "cannot describe GPUs. Run the step on a machine with such a GPU, or plan "
            "for 'cpu:<devices>' to see memory and collectives."
        )
    _checks.one_of("plan.topology_devices", [*CHIPS, "cpu"], chip=kind)
    # Skip the GCE metadata server and the libtpu lock; no TPU is used.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ImportError(
                f"A plan for {topology!r} needs the TPU compiler, libtpu, which works "
                "without a TPU. Run pip install 'jaxunlearn[tpu]', or plan for 'cpu:8'."
            ) from None
        reason = str(error).split("\n")[0]
        if "INVALID_ARGUMENT" not in reason:
            raise  # an error that is not about the topology
        raise ValueError(
            "plan.topology_devices needs the size of an existing slice, such as "
            f"v5e:4x4, v6e:16x16 or v5p:4x4x8, got {topology!r}: {reason}."
        ) from None
    return described.devices


def per_chip(devices: Sequence[jax.Device]) -> int:
    """The number of devices per chip."""
    chips = {tuple(getattr(d, "coords", (d.id,))) for d in devices}
    return max(1, len(devices) // len(chips))


def _cpus(shape: str, topology: str) -> Sequence[jax.Device]:
    devices = jax.devices("cpu")
    if not shape.isdigit() or not 1 <= int(shape) <= len(devices):
        raise ValueError(
            f"plan.topology_devices needs at most {len(devices)} CPU devices, as this "
            f"process has, got {topology!r}. Set jax_num_cpu_devices before jax "
            "starts, or use fewer."
        )
    return devices[: int(shape)]
