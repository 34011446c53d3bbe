# SPDX-License-Identifier: Apache-2.0
"""Runs every attack on a saved model and writes the robustness card.

The output folder gets

    attacks/NAME.json   the result of each attack, fact by fact, when it is done
    card.md, card.json  the robustness card

Calling again runs only what is missing: an attack that was interrupted, or one whose
model, facts or settings changed.
"""

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxunlearn import NotFinite, _checks
from jaxunlearn.workflows import loading, records
from jaxunlearn.workflows.attack import card, facts, jobs, prompts

VERSION = 3  # of the results; raise it when the code computes other results
LIBRARIES = ("jaxunlearn", "jax", "jaxlib", "numpy", "optax", "transformers")
# An attack that raises one of these is listed on the card as not run.
NOT_RUN = (ValueError, TypeError, ImportError, OSError, NotFinite, _checks.Missing)
KNOWN = ("", "auto", "completion", "choice")


def attack_model(
    path: str | Path,
    fact_set: facts.FactSet,
    output: str | Path,
    *,
    original: str | Path = "",
    attacks: Mapping[str, Mapping[str, Any]] = jobs.QUICK,
    settings: prompts.PromptSettings = prompts.PromptSettings(),  # noqa: B008
    known: str = "",
    seed: int = 0,
    dtype: str = "float32",
    compute_dtype: str = "auto",
    command: str = "",
    progress: bool = False,
) -> tuple[dict[str, Any], str]:
    """Attacks a model; (the numbers of the card, the card as Markdown).

    One model is in memory at a time.

    Args:
        path: the unlearned model: a Hugging Face folder, a GGUF file, a name on the
            hub, or "smollm2".
        fact_set: the facts to query.
        output: the folder.
        original: the model before unlearning; without it there are no recovery rates.
        attacks: attack -> settings that differ from jobs.THOROUGH.
        settings: how the models are prompted.
        known: "completion" or "choice" keeps only facts that the original gets right by
            this measure; "auto" is "completion" if there is an original; "" keeps all.
        seed: of random draws and of the data order.
        dtype, compute_dtype: of the loaded models.
        command: the command line, recorded on the card.
        progress: whether to show progress bars.
    Raises:
        ValueError, FileNotFoundError: for settings, facts or a model that cannot be
            used. An attack that cannot be run is listed on the card instead.
    """
    _checks.one_of("The attack", KNOWN, known=known)
    if known == "auto":
        known = "completion" if original else ""
    if known and not original:
        raise ValueError(
            "The attack needs an original model to find the known facts, got "
            f"known={known!r} without one. Pass --original MODEL."
        )
    work = jobs.plan(attacks, has_original=bool(original))
    output = records.make_folder("attack", Path(output).expanduser())
    start = time.perf_counter()
    models = _Models({"original": original, "model": path}, dtype, compute_dtype)
    results: dict[str, dict[str, Any]] = {}
    not_run: dict[str, str] = {}
    ran_in = None
    bar = tqdm(
        work, disable=not progress, unit="attack", dynamic_ncols=True, file=sys.stderr
    )
    for job in bar:
        bar.set_postfix_str(job.name)
        model_key, *loaded = models.load(job.target)
        ran_in = getattr(loaded[0].config, "compute_dtype", None)
        context = jobs.Context(*loaded, fact_set, settings, seed, progress)
        del loaded
        key = records.digest(
            [
                [VERSION, *model_key],
                fact_set.digest,
                settings.as_dict(),
                seed,
                job.name,
                dict(job.settings),
            ]
        )
        file = output / "attacks" / f"{_slug(job.name)}.json"
        try:
            result = _stored(file, key) or _run_job(job, context, file, key)
        except NOT_RUN as error:
            if job.name == "original" and known:
                raise ValueError(
                    "The attack could not query the original, which decides what facts "
                    f"are known (known={known!r}). Pass --known '' to use all facts, "
                    f"or solve this: {error}"
                ) from error
            not_run[job.name] = str(error)
            continue
        finally:
            del context  # frees the model before the next one is loaded
        if job.name == "original" and known:
            fact_set, result = _known_facts(fact_set, result, known)
        results[job.name] = result
    if "unlearned" not in results:
        raise ValueError(f"The attack could not query {path}: {not_run['unlearned']}")
    numbers = card.make(results, [fact["id"] for fact in fact_set.forget], not_run)
    about = {
        "model": str(path),
        "original": str(original) or None,
        "command": command,
        "known": known or None,
        "prompt_format": settings.prompt_format.as_dict(),
        "facts": {name: len(rows) for name, rows in fact_set._asdict().items()},
        "chance": 1 / len(fact_set.forget[0]["choices"]),
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "versions": records.versions(*LIBRARIES),
        "devices": records.devices(),
        "compute_dtype": ran_in,
    }
    text = card.markdown(numbers, about)
    records.write(output / "card.json", {"about": about, **numbers})
    records.replace(output / "card.md", text)
    return numbers, text


class _Models:
    """Loads models by name; the last one is freed before another is loaded."""

    def __init__(self, paths: Mapping[str, Any], dtype: str, compute_dtype: str):
        self._paths = paths
        self._dtypes = dict(dtype=dtype, compute_dtype=compute_dtype)
        self._loaded: dict[str, tuple] = {}

    def load(self, name: str) -> tuple:
        """(the key of the model, model, params, tokenizer)."""
        if name not in self._loaded:
            self._loaded.clear()
            found = loading.load(self._paths[name], **self._dtypes)
            self._loaded[name] = (records.model_key(*found), *found)
        return self._loaded[name]


def _stored(file: Path, key: str) -> dict[str, Any] | None:
    """The result in a file, if it has this key."""
    if not file.exists():
        return None
    found = records.read(file)
    return _with_nan(found["result"]) if found.get("key") == key else None


def _run_job(job, context, file: Path, key: str) -> dict[str, Any]:
    """Runs a job, writes its result and returns it as the file gives it back."""
    start = time.perf_counter()
    result = job.run(context)
    found = {"job": job.name, "key": key, "settings": dict(job.settings)}
    found["seconds"] = time.perf_counter() - start
    records.write(file, found | {"result": result})
    return _stored(file, key)


def _known_facts(
    fact_set, original, measure: str
) -> tuple[facts.FactSet, dict[str, Any]]:
    """The facts that the original gets right, and its values for them."""
    facts_kept, values_kept = {}, {}
    for name, rows in fact_set._asdict().items():
        right = original[name][measure]
        facts_kept[name] = [row for row, hit in zip(rows, right, strict=True) if hit]
        if len(facts_kept[name]) < 2:
            raise ValueError(
                f"The attack needs two or more facts to {name} that the original "
                f"knows, got {len(facts_kept[name])} of {len(rows)} by {measure}. Use "
                "another wording (--prompt), or pass --known '' to use all facts."
            )
        values_kept[name] = {
            each: [x for x, hit in zip(values, right, strict=True) if hit]
            for each, values in original[name].items()
        }
    return facts.FactSet(**facts_kept), values_kept


def _with_nan(value: Any) -> Any:
    """The value with NaN where a file of numbers has null."""
    if isinstance(value, dict):
        return {key: _with_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return float("nan") if value is None else value


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "_", name)
