# SPDX-License-Identifier: Apache-2.0
"""Two texts to tell apart: Python code and English prose, each in two disjoint parts.

Code is the standard library of the interpreter that runs, prose is WikiText-2, or
CPython's language reference where the files of WikiText-2 are absent.
"""

import gzip
import hashlib
import re
import sys
import sysconfig
from pathlib import Path

from experiments.small import questions
from jaxunlearn.data import prose

CHARACTERS = 4000  # of one module at most, so that many are read


def code(folder: Path | None = None) -> tuple[tuple[str, str], str]:
    """((text to look at, text to score), where it is from).

    A module's side depends on a hash of its name; its lines from a third on are taken,
    as the first ones are often a licence or a docstring.

    Args:
        folder: of Python files; the interpreter's standard library if None.
    Raises:
        FileNotFoundError: if a side has no file.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    sides: dict[bool, list[str]] = {True: [], False: []}
    for path in sorted(folder.glob("*.py"), key=lambda path: _hash(path.name)):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
        text = "".join(lines[len(lines) // 3 :])[:CHARACTERS]
        sides[bool(_hash(path.name) % 2)].append(text)
    if not all(sides.values()):
        raise FileNotFoundError(
            f"prune_texts.code needs at least two Python files in {folder}, got "
            f"{sum(map(len, sides.values()))}. Install the whole standard library."
        )
    version = ".".join(map(str, sys.version_info[:3]))
    texts = ["\n\n".join(sides[side]) for side in (True, False)]
    return (texts[0], texts[1]), f"standard library of Python {version}"


def english(folder: str = "") -> tuple[tuple[str, str], str]:
    """((text to look at, text to score), where it is from): WikiText-2's validation and
    test articles without headings, or `data.prose`."""
    place = questions.data_folder(folder) / "wikitext2"
    files = [place / f"{name}.txt.gz" for name in ("valid", "test")]
    if not all(file.is_file() for file in files):
        return prose.prose(), "CPython's language reference"
    first, second = (_articles(file) for file in files)
    return (first, second), "WikiText-2"


def _articles(file: Path) -> str:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        kept = [x.strip() for x in lines if x.strip() and not x.startswith(" =")]
    # The published form is tokenised; its hyphens and numbers are put together again.
    text = re.sub(r" @([-.,])@ ", r"\1", "\n\n".join(kept))
    text = re.sub(r" ([.,;:!?)])", r"\1", text)
    return re.sub(r"\( ", "(", text)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
