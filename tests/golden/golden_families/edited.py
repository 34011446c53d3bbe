# SPDX-License-Identifier: Apache-2.0
"""Edits of parameters: task vectors."""

from jaxunlearn import edits


def task_vector(case, x):
    """new = target - alpha * (finetuned - pretrained), by parameter."""
    target, tuned, base = (
        {k.removeprefix(part): v for k, v in x.items() if k.startswith(part)}
        for part in ("target_", "finetuned_", "pretrained_")
    )
    scale = case["hyperparameters"]["alpha"]
    new = edits.task_vector(target, tuned, base, scale=scale)
    return {f"new_{name}": value for name, value in new.items()}
