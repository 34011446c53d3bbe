# SPDX-License-Identifier: Apache-2.0
"""Sampling: one of many answers may still be the forgotten one.

Greedy decoding shows only the likeliest answer; an unlearned model can give the old one
in a few of a hundred samples (leak at k).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxunlearn import _checks
from jaxunlearn._generate import generate, ready
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Model, Params


def sample(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    number: int = 32,
    temperature: float = 1.0,
    max_new_tokens: int = 8,
    batch_size: int = 64,
    seed: int = 0,
) -> list[list[str]]:
    """Draws many answers to every prompt.

    Args:
        model, params, tokenizer: who is attacked.
        prompts: n texts that end before the answer.
        number: answers of each.
        temperature: > 0; 1 draws as the model says.
        max_new_tokens: of an answer.
        batch_size: answers at a time.
        seed: of the draws.
    Returns:
        n lists of `number` texts.
    Raises:
        ValueError: if an argument is not positive, there is no prompt, or a text is
            longer than the model's positions.
    """
    owner = "attacks.sample"
    _checks.positive_int(owner, number=number, batch_size=batch_size)
    _checks.positive(owner, temperature=temperature)
    _checks.not_negative(owner, seed=seed)
    if not prompts:
        raise ValueError(f"{owner} needs at least one prompt, got none.")
    table = tables.encode(tokenizer, prompts)
    table = {name: table[name].repeat(number, 0) for name in ("tokens", "mask")}
    params, texts = ready(model, params), []
    for index, batch in enumerate(tables.eval_batches(table, batch_size)):
        valid = batch.pop("valid")
        new = generate(
            model,
            params,
            batch,
            max_new_tokens=max_new_tokens,
            end=tokenizer.eos_token_id,
            temperature=temperature,
            key=jax.random.fold_in(jax.random.key(seed), index),
        )
        new = np.asarray(new)[valid]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return [texts[i : i + number] for i in range(0, len(texts), number)]


def leak_at_k(hits: np.ndarray, k: int) -> np.ndarray:
    """Chance that at least one of k samples gives the answer away.

    With c hits among K samples, 1 - C(K - c, k) / C(K, k), which is unbiased for every
    k <= K (Chen et al., "Evaluating large language models trained on code", Eq. 1).

    Args:
        hits: [n, K] bool, whether each sample holds the answer.
        k: 1 to K.
    Returns:
        [n] float64, one a prompt.
    Raises:
        ValueError: if hits are not [n, K], or k is not within 1 and K.
    References: https://arxiv.org/abs/2107.03374
    """
    hits = np.asarray(hits)
    if hits.ndim != 2 or hits.dtype != bool:
        raise ValueError(
            f"leak_at_k needs boolean hits [prompts, samples], got shape {hits.shape} "
            f"and dtype {hits.dtype}."
        )
    most = hits.shape[1]
    _checks.positive_int("leak_at_k", k=k)
    if k > most:
        raise ValueError(
            f"leak_at_k needs k of at most {most}, the number of samples, got k={k}. "
            "Draw more samples."
        )
    missed = (most - hits.sum(1))[:, None]
    factors = np.maximum(missed - np.arange(k), 0) / (most - np.arange(k))
    return 1.0 - factors.prod(1)
