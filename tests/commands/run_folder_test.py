# SPDX-License-Identifier: Apache-2.0
"""run.json comes back as it was written, and what cannot be used is refused."""

import pytest

from jaxunlearn import data
from jaxunlearn.workflows import run_folder

RECORD = run_folder.Record(
    action="forget",
    command="jaxunlearn forget --model m",
    original="smollm2",
    method="openunlearning.npo",
    arguments={"beta": 0.2},
    seed=3,
    streams={"forget": run_folder.Stream("file", "/data/f.jsonl", "question")},
    prompt_format=data.PromptFormat(chat=True, system="Be brief."),
    versions={"jax": "1"},
    config={"steps": 3},
)


def test_a_record_is_read_as_written(tmp_path):
    folder = run_folder.at(tmp_path)
    run_folder.write(folder, RECORD)
    assert run_folder.read(tmp_path) == (folder, RECORD)
    assert folder.evaluation("original") == tmp_path / "evaluation" / "original"


def test_unusable_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_folder.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="run.json"):
        run_folder.read(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="run.json"):
        run_folder.read(tmp_path)
    run_folder.write(run_folder.at(tmp_path), RECORD)
    with pytest.raises(FileNotFoundError, match="jaxunlearn forget --model m"):
        run_folder.finished(tmp_path)
    with pytest.raises(ValueError, match="unlearnt"):
        run_folder.at(tmp_path).evaluation("unlearnt")
