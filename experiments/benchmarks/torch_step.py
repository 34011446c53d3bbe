# SPDX-License-Identifier: Apache-2.0
"""The same step in torch and transformers, for comparison only.

Two forward passes (forget, retain), NPO on log-probabilities summed over each sequence
against a stored reference column, token-mean NLL, one backward pass, AdamW. No
reference model runs.
"""

import time
from pathlib import Path


def measure(folder: Path, steps: int, *, autocast: bool = False) -> dict:
    """Seconds of each step after the first, its losses, and the process's peak memory.

    Args:
        folder: from `step`, with the model and the batch.
        steps: with the first, which is not timed.
        autocast: whether the forward passes run under autocast to bfloat16.
    """
    import numpy as np
    import torch
    import transformers
    from torch.nn import functional

    from experiments.benchmarks.step import peak_gb

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    saved = np.load(folder / "batch.npz")
    forget, retain = (torch.from_numpy(saved[k]).long() for k in ("forget", "retain"))
    ref_logps, beta = torch.from_numpy(saved["ref_logps"]), 0.1

    def nll(tokens, reduction):
        logits = model(input_ids=tokens).logits[:, :-1]
        return functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction
        )

    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logps = -nll(forget, "none").view(len(forget), -1).sum(1)
            ratio = logps - ref_logps
            npo = (-2 / beta * functional.logsigmoid(-beta * ratio)).mean()
            loss = npo + nll(retain, "mean")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds[1:],
        "peak_gb": peak_gb(),
        "losses": losses,
    }
