# SPDX-License-Identifier: Apache-2.0
"""`jaxunlearn export`: the final model of a run, in another format or place."""

from pathlib import Path

import click

from jaxunlearn.commands import _group


@_group.command("Write a run's final model as a Hugging Face folder or a GGUF file.")
@click.argument("run", type=click.Path())
@click.option(
    "--format",
    "kind",
    type=click.Choice(["hf", "gguf"]),
    default="hf",
    show_default=True,
    help="A Hugging Face folder, or one GGUF file for llama.cpp.",
)
@click.option(
    "--output", required=True, type=click.Path(), help="The folder or file to write."
)
@click.option(
    "--scheme",
    type=click.Choice(["q4_0", "q4_1", "q8_0", "f16", "f32"]),
    default="q4_0",
    show_default=True,
    help="How GGUF rounds the weights.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the weights in a Hugging Face folder.",
)
def command(run: str, kind: str, output: str, scheme: str, dtype: str) -> None:
    from jaxunlearn.io import hf
    from jaxunlearn.workflows import records, run_folder

    folder, _ = run_folder.finished(run)
    target = Path(output).expanduser()
    if kind == "gguf" and target.suffix != ".gguf":
        raise ValueError(f"--format gguf needs an --output in .gguf, got {output}.")
    if target.resolve() == folder.model.resolve():
        raise ValueError(
            f"export needs an --output other than the run's model folder, got {output}."
        )
    records.make_folder("export", target if target.is_dir() else target.parent)
    model, params, tokenizer = hf.load(folder.model)
    if kind == "gguf":
        hf.save_gguf(model, params, target, tokenizer=tokenizer, scheme=scheme)
    else:
        hf.save(model, params, target, tokenizer=tokenizer, dtype=dtype)
    click.echo(f"The model is in {target}.")
