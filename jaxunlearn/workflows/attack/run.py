# SPDX-License-Identifier: Apache-2.0
"""Runs every attack on a saved model, and says what came back.

    python -m jaxunlearn.workflows.attack.run --config=experiments/configs/attack.py \\
        --config.model=PATH --config.original=PATH --config.output=CARD

PATH is what hf.load takes: a Hugging Face folder, a .gguf file, a name on the hub, or
"smollm2". The original, the model before unlearning, may be left out; recovery rates
are then left out too, and facts are asked that it may not have known. CARD gets

    attacks/NAME.json   what each attack found, fact by fact, as soon as it is done
    card.md, card.json  the robustness card, printed too

The same command again runs what is missing: an attack that was cut off, or one whose
model, facts or settings changed.
"""

import re
import shlex
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from jaxunlearn import NotFinite, _checks
from jaxunlearn.io import hf
from jaxunlearn.workflows.attack import card, facts
from jaxunlearn.workflows.attack import jobs as units
from jaxunlearn.workflows.attack import prompts as asking
from jaxunlearn.workflows.evaluation import folder as folders

VERSION = 1  # of the results; one more whenever the code would give others
LIBRARIES = ("jaxunlearn", "jax", "jaxlib", "numpy", "optax", "transformers")
REFUSED = (ValueError, TypeError, ImportError, OSError, NotFinite, _checks.Missing)
KNOWN = ("", "auto", "completion", "choice")


def defaults() -> ConfigDict:
    """Every setting; `facts` is filled in."""
    return ConfigDict(
        {
            "model": "",  # a path as hf.load takes it, or "smollm2"
            "original": "",  # the model before unlearning
            "output": "",
            "seed": 0,
            "folder": "",  # above the benchmarks; JAXUNLEARN_DATA if empty
            "facts": {},  # as attacking.facts.read takes them
            # Only facts that the original knows, by completion or choice; "auto": by
            # completion if there is an original, else all facts.
            "known": "",
            "ask": dict(asking.How()._asdict()),
            "attacks": {name: dict(own) for name, own in units.DEFAULTS.items()},
            "only": "",  # names of attacks between commas, all if empty
            "dtype": "float32",
            "compute_dtype": "float32",
        }
    )


def run(
    config: ConfigDict, command: str = "", *, progress: bool = False
) -> tuple[dict[str, Any], str]:
    """Attacks what a config names; (the card's numbers, the card).

    Raises:
        ValueError, FileNotFoundError: for a config, facts or a model that cannot be
            used. An attack that cannot be run is told on the card instead.
    """
    work = _plan(config)
    asked = facts.read(config.facts.to_dict(), config.folder)
    how = asking.How(**config.ask.to_dict())
    output = Path(config.output).expanduser()
    known = _way(config)
    start = time.perf_counter()
    loaded: dict[str, tuple[str, units.Scene]] = {}

    def scene(which: str, rows: facts.Facts) -> tuple[str, units.Scene]:
        """(what the results of a model depend on, the scene); one in memory."""
        if which not in loaded:
            loaded.clear()
            model, params, tokenizer = hf.load(
                config[which],
                dtype=config.dtype,
                compute_dtype=config.compute_dtype,
                remat="none",
            )
            folders.check_tokenizer(tokenizer, config[which])
            digest = folders.digest(
                [
                    VERSION,
                    folders.params_digest(params),
                    repr(model.config),
                    folders.tokenizer_digest(tokenizer),
                ]
            )
            own = units.Scene(model, params, tokenizer, rows, how, config.seed)
            loaded[which] = digest, own._replace(progress=progress)
        digest, own = loaded[which]
        return digest, own._replace(facts=rows)

    found: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    bar = tqdm(
        work, disable=not progress, unit="attack", dynamic_ncols=True, file=sys.stderr
    )
    for unit in bar:
        bar.set_postfix_str(unit.name)
        own = None  # lets the last model go before another is loaded
        digest, own = scene(unit.of, asked)
        key = folders.digest(
            [
                digest,
                asked.digest,
                how._asdict(),
                config.seed,
                unit.name,
                dict(unit.settings),
            ]
        )
        file = output / "attacks" / f"{_slug(unit.name)}.json"
        result = _kept(file, key)
        if result is None:
            began = time.perf_counter()
            try:
                result = unit.run(own)
            except REFUSED as error:
                if unit.name == "original" and known:
                    raise ValueError(
                        "The attack could not ask the original, which known facts "
                        f"(known={known!r}) are told by. Set --config.known='' to "
                        f"attack all, or mend this: {error}"
                    ) from error
                refused[unit.name] = str(error)
                continue
            about = {"unit": unit.name, "key": key, "settings": dict(unit.settings)}
            about["seconds"] = time.perf_counter() - began
            folders.write(file, about | {"result": result})
            result = _kept(file, key)
        if unit.name == "original" and known:
            asked, result = _known(asked, result, known)
        found[unit.name] = result
    if "unlearned" not in found:
        raise ValueError(f"The attack could not ask the model: {refused['unlearned']}")
    numbers = card.make(found, [fact["id"] for fact in asked.forget], refused)
    about = {
        "model": config.model,
        "original": config.original or None,
        "command": command or "python -m jaxunlearn.workflows.attack.run",
        "known": known or None,
        "facts": {name: len(rows) for name, rows in asked._asdict().items()},
        "chance": 1 / len(asked.forget[0]["choices"]),
        "seed": config.seed,
        "seconds": time.perf_counter() - start,
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    text = card.markdown(numbers, about)
    folders.write(output / "card.json", {"about": about, **numbers})
    (output / "card.md").write_text(text, encoding="utf-8")
    return numbers, text


def _plan(config: ConfigDict) -> list[units.Unit]:
    """The work of a config, once every key is known."""
    for key in config:
        _checks.one_of("The attack's config", list(defaults()), key=key)
    for key in config.ask:
        _checks.one_of("The attack's config.ask", asking.How._fields, key=key)
    for key in ("model", "output"):
        if not config[key]:
            raise ValueError(f"The attack needs --config.{key}=PATH, got none.")
    _checks.one_of("The attack's config", KNOWN, known=config.known)
    if _way(config) and not config.original:
        raise ValueError(
            "The attack's config needs an original to tell known facts by, got "
            f"known={config.known!r} without one. Set --config.original=PATH."
        )
    chosen = config.attacks.to_dict()
    if config.only:
        names = config.only.split(",")
        for name in names:
            _checks.one_of("The attack's config", list(chosen), only=name)
        chosen = {name: chosen[name] for name in names}
    return units.plan(chosen, original=bool(config.original))


def _way(config: ConfigDict) -> str:
    """How the original tells known facts; "" if all facts are attacked."""
    if config.known == "auto":
        return "completion" if config.original else ""
    return config.known


def _known(asked, original, way: str) -> tuple[facts.Facts, dict[str, Any]]:
    """The facts that the original gets right, and its answers to them."""
    kept, answers = {}, {}
    for name, rows in asked._asdict().items():
        right = original[name][way]
        kept[name] = [row for row, yes in zip(rows, right, strict=True) if yes]
        if len(kept[name]) < 2:
            raise ValueError(
                f"The attack needs two or more facts to {name} that the original "
                f"knows, got {len(kept[name])} of {len(rows)} by {way}. Ask in other "
                "words (--config.ask.prompt), or set --config.known=''."
            )
        answers[name] = {
            each: [x for x, yes in zip(values, right, strict=True) if yes]
            for each, values in original[name].items()
        }
    return facts.Facts(**kept), answers


def _kept(file: Path, key: str) -> dict[str, Any] | None:
    """The result that is there, if it is of this key."""
    if not file.exists():
        return None
    found = folders.read(file)
    return _numbers(found["result"]) if found.get("key") == key else None


def _numbers(value: Any) -> Any:
    """The value with NaN where a file has null, as files of numbers do for it."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float("nan") if value is None else value


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "_", name)


def main(argv: list[str]) -> None:
    """Checks the config, attacks and prints the card."""
    logging.set_verbosity(logging.WARNING)
    warnings.simplefilter("always", UserWarning)
    command = "python -m jaxunlearn.workflows.attack.run " + shlex.join(sys.argv[1:])
    try:
        if len(argv) > 1 or flags.FLAGS.config is None:
            raise ValueError(
                f"attack needs --config=FILE and nothing bare, got {argv[1:]}."
            )
        _, text = run(flags.FLAGS.config, command, progress=True)
    except REFUSED as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(text)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a config's file")
    app.run(main)
