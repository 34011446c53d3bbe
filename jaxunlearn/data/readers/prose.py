# SPDX-License-Identifier: Apache-2.0
"""General English prose from CPython's language reference.

CPython contains the reference as `pydoc_data.topics`, so nothing is downloaded and this
repository holds no copy. Only paragraphs that are prose are returned; code, grammars,
tables, signatures and version notes are removed. The text differs slightly between
Python versions: compare perplexities of one version only.
"""

import hashlib
import importlib
import re

HELD_OUT_IN = 4  # one topic in four is held out, by the hash of its name

_CODE = re.compile(r"::=|>>>|\.\.\. |^ *[+|]|={3,}|-{4,}|\*{4,}", re.MULTILINE)
_VERSION = re.compile(
    r"(Changed|Added|New|Deprecated|Removed|Raises)\b.*(version|event)"
)
_BULLET = re.compile(r"^(\*|[0-9]+\.|\[[0-9]+\])\s+|^Note:\s+")


def prose() -> tuple[str, str]:
    """Text to train on and held-out text, split by topic.

    The side of a topic depends on a hash of its name only. A paragraph that occurs in
    topics of both sides is held out, so no held-out paragraph is trained on.

    Returns:
        (training text, held-out text), with an empty line between paragraphs.
    Raises:
        ModuleNotFoundError: if this Python has no `pydoc_data`.
    """
    topics = _topics()
    seen: set[str] = set()
    sides: dict[bool, list[str]] = {True: [], False: []}
    # Held-out topics first: a paragraph goes to the first topic that has it.
    for name in sorted(topics, key=lambda name: (not held_out(name), _hash(name))):
        for paragraph in paragraphs(topics[name]):
            if paragraph not in seen:
                seen.add(paragraph)
                sides[held_out(name)].append(paragraph)
    return "\n\n".join(sides[False]), "\n\n".join(sides[True])


def held_out(topic: str) -> bool:
    """Whether a topic belongs to the held-out side."""
    return _hash(topic) % HELD_OUT_IN == 0


def paragraphs(text: str) -> list[str]:
    """The prose paragraphs of one topic, without markup, one line each."""
    found = (_clean(block) for block in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in found if paragraph]


def _clean(block: str) -> str:
    """The paragraph on one line, or "" if it is not prose."""
    if _CODE.search(block):
        return ""
    first, _, rest = block.strip("\n").partition("\n")
    if rest and _indent(rest) > _indent(first) and not _BULLET.match(first.strip()):
        block = rest  # a term and its definition: use the definition
    text = re.sub(r"(\w)-\n\s*(?=\w)", r"\1-", block)  # a word broken at a line end
    text = re.sub(r"\s+", " ", _BULLET.sub("", text.strip()))
    text = re.sub(r"\s*\[[0-9]+\]", "", text)  # footnotes
    text = re.sub(r"\*\*?([^*\s](?:[^*]*[^*\s])?)\*\*?", r"\1", text)  # emphasis
    text = re.sub(r'"([\w.]+(?:\(\))?)"', r"\1", text).strip()  # quoted names
    words = text.split()
    letters = sum(c.isalpha() or c == " " for c in text)
    prose = (
        len(words) >= 12
        and text[0].isupper()
        and text[-1] in ".:"
        and letters >= 0.9 * len(text)
        and not _VERSION.match(text)
    )
    return text if prose else ""


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def _hash(topic: str) -> int:
    # Python's built-in hash of a text differs between processes.
    return int.from_bytes(hashlib.sha256(topic.encode()).digest()[:8], "big")


def _topics() -> dict[str, str]:
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "prose needs CPython's language reference, but this Python has no "
            "'pydoc_data.topics'. Install the full standard library, or use another "
            "text."
        ) from error
