# SPDX-License-Identifier: Apache-2.0
"""One format joins prompts and answers, as the model's chat template joins them."""

import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxunlearn import attacks, data
from jaxunlearn.data import _encode, table
from tests import chat_templates, tiny
from tests.chat_templates import ANSWER, FAMILIES, OTHERS, QUESTION

CHAT = data.PromptFormat(chat=True)
EVERY = FAMILIES | OTHERS


@pytest.mark.parametrize("name", EVERY)
def test_a_template_gives_prompt_separator_answer_and_end(name):
    family = EVERY[name]
    tokenizer = chat_templates.tokenizer(family)
    (row,) = data.render(tokenizer, [QUESTION], [ANSWER], CHAT)
    assert row == data.Rendered(family.prompt, family.separator, ANSWER, family.end)
    assert (
        data.render(tokenizer, [QUESTION], prompt_format=CHAT)[0].prompt == row.prompt
    )
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ]
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    if family.end in full and name in FAMILIES:
        assert row.text == full.rstrip("\n")
        # Completions start at the generation prompt, or at a block after it.
        opening = tokenizer.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True
        )
        assert row.prompt.removeprefix(opening) in ("", "<think>\n\n</think>\n\n")
    t = data.encode(tokenizer, [QUESTION], [ANSWER], prompt_format=CHAT, mark_end=True)
    ids = tokenizer(row.text, add_special_tokens=False)["input_ids"]
    assert t["tokens"][0][t["mask"][0]].tolist() == ids
    assert ids.count(tokenizer.bos_token_id) == row.text.count("<s>") <= 1
    scored = tokenizer.decode(t["tokens"][0][t["answer"][0]])
    assert scored == family.separator + ANSWER + family.end
    assert tokenizer.decode(t["tokens"][0][t["end"][0]]) == family.end
    counted = _encode.num_tokens(tokenizer, [QUESTION], [ANSWER], CHAT)
    assert counted.tolist() == [len(ids)]


def test_the_special_tokens_of_an_end_stop_a_generation():
    for name, tokens in {
        "Llama 2": ["</s>"],
        "Gemma": ["<end_of_turn>"],
        "Phi-3": ["<|end|>", "</s>"],
        "Qwen 3": ["<|im_end|>"],
        "no generation prompt and no end": [],
    }.items():
        tokenizer = chat_templates.tokenizer(EVERY[name])
        ids = tokenizer.convert_tokens_to_ids(tokens)
        assert table.end_ids(tokenizer, CHAT) == tuple(ids), name
    tokenizer = tiny.tiny_tokenizer()
    assert table.end_ids(tokenizer) == ()
    assert table.end_ids(tokenizer, data.PromptFormat(end="eos")) == (2,)
    assert table.end_ids(tokenizer, data.PromptFormat(end="\n\n")) == ()


def test_templates_that_strip_change_or_refuse_contents():
    gemma = chat_templates.tokenizer(FAMILIES["Gemma"])
    (row,) = data.render(gemma, [" Where?\n"], ["\n Paris. \n"], CHAT)
    assert "user\nWhere?<end" in row.prompt and row.answer == ANSWER
    kept = chat_templates.tokenizer(FAMILIES["ChatML, Qwen 2"])
    (row,) = data.render(kept, [" Where?"], ["Paris.\n"], CHAT)
    assert "user\n Where?<|" in row.prompt and row.answer == "Paris.\n"
    qwen = chat_templates.tokenizer(FAMILIES["Qwen 3"])
    (row,) = data.render(qwen, ["Where?"], ["<think>\nHm.\n</think>\n\nParis."], CHAT)
    assert row.prompt.endswith("<think>\n")
    assert row.answer == "Hm.\n</think>\n\nParis."
    with pytest.raises(ValueError, match="system.*System role not supported"):
        data.render(gemma, ["x"], None, data.PromptFormat(chat=True, system="Be."))
    with pytest.raises(ValueError, match="chat_template=None"):
        data.encode(tiny.tiny_tokenizer(), ["x"], prompt_format=CHAT)


def test_settings_of_a_chat():
    llama = chat_templates.tokenizer(FAMILIES["Llama 2"])
    settings = {"system": "Be brief.", "prompt": "Q: {question}"}
    (row,) = data.render(llama, ["x"], ["y"], CHAT.with_settings(settings))
    assert row.prompt == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ: x [/INST]"
    other = CHAT.with_settings({"separator": "\n", "end": ""})
    assert data.render(llama, ["x"], ["y"], other)[0][1:] == ("\n", "y", "")
    dated = "{{ date_string }}" + FAMILIES["ChatML, Qwen 2"].template
    settings = {"template": dated, "arguments": {"date_string": "1 May"}}
    (row,) = data.render(llama, ["x"], ["y"], CHAT.with_settings(settings))
    assert row.prompt.startswith("1 May<|im_start|>user\nx")
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    (row,) = data.render(llama, [turns], ["d"], CHAT)
    assert row.text == "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>"
    with pytest.raises(ValueError, match="in row 0"):
        data.render(llama, [turns])


def test_plain_prompts_and_the_begin_token_of_the_text():
    tokenizer = tiny.tiny_tokenizer(template="<s> $A")
    for settings, text, scored in (
        ({}, "x y", " y"),
        ({"prompt": "Q: {question}", "end": "eos"}, "Q: x y</s>", " y</s>"),
        ({"separator": "\n", "end": "\n\n"}, "x\ny\n\n", "\ny\n\n"),
        ({"prompt": "<s>{question}", "separator": ""}, "xy", "y"),
    ):
        plain = data.PromptFormat().with_settings(settings)
        t = data.encode(tokenizer, ["x"], ["y"], prompt_format=plain)
        ids = t["tokens"][0][t["mask"][0]].tolist()
        assert ids == tokenizer(text)["input_ids"]
        assert tokenizer.decode(t["tokens"][0][t["answer"][0]]) == scored
    bare = tiny.tiny_tokenizer()
    bare.eos_token = None
    with pytest.raises(ValueError, match="eos_token=None"):
        data.render(bare, ["x"], ["y"], data.PromptFormat(end="eos"))


def test_templates_in_files(tmp_path):
    template = FAMILIES["Gemma"].template
    (tmp_path / "a.jinja").write_text(template)
    (tmp_path / "a.json").write_text(json.dumps({"chat_template": template}))
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.json").write_text('{"chat_template": [1]}')
    (tmp_path / "d.json").write_text("[]")
    (tmp_path / "e.json").write_text('{"chat_template": "x"}')
    for name in ("a.jinja", "a.json"):
        found = CHAT.with_settings({"template": str(tmp_path / name)})
        assert found.template == template
        assert found == data.PromptFormat(**json.loads(json.dumps(found.as_dict())))
        assert found == data.PromptFormat(chat=True, template=str(tmp_path / name))
    broken = [str(tmp_path / f"{name}.json") for name in "bcde"]
    for value in (*broken, "nowhere.jinja"):
        with pytest.raises(ValueError, match=f"template='{value}'"):
            CHAT.with_settings({"template": value})
        with pytest.raises(ValueError, match=f"template='{value}'"):
            data.PromptFormat(template=value)
    with pytest.raises(ValueError, match="promt"):
        CHAT.with_settings({"promt": "x"})
    with pytest.raises(TypeError, match="chat='yes'"):
        CHAT.with_settings({"chat": "yes"})
    with pytest.raises(ValueError, match="prompt='Q:'"):
        CHAT.with_settings({"prompt": "Q:"})
    with pytest.raises(ValueError, match="prompt='Q:'"):
        data.PromptFormat(prompt="Q:")


def test_rows_that_are_no_conversations_are_named():
    tokenizer = chat_templates.tokenizer(FAMILIES["Llama 2"])
    user = [{"role": "user", "content": "Where?"}]
    for prompts, came in (
        ([user, []], "an empty list in row 1"),
        ([[{"content": "Where?"}]], "'content': .*} in row 0"),
        ([user, ["Where?"]], r"prompts\[1\]"),
    ):
        for chat in (CHAT, CHAT.with_settings({"system": "Be."})):
            for use in (data.render, data.encode):
                with pytest.raises(ValueError, match=came):
                    use(tokenizer, prompts, prompt_format=chat)


@pytest.mark.parametrize("chat", [data.PromptFormat(), CHAT])
@pytest.mark.parametrize("answers", [["x"], ["x", "y", "z"], []])
def test_every_prompt_needs_one_answer(chat, answers):
    tokenizer = chat_templates.tokenizer(FAMILIES["Llama 2"])
    came = f"2 prompts and {len(answers)} answers"
    for name, use in (("render", data.render), ("encode", data.encode)):
        with pytest.raises(ValueError, match=f"data.{name} .*{came}"):
            use(tokenizer, ["a", "b"], answers, prompt_format=chat)


def test_shots_are_turns_of_a_chat():
    shots = [("q1", "a1")]
    worded = data.PromptFormat(prompt="Q: {question}", separator="\n")
    (text,) = attacks.in_context(
        ["q2"], prefix="P", shots=shots, num_shots=1, prompt_format=worded
    )
    assert text == "P\n\nQ: q1\na1\n\nQ: q2"
    chat = CHAT.with_settings({"prompt": "Q: {question}", "system": "S"})
    (turns,) = attacks.in_context(
        ["q2"], prefix="P", shots=shots, num_shots=1, prompt_format=chat
    )
    tokenizer = chat_templates.tokenizer(FAMILIES["ChatML, Qwen 2"])
    (row,) = data.render(tokenizer, [turns], ["a2"], chat.unworded)
    contents = [x.split("\n", 1)[1] for x in row.text.split("<|im_start|>")[1:]]
    assert contents == [
        "S<|im_end|>\n",
        "P\n\nQ: q1<|im_end|>\n",
        "a1<|im_end|>\n",
        "Q: q2<|im_end|>\n",
        "a2<|im_end|>",
    ]


def test_formats_of_facts_join_as_a_chat():
    tokenizer = chat_templates.tokenizer(FAMILIES["ChatML, Qwen 2"])
    fact = {"question": "Where?", "choices": ["Rome", "Paris"], "answer": 1}
    worded = CHAT.with_settings({"prompt": "Q: {question}"})
    for format, message, answer in (
        ("answer", "Q: Where?", "Paris<|im_end|>"),
        ("letter", "Where?\nA. Rome\nB. Paris\nAnswer:", "B<|im_end|>"),
    ):
        t = attacks.encode_facts(tokenizer, [fact], format, prompt_format=worded)
        text = tokenizer.decode(t["tokens"][0][t["mask"][0]])
        assert text.startswith(f"<|im_start|>user\n{message}<|im_end|>\n")
        assert tokenizer.decode(t["tokens"][0][t["answer"][0]]) == answer
    lazy = data.encoded([{"prompt": "a", "answer": "b"}], tokenizer, length=32)
    chat = data.encoded(
        [{"prompt": "a", "answer": "b"}], tokenizer, length=32, prompt_format=CHAT
    )
    assert np.sum(chat[0]["mask"]) > np.sum(lazy[0]["mask"])
    assert_array_equal(
        chat[0]["tokens"],
        data.encode(tokenizer, ["a"], ["b"], length=32, prompt_format=CHAT)["tokens"][
            0
        ],
    )
