# SPDX-License-Identifier: Apache-2.0
"""--help of every program in experiments/ prints, runs nothing and writes nothing."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [
    str(file.relative_to(ROOT))
    for file in sorted((ROOT / "experiments").rglob("*.py"))
    if '__name__ == "__main__"' in (text := file.read_text(encoding="utf-8"))
    # absl's flags are global: a second definition in one process is an error.
    and "from absl" not in text
]


def files():
    """Every file that a program might overwrite, with the time of its last change."""
    folders = (ROOT / "experiments", ROOT / "docs")
    found = (file for folder in folders for file in folder.rglob("*"))
    return {x: x.stat().st_mtime_ns for x in found if "__pycache__" not in x.parts}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_only_prints(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    before = files()
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert not caught.value.code
    assert "usage:" in capsys.readouterr().out
    assert files() == before and not list(tmp_path.iterdir())


def test_programs_are_found():
    assert {"experiments/quickstart/run.py", "experiments/blur/run.py"} <= set(PROGRAMS)
