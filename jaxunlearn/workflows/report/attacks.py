# SPDX-License-Identifier: Apache-2.0
"""Attacks as curves and flat rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn.workflows.report import read

Curves = Mapping[str, Any]


def curves(results: read.AttackResults) -> dict[str, Curves]:
    """Name -> {"attack", "measure", "chance", "x", "curves"} of everything with curves.

    These are: files that hold curves, unchanged; the leak by number of samples, from
    the card; and the accuracy by epoch of retraining (RTT), from the sweeps: the mean
    over rotations, at the best learning rate of each epoch.
    """
    found = {name: x for name, x in results.attacks.items() if "curves" in x}
    leak = (results.card or {}).get("leak")
    if leak:
        counts = list(dict.fromkeys(k for shares in leak.values() for k in shares))
        found["leak"] = {
            "attack": "Sampling",
            "measure": "share of facts with the answer in a sample",
            "x": {"label": "samples", "values": [int(k) for k in counts]},
            "curves": {
                name: [shares.get(k) for k in counts] for name, shares in leak.items()
            },
        }
    sweeps: dict[str, list[np.ndarray]] = {}
    for attack in results.attacks.values():
        result = attack.get("result") or {}
        if "sweep" in result:
            hits = np.asarray(result["sweep"]["hits"], float)  # [rates, epochs + 1, n]
            of_original = attack["job"].startswith("original")
            model = "original" if of_original else "unlearned"
            sweeps.setdefault(model, []).append(hits.mean(-1))
    if sweeps:
        best = {
            model: np.mean(rotations, axis=0).max(0).tolist()
            for model, rotations in sweeps.items()
        }
        found["rtt"] = {
            "attack": "Retraining on other facts (RTT)",
            "measure": "accuracy on held-out facts, best learning rate",
            "chance": chance(results),
            "x": {
                "label": "epochs",
                "values": list(range(max(map(len, best.values())))),
            },
            "curves": best,
        }
    return found


def chance(results: read.AttackResults) -> float | None:
    """The chance level of accuracy, if the card has it."""
    card = results.card or {}
    return card.get("chance", card.get("about", {}).get("chance"))


def rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with nested objects as columns: {"forget": {"choice": 1}} becomes
    {"forget choice": 1}. Lists are dropped; numbers with intervals stay."""
    return [_flat(row) for row in found]


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, Mapping) and "value" not in value:
            out |= {f"{key} {inner}": x for inner, x in _flat(value).items()}
        elif not isinstance(value, list):
            out[key] = value
    return out
