# SPDX-License-Identifier: Apache-2.0
"""A decoder as a model of lm-evaluation-harness.

    import lm_eval
    from jaxunlearn.workflows import harness

    model, params, tokenizer = hf.load("path")
    found = lm_eval.simple_evaluate(
        harness.Decoder(model, params, tokenizer), tasks=["mmlu"]
    )

An instruct model takes `apply_chat_template=True`, and with it `system_instruction` and
`fewshot_as_multiturn`.

Needs the extra `harness`. For an exported folder this module is not needed: the
harness's `--model hf --model_args pretrained=FOLDER` runs it with torch.
experiments/benchmarks/harness.py compares the two with evaluate.choose.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

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


class Decoder(api.TemplateLM):
    """Answers the three kinds of request of the harness, greedily and in float32.

    Args:
        model, params: a decoder; `generate_until` needs its cache.
        tokenizer: a fast tokenizer. Special tokens that it adds are used, but no begin
            token is put before a text that starts with one.
        batch_size: number of rows in a batch.
        template_arguments: keyword arguments of the chat template.

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
        template_arguments: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        _checks.positive_int("harness.Decoder", batch_size=batch_size)
        self.tokenizer = tokenizer
        self._model, self._params, self._rows = model, params, batch_size
        self._longest = getattr(model.config, "max_length", None)
        self._template_arguments = dict(template_arguments or {})
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
        return f"{name}--{records.digest([rules, template])[:16]}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation in the tokenizer's chat template.

        Args:
            chat_history: messages, each with `role` and `content`.
            add_generation_prompt: whether the assistant's turn begins after the last
                message; otherwise the last message is continued.
        Raises:
            ValueError: if the tokenizer has no chat template.
        Warns:
            UserWarning: if the template takes no system message, which is left out.
        """
        chat = table.PromptFormat(chat=True, arguments=self._template_arguments)
        self._eos_ids |= set(table.end_ids(self.tokenizer, chat))
        apply = functools.partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template_arguments,
        )
        try:
            return apply(chat_history)
        except jinja2.exceptions.TemplateError as error:
            others = [x for x in chat_history if x["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            warnings.warn(
                f"The chat template takes no system message ({error}). It is left out.",
                stacklevel=2,
            )
            return apply(others)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **more: Any
    ) -> list[int]:
        """The tokens of a text; by default with the tokenizer's special tokens, except
        before a text that starts with the begin token."""
        begin = self.tokenizer.bos_token
        special = add_special_tokens
        if special is None:
            special = not (begin and string.startswith(begin))
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

        An empty context is the prefix token.

        Raises:
            ValueError: if a task needs sampling.
        """
        texts = [""] * len(requests)
        empty = self.tokenizer.decode([self.prefix_token_id])
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
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
            groups.setdefault((new, tuple(stops)), []).append(number)
        for (new, stops), numbers in groups.items():
            found = evaluate.completions(
                self._model,
                self._params,
                self.tokenizer,
                [requests[number].args[0] or empty for number in numbers],
                eos_ids=sorted(self._eos_ids),
                max_new_tokens=new,
                batch_size=self._rows,
            )
            for number, text in zip(numbers, found, strict=True):
                texts[number] = metrics.truncate_at_stop(text, stops)
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
