# SPDX-License-Identifier: Apache-2.0
"""A decoder as a model of lm-evaluation-harness.

    import lm_eval
    from jaxunlearn.workflows import harness

    model, params, tokenizer = hf.load("path")
    found = lm_eval.simple_evaluate(
        harness.Decoder(model, params, tokenizer), tasks=["mmlu"]
    )

An instruct model takes `apply_chat_template=True`, and with it `system_instruction` and
`fewshot_as_multiturn`; give the format of its training:

    chat = data.PromptFormat(chat=True, prompt="Question: {question}")
    harness.Decoder(model, params, tokenizer, prompt_format=chat)

Needs the extra `harness`. For an exported folder this module is not needed: the
harness's `--model hf --model_args pretrained=FOLDER` runs it with torch.
experiments/benchmarks/harness.py compares the two with evaluate.choose.
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from lm_eval import utils
from lm_eval.api import model as api

from jaxunlearn import _checks, evaluate, metrics
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params
from jaxunlearn.workflows import records
from jaxunlearn.workflows.evaluation import values

NEW_TOKENS = 256  # the harness's default, for tasks that set no number


CHAT = table.PromptFormat(chat=True)
_MESSAGE = "MESSAGEx7Q9ZxMESSAGE"  # no template changes it and no text contains it
# A conversation that is a text already, with the special tokens that it shows.
_WRITTEN = table.PromptFormat(
    chat=True, template="{% for m in messages %}{{ m['content'] }}{% endfor %}"
)


class _Turn(NamedTuple):
    """What a chat format writes around a conversation and an answer.

    Attributes:
        starts: the texts before the first message, of a user or of the system.
        opening: the text between the user's message and the separator.
        separator: the text between `opening` and the answer.
        eos_ids: the special tokens in the end of an answer.
        stops: the end of an answer that is ordinary text.
    """

    starts: tuple[str, ...] = ()
    opening: str = ""
    separator: str = ""
    eos_ids: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()


class Decoder(api.TemplateLM):
    """Answers the three kinds of request of the harness, greedily and in float32.

    Args:
        model, params: a decoder; `generate_until` needs its cache.
        tokenizer: a fast tokenizer. Special tokens that it adds are used, but no begin
            token is put before a text that starts with one.
        batch_size: number of rows in a batch.
        prompt_format: how conversations are written where the harness applies a chat
            template: the template, the system message of a conversation without one,
            the wording of the user's messages, the separator before an answer and its
            end, at which generation stops. A task writes its other texts itself.

    Raises ValueError for a prompt_format without a chat.

    A text that is longer than the model's maximum length raises ValueError. (The models
    of the harness truncate it on the left.)
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Any,
        *,
        batch_size: int = 32,
        prompt_format: table.PromptFormat = CHAT,
    ):
        super().__init__()
        _checks.positive_int("harness.Decoder", batch_size=batch_size)
        self.tokenizer = tokenizer
        self._model, self._params, self._rows = model, params, batch_size
        self._longest = getattr(model.config, "max_length", None)
        if not prompt_format.chat:
            raise ValueError(
                "harness.Decoder needs a prompt_format with chat=True, got chat=False. "
                "Leave it out for texts without a chat, which the task writes."
            )
        self._format = prompt_format
        self._eos_ids = set(evaluate.eos_ids(model, tokenizer))

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without context: begin, or else end."""
        begin = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if begin is None else begin

    @functools.cached_property
    def tokenizer_name(self) -> str:
        """A name by which the harness keys its cached requests; tokenizers that differ
        have different names."""
        name = str(self.tokenizer.name_or_path or "").replace("/", "__")
        rules = records.tokenizer_digest(self.tokenizer)
        template = getattr(self.tokenizer, "chat_template", None)
        found = records.digest([rules, template, self._format.as_dict()])
        return f"{name}--{found[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template as text; the harness asks for it before it applies one."""
        given = self._format.template if chat_template else ""
        return given or super().chat_template(chat_template)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, in the decoder's prompt format.

        Args:
            chat_history: messages, each with `role` and `content`.
            add_generation_prompt: whether the assistant's turn begins after the last
                message; otherwise the last message is continued.
        Returns:
            The text that precedes the answer, with the separator where the assistant's
            turn begins.
        Raises:
            ValueError: if neither the tokenizer nor the format has a chat template.
        Warns:
            UserWarning: if the template takes no system message, which is left out.
        """
        write = self._opened if add_generation_prompt else self._continued
        messages = [
            {**x, "content": self._format.worded(x["content"])}
            if x["role"] == "user"
            else x
            for x in chat_history
        ]
        others = [x for x in messages if x["role"] != "system"]
        if self._format.system and others == messages:
            messages.insert(0, {"role": "system", "content": self._format.system})
        try:
            return write(messages)
        except (jinja2.exceptions.TemplateError, ValueError) as error:
            if others == messages:
                raise
            text = write(others)
            warnings.warn(
                f"The chat template takes no system message ({error}). It is left out.",
                stacklevel=2,
            )
            return text

    def _opened(self, messages: list[dict[str, str]]) -> str:
        """The text up to the assistant's answer."""
        written = dataclasses.replace(self._format, system="")
        (row,) = table.render(self.tokenizer, [messages], ["x"], written)
        return row.prompt + row.separator

    def _continued(self, messages: list[dict[str, str]]) -> str:
        """The text up to the end of the last message."""
        given = self._format.template
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=True,
            **self._format.arguments | ({"chat_template": given} if given else {}),
        )

    @functools.cached_property
    def _turn(self) -> _Turn:
        """That of the format; empty if there is no template that can be used."""
        written = dataclasses.replace(self._format.unworded, system="")
        user = [{"role": "user", "content": _MESSAGE}]
        system = [{"role": "system", "content": _MESSAGE}, *user]
        try:
            (row,) = table.render(self.tokenizer, [user], ["x"], written)
        except ValueError:
            return _Turn()
        starts = {row.prompt.partition(_MESSAGE)[0]}
        try:
            (other,) = table.render(self.tokenizer, [system], None, written)
            starts.add(other.prompt.partition(_MESSAGE)[0])
        except ValueError:
            pass  # a template without system messages
        ids = table.end_ids(self.tokenizer, written)
        return _Turn(
            tuple(starts - {""}),
            row.prompt.rpartition(_MESSAGE)[2],
            row.separator,
            ids,
            (row.end,) if row.end and not ids else (),
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **more: Any
    ) -> list[int]:
        """The tokens of a text; by default with the tokenizer's special tokens, except
        before a conversation and a text that starts with the begin token."""
        begin = self.tokenizer.bos_token
        special = add_special_tokens
        if special is None:
            begun = begin and string.startswith(begin)
            special = not (begun or string.startswith(self._turn.starts))
        return self.tokenizer.encode(string, add_special_tokens=special)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each text, in windows of the model's maximum length."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = utils.get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=(self._longest or 2**30) - 1,
                context_len=1,
            )
            for pair in map(utils.make_disjoint_window, pairs):
                windows.append((("", ""), *pair))
                owner.append(number)
        total = np.zeros(len(requests))
        if windows:
            found = self._loglikelihood_tokens(windows)
            np.add.at(total, owner, [logp for logp, _ in found])
        return total.tolist()

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Greedy continuations up to a stop word or the end of the text.

        An empty context is the prefix token; empty stop words are ignored. In a chat
        the text stops at the end of the format too, and begins before its separator.

        Raises:
            ValueError: if a task needs sampling.
        """
        texts = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...], bool], list[int]] = {}
        for number, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") or settings.get("temperature"):
                raise ValueError(
                    "harness.Decoder decodes greedily, but the task asks for "
                    f"{settings}. Give do_sample=False and temperature=0."
                )
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            new = settings.get("max_gen_toks", NEW_TOKENS)
            chat = request.args[0].startswith(self._turn.starts)
            key = (new, tuple(filter(None, stops)), chat)
            groups.setdefault(key, []).append(number)
        empty = self.tokenizer.decode([self.prefix_token_id])
        for (new, stops, chat), numbers in groups.items():
            turn = self._turn if chat else _Turn()
            opened = turn.opening + turn.separator
            contexts = [requests[number].args[0] or empty for number in numbers]
            contexts = [  # the separator is generated with the answer
                text.removesuffix(turn.separator) if text.endswith(opened) else text
                for text in contexts
            ]
            found = evaluate.completions(
                self._model,
                self._params,
                self.tokenizer,
                contexts,
                prompt_format=_WRITTEN if chat else table.PLAIN,
                eos_ids=sorted(self._eos_ids.union(turn.eos_ids)),
                max_new_tokens=new,
                batch_size=self._rows,
            )
            for number, text in zip(numbers, found, strict=True):
                texts[number] = metrics.truncate_at_stop(text, [*stops, *turn.stops])
        return texts

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **more: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it)."""
        if not requests:
            return []
        lengths = [len(before) + len(after) for _, before, after in requests]
        long = [x for x in lengths if self._longest and x > self._longest]
        if long:
            raise ValueError(
                f"harness.Decoder needs texts of at most {self._longest} tokens, but "
                f"{len(long)} of {len(lengths)} are longer, the longest {max(long)}. "
                "Remove those rows, or some examples of the prompt."
            )
        width = table.rounded_length(max(lengths))
        width = min(width, self._longest or width)
        tokens = np.zeros((len(requests), width), np.int32)
        mask, answer = np.zeros((2, *tokens.shape), bool)
        for row, (_, before, after) in enumerate(requests):
            tokens[row, : lengths[row]] = [*before, *after]
            mask[row, : lengths[row]] = True
            answer[row, len(before) : lengths[row]] = True
        rows = {"tokens": tokens, "mask": mask, "answer": answer}
        _checks.token_ids(
            "harness.Decoder", self._model, rows, tokenizer=self.tokenizer
        )
        scores = values.column_scores(
            self._model, self._params, {"answer": rows}, self._rows
        )["answer"]
        greedy = (scores.hits | ~scores.where).all(1)
        return list(zip(scores.logps.sum(1).tolist(), greedy.tolist(), strict=True))
