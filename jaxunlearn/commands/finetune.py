# SPDX-License-Identifier: Apache-2.0
"""`jaxunlearn finetune`: trains a model on the rows of a file."""

from typing import Any

import click

from jaxunlearn.commands import _group, _prompt, _training


@_group.command(
    "Train a model on the rows of a file, for instance to make a retrained model.",
    "The loss is the mean negative log-probability of the answers' tokens. The trained "
    "model is written to OUTPUT/model as a Hugging Face folder. The same command again "
    "resumes where it was stopped.",
)
@click.option("--data", type=_training.PATH, help="A file of rows to train on.")
@_training.options(_training.OF_MODEL, _training.OF_RUN)
@_prompt.options
def command(data: str, **given: Any) -> None:
    method = None
    if not given["file"]:
        _training.require(
            {"--model": given["model"], "--data": data, "--output": given["output"]}
        )
        method = "finetune.nll"
    _training.run(_training.make("finetune", method, {"train": data}, given))
