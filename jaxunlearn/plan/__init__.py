# SPDX-License-Identifier: Apache-2.0
"""Plans: compiles a training step for described devices, and reads what it needs.

Experimental, as it reads the text of compiled programs: any release may change it.

    devices = plan.topology_devices("v5p:4x4x4")             # needs libtpu, not a TPU
    mesh = sharding.make_mesh(fsdp=-1, devices=devices)
    step = sharding.jit_step(ju.make_step(terms, tx), mesh, model.rules, state)
    report = plan.compile_step(
        step, mesh, model, state, streams, terms=terms, chip=plan.CHIPS["v5p"])
    report.fits, report.mfu

| name | gives |
| --- | --- |
| `topology_devices` | the devices of a topology such as v5e:8x8 or cpu:8 |
| `compile_step` | a `Report` about a step of `sharding.jit_step` |
| `CHIPS`, `Chip` | public peak numbers of each type of chip |
| `GPUS`, `peak_flops` | those of GPUs, and FLOP/s of devices of this machine |
| `collectives` | bytes sent between devices, from a compiled text |
| `model_flops`, `dot_flops` | FLOPs, by formula and from the program |
"""

from jaxunlearn.plan._chips import CHIPS, GPUS, Chip, peak_flops, topology_devices
from jaxunlearn.plan._flops import dot_flops, model_flops
from jaxunlearn.plan._hlo import Collective, collectives
from jaxunlearn.plan._report import DoesNotFit, Report, compile_step

__all__ = [
    "CHIPS",
    "GPUS",
    "Chip",
    "DoesNotFit",
    "Collective",
    "Report",
    "collectives",
    "compile_step",
    "topology_devices",
    "dot_flops",
    "model_flops",
    "peak_flops",
]
