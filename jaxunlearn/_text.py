# SPDX-License-Identifier: Apache-2.0
"""Words and equality of texts in every script, by the properties of Unicode."""

import functools
import unicodedata

# Scripts without spaces between words: each character is a word. These are the first
# words of Unicode's names of their characters.
_NO_SPACES = (
    "CJK",
    "HIRAGANA",
    "IDEOGRAPHIC",
    "KATAKANA",
    "KHMER",
    "LAO",
    "MYANMAR",
    "NEW TAI LUE",
    "TAI",
    "THAI",
    "YI",
)
# Marks over these letters are accents or optional vowels. In other scripts a mark makes
# another letter, such as the voicing mark of Japanese or a vowel of Hindi.
_ACCENTED = ("ARABIC", "CYRILLIC", "GREEK", "HEBREW", "LATIN")
# Characters that show nothing: soft hyphen, joiners, marks of direction, variation
# selectors, the byte order mark, and the Arabic line that only stretches a word. The
# zero-width space separates words and so becomes a space.
_INVISIBLE = dict.fromkeys(
    [0xAD, 0x61C, 0x640, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFEFF]
    + [*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xFE00, 0xFE10)]
) | {0x200B: " "}


def words(text: str) -> list[str]:
    """The words of a text, caseless and without punctuation.

    A word is a run of letters, their marks, and digits. Each character of a script that
    writes no spaces, with its marks, is a word: Chinese, Japanese, Thai, Lao, Khmer,
    Burmese. For text whose letters are all ASCII, these are the runs of a-z and 0-9 of
    `text.lower()`.
    """
    text = text.translate(_INVISIBLE)
    # Symbols go first: compatibility would make letters of some, "TM" of a trade mark.
    text = "".join(c if _kind(c) else " " for c in text)
    found, before = [], ""
    for char in _caseless(text, "NFKD", "NFKC"):
        kind = _kind(char)
        if kind == "mark" and before:
            found[-1] += char
            continue
        if kind == before == "letter":
            found[-1] += char
        elif kind in ("letter", "word"):
            found.append(char)
        before = "" if kind == "mark" else kind
    return found


def caseless(text: str) -> str:
    """A text equal to that of all texts that differ only in case, in how accents are
    composed, in invisible characters and in outer white space."""
    return _caseless(text.translate(_INVISIBLE), "NFD", "NFC").strip()


def contains(text: str, answer: str) -> bool:
    """Whether the words of an answer occur in a text, one after the other.

    In Korean, a particle may follow the answer's last word without a space. An answer
    without words, such as a symbol, occurs where its characters do.
    """
    wanted, found = words(answer), words(text)
    if not wanted:
        return bool(caseless(answer)) and caseless(answer) in caseless(text)
    *first, last = wanted
    return any(
        found[i : i + len(first)] == first
        and (found[i + len(first)] == last or _particle(last, found[i + len(first)]))
        for i in range(len(found) - len(first))
    )


def begins(text: str, answer: str) -> bool:
    """Whether a text begins with an answer that ends at the end of a word.

    Case is ignored, and so are accents, kinds of apostrophes and of width.
    """
    text, answer = unaccented(text), unaccented(answer)
    rest = text.removeprefix(answer)
    if not text.startswith(answer) or not rest or not answer:
        return bool(answer) and text.startswith(answer)
    after = _kind(rest[0])
    inside = after == "mark" or _last_kind(answer) == after == "letter"
    return not inside or _is_hangul(answer[-1])


def halves(text: str) -> tuple[str, str]:
    """The first and the second half of a text's words; ("", text) if it has one word.

    White space between words becomes one space, except where the text is cut. Text of
    a script without spaces is cut between characters.
    """
    text = " ".join(text.split())
    kinds = [" " if char == " " else _kind(char) for char in text]
    starts = [
        i
        for i, (before, kind) in enumerate(zip([" ", *kinds], kinds, strict=False))
        if kind not in (" ", "mark") and (before == " " or "word" in (before, kind))
    ]
    cut = starts[len(starts) // 2] if len(starts) > 1 else 0
    return text[:cut].rstrip(), text[cut:]


def separator(first: str, second: str) -> str:
    """What the halves of a text had between them: a space, or "" where one of the two
    characters there is of a script without spaces."""
    return "" if "word" in (_last_kind(first), _kind(second[:1] or " ")) else " "


def _last_kind(text: str) -> str:
    """The kind of a text's last character, of a mark that of its letter."""
    return next((k for k in map(_kind, reversed(text)) if k != "mark"), "")


@functools.lru_cache(maxsize=2**16)
def _kind(char: str) -> str:
    """What a character is: "letter" (or digit), "mark", "word" (a letter that is a
    word by itself), or "" for spaces, punctuation and symbols."""
    category = unicodedata.category(char)
    if category in ("Mn", "Mc"):
        return "mark"
    if category in ("Nd", "Nl"):
        return "letter"
    if category[0] != "L":
        return ""
    name = unicodedata.name(char, "").removeprefix("HALFWIDTH ")
    return "word" if name.startswith(_NO_SPACES) else "letter"


def _caseless(text: str, apart: str, joined: str) -> str:
    text = unicodedata.normalize(apart, text).casefold()
    # The small letter of the Turkish capital I with a dot is a plain i.
    return unicodedata.normalize(joined, text.replace("i\u0307", "i"))


def unaccented(text: str) -> str:
    """Caseless text without accents, with one kind of apostrophe."""
    found, script = [], ""
    text = text.translate(_INVISIBLE).replace("’", "'")
    for char in unicodedata.normalize("NFKD", text):
        if unicodedata.category(char) != "Mn":
            script = unicodedata.name(char, "")
        elif script.startswith(_ACCENTED):
            continue
        found.append(char)
    return _caseless("".join(found), "NFKD", "NFKC")


def _particle(answer: str, word: str) -> bool:
    return _is_hangul(answer[-1]) and word.startswith(answer)


def _is_hangul(char: str) -> bool:
    return unicodedata.name(char, "").startswith("HANGUL")
