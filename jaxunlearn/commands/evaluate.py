# SPDX-License-Identifier: Apache-2.0
"""`jaxunlearn evaluate`: numbers with intervals, before and after."""

import click

from jaxunlearn.commands import _config, _group, _prompt

_EPILOG = """
A file of rows is .jsonl, .json, .csv or .parquet with the columns prompt (or question)
and answer; optional columns are paraphrased_answer, perturbed_answer (a list of wrong
answers), choices and id.
"""


@_group.command(
    "Evaluate a run's original and unlearned model, or any model.", epilog=_EPILOG
)
@click.argument("target", metavar="RUN_OR_MODEL", required=False)
@click.option("--output", help="Folder of the evaluation; not for a run's folder.")
@click.option("--forget", metavar="FILE", help="Rows to forget; default: the run's.")
@click.option("--retain", metavar="FILE", help="Rows to retain; default: the run's.")
@click.option(
    "--holdout",
    metavar="FILE",
    help="Rows like those to forget that no model was trained on, for membership "
    "attacks.",
)
@click.option(
    "--retrained",
    metavar="MODEL_OR_EVALUATION",
    help="A model that never saw the forget rows, or its evaluation.",
)
@click.option(
    "--tasks",
    metavar="NAME[,NAME]",
    help="Benchmarks: tofu[:10|05|01], muse[:news|books], mmlu, wmdp.",
)
@click.option("--data-folder", help="The folder that holds tofu/, muse/, mmlu/, wmdp/.")
@click.option("--role", help="original, retrained or unlearned; not for a run.")
@click.option("--name", help="What a report calls the model; not for a run.")
@click.option("--new-tokens", type=int, help="Generated tokens; 0 generates nothing.")
@click.option("--length", type=int, help="Maximum tokens of a row; 0: the model's.")
@click.option(
    "--gradnorm/--no-gradnorm",
    default=None,
    help="The attack GradNorm costs one gradient for each row. Default: no.",
)
@click.option("--batch-size", type=int, help="Rows at a time. Default: 32.")
@_prompt.options
@_config.options
def command(target, config, settings, **given):
    from jaxunlearn.workflows.evaluation import config as evaluation
    from jaxunlearn.workflows.evaluation import printed

    free = ("tasks", "judges", "prompt_format.arguments")
    c = _config.read(config, evaluation.defaults(), settings, free=free)
    prompt_format = _prompt.given(given)
    score = {k: given.pop(k) for k in ("new_tokens", "length", "gradnorm")}
    files = {k: given.pop(k) for k in ("forget", "retain", "holdout")}
    names = given.pop("tasks")
    given |= {"folder": given.pop("data_folder"), "model": target}
    c |= {key: value for key, value in given.items() if value is not None}
    if not config:
        usual = {"gradnorm": False, "new_tokens": 32}
        c["score"] = usual | c.get("score", {})
    c["prompt_format"] = c.get("prompt_format", {}) | prompt_format
    c["score"] |= {key: value for key, value in score.items() if value is not None}
    rows = {n: {"source": "file", "path": path} for n, path in files.items() if path}
    c["tasks"] = c.get("tasks", {}) | rows
    if names:
        c["benchmarks"] = tuple(names.split(","))
    found = evaluation.evaluate(c, command=_config.command_line(), log_fn=_config.log)
    click.echo("\n".join(printed.table(found)))
