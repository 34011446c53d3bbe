# SPDX-License-Identifier: Apache-2.0
"""`jaxunlearn attack`: every attack, and the robustness card."""

import click

from jaxunlearn.commands import _config, _group, _prompt

_EPILOG = """
A file of rows is .jsonl, .json, .csv or .parquet with the columns prompt (or question)
and answer; optional columns are wordings (a list of other wordings of the prompt),
choices or perturbed_answer (a list of wrong answers). Without the last two, answers of
other rows are the wrong choices.
"""


@_group.command(
    "Attack a run's unlearned model, or any model, and print the robustness card.",
    epilog=_EPILOG,
)
@click.argument("target", metavar="RUN_OR_MODEL", required=False)
@click.option("--output", help="Folder of the card; default for a run: RUN/attack.")
@click.option("--original", help="The model before unlearning; default: the run's.")
@click.option("--forget", metavar="FILE", help="Facts to forget; default: the run's.")
@click.option("--retain", metavar="FILE", help="Facts to retain; default: the run's.")
@click.option(
    "--attacks", metavar="NAME[,NAME]", help="Which attacks to run. Default: all."
)
@click.option(
    "--thorough",
    is_flag=True,
    help="More samples, strengths, steps, epochs and rotations, and all rows.",
)
@click.option(
    "--max-rows",
    type=int,
    help="Rows of each file, drawn at random; 0 for all. Default: 40.",
)
@click.option(
    "--learning-rates",
    metavar="RATE[,RATE]",
    help="Of the attacks that train: rtt, relearn and benign.",
)
@click.option("--steps", type=int, help="Training steps of relearn and benign.")
@click.option("--epochs", type=int, help="Training epochs of rtt.")
@click.option("--folds", type=int, help="Folds of rtt.")
@click.option("--rotations", type=int, help="Folds that rtt holds out, one by one.")
@click.option(
    "--known",
    help="Use only facts that the original knows by completion or choice; auto: by "
    "completion if there is an original.",
)
@click.option("--new-tokens", type=int, help="Tokens of a completion. Default: 12.")
@click.option("--batch-size", type=int, help="Rows at a time. Default: 32.")
@click.option("--seed", type=int, help="Of random draws and the data order.")
@_prompt.options
@_config.options
def command(target, config, settings, attacks, thorough, **given):
    import sys

    from jaxunlearn.workflows.attack import config as attack
    from jaxunlearn.workflows.attack import jobs

    free = ("facts", "attacks", "prompt_format.arguments")
    c = _config.read(config, attack.defaults(), settings, free=free)
    prompt_format = _prompt.given(given)
    c["prompt_format"] = c.get("prompt_format", {}) | prompt_format
    query = {k: given.pop(k) for k in ("new_tokens", "batch_size")}
    training = {
        k: given.pop(k)
        for k in ("learning_rates", "steps", "epochs", "folds", "rotations")
    }
    if rates := training["learning_rates"]:
        training["learning_rates"] = _config.numbers("--learning-rates", rates)
    given |= {"model": target, "only": attacks}
    c |= {key: value for key, value in given.items() if value is not None}
    c["query"] = c.get("query", {}) | {k: x for k, x in query.items() if x is not None}
    if not (config or thorough):
        c.setdefault("max_rows", 40)
        quick = {name: dict(x) for name, x in jobs.QUICK.items()}
        for name, changed in c.get("attacks", {}).items():
            quick[name] = quick.get(name, {}) | changed
        c["attacks"] = quick
    chosen = c.setdefault("attacks", attack.defaults()["attacks"])
    for name, value in training.items():
        for of_attack in chosen.values():
            if value is not None and name in of_attack:
                of_attack[name] = value
    _, card = attack.attack(
        c, command=_config.command_line(), progress=sys.stderr.isatty()
    )
    click.echo(card)
