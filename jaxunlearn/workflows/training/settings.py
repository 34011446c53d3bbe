# SPDX-License-Identifier: Apache-2.0
"""The settings of a run, and what is refused before anything runs.

A config file is a Python file with `get_config()`: it takes `defaults()`, fills it in
and returns it. The options of the commands write the same settings, and
`--set KEY=VALUE` writes any of them: `--set recipe.args.learning_rate=2e-5`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxunlearn import _checks, combine, data, recipes, sharding
from jaxunlearn.workflows import config_file

# What LoRA adapts by default: all kernels of the blocks but routers.
KERNELS = r"blocks/(?!mlp/(router|shared_gate)/).*/kernel"
MODES = ("finetune", "unlearn", "evaluate")
COMMON = {"source", "rows", "length"}
# Names of columns, and a dict of those fields of config.prompt_format that differ.
TEXTS = {"prompt", "answer", "prompt_format"}
STREAM = {  # the keys of each source; `rows` and `length` are common to all
    # Random tokens.
    "synthetic": {"count", "seed"},
    # The packaged capitals: of the continent `group`, or of all others.
    "capitals": {"group", "others", "prompt_format"},
    # The packaged prose.
    "prose": {"held_out"},
    # lazy: a row is read and encoded when its batch is made.
    "jsonl": {"path", "lazy"} | TEXTS,
    # path: .jsonl, .json, .csv or .parquet. prompt, answer: names of columns; if not
    # given, prompt or question, and answer. answer "": running text in the column
    # `prompt` (text, if not given) or a .txt file, cut into rows of `length`.
    # long: "drop" leaves out and counts rows over the length (of streams that are read
    # in pairs, from all of them); "refuse", the default, does not run.
    "file": {"path", "long"} | TEXTS,
    # A benchmark's table: data.tofu.read(table, folder, check=check) and the like.
    "benchmark": {"name", "table", "folder", "check", "long"} | TEXTS,
    # path: a glob. Records are JSON objects, read when their batch is made.
    "array_record": {"path"} | TEXTS,
}
FREE = ("model.fields", "data", "recipe.args", "projection.sites")
FREE += ("prompt_format.arguments",)
"""Parts of a config where any key may be added; their readers check the keys."""

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
    "recipe.scale",
)
"""Settings that may change when a run resumes: they do not enter the updates."""


def defaults() -> ConfigDict:
    """Every setting with its default; an empty one is filled in or not used."""
    return ConfigDict(
        {
            "mode": "unlearn",  # or "finetune" or "evaluate"
            "output": "",  # the run's folder
            "seed": 0,
            # Updates in all, those before a restart included; 0 for PASSES passes over
            # the forget rows (finetune: over the first stream).
            "steps": 100,
            "num_microbatches": 1,
            # How updates of params below float32 are rounded (model.dtype): "nearest",
            # "stochastic" or "masters", as combine.with_rounding describes them.
            "rounding": "nearest",
            # How moments of the optimizer are stored: "float32", "bfloat16" or "int8",
            # as combine.with_moments describes them.
            "moments": "float32",
            "save_every": 10,  # steps between checkpoints
            "keep": 3,  # checkpoints that stay
            # join: joins the other processes of a cluster first. Where JAX does not
            # find them, give coordinator ("host:port"), processes and process (from 0).
            "distributed": {
                "join": False,
                "coordinator": "",
                "processes": 0,
                "process": -1,
            },
            "model": {
                "path": "",  # for hf.load: folder, .gguf, adapter, hub name, "smollm2"
                "preset": "",  # or a name in training/presets.py, random weights
                "fields": {},  # or, or in addition, fields of DecoderConfig
                "dtype": "float32",
                "compute_dtype": "auto",  # the faster of bfloat16 and float32
                "remat": "full",
                "attention": "xla",  # or "auto", "cudnn", "splash", "tokamax"
            },
            "data": {},  # stream -> source, rows a step, length, and the source's keys
            # How prompts and answers are joined: the fields of data.PromptFormat.
            "prompt_format": data.PromptFormat().as_dict(),
            "recipe": {
                "name": "",  # a name of recipes.by_name, such as "blur.npo"
                "args": {},
                "trainable": "",  # a pattern that replaces the recipe's
                "scale": 5.0,  # of openunlearning.task_vector's subtraction
            },
            # rank > 0 trains LoRA matrices for the kernels that `pattern` matches.
            # alpha 0 means 2 * rank.
            "lora": {"rank": 0, "alpha": 0.0, "pattern": KERNELS},
            # Where mrp.graddiff projects: site -> layers. Empty: all layers of mlp_out.
            # num_protected 0: the smaller of 64 and a quarter of the units.
            "projection": {"sites": {}, "num_directions": 2, "num_protected": 0},
            # The learning rate rises over `warmup` steps and then falls, as a cosine,
            # to `end` times its peak at `steps`. It is constant where steps is 0.
            "schedule": {"warmup": 0, "steps": 0, "end": 0.1},
            "mesh": dict.fromkeys(sharding.AXES, 1) | {"fsdp": -1},
            # every: steps between two printed lines where there is no terminal.
            "log": {
                "every": 10,
                "tensorboard": False,
                "wandb": False,
                "project": "jaxunlearn",
            },
            "evaluate": {"rows": 256},  # of each stream, the first; 0 for all
        }
    )


def assign(config: ConfigDict, given: Mapping[str, str]) -> None:
    """Sets `--set KEY=VALUE` pairs: settings by their names, or the recipe's arguments.

    A key is a setting of the run, such as "seed" or "model.remat". Any other key
    without a dot is an argument of the recipe: "beta" means "recipe.args.beta".

    Raises:
        ValueError: for an unknown key, with the nearest one.
        TypeError: for a value of another type than the setting's.
    """
    keys, arguments = sorted(config_file.leaves(defaults())), {}
    if config.recipe.name:
        arguments = recipe_arguments(method(config.recipe.name))
    for key, text in given.items():
        is_free = any(key.startswith(f"{part}.") for part in FREE)
        if key in arguments and key not in keys:
            key = f"recipe.args.{key}"
        elif not is_free:
            _checks.one_of("--set", [*arguments, *keys], key=key)
        config_file.assign(config, {key: text}, free=FREE, owner="--set")


def recipe_arguments(name: str) -> dict[str, Any]:
    """The keyword arguments of a recipe, with their defaults."""
    parameters = list(inspect.signature(recipes.by_name(name)).parameters.values())
    return {x.name: x.default for x in parameters[1:]}


def method(name: str) -> str:
    """The dotted name of the recipe that a full or short name means.

    "npo" means openunlearning.npo: a name without a dot is first looked up in that
    group, then as the only recipe of this name. "blur_npo" means blur.npo.

    Raises:
        ValueError: for an unknown name, with the nearest, or one that several recipes
            have.
    """
    names = list(recipes.by_name())
    for meant in (name, f"openunlearning.{name}", name.replace("_", ".", 1)):
        if meant in names:
            return meant
    found = [each for each in names if name in each.split(".")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"A method needs one name, got {name!r}, which could be any of "
            f"{_checks.listed(found)}."
        )
    short = [each.split(".")[1] for each in names if each.startswith("openunl")]
    _checks.one_of("A method", names + short, name=name)
    raise AssertionError("one_of has raised")


def check(config: ConfigDict) -> ConfigDict:
    """The config, once every key is known and every static value makes sense.

    Raises:
        ValueError, TypeError: naming the key, what was needed and what came.
    """
    _known(config.to_dict(), defaults().to_dict(), "")
    _checks.one_of("The config", MODES, mode=config.mode)
    _checks.one_of("The config", combine.ROUNDINGS, rounding=config.rounding)
    _checks.one_of("The config", combine.MOMENTS, moments=config.moments)
    if not config.output:
        raise ValueError(
            "A run needs an output folder, got none. Give --output FOLDER."
        )
    for name in ("num_microbatches", "save_every", "keep"):
        _checks.positive_int("The config", **{name: config[name]})
    _checks.positive_int("The config's log", every=config.log.every)
    _checks.not_negative("The config", seed=config.seed, steps=config.steps)
    _checks.not_negative("The config's evaluate", rows=config.evaluate.rows)
    _checks.not_negative("The config's lora", rank=config.lora.rank)
    check_model(config.model)
    check_prompt_format(config)
    if not config.data:
        raise ValueError("A run needs a stream of data, got none. Give a file.")
    for stream, settings in config.data.items():
        check_stream(stream, dict(settings))
        if settings.get("prompt_format"):
            _check_format_of_stream(config, stream)
    finetunes = config.recipe.name.startswith("finetune.")
    if config.mode != "evaluate" and finetunes != (config.mode == "finetune"):
        needed = "one in finetune" if config.mode == "finetune" else "a method's"
        raise ValueError(
            f"mode={config.mode!r} needs a recipe, {needed}, got "
            f"recipe.name={config.recipe.name!r}. Change the mode or the recipe."
        )
    return config


def check_prompt_format(config: ConfigDict) -> None:
    """Checks config.prompt_format, and reads its template if that is a file.

    Raises:
        ValueError, TypeError: as PromptFormat.with_settings, and for a system message
            or a template without a chat.
    """
    given = config.prompt_format.to_dict()
    found = data.PromptFormat().with_settings(given)
    found.check_chat("The config's prompt_format", given)
    config.prompt_format.template = found.template


def _check_format_of_stream(config: ConfigDict, stream: str) -> None:
    """As check_prompt_format, for the fields that one stream replaces."""
    settings = config.data[stream].prompt_format
    given = settings.to_dict()
    common = data.PromptFormat().with_settings(config.prompt_format.to_dict())
    found = common.with_settings(given)
    found.check_chat(f"The prompt_format of the stream {stream!r}", given)
    if "template" in given:
        settings.template = found.template


def check_model(model: ConfigDict) -> None:
    """Checks config.model; errors are those of `check`."""
    random = model.preset or model.fields
    if not (model.path or random):
        raise ValueError(
            "A run needs a model, got none. Give --model, or model.preset or "
            "model.fields in a config."
        )
    if model.path and random:
        raise ValueError(
            "A run needs either a saved model (--model, model.path) or one of random "
            "weights (model.preset, model.fields), got both. Remove one."
        )


def check_stream(stream: str, settings: dict[str, Any]) -> None:
    """Checks the settings of one stream; errors are those of `check`."""
    owner = f"The stream {stream!r} of the config"
    _checks.one_of(owner, STREAM, source=settings.get("source"))
    known = COMMON | STREAM[settings["source"]]
    for name in settings:
        _checks.one_of(owner, sorted(known), key=name)
    _checks.one_of(owner, ("refuse", "drop"), long=settings.get("long", "refuse"))
    _checks.positive_int(owner, rows=settings.get("rows"))
    if settings["source"] in ("file", "capitals", "benchmark"):  # 0: the longest row
        _checks.not_negative(owner, length=settings.get("length", 0))
    else:
        _checks.positive_int(owner, length=settings.get("length"))


def _known(came: Any, schema: Any, path: str) -> None:
    """Refuses keys that `defaults` does not have."""
    if path in FREE or not isinstance(schema, dict):
        return
    owner = f"The config's {path!r}" if path else "The config"
    if not isinstance(came, dict):
        raise TypeError(f"{owner} needs keys {_checks.listed(schema)}, got {came!r}.")
    for name in came:
        _checks.one_of(owner, list(schema), key=name)
        _known(came[name], schema[name], f"{path}.{name}".removeprefix("."))
