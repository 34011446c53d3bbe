# SPDX-License-Identifier: Apache-2.0
"""Public numbers of chips, and devices of topologies that are only described."""

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
        hbm_bytes: capacity of its memory, in bytes.
        hbm_rate: bytes/s between the chip and that memory.
        ici_rate: bytes/s that a chip can send over all its links to neighbours: half
            of the number for both directions that the vendor gives.
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
"""From the tables "key specifications" on Google Cloud's pages on each TPU version, as
of 2026. Capacities there are called GB or GiB; both are read as 2^30 bytes."""


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology, to make a mesh of.

    Args:
        topology: chip and shape, such as "v5e:8x8" or "v5p:4x4x4", which the TPU
            compiler describes without a TPU; or "cpu:8", devices that this process has.
    Returns:
        Devices. On v4 and tpu7x a device is one of a chip's two cores.
    Raises:
        ValueError: for an unknown chip or shape, or more CPU devices than there are.
        ImportError: for a TPU where libtpu is missing.
        NotImplementedError: for GPUs, whose compiler needs one at hand.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not found:
        raise ValueError(
            "plan.topology_devices needs a topology such as 'v5p:4x4x4', 'v5e:8x8' or 'cpu:8', "
            f"got {topology!r}."
        )
    kind, shape = found.groups()
    if kind == "cpu":
        return _cpus(shape, topology)
    if kind in ("gpu", "cuda", "rocm", "h100", "h200", "a100", "b200"):
        raise NotImplementedError(
            f"plan.topology_devices cannot describe {topology!r}: jax describes only TPUs that "
            "are not there. On a machine with such a GPU install '.[cuda]' and run the "
            "step itself, or plan for 'cpu:<devices>' to see memory and collectives."
        )
    _checks.one_of("plan.topology_devices", [*CHIPS, "cpu"], chip=kind)
    # Ask no metadata server, and mind no other process: none touches a TPU.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ImportError(
                f"A plan for {topology!r} needs the TPU compiler, libtpu. Install it "
                'without a TPU by pip install -e ".[tpu]", or plan for "cpu:8".'
            ) from None
        reason = str(error).split("\n")[0]
        if "INVALID_ARGUMENT" not in reason:
            raise  # not the topology's fault
        raise ValueError(
            f"The TPU compiler knows no topology {topology!r}: {reason}. Sizes must be "
            "slices that exist, such as v5e:4x4, v6e:16x16 or v5p:4x4x8."
        ) from None
    return described.devices


def per_chip(devices: Sequence[jax.Device]) -> int:
    """How many devices make one chip."""
    places = {tuple(getattr(d, "coords", (d.id,))) for d in devices}
    return max(1, len(devices) // len(places))


def _cpus(shape: str, topology: str) -> Sequence[jax.Device]:
    devices = jax.devices("cpu")
    if not shape.isdigit() or not 1 <= int(shape) <= len(devices):
        raise ValueError(
            f"This process has {len(devices)} CPU devices, got {topology!r}. Set "
            "jax_num_cpu_devices before jax starts, or ask for fewer."
        )
    return devices[: int(shape)]
