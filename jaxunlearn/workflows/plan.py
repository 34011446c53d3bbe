# SPDX-License-Identifier: Apache-2.0
"""The memory, traffic and time of a run's step on machines that are only described.

`jaxunlearn plan` calls it. The step that is compiled is the one that a run of the
config executes. TPU topologies need libtpu (the extra tpu) and no TPU; cpu:8 needs
nothing.

Experimental: it reads compiled programs, whose text differs between versions of XLA.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxunlearn import plan, sharding
from jaxunlearn.workflows.training import build, settings

GIB = 2.0**30
ROWS = 1024  # of the random streams that stand for files
REMAT = ("full", "mlp", "dots")


def with_random_streams(config: ConfigDict, rows: int, length: int) -> ConfigDict:
    """The config with random tokens for every stream that its method reads.

    Args:
        config: with a model and a recipe, and no data.
        rows: of each stream at a step.
        length: tokens of a row.
    """
    settings.check_model(config.model)
    recipe = build.recipe(config, build.base_model(config))
    stream = dict(source="synthetic", rows=rows, length=length, count=ROWS)
    config = config.copy_and_resolve_references()
    config.data = {name: dict(stream) for name in sorted(recipe.reads())}
    return config


def use_cpus(topology: str) -> None:
    """Keeps JAX off accelerators, and gives it the CPU devices that "cpu:8" names.

    Call it before anything starts JAX.
    """
    jax.config.update("jax_platforms", "cpu")
    kind, _, count = topology.partition(":")
    if kind == "cpu" and count.isdigit():
        try:
            jax.config.update("jax_num_cpu_devices", max(1, int(count)))
        except RuntimeError:
            pass  # JAX has started; topology_devices reports the number of devices


def planned(
    config: ConfigDict,
    topology: str,
    mesh: Mapping[str, int] | None = None,
    *,
    pieces: Callable = build.pieces,
    keep: Callable[[str], None] | None = None,
) -> plan.Report:
    """The Report of a config on a topology.

    Args:
        config: a run's.
        topology: such as "v5p:4x4x4".
        mesh: sizes that replace the config's.
        pieces: (config, devices) -> build.Pieces.
        keep: called with the compiled text.
    """
    config = config.copy_and_resolve_references()
    if mesh is not None:
        config.mesh = ConfigDict(dict.fromkeys(sharding.AXES, 1) | dict(mesh))
    built = pieces(config, plan.topology_devices(topology))
    return plan.compile_step(
        built.step,
        built.mesh,
        built.model,
        built.state,
        built.streams,
        built.frozen,
        terms=built.recipe.terms,
        chip=plan.CHIPS.get(topology.split(":")[0]),
        text_callback=keep,
    )


def candidates(
    config: ConfigDict, devices: int, chip: plan.Chip | None, max_each: int = 2
) -> list[dict]:
    """Mesh sizes and microbatches worth compiling, `max_each` for each remat policy.

    Sizes that do not divide the model or the batch are left out, and so are settings
    that cannot fit: parameters, moments and gradients are divided by the devices; the
    activations of a token and layer are estimated as 2 * width bytes (remat "full"),
    those plus the activation function's inputs ("mlp"), or all results of matrix
    products ("dots"). The rest is ordered by recomputation, then by microbatches and
    tensor parallelism. Mixtures of experts are also split over the axis `expert`;
    settings that differ in nothing else are ordered by the bytes that a device sends.
    """
    model = build.base_model(config)
    shape, recipe = model.config, build.recipe(config, model)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = sum(x.size * 4.0 for x in jax.tree.leaves(params))
    state *= 3 + len(recipe.terms)
    streams = [(s.rows, s.length) for s in config.data.values()]
    found = []
    for tensor, expert in _splits(shape, devices):
        fsdp = devices // tensor // expert
        ranks = fsdp * expert  # over which rows are split
        if shape.width % ranks or any(rows % ranks for rows, _ in streams):
            continue
        per_layer, again = _stored(shape, tensor, expert)
        for micro in (1, 2, 4):
            if any((rows // ranks) % micro for rows, _ in streams):
                continue
            tokens = max(rows * length for rows, length in streams) / ranks / micro
            sent = _sent(shape, fsdp, tensor, expert, tokens) * micro
            for remat, each in per_layer.items():
                stored = tokens * shape.layers * each / tensor
                if chip and state / devices + stored > chip.hbm_bytes:
                    continue
                cost = again[remat] + 0.05 * (micro - 1) + 0.02 * tensor
                sizes = {"fsdp": fsdp, "tensor": tensor}
                sizes |= {"expert": expert} if shape.experts else {}
                found.append(
                    (cost, sent, sizes | {"num_microbatches": micro} | {"remat": remat})
                )
    found.sort(key=lambda x: x[:2])
    settings = [setting for *_, setting in found]
    best = {remat: [s for s in settings if s["remat"] == remat] for remat in REMAT}
    return [s for s in settings if s in best[s["remat"]][:max_each]]


def _splits(shape: Any, devices: int) -> Iterator[tuple[int, int]]:
    """Sizes of the axes tensor and expert that divide the model and the devices."""
    wide = shape.experts.shared_hidden if shape.experts else shape.hidden
    powers = [2**i for i in range(devices.bit_length())]
    for tensor, expert in itertools.product((1, 2, 4, 8, 16), powers):
        parts = tensor * expert
        if shape.experts is None and expert > 1:
            continue
        rests = [shape.kv_heads % tensor, shape.vocab % tensor, wide % tensor]
        rests += [devices % parts, shape.experts.num % parts if shape.experts else 0]
        if not any(rests):
            yield tensor, expert


def _stored(shape: Any, tensor: int, expert: int) -> tuple[dict, dict]:
    """By remat: the bytes stored for a token and layer, and the share of the step that
    is computed again."""
    heads = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    wide = shape.hidden * (2 if shape.gated else 1)
    if shape.experts:
        wide *= shape.experts.per_token
    dots, mlp = heads + wide + 2 * shape.width, wide + shape.width
    again = {"full": 1 / 3, "mlp": (1 - wide / (dots + shape.width)) / 3, "dots": 0.0}
    # A device has room for the gathered rows of all devices that share its experts.
    more = wide * (tensor * expert - 1) if shape.experts else 0
    stored = {"full": 2.0 * shape.width, "mlp": 2.0 * mlp, "dots": 2.0 * dots}
    return stored | {x: stored[x] + 2.0 * more for x in ("mlp", "dots")}, again


def _sent(shape: Any, fsdp: int, tensor: int, expert: int, tokens: float) -> float:
    """Bytes that a device receives for its experts, forward, again and backward:
    kernels over the axis fsdp, and the activations of rows over the axis expert."""
    if not shape.experts:
        return 0.0
    kernels = 3 * shape.experts.num * shape.width * shape.hidden / tensor / expert
    rows = 2 * tokens * (expert - 1) * shape.width
    return 3 * 2.0 * shape.layers * (kernels * (1 - 1 / fsdp) + rows)


def search(
    config: ConfigDict, topology: str, log_fn: Callable[[str], Any] = print
) -> list[tuple[dict, plan.Report | str]]:
    """Compiles the candidates; those that fit come first, the shortest step first."""
    devices = plan.topology_devices(topology)
    chip = plan.CHIPS.get(topology.split(":")[0])
    tried = []
    for setting in candidates(config, len(devices), chip):
        changed = config.copy_and_resolve_references()
        changed.num_microbatches, changed.model.remat = (
            setting["num_microbatches"],
            setting["remat"],
        )
        mesh = {axis: setting[axis] for axis in sharding.AXES if axis in setting}
        try:
            report = planned(changed, topology, mesh)
        except plan.DoesNotFit as error:
            report = str(error)
        tried.append((setting, report))
        log_fn(f"{setting}: {line(report)}")
    if not tried:
        raise ValueError(
            "A search needs a mesh that divides the batch and the model, and fits, got "
            f"none for {topology}. Change --batch-size, take more devices, or give "
            "--mesh to see why."
        )
    return sorted(tried, key=_rank)


def table(report: plan.Report) -> str:
    """The report as text of several lines."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    lines = [f"{report.devices} devices, {mesh}", "memory of a device, GiB"]
    lines += [f"  {name:14}{size / GIB:9.3f}" for name, size in report.memory.items()]
    lines += [f"  {'peak':14}{report.peak / GIB:9.3f}"]
    if report.hbm is not None:
        word = "fits" if report.fits else "DOES NOT FIT"
        lines[-1] += f"  of {report.hbm / GIB:.0f}: {word}"
    lines += ["sent by a device in a step, GB (times)"]
    lines += [
        f"  {kind:20}{m.bytes / 1e9:10.3f} ({m.count})"
        for kind, m in sorted(report.collectives.items())
    ]
    lines += [
        f"model FLOPs {report.model_flops:.4g}, hardware FLOPs "
        f"{report.hardware_flops:.4g} (matrix products, recomputation included)"
    ]
    if report.seconds is not None:
        lines += ["lower bounds of the step, s"]
        lines += [f"  {name:14}{s:9.4f}" for name, s in report.seconds.items()]
        low, high = (100 * x for x in report.mfu)
        lines += [
            f"MFU at most {high:.1f} % if all overlaps, {low:.1f} % if nothing does: "
            "a roofline, not a measurement"
        ]
    return "\n".join([*lines, f"compiled in {report.compile_seconds:.1f} s"])


def line(report: plan.Report | str) -> str:
    """One line about a candidate."""
    if isinstance(report, str):
        return "does not fit"
    text = f"peak {report.peak / GIB:.2f} GiB"
    if report.seconds:
        text += f", fits {report.fits}, {report.seconds['serial']:.4f} s serial"
    return text


def as_json(report: plan.Report) -> dict:
    """A Report as plain dicts, lists and numbers."""
    found = report._asdict()
    collectives = found.pop("collectives")
    return found | {"moved": {kind: x._asdict() for kind, x in collectives.items()}}


def _rank(item):
    report = item[1]
    if isinstance(report, str):
        return (2, 0.0)
    fits = report.fits is not False
    return (0 if fits else 1, report.seconds["serial"] if report.seconds else 0.0)
