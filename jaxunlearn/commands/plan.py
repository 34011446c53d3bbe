# SPDX-License-Identifier: Apache-2.0
"""`jaxunlearn plan`: what a run would take on machines that are only described."""

import json
from pathlib import Path
from typing import Any

import click

from jaxunlearn.commands import _group, _training

LENGTH = 512


@_group.command(
    "Compile a run's step for devices that are only described (experimental).",
    "Prints memory, traffic and lower bounds of the time. Needs a model's config.json "
    "and no weights, files of rows or TPU; TPU topologies need the extra tpu.",
)
@click.option("--topology", required=True, help="v5p:4x4x4, v5e:8x8, cpu:8, ...")
@click.option("--method", help="A recipe: npo, blur_npo, openunlearning.graddiff, ...")
@_training.options(_training.OF_MODEL)
@click.option("--search", is_flag=True, help="Try meshes, microbatches and remat.")
@click.option("--output", type=_training.PATH, help="A JSON file to write.")
def command(
    topology: str, method: str | None, search: bool, output: str | None, **given: Any
) -> None:
    from jaxunlearn.workflows import plan, records
    from jaxunlearn.workflows.training import settings

    if not given["file"]:
        _training.require({"--method": method})
    if output:
        records.make_folder("plan", Path(output).expanduser().parent)
    plan.use_cpus(topology)
    config = _training.make("unlearn", method, {}, given)
    if not config.data:
        size, length = given["batch_size"] or _training.ROWS, given["length"] or LENGTH
        config = plan.with_random_streams(config, size, length)
    config.output = config.output or "unused"
    config = settings.check(config)
    if search:
        ranked = plan.search(config, topology, click.echo)
        click.echo("best first:")
        result: Any = []
        for setting, report in ranked:
            click.echo(f"  {setting}: {plan.line(report)}")
            shown = report if isinstance(report, str) else plan.as_json(report)
            result.append(setting | {"report": shown})
    else:
        report = plan.planned(config, topology)
        click.echo(plan.table(report))
        result = plan.as_json(report)
    if output:
        head = {"topology": topology, "config": given["file"] or given["model"]}
        text = json.dumps(head | {"result": result}, indent=1)
        records.replace(Path(output).expanduser(), text + "\n")
