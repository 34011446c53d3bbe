# SPDX-License-Identifier: Apache-2.0
"""Compiles a step for a mesh of described devices and reports what it needs."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxunlearn import sharding
from jaxunlearn.plan import _chips, _flops, _hlo
from jaxunlearn.typing import Frozen, Model, PyTree, Streams, Term


class DoesNotFit(ValueError):
    """The compiler could not fit the step into the memory of the chip."""


class Report(NamedTuple):
    """What a step needs. Bytes are per device; FLOPs and times are per step.

    Attributes:
        devices: number of devices of the mesh.
        mesh: size of each axis.
        memory: bytes by kind. params, optimizer, frozen (leaves that do not train, and
            the reference) and batch are counted from sharded shapes; gradients are one
            tree per term in the dtype of the params; activations are the rest of the
            temporaries that XLA reserves, which includes gathered kernels; program is
            the code.
        xla: bytes that XLA reports: arguments, outputs, aliased, temporaries, program.
        peak: arguments + outputs - aliased + temporaries + program, bytes.
        hbm: bytes of memory of a device; None without a chip.
        fits: peak <= hbm; None without a chip.
        model_flops: by the formula of `plan.model_flops`, over all devices.
        hardware_flops: matrix products of the program with recomputation, over all
            devices, see `plan.dot_flops`.
        collectives: what each kind of collective sends, see `plan.collectives`.
        seconds: lower bounds by kind: compute is hardware_flops at peak; hbm is reading
            all arguments, writing all outputs, and writing and reading all temporaries
            once; ici is the bytes sent at the rate of all links; `overlapped` is the
            largest of the three and `serial` their sum. None without a chip.
        mfu: model_flops / (devices * peak FLOP/s * seconds) as bounds: (serial,
            overlapped).
        compile_seconds: time of the compilation, seconds.
        optimal_seconds: the compiler's estimate, which counts the body of a loop once.
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
    collectives: dict[str, _hlo.Collective]
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
    text_callback: Callable[[str], None] | None = None,
) -> Report:
    """Compiles the step that `sharding.jit_step` would run, without running it.

    Nothing is allocated: `state`, `streams` and `frozen` are shapes with shardings on
    the mesh; streams are those of all processes (`sharding.put_rows` also takes
    shapes).

    Args:
        step: from sharding.jit_step.
        mesh: a mesh of existing devices or of `topology_devices`.
        model: its config determines how FLOPs are counted.
        state, streams, frozen: the arguments of the step, or their shapes.
        terms: the terms of the step.
        chip: peak numbers, from CHIPS; without them `seconds`, `mfu`, `hbm` and `fits`
            are None.
        text_callback: is called with the compiled text.
    Returns:
        A Report.
    Raises:
        DoesNotFit: if the step does not fit into the memory of the chip.
    """
    streams = sharding.put_rows(streams, mesh)
    traced = step.trace(state, streams, frozen)
    start = time.monotonic()
    try:
        with jax.set_mesh(sharding.auto_axes(mesh)):
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split()[:40])
        raise DoesNotFit(
            f"The step does not fit on {mesh.size} devices: {reason} ... Use more "
            "devices, more microbatches or remat='full'."
        ) from None
    spent = time.monotonic() - start
    text = compiled.as_text()
    if text_callback is not None:
        text_callback(text)
    xla = _sizes(compiled.memory_analysis())
    memory = _memory(state, streams, frozen, len(terms), xla)
    peak = xla["arguments"] + xla["outputs"] - xla["aliased"]
    peak += xla["temporaries"] + xla["program"]
    needed = _flops.model_flops(model, state.params, frozen.params, terms, streams)
    hardware = _flops.dot_flops(traced.jaxpr)
    collectives = _hlo.collectives(text)
    per_chip = _chips.per_chip(list(mesh.devices.flat))
    seconds = mfu = hbm = None
    if chip is not None:
        hbm = chip.hbm_bytes / per_chip
        seconds = _seconds(chip, per_chip, mesh.size, hardware, xla, collectives)
        best = needed / (mesh.size * chip.flops / per_chip)
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
        collectives=collectives,
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


def _seconds(chip, per_chip, devices, flops, xla, collectives) -> dict[str, float]:
    touched = xla["arguments"] + xla["outputs"] + 2 * xla["temporaries"]
    times = {
        "compute": flops / (devices * chip.flops / per_chip),
        "hbm": touched / (chip.hbm_rate / per_chip),
        "ici": sum(c.bytes for c in collectives.values()) / (chip.ici_rate / per_chip),
    }
    return times | {"overlapped": max(times.values()), "serial": sum(times.values())}
