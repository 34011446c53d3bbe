# SPDX-License-Identifier: Apache-2.0
"""Chat templates in the form of well-known families, with the parts that they give.

They were written for these tests. Begin and end token are those of the tiny tokenizer,
<s> and </s>, where a family's template inserts `bos_token` and `eos_token`.
"""

from typing import NamedTuple

from tests import tiny

QUESTION, ANSWER = "Where?", "Paris."
SPECIAL = (
    "<start_of_turn> <end_of_turn> <|user|> <|assistant|> <|end|> <|im_start|> "
    "<|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|>"
).split()


class Family(NamedTuple):
    """A template, and what it gives for QUESTION and ANSWER."""

    template: str
    prompt: str
    separator: str
    end: str
    begins: bool = False  # whether the tokenizer itself puts a begin token first


_CHATML = "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'"
_IM_PROMPT = "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
_IM_START = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
FAMILIES = {
    "Llama 2": Family(
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
        "{% for m in rest %}"
        "{% set content = (system if loop.first else '') + m['content'] %}"
        "{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}",
        prompt="<s>[INST] Where? [/INST]",
        separator=" ",
        end=" </s>",
        begins=True,
    ),
    "Mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + '[/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        prompt="<s>[INST] Where?[/INST]",
        separator=" ",
        end="</s>",
        begins=True,
    ),
    "Gemma": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        prompt="<s><start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n",
        separator="",
        end="<end_of_turn>",
        begins=True,
    ),
    "Phi-3": Family(
        "{% for m in messages %}"
        "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        prompt="<|user|>\nWhere?<|end|>\n<|assistant|>\n",
        separator="",
        end="<|end|>\n</s>",
    ),
    "ChatML, Qwen 2": Family(
        "{% for m in messages %}{{ " + _CHATML + " }}{% endfor %}" + _IM_START,
        prompt=_IM_PROMPT,
        separator="",
        end="<|im_end|>",
    ),
    "Qwen 3": Family(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% set parts = m['content'].split('</think>') %}"
        "{% set thought = parts[:-1] | join | replace('<think>', '') %}"
        "{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') }}"
        "{{ '\n</think>\n\n' + parts[-1].lstrip('\n') + '<|im_end|>\n' }}"
        "{% else %}{{ " + _CHATML + " }}{% endif %}{% endfor %}" + _IM_START,
        prompt=_IM_PROMPT + "<think>\n\n</think>\n\n",
        separator="",
        end="<|im_end|>",
    ),
    "Llama 3": Family(
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        prompt="<s><|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        separator="",
        end="<|eot_id|>",
        begins=True,
    ),
}
# Templates of other forms, whose parts are not as easy to find.
OTHERS = {
    "the end is written before the next turn only": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% if (loop.last and add_generation_prompt) or not loop.last %}"
        "{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}",
        prompt=_IM_PROMPT,
        separator="",
        end="<|im_end|>",
    ),
    "the generation prompt opens a thought that answers do not have": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<|user|>' + m['content'] }}{% else %}"
        "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
        prompt="<s><|user|>Where?<|assistant|>",
        separator="",
        end="</s>",
    ),
    "no generation prompt and no end": Family(
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}"
        "{% endfor %}",
        prompt="[user] Where?\n[assistant]",
        separator=" ",
        end="",
    ),
}


def tokenizer(family: Family):
    """The tiny tokenizer with the template of a family and all special tokens."""
    made = tiny.tiny_tokenizer(template="<s> $A" if family.begins else None)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = family.template
    return made
