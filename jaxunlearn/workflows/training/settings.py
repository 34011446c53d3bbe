# SPDX-License-Identifier: Apache-2.0
"""What a config of jaxunlearn/workflows/training/run.py holds, and what is refused before anything runs.

A config file is a Python file with `get_config()`: it takes `defaults()`, fills it in
and returns it. Every value can be overridden on the command line, as in
--config.recipe.args.learning_rate=2e-5.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxunlearn import _checks

MODES = ("finetune", "unlearn", "evaluate")
SOURCES = (
    "synthetic",
    "capitals",
    "prose",
    "jsonl",
    "file",
    "benchmark",
    "array_record",
)
COMMON = {"source", "rows", "length"}
CHAT = {"chat", "system", "date"}
STREAM = {  # what each source may be told; `rows` and `length` are common to all
    "synthetic": {"count", "seed"},
    "capitals": {"group", "others"},
    "prose": {"held_out"},
    "jsonl": {"path", "prompt", "answer", "lazy"},  # lazy: encoded when a row is read
    # path: .jsonl, .json, .csv or .parquet. long: "drop" leaves out, and counts, rows
    # over the length; else they are refused.
    # answer "": running text in the column `prompt` ("text" if not told otherwise, or a
    # .txt file), texts apart by an empty line, cut into rows of `length`.
    # chat: prompts in the tokenizer's own template, with what the system says and the
    # date for it, and an end token behind each answer.
    "file": {"path", "prompt", "answer", "long", *CHAT},
    # a table of TOFU and the like: data.tofu.read(table, folder, check=check)
    "benchmark": {"name", "table", "folder", "check", "prompt", "answer", "long"}
    | CHAT,
    "array_record": {"path", "prompt", "answer"},  # a glob; records are JSON, lazy
}
FREE = ("model.fields", "data", "recipe.args")  # keys that only their readers know
# What a run may change when it goes on: none of it enters the mathematics.
MAY_DIFFER = (
    "output",
    "steps",
    "save_every",
    "keep",
    "mesh",
    "num_microbatches",
    "distributed",
    "log",
    "evaluate",
    "model.remat",
    "model.attention",
)


def defaults() -> ConfigDict:
    """Every setting with its default; what is empty is filled in or not used."""
    return ConfigDict(
        {
            "mode": "unlearn",  # or "finetune" or "evaluate"
            "output": "",  # folder for checkpoints, logs, results and the model
            "seed": 0,
            "steps": 100,  # updates in all, those before a restart included
            "num_microbatches": 1,
            "save_every": 10,  # steps between checkpoints
            "keep": 3,  # checkpoints that stay
            # join: first joins the other processes of a cluster. If that is not found
            # by itself, say coordinator ("host:port"), processes and process (from 0).
            "distributed": {
                "join": False,
                "coordinator": "",
                "processes": 0,
                "process": -1,
            },
            "model": {
                "path": "",  # for hf.load: folder, .gguf, hub name, or "smollm2"
                "preset": "",  # or a name in jaxunlearn/workflows/training/presets.py, random weights
                "fields": {},  # or, or on top, fields of DecoderConfig
                "dtype": "float32",
                "compute_dtype": "float32",
                "remat": "full",
                "attention": "xla",  # or "auto", "cudnn", "splash"
            },
            "data": {},  # stream -> source, rows a step, length and the source's own
            "recipe": {
                "name": "",  # within jaxunlearn.recipes, such as "blur.npo"
                "args": {},
                "trainable": "",  # pattern in place of the recipe's own
            },
            # lr rises over `warmup` steps and falls, as a cosine, to lr * end at
            # `steps`; it is constant where steps is 0.
            "schedule": {"warmup": 0, "steps": 0, "end": 0.1},
            "mesh": {"data": 1, "fsdp": -1, "context": 1, "tensor": 1},
            "log": {"tensorboard": True, "wandb": False, "project": "jaxunlearn"},
            "evaluate": {"rows": 256},  # of each stream, the first; 0 for all
        }
    )


def keys() -> list[str]:
    """Dotted names of all settings."""
    return [name for name, _ in _leaves(defaults().to_dict())]


def check(config: ConfigDict) -> ConfigDict:
    """The config, once every key is known and every static value makes sense.

    Raises:
        ValueError, TypeError: naming the key, what was needed and what came.
    """
    _known(config.to_dict(), defaults().to_dict(), "")
    _checks.one_of("The config", MODES, mode=config.mode)
    if not config.output:
        raise ValueError(
            "The config needs an output folder, got none. Set --config.output=FOLDER."
        )
    for name in ("steps", "num_microbatches", "save_every", "keep"):
        _checks.positive_int("The config", **{name: config[name]})
    _checks.not_negative("The config", seed=config.seed)
    _checks.not_negative("The config's evaluate", rows=config.evaluate.rows)
    if not (config.model.path or config.model.preset or config.model.fields):
        raise ValueError(
            "The config needs a model: model.path, model.preset or model.fields, got "
            "none of them."
        )
    if config.model.path and (config.model.preset or config.model.fields):
        raise ValueError(
            "The config needs either model.path or a model of random weights "
            "(model.preset, model.fields), got both. Take one out."
        )
    if not config.data:
        raise ValueError("The config needs a stream in data, got none.")
    for stream, settings in config.data.items():
        _check_stream(stream, dict(settings))
    finetunes = config.recipe.name.startswith("finetune.")
    if config.mode != "evaluate" and finetunes != (config.mode == "finetune"):
        needed = "one in finetune" if config.mode == "finetune" else "a method's"
        raise ValueError(
            f"mode={config.mode!r} needs a recipe, {needed}, got "
            f"recipe.name={config.recipe.name!r}. Change the mode or the recipe."
        )
    return config


def _check_stream(stream: str, settings: dict[str, Any]) -> None:
    owner = f"The stream {stream!r} of the config"
    _checks.one_of(owner, SOURCES, source=settings.get("source"))
    known = COMMON | STREAM[settings["source"]]
    for name in settings:
        _checks.one_of(owner, sorted(known), key=name)
    _checks.one_of(owner, ("refuse", "drop"), long=settings.get("long", "refuse"))
    for name in ("rows", "length"):
        _checks.positive_int(owner, **{name: settings.get(name)})


def _known(came: Any, schema: Any, path: str) -> None:
    """Refuses keys that `defaults` lacks."""
    if path in FREE or not isinstance(schema, dict):
        return
    owner = f"The config's {path!r}" if path else "The config"
    if not isinstance(came, dict):
        raise TypeError(f"{owner} needs keys {_checks.listed(schema)}, got {came!r}.")
    for name in came:
        _checks.one_of(owner, list(schema), key=name)
        _known(came[name], schema[name], f"{path}.{name}".removeprefix("."))


def _leaves(tree: dict[str, Any], path: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
