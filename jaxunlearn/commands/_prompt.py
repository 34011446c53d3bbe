# SPDX-License-Identifier: Apache-2.0
"""The options that say how prompts and answers are joined: `prompt_format` in configs.

`forget`, `finetune`, `evaluate` and `attack` share them.
"""

from collections.abc import Callable
from typing import Any

import click

NAMES = ("prompt", "chat", "system", "template", "separator", "end")
_OPTIONS = (
    click.option("--prompt", help="The text before an answer, with {question} in it."),
    click.option(
        "--chat/--no-chat",
        default=None,
        help="Use the chat template. [no, or the run's]",
    ),
    click.option("--system", help="The system message of the chat."),
    click.option(
        "--template", help="A file with a chat template. [the tokenizer's template]"
    ),
    click.option(
        "--separator",
        help="The text between prompt and answer. [a space; in a chat the template's]",
    ),
    click.option(
        "--end",
        help='The text after an answer; "eos" for the tokenizer\'s end token, "" for '
        "none. [none; in a chat the template's]",
    ),
)


def options(function: Callable) -> Callable:
    """Adds the options to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Removes these options from those of a command; returns the ones given."""
    found = {name: options.pop(name, None) for name in NAMES}
    return {name: value for name, value in found.items() if value is not None}
