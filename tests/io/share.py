# SPDX-License-Identifier: Apache-2.0
"""One of two processes that load a model together, each with too little memory for it.

    python -m tests.io.share FOLDER ADDRESS RANK

It prints a report in JSON. The limit is RLIMIT_DATA, on the memory that is a process's
own: address space as a whole (`ulimit -v`) also counts what threads only reserve.
"""

import gc
import json
import math
import resource
import struct
import sys
from pathlib import Path

import jax
import numpy as np

from jaxunlearn import sharding, trees
from jaxunlearn.io import _hf_config, _names, hf

ALLOWED = 0.75  # of the model's bytes, on top of what the process has before it loads
MARK = 3.5


def write_sparse(folder: Path, config) -> None:
    """A float32 checkpoint that takes hardly any disk: zeros, each ending in a mark."""
    (folder / "config.json").write_text(_hf_config.write(config, "float32"))
    items, end = {}, 0
    for name, tensor in _names.tensors(config).items():
        start, end = end, end + 4 * math.prod(tensor.shape)
        items[name] = dict(dtype="F32", shape=tensor.shape, data_offsets=[start, end])
    text = json.dumps(items).encode()
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for item in items.values():
            stream.seek(8 + len(text) + item["data_offsets"][1] - 4)
            stream.write(struct.pack("<f", MARK))


def counted(field: str) -> int:
    """Bytes that Linux counts for this process under VmData, VmHWM or VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def main(folder: str, address: str, rank: int) -> dict:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=rank)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    size = (Path(folder) / "model.safetensors").stat().st_size
    resident, limit = counted("VmRSS"), counted("VmData") + int(ALLOWED * size)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    _, params, _ = hf.load(folder, mesh=mesh)
    grew = counted("VmHWM") - resident
    shards = {
        path: [np.asarray(shard.data) for shard in leaf.addressable_shards]
        for path, leaf in trees.paths(params).items()
    }
    held = sum(shard.nbytes for each in shards.values() for shard in each)
    marks = {path: sum(int((x == MARK).sum()) for x in shards[path]) for path in shards}
    del params, shards
    gc.collect()
    free, plain = limit - counted("VmData"), "loaded"
    try:
        hf.load(folder)
    except MemoryError:  # NumPy's
        plain = "no memory"
    except jax.errors.JaxRuntimeError as error:
        plain = "no memory" if "RESOURCE_EXHAUSTED" in str(error) else str(error)
    share = {"grew": grew / size, "held": held / size, "free": free / size}
    return share | {"marks": marks, "plain": plain}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
