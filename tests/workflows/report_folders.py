# SPDX-License-Identifier: Apache-2.0
"""Tiny evaluation folders, written by hand."""

import json

SETTINGS = {"prompt_format": {"end": "eos"}, "length": 0, "new_tokens": 4}
TOKENS = {"tokens": [" Basil", " <b>|", "\n"], "id": "f0", "prompt": "Who & why?"}


def number(value, low=None, high=None, n=6):
    return {"value": value, "low": low, "high": high, "n": n}


def about(name, role, **more):
    return {
        "name": name,
        "role": role,
        "method": None,
        "seed": None,
        "params_digest": f"{name:x<64}",
        "data": {"forget": "a" * 64, "retain": "b" * 64},
        "left_out": {"forget": [], "retain": ["r7"]},
        "versions": {"jax": "0.10.2", "numpy": "2.3"},
        "command": "jaxunlearn evaluate m",
        "seconds": 1.25,
        "devices": "1 x cpu",
        "settings": dict(SETTINGS),
    } | more


def metrics(forget, utility, quality=None):
    overall = {"model_utility": number(utility, utility - 0.1, utility + 0.1)}
    if quality is not None:
        overall["forget_quality"] = number(quality)
    return {
        "tasks": {
            "forget": {
                "probability": number(forget, forget / 2, forget + 0.01),
                "perplexity": number(1 / forget),
            },
            "retain": {"probability": number(0.9, 0.8, 0.95)},
        },
        "overall": overall,
    }


def write(folder, name, role, numbers, logps=None, training=(), **more):
    """One evaluation in folder/name."""
    place = folder / name
    place.mkdir(parents=True)
    put(place / "about.json", about(name, role, **more))
    put(place / "metrics.json", numbers)
    put(place / "cache.json", {"tasks": {}, "metrics": "key"})
    if logps is not None:
        (place / "tokens").mkdir()
        put(place / "tokens" / "forget.jsonl", TOKENS | {"logps": logps})
    if training:
        lines = "".join(json.dumps(entry) + "\n" for entry in training)
        (place / "training.jsonl").write_text(lines)
    return place


def put(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value) + "\n", encoding="utf-8")


def three(folder):
    """An original, a retrained and an unlearned model."""
    write(
        folder,
        "npo",
        "unlearned",
        metrics(0.06, 0.6, 0.3),
        [-3.0, None, -9.0],
        training=[
            {"step": i, "forget/loss": 5.0 - i, "blur/cosine": 0.1} for i in range(3)
        ],
        method="openunlearning.npo",
        seed=4,
    )
    write(folder, "original", "original", metrics(0.98, 0.7, 1e-9), [-0.01, -0.1, 0.0])
    write(folder, "retrained", "retrained", metrics(0.05, 0.71), [-4.0, -8.0, -2.0])
    return folder
