# SPDX-License-Identifier: Apache-2.0
"""Sampling: some of many sampled answers may still be the forgotten one.

Greedy decoding shows only one answer. An unlearned model may still give the forgotten
answer in a few of a hundred samples (leak at k).
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxunlearn import _checks, evaluate
from jaxunlearn._ahead import one_behind
from jaxunlearn._generate import generate, prepare_params
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Model, Params, PRNGKey


def sample(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    prompt_format: tables.PromptFormat = tables.PLAIN,
    num_samples: int = 32,
    temperature: float = 1.0,
    max_new_tokens: int = 8,
    batch_size: int = 64,
    key: PRNGKey,
) -> list[list[str]]:
    """Samples many answers to every prompt.

    The attacker can only prompt the model. `leak_at_k` measures how often one of k
    samples has the forgotten answer.

    Args:
        model, params, tokenizer: the attacked model.
        prompts: n texts that end before the answer.
        prompt_format: how prompts are given to the model.
        num_samples: answers to each prompt.
        temperature: > 0; 1 samples from the distribution of the model.
        max_new_tokens: maximum length of an answer.
        batch_size: number of answers generated at a time.
        key: draws the samples.
    Returns:
        n lists of `num_samples` texts.
    Raises:
        ValueError: if an argument is not positive, there is no prompt, or a text is
            longer than the model's positions.
    """
    owner = "attacks.sample"
    _checks.positive_int(owner, num_samples=num_samples, batch_size=batch_size)
    _checks.positive(owner, temperature=temperature)
    prompts = tables.begun(owner, tokenizer, prompts, prompt_format)
    if not prompts:
        raise ValueError(f"{owner} needs at least one prompt, got none.")
    eos_ids = evaluate.eos_ids(model, tokenizer, prompt_format)
    table = tables.encode(tokenizer, prompts, prompt_format=prompt_format)
    _checks.token_ids(owner, model, table, tokenizer=tokenizer)
    table = {name: table[name].repeat(num_samples, 0) for name in ("tokens", "mask")}
    params, texts = prepare_params(model, params), []

    def started(index, batch):
        valid = batch.pop("valid")
        return valid, generate(
            model,
            params,
            batch,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            temperature=temperature,
            key=jax.random.fold_in(key, index),
        )

    batches = tables.eval_batches(table, batch_size)
    for valid, new in one_behind(map(started, itertools.count(), batches)):
        new = np.asarray(new)[valid]
        texts += evaluate.decode(tokenizer, new, eos_ids, prompt_format)
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


def leak_at_k(hits: np.ndarray, k: int) -> np.ndarray:
    """Probability that at least one of k samples has the answer.

    With c hits among K samples it is 1 - C(K - c, k) / C(K, k), which is unbiased for
    every k <= K (Chen et al., "Evaluating large language models trained on code",
    Eq. 1).

    Args:
        hits: [n, K] bool, whether each sample has the answer.
        k: 1 to K.
    Returns:
        [n] float64, one value for each prompt.
    Raises:
        ValueError: if hits is not a boolean array [n, K], or k is not in 1 to K.
    References: https://arxiv.org/abs/2107.03374
    """
    hits = np.asarray(hits)
    if hits.ndim != 2 or hits.dtype != bool:
        raise ValueError(
            f"leak_at_k needs boolean hits [prompts, samples], got shape {hits.shape} "
            f"and dtype {hits.dtype}."
        )
    num_samples = hits.shape[1]
    _checks.positive_int("leak_at_k", k=k)
    if k > num_samples:
        raise ValueError(
            f"leak_at_k needs k of at most {num_samples}, the number of samples, got "
            f"k={k}. Draw more samples."
        )
    missed = (num_samples - hits.sum(1))[:, None]
    factors = np.maximum(missed - np.arange(k), 0) / (num_samples - np.arange(k))
    return 1.0 - factors.prod(1)
