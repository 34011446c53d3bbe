# SPDX-License-Identifier: Apache-2.0
"""What a run's step would take on machines that are only described.

python -m jaxunlearn.workflows.plan --config experiments/configs/llama31_8b.py \\
    --topology v5p:4x4x4 [--mesh fsdp=64,tensor=1] [--search] [--output plan.json] \\
    [--config.model.remat=dots ...]

The config is one of jaxunlearn/workflows/training/run.py; the step compiled is the one that it would run.
TPU topologies need libtpu, pip install -e ".[tpu]", and no TPU. cpu:8 needs nothing.
"""

import argparse
import ast
import json
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxunlearn import _checks, plan, sharding
from jaxunlearn.workflows.training import build, settings

GIB = 2.0**30
REFUSED = (ValueError, KeyError, TypeError, ImportError, NotImplementedError)


def load(path: str, overrides: Mapping[str, str] = {}) -> ConfigDict:
    """The config in a Python file, with values replaced, once it makes sense."""
    if not Path(path).is_file():
        raise ValueError(f"--config needs a Python file with get_config(), got {path}.")
    module = runpy.run_path(path)
    if "get_config" not in module:
        raise ValueError(f"{path} needs a function get_config(), got none.")
    config = module["get_config"]()
    for key, text in overrides.items():
        if not key.startswith(settings.FREE):
            _checks.one_of("--config.KEY=VALUE", settings.keys(), key=key)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        place = config
        *parents, last = key.split(".")
        for name in parents:
            place = place[name]
        place[last] = value
    return settings.check(config)


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
        config: as `load` gives it.
        topology: such as "v5p:4x4x4".
        mesh: sizes in place of the config's.
        pieces: (config, devices) -> build.Pieces.
        keep: is given the compiled text.
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
        keep=keep,
    )


def candidates(config: ConfigDict, devices: int, chip, most: int = 2) -> list[dict]:
    """Mesh sizes and microbatches worth compiling, `most` for each remat policy.

    Sizes that do not divide the model or the batch are left out, and so is what cannot
    fit: parameters, moments and gradients by division, kept activations by 2 * width
    (remat "full"), by what enters the activation too ("mlp") or by all results of
    matrices ("dots") a token and layer. What is left is ordered by recomputation, then
    by microbatches and tensor parallelism.
    """
    model = build.model(config)
    shape, recipe = model.config, build.recipe(config, model)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = sum(x.size * 4.0 for x in jax.tree.leaves(params))
    state *= 3 + len(recipe.terms)
    heads = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    wide = shape.hidden * (2 if shape.gated else 1)
    dots = heads + wide + 2 * shape.width
    mlp = wide + shape.width
    per_layer = {"full": 2.0 * shape.width, "mlp": 2.0 * mlp, "dots": 2.0 * dots}
    again = {"full": 1 / 3, "mlp": (1 - wide / (dots + shape.width)) / 3, "dots": 0.0}
    streams = [(s.rows, s.length) for s in config.data.values()]
    found = []
    for tensor in (1, 2, 4, 8, 16):
        sizes = (devices, shape.kv_heads, shape.hidden, shape.vocab)
        if any(size % tensor for size in sizes):
            continue
        fsdp = devices // tensor
        if shape.width % fsdp or any(rows % fsdp for rows, _ in streams):
            continue
        for micro in (1, 2, 4):
            if any((rows // fsdp) % micro for rows, _ in streams):
                continue
            tokens = max(rows * length for rows, length in streams) / fsdp / micro
            for remat, each in per_layer.items():
                kept = tokens * shape.layers * each / tensor
                if chip and state / devices + kept > chip.hbm_bytes:
                    continue
                cost = again[remat] + 0.05 * (micro - 1) + 0.02 * tensor
                setting = dict(
                    fsdp=fsdp, tensor=tensor, num_microbatches=micro, remat=remat
                )
                found.append((cost, setting))
    found.sort(key=lambda x: x[0])
    best = {remat: [s for _, s in found if s["remat"] == remat] for remat in per_layer}
    return [setting for _, setting in found if setting in best[setting["remat"]][:most]]


def search(config: ConfigDict, topology: str) -> list[tuple[dict, plan.Report | str]]:
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
        mesh = dict(fsdp=setting["fsdp"], tensor=setting["tensor"])
        try:
            report = planned(changed, topology, mesh)
        except plan.DoesNotFit as error:
            report = str(error)
        tried.append((setting, report))
        print(f"{setting}: {line(report)}", flush=True)
    if not tried:
        raise ValueError(
            "No mesh divides this batch and model, or none can fit. Change rows, take "
            "more devices, or give --mesh to see why."
        )
    return sorted(tried, key=_rank)


def table(report: plan.Report) -> str:
    """The report for a reader."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    lines = [f"{report.devices} devices, {mesh}", "memory of a device, GiB"]
    lines += [f"  {name:14}{size / GIB:9.3f}" for name, size in report.memory.items()]
    lines += [f"  {'peak':14}{report.peak / GIB:9.3f}"]
    if report.hbm is not None:
        word = "fits" if report.fits else "DOES NOT FIT"
        lines[-1] += f"  of {report.hbm / GIB:.0f}: {word}"
    lines += ["sent by a device in a step, GB (times)"]
    lines += [
        f"  {kind:20}{m.bytes / 1e9:10.3f} ({m.times})"
        for kind, m in sorted(report.moved.items())
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
    """One line of a search."""
    if isinstance(report, str):
        return "does not fit"
    text = f"peak {report.peak / GIB:.2f} GiB"
    if report.seconds:
        text += f", fits {report.fits}, {report.seconds['serial']:.4f} s serial"
    return text


def as_json(report: plan.Report) -> dict:
    """A Report as plain dicts, lists and numbers."""
    moved = {kind: m._asdict() for kind, m in report.moved.items()}
    return report._asdict() | {"moved": moved}


def main(argv=None) -> int:
    arguments, rest = _parser().parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")
    kind, _, count = arguments.topology.partition(":")
    if kind == "cpu" and count.isdigit():
        try:
            jax.config.update("jax_num_cpu_devices", max(1, int(count)))
        except RuntimeError:
            pass  # jax has started: describe says how many devices there are
    try:
        config = load(arguments.config, _overrides(rest))
        if arguments.search:
            ranked = search(config, arguments.topology)
            print("best first:")
            for setting, report in ranked:
                print(f"  {setting}: {line(report)}")
            result = [
                setting | {"report": r if isinstance(r, str) else as_json(r)}
                for setting, r in ranked
            ]
        else:
            mesh = _mesh(arguments.mesh) if arguments.mesh else None
            report = planned(config, arguments.topology, mesh)
            print(table(report))
            result = as_json(report)
    except REFUSED as error:
        print(f"jaxunlearn.workflows.plan: {error}", file=sys.stderr)
        return 2
    if arguments.output:
        head = {"topology": arguments.topology, "config": arguments.config}
        text = json.dumps(head | {"result": result}, indent=1)
        Path(arguments.output).write_text(text + "\n")
    return 0


def _overrides(rest: list[str]) -> dict[str, str]:
    for text in rest:
        if not text.startswith("--config.") or "=" not in text:
            raise ValueError(
                f"There is no argument {text!r}. Settings are changed by "
                "--config.KEY=VALUE, as in --config.model.remat=dots."
            )
    return dict(text.removeprefix("--config.").split("=", 1) for text in rest)


def _rank(item):
    report = item[1]
    if isinstance(report, str):
        return (2, 0.0)
    fits = report.fits is not False
    return (0 if fits else 1, report.seconds["serial"] if report.seconds else 0.0)


def _mesh(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        _checks.one_of("--mesh", sharding.AXES, axis=axis.strip())
        if not size.strip().lstrip("-").isdigit():
            raise ValueError(f"--mesh needs axis=size, as in fsdp=64, got {part!r}.")
        sizes[axis.strip()] = int(size)
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Plan a step without its machine.")
    parser.add_argument("--config", required=True, help="Python file with get_config()")
    parser.add_argument("--topology", required=True, help="v5p:4x4x4, v5e:8x8, cpu:8")
    parser.add_argument("--mesh", help="axis=size,...; what is not named is 1")
    parser.add_argument("--search", action="store_true", help="try meshes and policies")
    parser.add_argument("--output", help="JSON file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
