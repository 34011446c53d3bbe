# SPDX-License-Identifier: Apache-2.0
"""Check that all hosts of a TPU slice find each other; run it first on new machines.

    python -m experiments.tpu.hosts --devices 16

Run it on every host at the same time. It joins the processes, adds one number from
every device, and fails if the sum or the number of devices is not as expected.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxunlearn import sharding


def total(mesh: jax.sharding.Mesh) -> int:
    """The sum 0 + 1 + ... over the devices of the mesh; each holds one number."""
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    numbers = np.arange(mesh.size, dtype=np.int32)
    spread = jax.make_array_from_callback(numbers.shape, place, numbers.__getitem__)
    replicated = NamedSharding(mesh, PartitionSpec())
    return int(jax.jit(jnp.sum, out_shardings=replicated)(spread))


def check(expected: int | None) -> int:
    """Prints what this process finds; 0 if the devices and their sum are right."""
    devices = jax.devices()
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    print(
        f"process {jax.process_index()} of {jax.process_count()}: "
        f"{jax.local_device_count()} of {len(devices)} devices "
        f"({devices[0].device_kind}), {slices} slice(s)",
        flush=True,
    )
    if expected is not None and expected != len(devices):
        print(
            f"hosts needs {expected} devices, got {len(devices)}. Start the same "
            "command on every host of every slice.",
            file=sys.stderr,
        )
        return 1
    found = total(sharding.make_mesh(data=slices))
    wanted = len(devices) * (len(devices) - 1) // 2
    print(f"sum over all devices: {found}, expected {wanted}")
    return 0 if found == wanted else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--devices", type=int, help="expected number of devices, on all hosts together"
    )
    expected = parser.parse_args().devices
    sharding.initialize()
    return check(expected)


if __name__ == "__main__":
    sys.exit(main())
