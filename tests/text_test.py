# SPDX-License-Identifier: Apache-2.0
"""Words and equality of texts in many scripts."""

import random
import string
import unicodedata

import pytest

from jaxunlearn import _text

TEXTS = {
    "Arabic": "عاصمة فرنسا هي باريس",
    "Bengali": "ফ্রান্সের রাজধানী প্যারিস",
    "Burmese": "ပြင်သစ်နိုင်ငံ၏ မြို့တော်",
    "Chinese": "法国的首都是巴黎。",
    "Georgian": "საფრანგეთის დედაქალაქია პარიზი",
    "Greek": "Η πρωτεύουσα είναι το Παρίσι",
    "Hebrew": "בירת צרפת היא פריז",
    "Hindi": "फ़्रांस की राजधानी पेरिस है।",
    "Japanese": "フランスの首都はパリです。",
    "Khmer": "រដ្ឋធានីនៃប្រទេសបារាំង",
    "Korean": "프랑스의 수도는 파리이다",
    "Persian": "می‌خواهم به پاریس بروم",
    "Russian": "Столица Франции - Париж.",
    "Tamil": "பிரான்சின் தலைநகரம் பாரிஸ்",
    "Thai": "เมืองหลวงของฝรั่งเศสคือปารีส",
    "Turkish": "İSTANBUL güzel bir şehir",
    "Vietnamese": "Thủ đô của nước Pháp là Pa-ri",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
def test_words_have_every_letter_and_do_not_depend_on_composition(text):
    found = _text.words(text)
    kept = [c for c in text if unicodedata.category(c)[0] in "LN"]
    assert len(found) > 2 and sum(map(len, found)) >= len(kept)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert _text.words(unicodedata.normalize(form, text)) == found
    assert _text.words(text.upper()) == found or text == TEXTS["Greek"]
    assert _text.contains(text, text) and not _text.contains(text[:-4], text)


def test_words_of_english_are_runs_of_letters_and_digits():
    draw = random.Random(0)
    symbols = string.printable + "“”‘’–—…€£™²½•\u00a0🙂"
    for _ in range(50):
        text = "".join(draw.choices(symbols, k=60))
        plain = "".join(c if c.isascii() and c.isalnum() else " " for c in text)
        assert _text.words(text) == plain.lower().split()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Müller", "Möller", False),
        ("Müller", "MU\u0308LLER", True),
        ("Straße", "STRASSE", True),
        ("दिल्ली", "दल्ला", False),
        ("が", "か", False),
        ("ＡＢＣ１２", "abc12", True),
        ("ｶﾞｽ", "ガス", True),
        ("ﻣﺪﻳﻨﺔ", "مدينة", True),
        ("مـــدينة", "\u200fمدينة", True),
        ("co\u00adop", "coop", True),
        ("a\u200bb", "a b", True),
        ("İzmir", "izmir", True),
        ("ก็", "ก", False),
    ],
)
def test_equal_words(one, other, same):
    assert (_text.words(one) == _text.words(other)) is same


def test_caseless_texts_differ_in_what_is_seen():
    assert _text.caseless(" CAFE\u0301\n") == _text.caseless("café")
    assert _text.caseless("x²") != _text.caseless("x2")
    assert _text.caseless("!") != _text.caseless("?")
    assert _text.caseless("\u200fباريس\u200e") == "باريس"


@pytest.mark.parametrize(
    ("text", "answer", "found", "first"),
    [
        ("法国的首都是巴黎。", "巴黎", True, False),
        ("巴黎是法国的首都", "巴黎", True, True),
        ("パリです。", "パリ", True, True),
        ("ハリです。", "パリ", False, False),
        ("파리입니다", "파리", True, True),
        ("수도는 파리이다", "파리", True, False),
        ("ปารีสครับ", "ปารีส", True, True),
        ("दिल्ली है", "दिल्ली", True, True),
        ("दिल्ली है", "दिल्ल", False, False),
        ("Романия", "Рома", False, False),
        ("Romeo", "Rome", False, False),
        ("in Rome, Italy", "rome", True, False),
        ("5 € each", "€", True, False),
        ("", "Rome", False, False),
        ("Rome", "", False, False),
    ],
)
def test_an_answer_in_a_text(text, answer, found, first):
    assert _text.contains(text, answer) is found
    assert _text.begins(text, answer) is first


def test_accents_may_be_left_out_where_they_are_no_letters():
    assert _text.begins("Bogota is", "Bogotá") and _text.begins(
        "N’Djamena", "N'Djamena"
    )
    assert _text.begins("مدينه", "مدينه") and _text.begins("القاهرة", "القَاهِرة")


def test_halves_join_to_the_text():
    assert _text.halves(" one two\nthree ") == ("one", "two three")
    assert _text.halves("one") == ("", "one") and _text.halves("") == ("", "")
    for text in TEXTS.values():
        first, second = _text.halves(text)
        between = _text.separator(first, second)
        assert first and second and first + between + second == text
    assert _text.halves("法国的首都是巴黎") == ("法国的首", "都是巴黎")
    assert _text.halves("ปารีส") == ("ปา", "รีส")
