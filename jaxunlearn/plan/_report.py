# SPDX-License-Identifier: Apache-2.0
"""Compiles a step for a mesh of described devices and says what it would take."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxunlearn import sharding
from jaxunlearn.plan import _chips, _flops, _hlo
from jaxunlearn.typing import Frozen, Model, PyTree, Streams, Term


class DoesNotFit(ValueError):
    """The compiler itself found no way to fit the step into the chip's memory."""


class Report(NamedTuple):
    """A plan. Bytes are of one device, FLOPs and times of one step.

    Attributes:
        devices: how many the mesh has.
        mesh: size of each axis.
        memory: bytes by kind: params, optimizer, frozen (leaves that do not train and
            the reference) and batch are counted from sharded shapes; gradients are one
            tree a term in the dtype of the params; activations are the rest of the
            temporaries that XLA reserves, among them gathered kernels; program is the
            code.
        xla: what XLA reports: arguments, outputs, aliased, temporaries, program.
        peak: arguments + outputs - aliased + temporaries + program.
        hbm: what the device has; None where no chip was given.
        fits: peak <= hbm, None without a chip.
        model_flops: by the formula of `plan.model_flops`, over all devices.
        hardware_flops: matrix products of the program, recomputation included, over all
            devices, see `plan.dot_flops`.
        moved: what each kind of collective sends, see `plan.collectives`.
        seconds: lower bounds by kind: compute is hardware_flops at peak; hbm is all
            arguments read, all outputs written and all temporaries written and read
            once; ici is bytes sent at the rate of all links; `overlapped` is the
            largest of the three and `serial` their sum. None without a chip.
        mfu: model_flops / (devices * peak * seconds), as bounds: (serial, overlapped).
        compile_seconds: how long the compiler took here.
        optimal_seconds: the compiler's own estimate, which sees loops once.
    """

    devices: int
    mesh: dict[str, int]
    memory: dict[str, float]
    xla: dict[str, float]
    peak: float
    hbm: float | None
    fits: bool | None
    model_flops: float
    hardware_flops: float
    moved: dict[str, _hlo.Collective]
    seconds: dict[str, float] | None
    mfu: tuple[float, float] | None
    compile_seconds: float
    optimal_seconds: float | None


def compile_step(
    step: Callable,
    mesh: Mesh,
    model: Model,
    state: PyTree,
    streams: Streams,
    frozen: Frozen = Frozen(),
    *,
    terms: Mapping[str, Term],
    chip: _chips.Chip | None = None,
    keep: Callable[[str], None] | None = None,
) -> Report:
    """Compiles a step of sharding.jit_step, the very one that would run.

    Nothing is allocated: `state`, `streams` and `frozen` are shapes with shardings on
    the mesh, streams those of all processes (`sharding.put_rows` places shapes too).

    Args:
        step: from sharding.jit_step.
        mesh: of devices that exist or of `topology_devices`.
        model: whose config says how FLOPs are counted.
        state, streams, frozen: what the step would be called with.
        terms: the terms the step was made of.
        chip: peak numbers, from CHIPS; without them there is no time and no `fits`.
        keep: is given the compiled text, to be read or stored.
    Returns:
        A Report.
    Raises:
        DoesNotFit: where the compiler finds no way to.
    """
    streams = sharding.put_rows(streams, mesh)
    traced = step.trace(state, streams, frozen)
    start = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split()[:40])
        raise DoesNotFit(
            f"The step does not fit on {mesh.size} devices: {reason} ... Take more "
            "devices, more microbatches or remat='full'."
        ) from None
    spent = time.monotonic() - start
    text = compiled.as_text()
    if keep is not None:
        keep(text)
    xla = _sizes(compiled.memory_analysis())
    memory = _memory(state, streams, frozen, len(terms), xla)
    peak = xla["arguments"] + xla["outputs"] - xla["aliased"]
    peak += xla["temporaries"] + xla["program"]
    needed = _flops.model_flops(model, state.params, frozen.params, terms, streams)
    hardware = _flops.dot_flops(traced.jaxpr)
    moved = _hlo.collectives(text)
    share = _chips.per_chip(list(mesh.devices.flat))
    seconds = mfu = hbm = None
    if chip is not None:
        hbm = chip.hbm_bytes / share
        seconds = _seconds(chip, share, mesh.size, hardware, xla, moved)
        best = needed / (mesh.size * chip.flops / share)
        mfu = (best / seconds["serial"], best / seconds["overlapped"])
    costs = compiled.cost_analysis() or {}
    return Report(
        devices=mesh.size,
        mesh=dict(mesh.shape),
        memory=memory,
        xla=xla,
        peak=peak,
        hbm=hbm,
        fits=None if hbm is None else peak <= hbm,
        model_flops=needed,
        hardware_flops=hardware,
        moved=moved,
        seconds=seconds,
        mfu=mfu,
        compile_seconds=spent,
        optimal_seconds=costs.get("optimal_seconds"),
    )


def _sizes(analysis) -> dict[str, float]:
    return {
        "arguments": float(analysis.argument_size_in_bytes),
        "outputs": float(analysis.output_size_in_bytes),
        "aliased": float(analysis.alias_size_in_bytes),
        "temporaries": float(analysis.temp_size_in_bytes),
        "program": float(analysis.generated_code_size_in_bytes),
    }


def _memory(state, streams, frozen, trees: int, xla) -> dict[str, float]:
    params = _flops.total_bytes(state.params)
    gradients = min(trees * params, xla["temporaries"])
    return {
        "params": params,
        "optimizer": _flops.total_bytes((state.opt_state, state.step, state.key)),
        "gradients": gradients,
        "frozen": _flops.total_bytes(frozen),
        "batch": _flops.total_bytes(streams),
        "activations": xla["temporaries"] - gradients,
        "program": xla["program"],
    }


def _seconds(chip, share, devices, flops, xla, moved) -> dict[str, float]:
    touched = xla["arguments"] + xla["outputs"] + 2 * xla["temporaries"]
    times = {
        "compute": flops / (devices * chip.flops / share),
        "hbm": touched / (chip.hbm_rate / share),
        "ici": sum(m.bytes for m in moved.values()) / (chip.ici_rate / share),
    }
    return times | {"overlapped": max(times.values()), "serial": sum(times.values())}
