# SPDX-License-Identifier: Apache-2.0
"""What jaxunlearn/workflows/attack/run.py left beside an evaluation, as curves and flat rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn.workflows.report import read

Curves = Mapping[str, Any]


def curves(run: read.Run) -> dict[str, Curves]:
    """Name -> {"attack", "measure", "chance", "x", "curves"} of all that has curves.

    Files that hold curves, as they are; samples needed for a leak, from the card; and
    accuracy by epoch of retraining (RTT), from the sweeps: the mean over rotations, at
    the learning rate that is best in each epoch.
    """
    found = {name: own for name, own in run.attacks.items() if "curves" in own}
    leak = (run.card or {}).get("leak")
    if leak:
        counts = list(dict.fromkeys(k for own in leak.values() for k in own))
        found["leak"] = {
            "attack": "answers sampled, until one is right",
            "measure": "share of facts that leaked",
            "x": {"label": "samples", "values": [int(k) for k in counts]},
            "curves": {
                name: [own.get(k) for k in counts] for name, own in leak.items()
            },
        }
    sweeps: dict[str, list[np.ndarray]] = {}
    for own in run.attacks.values():
        result = own.get("result") or {}
        if "sweep" in result:
            hits = np.asarray(result["sweep"]["hits"], float)  # [rates, epochs + 1, n]
            whose = "original" if own["unit"].startswith("original") else "unlearned"
            sweeps.setdefault(whose, []).append(hits.mean(-1))
    if sweeps:
        best = {
            whose: np.mean(rotations, axis=0).max(0).tolist()
            for whose, rotations in sweeps.items()
        }
        found["rtt"] = {
            "attack": "retrained on other facts (RTT), asked those held out",
            "measure": "accuracy, best of all learning rates",
            "chance": chance(run),
            "x": {
                "label": "epochs",
                "values": list(range(max(map(len, best.values())))),
            },
            "curves": best,
        }
    return found


def chance(run: read.Run) -> float | None:
    """Accuracy of guessing, where the card says it."""
    card = run.card or {}
    return card.get("chance", card.get("about", {}).get("chance"))


def rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose inner objects became columns: {"forget": {"choice": 1}} is
    {"forget choice": 1}; lists are left out, numbers with intervals stay."""
    return [_flat(row) for row in found]


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, Mapping) and "value" not in value:
            out |= {f"{key} {inner}": x for inner, x in _flat(value).items()}
        elif not isinstance(value, list):
            out[key] = value
    return out
