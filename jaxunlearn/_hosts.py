# SPDX-License-Identifier: Apache-2.0
"""Connects the processes of one run; public as `sharding.initialize`."""

import jax

_FIX = (
    "Pass coordinator='host:port' of process 0, num_processes, and process_id from 0, "
    "on every host."
)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Connects this process to the others, so that jax.devices() has all devices.

    Call it first in a script, before any device is used. Without arguments the settings
    come from the cluster (Cloud TPU pods, GKE, Slurm, Open MPI and others that
    jax.distributed detects). Outside a cluster this is a run of one process, and the
    call has no effect. It also has no effect if the processes are connected already.

    Args:
        coordinator: "host:port" at which all processes can reach process 0.
        num_processes: number of processes.
        process_id: number of this process, from 0.
        timeout: largest time to wait for the others, seconds.
    Raises:
        ValueError: if only some of the three arguments are given, or they do not fit.
        RuntimeError: if a device was used before, or the others did not connect.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            "initialize needs all of coordinator, num_processes and process_id, or "
            f"none of them, got no {' and no '.join(missing)}. {_FIX}"
        )
    if not missing and not 0 <= process_id < num_processes:
        raise ValueError(
            "initialize needs 0 <= process_id < num_processes, got process_id="
            f"{process_id} and num_processes={num_processes}. {_FIX}"
        )
    if not missing and ":" not in coordinator:
        raise ValueError(
            f"initialize needs coordinator='host:port', got {coordinator!r}. {_FIX}"
        )
    if jax.distributed.is_initialized() or num_processes == 1:
        return
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout
        )
    except ValueError as error:
        if missing and "coordinator_address" in str(error):
            return  # no cluster here
        raise
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise RuntimeError(
                "initialize must be called before any device is used, but one was used "
                "already. Make it the first call of the script, before jax.devices(), "
                "hf.load and every array."
            ) from error
        raise RuntimeError(
            f"initialize needs {num_processes or 'all'} processes to connect to "
            f"{coordinator or 'the coordinator of the cluster'} within {timeout} s, "
            f"got: {error}. Start the same command on every host, and open that port."
        ) from error
