# SPDX-License-Identifier: Apache-2.0
"""How a prompt meets an answer: one block of settings and one function.

    chat = data.PromptFormat(chat=True)
    data.render(tokenizer, ["Where?"], ["Paris."], chat)[0]
    # Rendered("<start_of_turn>user\\nWhere?...model\\n", "", "Paris.", "<end_of_turn>")

Training, scoring, choices, completions and attacks all read texts that `render` made.
For a chat, separator and end come from the conversation as the template renders it,
with the assistant's message in it. docs/prompt-format.md has examples of each family.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxunlearn import _checks

AUTO = "auto"  # the template's, or the plain default
EOS = "eos"  # the tokenizer's end token
QUESTION = "{question}"

Conversation = Sequence[Mapping[str, str]]

# An answer that no template changes and no text contains; it marks the place.
_MARK = "ANSWERx7Q9ZxANSWER"


def _template_text(template: str) -> str:
    """The template; read from the file if `template` is a path."""
    if not template or "{" in template:
        return template
    path = Path(template).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = json.loads(text)["chat_template"]
        problem = _checks.not_text(text)
        if problem or "{" not in text:
            raise ValueError(problem or "a text without Jinja")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            "The prompt format needs a chat template, as Jinja text or a file (.jinja, "
            f"or .json with the key chat_template), got template={template!r}: "
            f"{error!r}."
        ) from error
    return text


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """The settings that turn a row into the text that a model reads.

    Attributes:
        prompt: the text before the answer, or the user's message in a chat; {question}
            is replaced by the row's prompt.
        chat: whether the text is a conversation in a chat template.
        system: the system message of a chat; "" for none.
        template: the chat template; "" for the tokenizer's. It is Jinja text or the
            path of a file, which is read when the format is made: Jinja text, or JSON
            with the key `chat_template`.
        arguments: keyword arguments of the template, such as {"date_string": "1 May"}:
            some templates insert today's date unless they are given one.
        separator: the text between prompt and answer. "auto" is the template's in a
            chat and one space elsewhere.
        end: the text after the answer, trained and scored with it. "auto" is the
            template's end of the assistant's turn in a chat and nothing elsewhere,
            "eos" the tokenizer's end token, "" nothing; any other text is used as it
            is.
    """

    prompt: str = QUESTION
    chat: bool = False
    system: str = ""
    template: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    separator: str = AUTO
    end: str = AUTO

    def __post_init__(self):
        for name in ("prompt", "system", "template", "separator", "end"):
            if problem := _checks.not_text(getattr(self, name)):
                raise TypeError(f"PromptFormat needs a text as {name}, got {problem}.")
        if QUESTION not in self.prompt:
            raise ValueError(
                f"The prompt format needs {QUESTION} in its prompt, got "
                f"prompt={self.prompt!r}."
            )
        object.__setattr__(self, "template", _template_text(self.template))
        object.__setattr__(self, "arguments", dict(self.arguments))

    def with_settings(self, settings: Mapping[str, Any]) -> "PromptFormat":
        """The format with some fields replaced by those of a settings block.

        Args:
            settings: field -> value.
        Raises:
            ValueError: for an unknown field, a prompt without {question}, or a template
                that cannot be read. TypeError: for a value of another type.
        """
        owner = "The prompt format"
        usual = {x.name: getattr(PLAIN, x.name) for x in dataclasses.fields(self)}
        for name, value in settings.items():
            _checks.one_of(owner, list(usual), setting=name)
            kind = Mapping if name == "arguments" else type(usual[name])
            if not isinstance(value, kind):
                raise TypeError(
                    f"{owner} needs a value of type {kind.__name__} for {name}, got "
                    f"{name}={value!r}."
                )
        return dataclasses.replace(self, **settings)

    def check_chat(self, owner: str, given: Mapping[str, Any]) -> None:
        """Raises ValueError if a chat's settings are given and this is not a chat.

        Args:
            owner: what has the settings; begins the error.
            given: the settings from which this format was made.
        """
        for name in ("system", "template", "arguments"):
            if given.get(name) and not self.chat:
                raise ValueError(
                    f"{owner} needs chat=True with {name}, got "
                    f"{name}={given[name]!r} and chat=False. Pass --chat, or remove "
                    f"{name}."
                )

    def worded(self, prompt: str) -> str:
        """The wording with a row's prompt in it: the user's message in a chat."""
        return self.prompt.replace(QUESTION, prompt)

    @property
    def unworded(self) -> "PromptFormat":
        """The format for prompts that have the wording already."""
        return dataclasses.replace(self, prompt=QUESTION)

    def as_dict(self) -> dict[str, Any]:
        """The settings as a dict, as files record them."""
        return dataclasses.asdict(self)


PLAIN = PromptFormat()


class Rendered(NamedTuple):
    """One row as text, in four parts that follow each other.

    Attributes:
        prompt: what the model reads before it answers; completions start here. A block
            that the template writes in front of every answer, such as Qwen3's empty
            think block, is part of it.
        separator: spaces between prompt and answer, tokenised with the answer.
        answer: the answer, as the template writes it.
        end: the end of the answer's turn; "" for none.
    """

    prompt: str
    separator: str = ""
    answer: str = ""
    end: str = ""

    @property
    def text(self) -> str:
        return "".join(self)


def render(
    tokenizer: Any,
    prompts: Sequence[str | Conversation],
    answers: Sequence[str] | None = None,
    prompt_format: PromptFormat = PLAIN,
) -> list[Rendered]:
    """The text of each row.

    Args:
        tokenizer: a transformers tokenizer. Plain texts need of it only `eos_token`.
        prompts: n texts; in a chat also conversations, lists of {"role", "content"}
            that end with the user's message.
        answers: n texts, or None: `separator`, `answer` and `end` are then empty.
        prompt_format: the settings.
    Raises:
        TypeError: for one text in place of a list.
        ValueError: for numbers of prompts and answers that differ, a conversation
            without messages, a chat without a template, a template that takes no such
            conversation, or "eos" without an end token.
    """
    check_rows("data.render", prompts, answers, prompt_format)
    contents = [_content(prompt, prompt_format) for prompt in prompts]
    if not prompt_format.chat:
        separator = _given(prompt_format.separator, " ")
        end = _end(tokenizer, prompt_format, "") if answers is not None else ""
        if answers is None:
            return [Rendered(text) for text in contents]
        return [
            Rendered(text, separator, answer, end)
            for text, answer in zip(contents, answers, strict=True)
        ]
    apply = _template(tokenizer, prompt_format)
    rows = [None] * len(contents) if answers is None else answers
    return [
        _chat_row(
            tokenizer, apply, _messages(content, prompt_format), answer, prompt_format
        )
        for content, answer in zip(contents, rows, strict=True)
    ]


def check_rows(
    owner: str,
    prompts: Sequence[str | Conversation],
    answers: Sequence[str] | None,
    prompt_format: PromptFormat,
) -> None:
    """Raises unless there is one answer, a text, for each prompt of `check_prompts`.

    Raises:
        TypeError, ValueError: as `check_prompts`.
    """
    check_prompts(owner, prompts, prompt_format)
    _checks.texts(owner, answers=answers)
    if answers is None:
        return
    num_prompts, num_answers = (len(list(x)) for x in (prompts, answers))
    if num_prompts != num_answers:
        raise ValueError(
            f"{owner} needs one answer per prompt, got {num_prompts} prompts and "
            f"{num_answers} answers. Remove the rows that lack one."
        )


def check_prompts(
    owner: str, prompts: Sequence[str | Conversation], prompt_format: PromptFormat
) -> None:
    """Raises unless prompts are a list of texts or, in a chat, of conversations.

    Raises:
        TypeError, ValueError: as _checks.texts; ValueError for a conversation without
            messages, or a message without a role.
    """
    if not prompt_format.chat or isinstance(prompts, str | Iterator):
        return _checks.texts(owner, prompts=prompts)
    for row, prompt in enumerate(prompts):
        contents = [prompt]
        if isinstance(prompt, list) and all(isinstance(x, Mapping) for x in prompt):
            contents = [message.get("content") for message in prompt]
            without = [message for message in prompt if not message.get("role")]
            if without or not prompt:
                came = _checks.short(without[0]) if without else "an empty list"
                raise ValueError(
                    f"{owner} needs conversations of messages with role and content, "
                    f"got {came} in row {row} of prompts. Remove the row, or give it "
                    "the user's message."
                )
        _checks.texts(owner, **{f"prompts[{row}]": contents})


def end_ids(tokenizer: Any, prompt_format: PromptFormat = PLAIN) -> tuple[int, ...]:
    """Ids of the special tokens in the end of an answer, at which generation stops."""
    (row,) = render(tokenizer, ["x"], ["x"], prompt_format)
    if not row.end:
        return ()
    added = tokenizer.added_tokens_decoder
    ids = tokenizer(row.end, add_special_tokens=False)["input_ids"]
    return tuple(dict.fromkeys(int(x) for x in ids if x in added))


def _content(prompt: str | Conversation, prompt_format: PromptFormat):
    """The user's message, or the conversation as it is."""
    return prompt_format.worded(prompt) if isinstance(prompt, str) else prompt


def _messages(content, prompt_format: PromptFormat) -> list[Mapping[str, str]]:
    messages = [{"role": "user", "content": content}]
    messages = messages if isinstance(content, str) else list(content)
    if prompt_format.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": prompt_format.system})
    return messages


def _template(tokenizer: Any, prompt_format: PromptFormat) -> Callable[..., str]:
    """(messages, add_generation_prompt) -> text."""
    given = prompt_format.template
    if not given and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "A chat prompt needs a tokenizer with a chat template, got "
            "chat_template=None. Use the tokenizer of an instruct model, name a file "
            "with the template (template=FILE), or use plain prompts (chat=False)."
        )
    settings = dict(prompt_format.arguments) | (
        {"chat_template": given} if given else {}
    )
    return partial(_applied, tokenizer, settings)


def _applied(tokenizer, settings, messages, add_generation_prompt: bool) -> str:
    jinja2 = _checks.library("A chat template", "jinja2", "hf")
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **settings,
        )
    except jinja2.exceptions.TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"The chat template needs a conversation that it can render, got the roles "
            f"{_checks.listed(roles)}: {error}. Leave out the system message if it "
            "takes none."
        ) from error


def _chat_row(tokenizer, apply, messages, answer, prompt_format) -> Rendered:
    opening = apply(messages, True)
    marked = apply([*messages, _assistant(_MARK)], False)
    place = marked.rfind(_MARK)
    if place < 0:
        raise ValueError(
            "The chat template needs to write the assistant's message, got a text "
            f"without it: {marked[-80:]!r}. Use another template."
        )
    before, after = marked[:place], marked[place + len(_MARK) :]
    # Completions start at the template's generation prompt, after any block that the
    # template writes in front of the answer; spaces are tokenised with the answer.
    prompt = opening
    if not before.startswith(opening) or before[len(opening) :].strip():
        prompt = before.rstrip(" ")
    separator = _given(prompt_format.separator, before[len(prompt) :])
    if answer is None:
        return Rendered(prompt)
    full = apply([*messages, _assistant(answer)], False)
    same = _shared(full, before)
    if same < len(before):  # the answer has its own block, a thought: it is scored
        prompt, separator = before[:same], ""
    written = full[same : len(full) - len(after)]
    end = after.rstrip() or _end_before_next_turn(tokenizer, apply, messages, opening)
    return Rendered(prompt, separator, written, _end(tokenizer, prompt_format, end))


def _shared(full: str, before: str) -> int:
    """The number of characters that both texts start with."""
    if full.startswith(before):
        return len(before)
    pairs = enumerate(zip(full, before, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(full), len(before)))


def _end_before_next_turn(tokenizer, apply, messages, opening: str) -> str:
    """The end of the assistant's turn where the template writes it only before another
    turn; "" where it writes none."""
    text = apply([*messages, _assistant(_MARK)], True)
    after = text[text.rfind(_MARK) + len(_MARK) :]
    turn = apply(messages, False)
    start = opening[len(turn) :] if opening.startswith(turn) else opening
    if not after.strip() or after == start:
        return ""
    special = [str(x) for x in tokenizer.added_tokens_decoder.values()]
    ends = [after.find(token) + len(token) for token in special if token in after]
    return after[: min(ends)] if ends else ""


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _given(setting: str, usual: str) -> str:
    return usual if setting == AUTO else setting


def _end(tokenizer: Any, prompt_format: PromptFormat, usual: str) -> str:
    if prompt_format.end != EOS:
        return _given(prompt_format.end, usual)
    if not tokenizer.eos_token:
        raise ValueError(
            "The prompt format needs a tokenizer with an end token for end='eos', got "
            "eos_token=None. Set end to the text that ends an answer, or to ''."
        )
    return tokenizer.eos_token
