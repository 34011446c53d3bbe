# SPDX-License-Identifier: Apache-2.0
"""Two texts, Python code and English prose, each in two disjoint parts.

Code is the standard library of the running interpreter. Prose is WikiText-2, or
CPython's language reference if the files of WikiText-2 are absent.
"""

import gzip
import hashlib
import re
import sys
import sysconfig
from pathlib import Path

from experiments.small import questions
from jaxunlearn.data import prose

MAX_CHARACTERS = 4000  # of one module, so that many modules are read


def code(folder: Path | None = None) -> tuple[tuple[str, str], str]:
    """((text for statistics, text to score), where it is from).

    A module's part depends on a hash of its name; only its last two thirds are used,
    as the first ones are often a licence or a docstring.

    Args:
        folder: of Python files; the interpreter's standard library if None.
    Raises:
        FileNotFoundError: if a part has no file.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[str]] = {True: [], False: []}
    for path in sorted(folder.glob("*.py"), key=lambda path: _hash(path.name)):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
        text = "".join(lines[len(lines) // 3 :])[:MAX_CHARACTERS]
        parts[bool(_hash(path.name) % 2)].append(text)
    if not all(parts.values()):
        raise FileNotFoundError(
            f"texts.code needs at least two Python files in {folder}, got "
            f"{sum(map(len, parts.values()))}. Install the full standard library."
        )
    version = ".".join(map(str, sys.version_info[:3]))
    texts = ["\n\n".join(parts[side]) for side in (True, False)]
    return (texts[0], texts[1]), f"standard library of Python {version}"


def english(folder: str = "") -> tuple[tuple[str, str], str]:
    """((text for statistics, text to score), where it is from).

    WikiText-2's validation and test articles without headings, or `data.prose`.
    """
    place = questions.data_folder(folder) / "wikitext2"
    files = [place / f"{name}.txt.gz" for name in ("valid", "test")]
    if not all(file.is_file() for file in files):
        return prose.prose(), "CPython's language reference"
    first, second = (_articles(file) for file in files)
    return (first, second), "WikiText-2"


def _articles(file: Path) -> str:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        paragraphs = [x.strip() for x in lines if x.strip() and not x.startswith(" =")]
    # The published form is tokenised: hyphens and numbers are joined again.
    text = re.sub(r" @([-.,])@ ", r"\1", "\n\n".join(paragraphs))
    text = re.sub(r" ([.,;:!?)])", r"\1", text)
    return re.sub(r"\( ", "(", text)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
