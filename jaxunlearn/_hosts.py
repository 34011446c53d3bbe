# SPDX-License-Identifier: Apache-2.0
"""Joining the processes of one run; reached as `sharding.initialize`."""

import jax

_FIX = (
    "Give coordinator='host:port' of process 0, the number of processes and this "
    "process's number from 0, the same run on every host."
)


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Joins this process to the others of the run, so that jax.devices() is all theirs.

    Call it first in a script, before anything touches a device. Without arguments the
    cluster is asked for (Cloud TPU pods, GKE, Slurm, Open MPI, whatever
    jax.distributed knows); where there is none this is a run of one process, and
    nothing happens. Nothing happens either if the processes have joined already.

    Args:
        coordinator: "host:port" at which process 0 can be reached by all.
        processes: how many there are.
        process: which one this is, from 0.
        timeout: how long to wait for the others, seconds.
    Raises:
        ValueError: if only some of the three arguments came, or they do not fit.
        RuntimeError: if devices were used before, or the others did not come.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"initialize needs all of coordinator, processes and process, or none, got "
            f"no {' and no '.join(missing)}. {_FIX}"
        )
    if not missing and not 0 <= process < processes:
        raise ValueError(
            f"initialize needs 0 <= process < processes, got process={process} and "
            f"processes={processes}. {_FIX}"
        )
    if not missing and ":" not in coordinator:
        raise ValueError(
            f"initialize needs coordinator='host:port', got {coordinator!r}. {_FIX}"
        )
    if jax.distributed.is_initialized() or processes == 1:
        return
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=timeout
        )
    except ValueError as error:
        if missing and "coordinator_address" in str(error):
            return  # no cluster here
        raise
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise RuntimeError(
                "initialize needs to come before anything touches a device, but a "
                "device was used already. Make it the first call of the script, above "
                "jax.devices(), hf.load and every array."
            ) from error
        raise RuntimeError(
            f"initialize needs {processes or 'all'} processes to meet at "
            f"{coordinator or 'the coordinator of the cluster'} within {timeout} s, "
            f"got: {error}. Start the same command on every host, and let them reach "
            "that port."
        ) from error
