# SPDX-License-Identifier: Apache-2.0
"""The same prompts and answers by transformers, for comparison only."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

PIECES = (64, 16)  # prompts that `generate` gets at a time
DTYPES = ("float32", "bfloat16")  # of the weights and of computing
LOOPS = ((8, False), (32, False), (32, True))  # rows of scoring, sorted by length?


def tasks(folder: Path, new: int) -> dict[str, Callable[[], np.ndarray]]:
    """Name -> what runs it; all of a task in one dtype give the same values."""
    import torch
    import transformers

    saved = np.load(folder / "rows.npz")
    prompts, mask = (
        torch.from_numpy(saved[f"prompt_{name}"]).long() for name in ("tokens", "mask")
    )
    rows = [torch.from_numpy(saved[f"row_{x}"]) for x in ("tokens", "mask", "answer")]
    found = {}
    for dtype in DTYPES:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=getattr(torch, dtype)
        ).eval()
        for size in PIECES:
            found[f"generate, {size} at a time, {dtype}"] = partial(
                _generate, model, prompts, mask, size, new
            )
        for size, sort in LOOPS:
            how = "sorted by length" if sort else "as they come"
            found[f"score, {size} at a time, {how}, {dtype}"] = partial(
                _score, model, *rows, size, sort
            )
        _generate(model, prompts[:2], mask[:2], 2, 2)  # warms up
        _score(model, *(x[:8] for x in rows), 8, False)
    return found


def _generate(model, prompts, mask, size, new):
    import torch

    parts = []
    with torch.inference_mode():
        for start in range(0, len(prompts), size):
            cut = slice(start, start + size)
            out = model.generate(
                input_ids=prompts[cut],
                attention_mask=mask[cut],
                do_sample=False,
                max_new_tokens=new,
                eos_token_id=None,  # as many new tokens for every prompt
                pad_token_id=0,
            )
            parts.append(out[:, prompts.shape[1] :].numpy())
    return np.concatenate(parts).astype(np.int32)


def _score(model, tokens, mask, answer, size, sort):
    """Log-probability of each answer, summed over its tokens."""
    import torch
    from torch.nn import functional

    lengths = mask.sum(1)
    order = torch.argsort(lengths, stable=True) if sort else torch.arange(len(mask))
    found = torch.zeros(len(mask))
    with torch.inference_mode():
        for index in order.split(size):
            width = int(lengths[index].max())
            ids = tokens[index, :width].long()
            logits = model(
                input_ids=ids, attention_mask=mask[index, :width].long()
            ).logits[:, :-1]
            nll = functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            where = answer[index, 1:width]
            found[index] = -(nll.view(where.shape).float() * where).sum(1)
    return found.numpy()
