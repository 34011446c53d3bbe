# SPDX-License-Identifier: Apache-2.0
"""Rows as OpenUnlearning creates them, token by token, to compare with that library.

`data.encode` tokenises prompt and answer as one text and locates the answer by
character offsets. Here the answer begins after the number of tokens of the prompt
alone, so a merge across the boundary moves a label by one, and an end token is added
even to a truncated row.

A row is {"input_ids", "labels", "attention_mask"}, lists of int; labels lie on the
tokens (not shifted), IGNORE where a token is none. `collate` makes a table of rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks

IGNORE = -100
PADS = ("right", "left")
TAGS = ("user_start_tag", "user_end_tag", "asst_start_tag", "asst_end_tag")

Row = dict[str, list[int]]


def chat(
    tokenizer: Any,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    template: Mapping[str, Any],
    length: int | None = None,
    generate: bool = False,
) -> Row:
    """A conversation as one row; only its last answer is labelled.

    Args:
        tokenizer: a Hugging Face tokenizer, or what can be called like one.
        questions: what the user says, the questions before the last being examples.
        answers: as many answers.
        template: either "apply_chat_template": True and optionally "system_prompt" and
            "date_string", to use the tokenizer's own; or the four tags
            "user_start_tag", "user_end_tag", "asst_start_tag", "asst_end_tag" to write
            around question and answer, and optionally
            "system_prompt_with_special_tokens" to begin with. The last answer gets no
            end tag.
        length: tokens at most, before the end token; the tokenizer's own template is
            not cut.
        generate: the row to generate from: tokens of the prompt alone, and the
            conversation as labels.
    Returns:
        A row.
    Raises:
        ValueError: if there is no question or the numbers differ. KeyError: if a tag is
            missing.
    """
    if len(questions) != len(answers) or not questions or isinstance(questions, str):
        raise ValueError(
            "openunlearning.chat needs a list of questions and as many answers, got "
            f"{questions!r} and {answers!r}."
        )
    build = _by_tokenizer if template.get("apply_chat_template") else _by_tags
    prompt, ids = build(tokenizer, questions, answers, template, length)
    if ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    if generate:
        return _row(prompt, ids)
    return _row(ids, [IGNORE] * len(prompt) + ids[len(prompt) :])


def document(
    tokenizer: Any,
    text: str,
    *,
    length: int,
    prefix: str = "",
    insert_space: bool = False,
    generate: bool = False,
) -> Row:
    """Running text as one row, labelled after the prefix; no end token is added.

    Args:
        tokenizer: as in `chat`. What it makes of the prefix is not labelled, and at
            least one token never is.
        text: the text.
        length: tokens at most beyond those of the prefix.
        prefix: text before it that is not labelled.
        insert_space: put a space between the two.
        generate: tokens of the prefix alone, labels as without it.
    Returns:
        A row.
    Raises:
        ValueError: if length < 1.
    """
    _checks.positive_int("openunlearning.document", length=length)
    before = _ids(tokenizer, prefix, None)
    ids = _ids(tokenizer, prefix + (" " if insert_space else "") + text, None)
    ids = ids[: len(before) + length]
    start = max(1, len(before))
    labels = [IGNORE] * start + ids[start:]
    return _row(before if generate else ids, labels)


def collate(
    rows: Sequence[Mapping[str, Sequence[int]]],
    *,
    pad_id: int,
    pad: str = "right",
    hide_pad_id: bool = False,
) -> dict[str, np.ndarray]:
    """Rows as a table, padded to the longest.

    Args:
        rows: each with `input_ids` and `labels` of one length.
        pad_id: the token to fill with.
        pad: the side that is padded.
        hide_pad_id: mask every token that equals pad_id, as the peer does, and so also
            end tokens of the text where the two are one.
    Returns:
        {"tokens": [n, L] int32, "mask": [n, L] bool, "answer": [n, L] bool}; `answer`
        marks the labelled tokens.
    Raises:
        ValueError: if there is no row, pad is unknown, or labels do not lie on the
            tokens (a row to generate from, or labels of other tokens).
    """
    _checks.one_of("openunlearning.collate", PADS, pad=pad)
    if not rows:
        raise ValueError("openunlearning.collate needs at least one row, got none.")
    longest = max(len(row["input_ids"]) for row in rows)
    shape = len(rows), longest
    table = {
        "tokens": np.full(shape, pad_id, np.int32),
        "mask": np.zeros(shape, np.bool_),
        "answer": np.zeros(shape, np.bool_),
    }
    for i, row in enumerate(rows):
        ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
        answer = labels != IGNORE
        if ids.shape != labels.shape or (ids != labels)[answer].any():
            raise ValueError(
                "openunlearning.collate needs labels that lie on the tokens, but row "
                f"{i} has {len(labels)} labels for {len(ids)} tokens or others than "
                "they. A row to generate from goes to evaluate.completions as a text."
            )
        at = slice(0, len(ids)) if pad == "right" else slice(longest - len(ids), None)
        table["tokens"][i, at] = ids
        table["mask"][i, at] = True
        table["answer"][i, at] = answer
    if hide_pad_id:
        table["mask"] = table["tokens"] != pad_id
    return table


def _by_tags(tokenizer, questions, answers, template, length):
    fix = "Or set apply_chat_template to use the tokenizer's own."
    _checks.has_keys("openunlearning.chat", "tags", TAGS, template, fix)
    user, user_end, assistant, assistant_end = (template[tag] for tag in TAGS)
    prompt = template.get("system_prompt_with_special_tokens") or ""
    for question, answer in zip(questions[:-1], answers[:-1], strict=True):
        prompt += user + question + user_end + assistant + answer + assistant_end
    prompt += user + questions[-1] + user_end + assistant
    texts = (prompt, prompt + answers[-1])
    return tuple(_ids(tokenizer, text, length) for text in texts)


def _by_tokenizer(tokenizer, questions, answers, template, length):
    del length  # the peer does not cut these
    system = template.get("system_prompt")
    messages = [] if not system else [{"role": "system", "content": system}]
    for question, answer in zip(questions, answers, strict=True):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    date = template.get("date_string")
    more = {} if date is None else {"date_string": date}
    coded = []
    for turns, prompt in ((messages[:-1], True), (messages, False)):
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompt, **more
        )
        coded.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return tuple(coded)


def _ids(tokenizer, text, length):
    cut = {} if length is None else {"truncation": True, "max_length": length}
    return list(tokenizer(text, **cut)["input_ids"])


def _row(ids, labels) -> Row:
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
