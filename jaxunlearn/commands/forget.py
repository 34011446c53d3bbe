# SPDX-License-Identifier: Apache-2.0
"""`jaxunlearn forget`: makes a model forget the rows of a file."""

from typing import Any

import click

from jaxunlearn.commands import _group, _prompt, _training


def _list_methods(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        return
    from jaxunlearn import recipes
    from jaxunlearn.workflows.training import settings

    for name, recipe in recipes.by_name().items():
        if not name.startswith("finetune."):
            first = (recipe.__doc__ or "").strip().splitlines()[0]
            click.echo(f"{name}\n    {first}")
            arguments = settings.recipe_arguments(name)
            click.echo(f"    {', '.join(arguments)}")
    ctx.exit()


@_group.command(
    "Make a model forget the rows of one file and retain those of another.",
    "A row is a prompt and an answer: .jsonl, .json, .csv or .parquet. The unlearned "
    "model is written to OUTPUT/model as a Hugging Face folder. The same command again "
    "resumes where it was stopped.",
)
@click.option("--forget", type=_training.PATH, help="A file of rows to forget.")
@click.option("--retain", type=_training.PATH, help="A file of rows to retain.")
@click.option("--method", help="A recipe: npo, blur_npo, openunlearning.graddiff, ...")
@_training.options(_training.OF_MODEL, _training.OF_RUN)
@_prompt.options
@click.option(
    "--list-methods",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_list_methods,
    help="Print every method with its arguments.",
)
def command(forget: str, retain: str, method: str, **given: Any) -> None:
    if not given["file"]:
        _training.require(
            {"--model": given["model"], "--forget": forget, "--method": method}
            | {"--output": given["output"]}
        )
    files = {"forget": forget, "retain": retain}
    _training.run(_training.make("unlearn", method, files, given))
