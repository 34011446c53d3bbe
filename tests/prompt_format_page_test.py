# SPDX-License-Identifier: Apache-2.0
"""The table of docs/prompt-format.md is what the templates give."""

from pathlib import Path

from jaxunlearn import data
from tests import chat_templates
from tests.chat_templates import ANSWER, FAMILIES, QUESTION

PAGE = Path(__file__).resolve().parent.parent / "docs" / "prompt-format.md"
START, END = "<!-- families -->\n", "<!-- end of families -->"


def cell(text):
    shown = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`{shown}`" if text else "none"


def table():
    """The lines of the table."""
    lines = ["| family | prompt | separator | end |", "| --- | --- | --- | --- |"]
    for name, family in FAMILIES.items():
        tokenizer = chat_templates.tokenizer(family)
        chat = data.PromptFormat(chat=True)
        (row,) = data.render(tokenizer, [QUESTION], [ANSWER], chat)
        separator = "one space" if row.separator == " " else cell(row.separator)
        lines.append(f"| {name} | {cell(row.prompt)} | {separator} | {cell(row.end)} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_families_is_what_their_templates_give():
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(START)[1].split(END)[0] == table()
