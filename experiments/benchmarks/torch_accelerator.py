# SPDX-License-Identifier: Apache-2.0
"""The step of `accelerator` in torch and transformers on a GPU, for comparison only.

Random float32 weights, bfloat16 autocast, torch's attention kernels, fused AdamW. NPO
against a stored reference column on one half of the rows and NLL on the other, in one
forward pass as in ours. Where the logits of all rows would be large, a model is
measured as users run it: their memory is part of the number.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any

from jaxunlearn import models


def usable(rehearsal: bool) -> bool:
    """Whether torch has a GPU; a rehearsal takes the CPU."""
    import torch

    return rehearsal or torch.cuda.is_available()


def measure(
    config: models.DecoderConfig,
    streams: Mapping[str, Mapping[str, Any]],
    steps: int,
    warm_up: int,
) -> dict[str, Any]:
    """Seconds of a step, tokens a second, the GPU's peak and the last loss."""
    import torch
    import transformers
    from torch.nn import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.positions,
        tie_word_embeddings=config.tied,
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(shape)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, weight_decay=0.01, fused=device == "cuda"
    )
    forget, retain = (
        torch.from_numpy(streams[name]["tokens"]).long().to(device)
        for name in ("forget", "retain")
    )
    ref_logps = torch.from_numpy(streams["forget"]["ref_logps"]).to(device)
    tokens, beta, seconds = torch.cat([forget, retain]), 0.1, []
    for _ in range(warm_up + steps):
        _wait(torch, device)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        nll = functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view(len(tokens), -1)
        ratio = -nll[: len(forget)].sum(1) - ref_logps
        npo = (-2 / beta * functional.logsigmoid(-beta * ratio)).mean()
        loss = npo + nll[len(forget) :].mean()
        loss.backward()
        optimizer.step()
        _wait(torch, device)
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds[warm_up:])
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "seconds": middle,
        "tokens_per_second": tokens.numel() / middle,
        "mfu": None,
        "peak": peak,
        "loss": float(loss.detach()),
        "version": torch.__version__,
    }


def _wait(torch, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
