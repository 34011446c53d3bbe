# SPDX-License-Identifier: Apache-2.0
"""The layout of a run's folder, and run.json, the record of how it was made.

`forget` and `finetune` make the folder; `evaluate`, `attack`, `report` and `export`
read it.

    runs/a/
        run.json                the record of the run, see Record
        checkpoints/            saved states; a killed run resumes from the newest
        metrics.jsonl           one JSON object for each step
        result.json             losses before and after, times
        model/                  the final model as a Hugging Face folder
        evaluation/original/    an evaluation of the model before the run,
        evaluation/unlearned/   of the model after it
        evaluation/retrained/   and of a retrained model, if one was given
        attack/                 results of each attack, and the robustness card
        report/                 report.html, report.md and figures
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxunlearn import _checks
from jaxunlearn.data import PromptFormat
from jaxunlearn.io import log

FORMAT = 2  # of run.json; it grows when an older reader would misread the file
ACTIONS = ("forget", "finetune")
ROLES = ("original", "unlearned", "retrained")


class Stream(NamedTuple):
    """The rows of one stream.

    Attributes:
        source: "file", or another source of workflows.training.settings.
        path: the absolute path of the file; "" for a source without one.
        prompt, answer: names of the columns; answer is "" for running text.
    """

    source: str
    path: str = ""
    prompt: str = "prompt"
    answer: str = "answer"


class Record(NamedTuple):
    """What run.json holds.

    Attributes:
        action: "forget" or "finetune".
        command: the command line that made the run.
        original: the model before the run: an absolute path, a name on the hub, or
            "smollm2".
        method: dotted name of the recipe, such as "openunlearning.npo".
        arguments: the recipe's arguments that were given.
        seed: of the run.
        streams: by name ("forget", "retain", ...).
        prompt_format: how prompts and answers are joined.
        versions: of the libraries, by name.
        config: every setting of the run.
    """

    action: str
    command: str
    original: str
    method: str
    arguments: Mapping[str, Any]
    seed: int
    streams: Mapping[str, Stream]
    prompt_format: PromptFormat
    versions: Mapping[str, str]
    config: Mapping[str, Any]


class RunFolder(NamedTuple):
    """Paths inside a run's folder; none of them needs to exist."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def evaluation(self, role: str) -> Path:
        """The folder of one model's evaluation; `role` is one of ROLES."""
        _checks.one_of("A run's evaluation", ROLES, role=role)
        return self.path / "evaluation" / role

    @property
    def attack(self) -> Path:
        return self.path / "attack"

    @property
    def report(self) -> Path:
        return self.path / "report"


def at(path: str | os.PathLike) -> RunFolder:
    """The paths of a run's folder; nothing is read."""
    return RunFolder(Path(path).expanduser())


def write(folder: RunFolder, record: Record) -> None:
    """Writes run.json in one step: a reader sees the old file or the new one.

    Raises:
        OSError: if the folder cannot be written.
    """
    found = {"format": FORMAT, **record._asdict()}
    found["streams"] = {name: s._asdict() for name, s in record.streams.items()}
    found["prompt_format"] = record.prompt_format.as_dict()
    fresh = folder.record.with_name("run.json.new")
    text = json.dumps(log.plain(found), indent=2, default=str) + "\n"
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, folder.record)


def read(path: str | os.PathLike) -> tuple[RunFolder, Record]:
    """The folder of a run and its record.

    Raises:
        FileNotFoundError: if there is no such folder, or no run.json in it.
        ValueError: if run.json cannot be read as a record.
    """
    folder = at(path)
    if not folder.record.is_file():
        came = "a folder without it" if folder.path.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"A run's folder needs run.json, got {folder.path}: {came}. Give the "
            "--output of `jaxunlearn forget` or `jaxunlearn finetune`."
        )
    try:
        found = json.loads(folder.record.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        found["streams"] = {k: Stream(**x) for k, x in found["streams"].items()}
        found["prompt_format"] = PromptFormat(**found["prompt_format"])
        return folder, Record(**found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder.record} needs the record of a run of this version, got a file "
            f"that cannot be used ({error!r}). Make the run again in another folder."
        ) from error


def finished(path: str | os.PathLike) -> tuple[RunFolder, Record]:
    """As `read`, for a run that has its final model.

    Raises:
        FileNotFoundError: if the run has not finished; the message has its command.
    """
    folder, record = read(path)
    if not (folder.model / "config.json").is_file():
        raise FileNotFoundError(
            f"A finished run needs {folder.model}, which is not there. Finish the run "
            f"first: {record.command}"
        )
    return folder, record
