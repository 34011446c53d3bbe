# SPDX-License-Identifier: Apache-2.0
"""Do all hosts of a TPU slice see each other? The first thing to run on new machines.

python -m experiments.tpu.hosts --devices 16

Run it on every host at once. It joins the processes, adds one number from every device
of all of them, and fails where the sum or the number of devices is not as expected.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxunlearn import sharding


def total(mesh: jax.sharding.Mesh) -> int:
    """0 + 1 + ... over the devices of the mesh, each of which holds one of them."""
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    numbers = np.arange(mesh.size, dtype=np.int32)
    spread = jax.make_array_from_callback(numbers.shape, place, numbers.__getitem__)
    whole = NamedSharding(mesh, PartitionSpec())
    return int(jax.jit(jnp.sum, out_shardings=whole)(spread))


def check(expected: int | None) -> int:
    """Says what this process sees; the exit status: 0 if all is there and adds up."""
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
        "--devices", type=int, help="how many there should be, on all hosts together"
    )
    expected = parser.parse_args().devices
    sharding.initialize()
    return check(expected)


if __name__ == "__main__":
    sys.exit(main())
