# SPDX-License-Identifier: Apache-2.0
"""`jaxunlearn report`: one page that compares evaluated models."""

import click

from jaxunlearn.commands import _config, _group


@_group.command("Compare evaluated models on one HTML page, with attacks and training.")
@click.argument("folders", metavar="[RUN_OR_EVALUATION]...", nargs=-1)
@click.option(
    "--run", "runs", multiple=True, metavar="RUN", help="The folder of a run."
)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    metavar="FOLDER",
    help="The folder of an evaluation, or of several.",
)
@click.option(
    "--card",
    "cards",
    multiple=True,
    metavar="FOLDER",
    help="The output of `jaxunlearn attack`, for a model that is not a run's.",
)
@click.option("--output", help="The folder to write; default for one run: RUN/report.")
@click.option("--title", default="Did it forget?", show_default=True, help="The title.")
@click.option("--note", default="", help="A text under the title.")
@click.option(
    "--examples",
    default=8,
    show_default=True,
    help="Maximum number of forget rows whose tokens are shown.",
)
def command(folders, runs, evaluations, cards, output, title, note, examples):
    from jaxunlearn.workflows import run_folder
    from jaxunlearn.workflows.report import read, run

    for path in runs:
        run_folder.read(path)
    given = [*folders, *runs, *evaluations]
    models = read.load(given)
    if not output:
        if len(given) > 1 or not run_folder.at(given[0]).record.is_file():
            raise ValueError(
                "report needs an output folder unless it is about one run, got none. "
                "Pass --output FOLDER."
            )
        output = run_folder.at(given[0]).report
    page = run.write(
        models,
        output,
        attack_results=[read.load_attacks(path) for path in cards],
        title=title,
        note=note,
        examples=examples,
        command=_config.command_line(),
    )
    click.echo(f"The report is in {page}.")
